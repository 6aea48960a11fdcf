"""What is unseen of the averages: its expected gain against sums over voxels, and what it does to choices."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

from faml_gpu import fourier
from faml_gpu.expectation import expectation
from faml_gpu.fast_alignment import (
    Candidates,
    Observation,
    Reference,
    UnseenGain,
    joint,
    marginal,
    refine,
    unseen_gain,
    unseen_harmonics,
    weight_harmonics,
)
from faml_gpu.fast_alignment.align import make_reference, normalised_scores
from faml_gpu.fast_alignment.so3 import grid_angles, interpolate
from faml_gpu.geometry import euler_to_matrix, random_rotations
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import Accumulators, direct_average, wiener_factor
from faml_gpu.options import Options
from faml_gpu.plan import Band, Plan
from faml_gpu.starting import start

BOX, R_MAX, L = 20, 7, 16
AXIS = np.array([0.6, 0.0, 0.8])


def power(points):
    """A smooth unseen power (..., 3) -> (...): a double cone, as a missing wedge leaves it."""
    radius = np.linalg.norm(points, axis=-1)
    return 100 * np.exp(-radius / 4) * (points @ AXIS / np.maximum(radius, 1e-9)) ** 2


class Scene:
    """Two weights, three particles of noise, and the unseen power on the package's grids."""

    def __init__(self, oracles):
        rng = np.random.default_rng(2)
        self.support = fourier.make_support(BOX, R_MAX)
        cubes = [oracles.wedge_cube(BOX, [0, 0, 1], 0.8), 0.6 * oracles.wedge_cube(BOX, [1, 0, 0.2], 0.4)]
        self.weights = self.support.gather(np.stack([oracles.half_of_cube(c) for c in cubes])).astype(np.float32)
        self.index = np.array([1, 0, 1])
        self.sigma2 = 20.0 + 3 * np.arange(R_MAX + 1)
        self.precision = (1 / self.sigma2[self.support.shell]).astype(np.float32)
        line = np.fft.fftfreq(BOX, 1 / BOX)
        z, y, x = np.meshgrid(line, line, np.arange(BOX // 2 + 1), indexing="ij")
        self.grid = fourier.weight_grid(power(np.stack([x, y, z], axis=-1)).astype(np.float32), R_MAX)
        harmonics = unseen_harmonics(self.grid, R_MAX, L)
        noise = rng.standard_normal((2, 3, len(self.support)))
        spectra = (5 * (noise[0] + 1j * noise[1])).astype(np.complex64)
        self.plain = Observation(self.support, spectra, self.weights, self.index, ("a", "b"))
        self.gain = unseen_gain(weight_harmonics(self.plain, self.precision, L), self.index, harmonics)
        self.observation = replace(self.plain, unseen=self.gain)
        structure = oracles.blobs(rng, 6, 5.0, 1.0)
        volume = oracles.blob_volume(BOX, *structure).astype(np.float32)
        self.volume_grid = fourier.interpolation_grid(3 * volume, R_MAX, 2)

    def direct(self, particle, rotation):
        """1/2 sum w^2 / sigma^2 v(R^T xi) over both voxels of each pair, float64."""
        weight = self.weights[self.index[particle]].astype(float) ** 2 / self.sigma2[self.support.shell]
        return float((weight * power(self.support.coords @ rotation)).sum())


@pytest.fixture(scope="module")
def scene(oracles):
    return Scene(oracles)


def test_gain_is_the_sum_over_voxels(scene, rng):
    rotations = random_rotations(120, rng).reshape(3, 40, 3, 3)
    found = scene.observation.expected_gain(rotations)
    expected = np.array([[scene.direct(b, r) for r in rotations[b]] for b in range(3)])
    for b in range(3):
        error = found[b] - expected[b]
        # Trilinear in Fourier space and linear in r: a common offset of some per cent, which no comparison sees.
        assert abs(error.mean()) < 0.05 * expected[b].mean()
        assert error.std() < 0.12 * expected[b].std()  # of 5 nats; about the origin the cone is sharper than the grid
        assert np.ptp(expected[b]) > 5
    np.testing.assert_array_equal(scene.plain.expected_gain(rotations), np.zeros((3, 40)))


def test_gain_of_the_inner_shells(scene, rng):
    """Kept beside the whole where cells are compared by these first; the shell at the edge counts in part."""
    harmonics = unseen_harmonics(scene.grid, R_MAX, L)
    weights = weight_harmonics(scene.plain, scene.precision, L)
    found = unseen_gain(weights, scene.index, harmonics, 3)
    np.testing.assert_array_equal(found.table, scene.gain.table)
    inner = replace(scene.plain, weights=np.where(scene.support.shell <= 3, scene.weights, 0))
    expected = unseen_gain(weight_harmonics(inner, scene.precision, L), scene.index, harmonics)
    rotations = random_rotations(120, rng).reshape(3, 40, 3, 3)
    for a, b in zip(UnseenGain(found.low, scene.index).at(rotations), expected.at(rotations), strict=True):
        assert np.corrcoef(a, b)[0, 1] > 0.97
        assert abs(a.mean() / b.mean() - 1) < 0.25
    assert abs(found.low).max() < 0.8 * abs(found.table).max()


def test_interpolation_is_exact_on_the_grid_and_close_between(rng):
    beta, angle = grid_angles(L)

    def functions(rotations):
        """Of degree 1 and 2, odd ones too."""
        return np.stack([rotations @ [1, 2, 3] @ [2, -1, 1], (rotations @ [0, 1, 2] @ [1, 1, 0]) ** 2])

    b, g, a = np.meshgrid(beta, angle, angle, indexing="ij")
    on_grid = euler_to_matrix(np.stack([a, b, g], axis=-1))
    table = functions(on_grid)
    some = rng.integers(0, 2 * L, (200, 3))
    rotations = on_grid[tuple(some.T)]
    for w in range(2):
        np.testing.assert_allclose(interpolate(table, np.full(200, w), rotations), functions(rotations)[w], atol=1e-10)
    # The poles themselves, and what lies between them and the first row; steps of 11 degrees leave some per cent.
    near = np.stack([rng.uniform(0, 6, 300), rng.uniform(0, 0.04, 300), rng.uniform(0, 6, 300)], axis=-1)
    far = near * [1, -1, 1] + [0, np.pi, 0]
    poles = euler_to_matrix(np.concatenate([near[:5] * [1, 0, 1], far[:5] * [1, 0, 1] + [0, np.pi, 0]]))
    for points in (random_rotations(500, rng), euler_to_matrix(near), euler_to_matrix(far), poles):
        index = rng.integers(0, 2, len(points))
        expected = functions(points)[index, np.arange(len(points))]
        error = interpolate(table, index, points) - expected
        assert abs(error).max() < 0.03 * abs(table).max()


@pytest.mark.parametrize("n", [0, 1, 4, 30])
def test_the_right_pose_is_expected_to_gain_the_same_wherever_it_was_seen(n, rng):
    """Voxels seen by n particles: C tau^2 of what is seen and (1 - C) tau^2 of what is not make tau^2."""
    m, tau2, sigma2 = 200_000, 3.0, 5.0

    def noise(variance):
        return np.sqrt(variance / 2) * (rng.standard_normal(m) + 1j * rng.standard_normal(m))

    signal, seen_by = noise(tau2), np.where(np.arange(m) < m // 2, n, 10.0)
    sums = seen_by * signal + np.sqrt(seen_by) * noise(sigma2)
    (ratio,) = direct_average(sums[None], seen_by[None], np.array([30.0]))
    factor, unseen = wiener_factor(
        ratio[None], seen_by[None], np.array([30.0]), np.array([sigma2]), np.zeros(m, np.int64)
    )
    average = factor * ratio
    particle = signal + noise(sigma2)
    gain = (2 * (particle * average.conj()).real - abs(average) ** 2 + unseen) / (2 * sigma2)
    spread = 4 * gain.std() / np.sqrt(m / 2)
    assert abs(gain[: m // 2].mean() - tau2 / (2 * sigma2)) < spread + 0.02 * tau2 / (2 * sigma2)
    assert abs(gain[m // 2 :].mean() - tau2 / (2 * sigma2)) < spread + 0.02 * tau2 / (2 * sigma2)
    expected = seen_by * tau2 / (seen_by * tau2 + sigma2)
    np.testing.assert_allclose(1 - unseen / tau2, expected, atol=0.04)
    np.testing.assert_allclose(factor, expected, atol=0.04)


def test_a_particle_stands_out_from_the_noise_within_its_mask(oracles, rng):
    """C of a map that fills a hundredth of the box: that of its own power and the noise that lies over it."""
    box, n, sigma = 32, 20, 0.4
    structure = oracles.blob_volume(box, *oracles.blobs(rng, 8, 4.0, 1.0)).astype(np.float32)
    particles = ArrayParticles(rng.standard_normal((2, box, box, box)), 1.0)
    plan = Plan.make(particles, Options(mask_radius=6.0, update="wiener"))
    state = replace(start(plan, particles, None, None).state, sigma2=np.full(plan.n_shells, sigma**2 * box**3))
    band = Band(plan, state, 12, 12)
    shell, weights = band.output.shell, np.full((1, len(band.output)), float(n))
    errors, factors, expected = [], [], []
    for _ in range(4):
        average = structure + sigma / np.sqrt(n) * rng.standard_normal((box, box, box)).astype(np.float32)
        spectrum = band.output.gather(fourier.transform(average[None])).astype(complex)
        total = replace(Accumulators.zero(1, len(shell), 12), weights=weights, mass=np.array([float(n)]))
        factor, unseen = band.wiener(spectrum, total, band.noise_of_averages(total))
        wary = Band(replace(plan, options=replace(plan.options, update="explore")), state, 12, 12)
        careful, _ = wary.wiener(spectrum, total, wary.noise_of_averages(total))
        assert factor.mean() > 2 * careful.mean()  # asked to stand out from the noise of the whole box
        power = abs(band.output.gather(fourier.transform(structure * plan.mask))) ** 2
        tau2 = (np.bincount(shell, power) / np.maximum(np.bincount(shell), 1))[shell]
        inside = tau2 / (tau2 + np.mean(plan.mask**2) * state.sigma2[0] / n)
        factors.append(np.bincount(shell, factor)[1:] / np.bincount(shell)[1:])
        expected.append(np.bincount(shell, inside)[1:] / np.bincount(shell)[1:])
        np.testing.assert_allclose(band.output.gather(unseen)[0], tau2 * (1 - inside), atol=0.3 * tau2.max())

        def error(c, spectrum=spectrum):
            return np.sum((plan.to_maps(c * spectrum, band.output)[0] * plan.mask - structure * plan.mask) ** 2)

        errors.append([error(factor), error(inside), error(np.ones(len(shell)))])
    np.testing.assert_allclose(np.mean(factors, axis=0), np.mean(expected, axis=0), atol=0.1)
    assert np.mean(expected) < 0.9
    ours, best, plain = np.mean(errors, axis=0)
    assert ours < 1.3 * best  # tau^2 of this few voxels is known to some 20 %
    assert ours < 0.2 * plain


@pytest.mark.parametrize("radius", [5.0, 12.8])
def test_what_the_mask_spreads_beyond_the_band_is_not_missed(radius, rng):
    """White noise, cut off at the band and masked: what is left at each voxel. And C, the same at the band's edge."""
    box, r = 32, 8
    particles = ArrayParticles(rng.standard_normal((2, box, box, box)), 1.0)
    plan = Plan.make(particles, Options(mask_radius=radius, update="wiener"))
    state = replace(start(plan, particles, None, None).state, sigma2=np.full(plan.n_shells, float(box**3)))
    band = Band(plan, state, r, r)
    shell = band.output.shell

    def per_shell(values):
        return (np.bincount(shell, values) / np.maximum(np.bincount(shell), 1))[1:]

    def seen(volumes):
        cut = band.output.scatter(band.output.gather(fourier.transform(volumes)))
        return band.output.gather(fourier.transform(fourier.inverse_transform(cut, box) * plan.mask))

    noise = rng.standard_normal((60, box, box, box)).astype(np.float32)
    power = (abs(seen(noise)) ** 2).mean(axis=0) / (box**3 * np.mean(plan.mask**2))
    np.testing.assert_allclose(per_shell(power), per_shell(band.left), rtol=0.1)
    assert per_shell(band.left)[-1] < 0.75  # there is something to be mended

    # As much signal as noise in each voxel: C = 1/2 up to the edge.
    factors = []
    for k in range(8):
        signal = rng.standard_normal((box, box, box)).astype(np.float32)
        spectrum = band.output.gather(fourier.transform((signal + noise[k])[None])).astype(complex)
        total = replace(Accumulators.zero(1, len(shell), r), weights=np.ones((1, len(shell))), mass=np.ones(1))
        factors.append(per_shell(band.wiener(spectrum, total, band.noise_of_averages(total))[0]))
    found = np.mean(factors, axis=0)
    np.testing.assert_allclose(found[2:], 0.5, atol=0.08)  # tau^2 is of few numbers, in the first shells fewest
    assert found[-1] > 0.45


def test_copies_count_as_particles(oracles, rng):
    """With C3 imposed each particle was seen in three poses."""
    box = 16
    volume = oracles.blob_volume(box, *oracles.blobs(rng, 6, 4.0, 1.0)).astype(np.float32)
    particles = ArrayParticles(rng.standard_normal((2, box, box, box)), 1.0)
    plan = Plan.make(particles, Options(mask_radius=5.0, max_shift=1.0))
    state = start(plan, particles, None, None).state
    whole = Band(plan, state, 6, 6).output
    sigma2 = np.full(plan.n_shells, 5 * (abs(whole.gather(fourier.transform(volume))) ** 2).mean())
    state = replace(state, sigma2=sigma2, iteration=15)
    factors = []
    for symmetry, weight in (("C3", 1.0), ("C1", 3.0)):
        band = Band(plan.with_symmetry(symmetry), state, 6, 6)
        spectrum = band.output.gather(fourier.transform(volume[None])).astype(complex)
        weights = np.full((1, len(band.output)), weight)
        total = replace(Accumulators.zero(1, len(band.output), 6), weights=weights, mass=np.array([weight]))
        factors.append(band.wiener(spectrum, total, band.noise_of_averages(total))[0])
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-6)
    assert 0.1 < factors[0].mean() < 0.9


def test_a_wary_start_takes_less_for_known(rng):
    """C with so many times the noise, tau^2 as it is."""
    shell, weights = np.repeat([1, 2], 500), np.full((1, 1000), 5.0)
    averages, noise = rng.standard_normal((1, 1000)) + 0j, np.array([1.0, 2.0, 3.0])
    plain, unseen = wiener_factor(averages, weights, np.array([5.0]), noise, shell)
    wary, more = wiener_factor(averages, weights, np.array([5.0]), noise, shell, 8.0)
    np.testing.assert_allclose(1 / wary - 1, 8 * (1 / plain - 1))
    np.testing.assert_allclose(unseen / (1 - plain), more / (1 - wary))


def test_wiener_factor_pools_classes_and_survives_nothing():
    """By hand: W of a class of average size, tau^2 of all; an empty class, an empty shell, a shell of noise."""
    shell = np.array([1, 1, 2, 3, 3])
    averages = np.array([[2, 2j, 0, 0.25, 0], [0, 0, 0, 0, 0]], complex)
    weights = np.array([[4, 4, 0, 4, 4], [0, 0, 0, 0, 0]], float)
    factor, unseen = wiener_factor(averages, weights, np.array([4.0, 0.0]), np.array([9.0, 2.0, 2.0, 5.0]), shell)
    tau2 = (4 * 4 - 2) / 4  # |A|^2 = 4 at W = 4, less the noise
    determined = 2 * tau2 / (2 * tau2 + 2)
    np.testing.assert_allclose(factor, [determined, determined, 0, 0, 0])
    np.testing.assert_allclose(unseen, [tau2 * (1 - determined)] * 2 + [0, 0, 0])


def test_posterior_counts_it_and_the_likelihood_does_not(scene, rng):
    # A reference so weak that no pose is out of the question.
    references = [Reference(scene.volume_grid / 30, 2, L, np.zeros(0), np.zeros(0)) for _ in range(2)]
    rotations = random_rotations(24, rng).reshape(2, 3, 4, 3, 3)
    shifts, count = rng.uniform(-1, 1, (2, 3, 4, 3)), np.full(3, 4)
    candidates = [Candidates(r, t, np.zeros((3, 4)), count) for r, t in zip(rotations, shifts, strict=True)]
    alpha, volumes = np.array([0.3, 0.7]), [np.zeros((3, 4))] * 2

    def of(observation):
        return expectation(observation, references, candidates, volumes, alpha, scene.sigma2, 2.0)

    plain, found = of(scene.plain), of(replace(scene.observation, unseen=UnseenGain(scene.gain.table / 5, scene.index)))
    np.testing.assert_allclose(found.log_likelihood, plain.log_likelihood)

    def log_ratios(posterior):
        table = np.full((3, 2, 4), np.nan)
        for i, k, r, p in zip(
            posterior.particle, posterior.class_index, posterior.rotations, posterior.probability, strict=True
        ):
            pose = int(np.argmin(abs(rotations[k, i] - r).sum(axis=(1, 2))))
            table[i, k, pose] = np.log(p)
        return table

    difference = log_ratios(found) - log_ratios(plain)
    for i in range(3):
        expected = np.array([[scene.direct(i, r) for r in rotations[k, i]] for k in range(2)]) / 5
        shown = np.isfinite(difference[i])
        assert shown.sum() > 2
        centred = difference[i][shown] - difference[i][shown].mean()
        np.testing.assert_allclose(centred, expected[shown] - expected[shown].mean(), atol=0.5)  # of 7


def test_a_pose_that_may_matter_for_what_is_unseen_is_looked_at(scene, rng):
    """By its gain alone the second pose is out of the question; with what is expected of it, it is not."""
    rotations = random_rotations(6, rng).reshape(3, 2, 3, 3)
    by_gain = scene.observation.expected_gain(rotations)
    order = np.argsort(by_gain, axis=1)
    rotations = rotations[np.arange(3)[:, None], order]
    strong = replace(scene.observation, unseen=UnseenGain(1000 * scene.gain.table, scene.index))
    candidates = Candidates(
        rotations, np.zeros((3, 2, 3)), np.zeros((3, 2)), np.full(3, 2), np.tile([0.0, -100.0], (3, 1))
    )
    reference = Reference(scene.volume_grid / 30, 2, L, np.zeros(0), np.zeros(0))
    found = expectation(strong, [reference], [candidates], [np.zeros((3, 2))], np.ones(1), scene.sigma2, 2.0)
    np.testing.assert_array_equal(found.rotations, rotations[:, 1])


def test_refined_poses_climb_it_and_gain_stays_the_residuals(scene, rng):
    reference = make_reference(scene.volume_grid, 2, R_MAX, L)
    start = Candidates(
        random_rotations(9, rng).reshape(3, 3, 3, 3), np.zeros((3, 3, 3)), np.zeros((3, 3)), np.full(3, 3)
    )
    strong = replace(scene.observation, unseen=UnseenGain(20 * scene.gain.table, scene.index))
    found = refine(strong, reference, start, scene.precision, 1, 2.0)
    before, after = strong.expected_gain(start.rotations).max(axis=1), strong.expected_gain(found.rotations).max(axis=1)
    assert (after > before).all()
    # With one round less to go, the same from the same poses: what `gain` says is the residual's part alone.
    bare = refine(scene.plain, reference, replace(found, gain=None), scene.precision, 3, 2.0)
    same = (abs(bare.rotations - found.rotations) < 1e-12).all(axis=(2, 3)) & np.isfinite(found.gain)
    np.testing.assert_allclose(bare.gain[same], found.gain[same], rtol=1e-6, atol=1e-6)


def test_matching_counts_it_as_if_it_matched(scene):
    """c~ = (c0 + V) / sqrt(c1^2 + V), V twice the gain."""
    reference = make_reference(scene.volume_grid, 2, R_MAX, L)
    kept = {}
    plain = normalised_scores(scene.plain, reference, scene.precision, centred=False, kept=kept)
    found = normalised_scores(scene.observation, reference, scene.precision, centred=False)
    c1 = np.stack([kept[name] for name in ("a", "b")])[scene.index]
    v = 2 * scene.gain.table[scene.index]
    np.testing.assert_allclose(found, (plain * c1 + v) / np.sqrt(c1**2 + v), rtol=1e-4)


def test_joint_counts_it_at_every_stage(scene):
    """The integral over all poses, with and without: by its own candidates and by the coarse grid."""
    plain = marginal.make_joint_reference(scene.volume_grid / 10, 2, R_MAX, 12)
    reference = marginal.make_joint_reference(scene.volume_grid / 10, 2, R_MAX, 12, scene.grid / 5)
    shifts = marginal.shift_grid(0.0, 1.0)
    without = marginal.log_marginal(scene.plain, [plain], scene.precision, shifts, 1.0)[0][0]
    found = marginal.log_marginal(scene.observation, [reference], scene.precision, shifts, 1.0)[0][0]
    beta, angle = grid_angles(12)
    g, a, b = np.meshgrid(angle, angle, beta, indexing="ij")
    rotations = euler_to_matrix(np.stack([a, b, g], axis=-1))
    some = tuple(np.random.default_rng(0).integers(0, 24, (100, 3)).T)
    for i in range(3):
        expected = np.array([scene.direct(i, r) / 5 for r in rotations[some]])
        error = (found - without)[i][some] - expected
        assert error.std() < 0.12 * expected.std()
    observation = replace(scene.observation, unseen=UnseenGain(scene.gain.table / 5, scene.index))
    [(candidates, volumes)] = joint.integrate(
        observation, [reference], scene.precision, max_shift=1.0, zeta=1.0, n_candidates=300
    )
    for i in range(3):
        n = candidates.count[i]
        value = candidates.gain[i, :n] + observation.expected_gain(candidates.rotations)[i, :n]
        value = value - (candidates.shifts[i, :n] ** 2).sum(axis=-1) / 2 + volumes[i, :n]
        # Most massive first, the unseen counted.
        assert value[0] > logsumexp(value) - 6
        assert value[0] >= value[n // 2 :].max()
    # What `gain` says is the residual's part alone, as everywhere.
    some = replace(candidates, gain=None, count=np.minimum(candidates.count, 5))
    alone = refine(scene.plain, make_reference(scene.volume_grid / 10, 2, R_MAX, L), some, scene.precision, 0, 1.0)
    for i in range(3):
        n = some.count[i]
        np.testing.assert_allclose(candidates.gain[i, :n], alone.gain[i, :n], atol=0.01)
    [(bare, of_bare)] = joint.integrate(
        scene.plain, [plain], scene.precision, max_shift=1.0, zeta=1.0, n_candidates=300
    )

    def mean_gain(found, log_volumes, unseen):
        gain = observation.expected_gain(found.rotations)
        value = found.gain + unseen * gain - (found.shifts**2).sum(axis=-1) / 2 + log_volumes
        return (gain * np.exp(value - logsumexp(value, axis=1)[:, None])).sum(axis=1)

    assert (mean_gain(candidates, volumes, 1) > mean_gain(bare, of_bare, 0)).all()
