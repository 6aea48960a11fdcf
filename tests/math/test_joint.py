"""Sampler `joint`: against sums over voxels and every pose tried, and the grids' own laws."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

from faml_gpu import faml, fourier
from faml_gpu.array_backend import to_host
from faml_gpu.expectation import expectation
from faml_gpu.fast_alignment import Observation, UnseenGain, joint, marginal, translations
from faml_gpu.fast_alignment.cells import all_cells, cell_children, cell_rotations, cell_width
from faml_gpu.fast_alignment.so3 import at_places, grid_angles
from faml_gpu.geometry import euler_to_matrix, random_rotations, rotation_angle
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.plan import Plan

BOX, R_MAX, L = 20, 5, 12
ZETA, MAX_SHIFT = 1.0, 2.0


class Case:
    """Two structures of blobs in a box of 20, seen through two weights; noise makes posteriors spread over poses."""

    def __init__(self, oracles, gain, seed=5):
        self.oracles, self.rng = oracles, np.random.default_rng(seed)
        self.structures = [oracles.blobs(self.rng, 6, 6.0, 1.0) for _ in range(2)]
        self.support = fourier.make_support(BOX, R_MAX)
        volumes = [oracles.blob_volume(BOX, *s).astype(np.float32) for s in self.structures]
        self.grids = fourier.interpolation_grid(np.stack(volumes), R_MAX, 3)
        self.references = [marginal.make_joint_reference(g, 3, R_MAX, L) for g in self.grids]
        cubes = [oracles.wedge_cube(BOX, [0, 0, 1], 0.6), 0.7 * oracles.wedge_cube(BOX, [1, 0, 0.2], 0.4)]
        self.weights = self.support.gather(np.stack([oracles.half_of_cube(c) for c in cubes])).astype(np.float32)
        self.index = np.array([0, 1, 0])
        self.rotations = random_rotations(3, self.rng)
        self.shifts = self.rng.uniform(-1, 1, (3, 3))
        clean = np.stack([self.model(0, r, t) for r, t in zip(self.rotations, self.shifts, strict=True)])
        # The best pose is about `gain` nats better than none.
        sigma2 = (self.weights[0] ** 2 * abs(clean[0]) ** 2).sum() / gain
        self.sigma2 = np.full(R_MAX + 1, sigma2) * (1 + np.arange(R_MAX + 1) / 10)
        self.precision = (1 / self.sigma2[self.support.shell]).astype(np.float32)
        normal = self.rng.standard_normal((2, *clean.shape))
        noise = np.sqrt(self.sigma2[self.support.shell] / 2) * (normal[0] + 1j * normal[1])
        self.clean = clean
        self.observation = self.observe(clean + noise)

    def observe(self, spectra):
        return Observation(self.support, spectra.astype(np.complex64), self.weights, self.index, ("a", "b"))

    def model(self, k, rotation, shift):
        points = self.support.coords
        turned = self.oracles.blob_transform(BOX, points @ rotation, *self.structures[k])
        return turned * self.oracles.phase(points, shift, BOX)

    def log_posterior(self, particle, k, rotations, shifts):
        """c0 - c1^2 / 2 - |t|^2 / (2 zeta^2), (rotations, shifts), over both voxels of each pair."""
        weight = 2 * self.weights[self.index[particle]] ** 2 * self.precision.astype(float)
        turned = np.stack([self.model(k, r, np.zeros(3)) for r in rotations])
        phases = np.stack([self.oracles.phase(self.support.coords, t, BOX) for t in shifts])
        cross = (weight * self.observation.spectra[particle] * turned.conj()) @ phases.conj().T
        prior = (np.asarray(shifts) ** 2).sum(axis=1) / (2 * ZETA**2)
        return cross.real - 0.5 * (weight * abs(turned) ** 2).sum(axis=1)[:, None] - prior

    def integrate(self, k=0, n=400, **options):
        options = {"max_shift": MAX_SHIFT, "zeta": ZETA, "n_candidates": n} | options
        return joint.integrate(self.observation, [self.references[k]], self.precision, **options)[0]


@pytest.fixture(scope="module")
def case(oracles):
    return Case(oracles, 12.0)


def grid_rotations():
    """The Euler grid [gamma, alpha, beta] as matrices."""
    beta, angle = grid_angles(L)
    g, a, b = np.meshgrid(angle, angle, beta, indexing="ij")
    return euler_to_matrix(np.stack([a, b, g], axis=-1))


def test_marginal_is_the_voxel_sum_at_every_rotation_and_shift(case):
    shifts = marginal.shift_grid(MAX_SHIFT, 1.0)
    assert len(shifts) == 33
    [found], _ = marginal.log_marginal(case.observation, case.references[:1], case.precision, shifts, ZETA)
    assert found.shape == (3, 2 * L, 2 * L, 2 * L)
    rotations = grid_rotations()
    some = np.random.default_rng(0).integers(0, 2 * L, (300, 3))
    for b in range(3):
        values = case.log_posterior(b, 0, rotations[tuple(some.T)], shifts)
        expected = logsumexp(values, axis=1)
        error = found[b][tuple(some.T)] - expected
        # Linear in r between shells half a voxel apart, degrees below 12 where the rule asks for 15.
        assert np.sqrt((error**2).mean()) < 0.15 * expected.std()
        assert np.corrcoef(found[b][tuple(some.T)], expected)[0, 1] > 0.99
        assert expected.std() > 1


def test_one_shift_is_one_correlation(case):
    """No sum over shifts: the log-posterior itself, at a shift that is not on any lattice."""
    shift = np.array([[0.7, -1.3, 0.4]])
    found = marginal.log_marginal(case.observation, case.references, case.precision, shift, ZETA)[0][1][1]
    some = np.random.default_rng(1).integers(0, 2 * L, (300, 3))
    expected = case.log_posterior(1, 1, grid_rotations()[tuple(some.T)], shift)[:, 0]
    error = found[tuple(some.T)] - expected
    assert error.std() < 0.06 * expected.std()
    assert np.corrcoef(found[tuple(some.T)], expected)[0, 1] > 0.995


@pytest.mark.parametrize(("gain", "share"), [(3.0, (0.5, 1.0)), (60.0, (0.002, 0.3)), (1000.0, (0.002, 0.1))])
def test_shifts_that_the_inner_shells_rule_out_do_not_matter(oracles, gain, share, monkeypatch):
    monkeypatch.setattr(marginal, "INNER_R", 3)
    case, zeta = Case(oracles, gain), 3.0
    shifts = marginal.shift_grid(7.0, 1.6)
    assert len(shifts) > 300
    arguments = case.observation, case.references, case.precision, shifts, zeta
    likely = marginal.likely_shifts(*arguments)
    assert share[0] < likely.mean() <= share[1]
    whole, some = (np.stack(marginal.log_marginal(*arguments, x)[0]) for x in (None, likely))
    # What is behind by more than 10 nats there would have to be ahead by the outer shells.
    near = whole > whole.max(axis=(0, 2, 3, 4), keepdims=True) - 5
    assert abs(some - whole)[near].max() < 0.05


def test_the_first_look_is_by_inner_shells_and_low_degrees(case, monkeypatch):
    monkeypatch.setattr(marginal, "INNER_R", 3)
    reference = marginal.make_joint_reference(case.grids[0], 3, R_MAX, L)
    inner, expected = reference.inner, marginal.make_joint_reference(case.grids[0], 3, 3, marginal.INNER_L)
    assert (inner.bandwidth, inner.coarse_r) == (6, 3)
    assert inner.inner is None
    m = [*range(6), *range(-5, 0)]  # without the Nyquist line
    for name in ("phases", "powers"):
        found, other = (getattr(x, name)[:, m] for x in (inner, expected))
        # Of a narrower grid on the sphere, which takes part of the higher degrees for lower ones.
        assert abs(found - other).max() < 0.05 * abs(other).max()


def test_round_part_is_the_mean_over_all_rotations(case):
    shift, rotations = np.array([[0.7, -1.3, 0.4]]), cell_rotations(*all_cells(2))
    _, found = marginal.log_marginal(case.observation, case.references, case.precision, shift, ZETA)
    for k in range(2):
        for b in range(3):
            weight = 2 * case.weights[case.index[b]] ** 2 * case.precision.astype(float)
            power = np.array([(weight * abs(case.model(k, r, np.zeros(3))) ** 2).sum() for r in rotations])
            c0 = case.log_posterior(b, k, rotations, shift)[:, 0] + 0.5 * power + (shift**2).sum() / (2 * ZETA**2)
            assert found[k][b] == pytest.approx(c0.mean(), abs=0.03 * c0.std())
            assert c0.std() > 1


def test_a_round_structure_tells_nothing_by_turning(oracles):
    case = Case(oracles, 400.0)
    centres, *rest = case.structures[0]
    case.structures[0] = (0 * centres, *rest)
    volume = oracles.blob_volume(BOX, *case.structures[0]).astype(np.float32)
    reference = marginal.make_joint_reference(fourier.interpolation_grid(volume, R_MAX, 3), 3, R_MAX, L)
    clean = np.stack([case.model(0, np.eye(3), t) for t in case.shifts])
    case.observation = case.observe(clean)
    gains = [
        (case.weights[i] ** 2 * case.precision * abs(x) ** 2).sum() for i, x in zip(case.index, clean, strict=True)
    ]
    _, [round_part] = marginal.log_marginal(case.observation, [reference], case.precision, case.shifts[:1], ZETA)
    squared = case.weights**2 * case.precision
    scorer = joint._Scorer(case.observation, reference, squared, 2.0, ZETA, 0.5, 1, np.eye(3)[None], 0.0, round_part)
    which = (*(np.full((3, 1), x) for x in (3, 40, 5)), np.zeros((3, 1)))
    cells = joint._score_cells(
        scorer,
        which,
        np.ones((3, 1), bool),
        np.tile(case.shifts[:1], (3, 1, 1)),
        np.full((3, 1), 0.5),
        np.zeros((3, 1), int),
    )
    told = scorer.told_by_turning(cells)
    assert (np.array(gains) > 100).all()
    assert (told < 0.02 * np.array(gains)).all()


def test_hermitian_half_is_the_complex_sum(case):
    """P_lm of the real and imaginary parts over half the voxels against sum f conj Y_lm over all of them."""
    from scipy.special import sph_harm_y

    harmonics = marginal._phase_harmonics(BOX, R_MAX, R_MAX, 6, "cpu")
    order, pairs = harmonics.order, marginal._pairs(6)
    spectra = case.observation.spectra[:, order].T
    found = harmonics.coefficients(np.ascontiguousarray(spectra))
    coords = case.support.coords[order]
    points = np.concatenate([coords, -coords]).astype(float)
    values = np.concatenate([spectra, spectra.conj()])
    radius = np.linalg.norm(points, axis=1)
    theta, phi = np.arccos(points[:, 2] / radius), np.arctan2(points[:, 1], points[:, 0])
    shells = 1 + np.arange(2 * R_MAX - 1) / 2
    for p, (m, l) in enumerate(zip(pairs.m, pairs.l, strict=True)):
        hat = np.maximum(0, 1 - 2 * abs(radius - shells[:, None]))
        expected = (hat * sph_harm_y(l, m, theta, phi).conj()) @ values
        np.testing.assert_allclose(found[:, p] * (1 if l % 2 == 0 else 1j), expected, atol=1e-4 * abs(values).max())


def test_cells_are_equal_and_made_of_their_children(rng):
    level, pixel, turn = (np.full(12 * 16 * 24, 2), np.repeat(np.arange(192), 24), np.tile(np.arange(24), 192))
    rotations = cell_rotations(level, pixel, turn)
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3) + 0 * rotations, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    # Equal areas: the mean of the moments of the directions is that of the sphere.
    z = rotations[:, :, 2]
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose((z[:, :, None] * z[:, None]).mean(axis=0), np.eye(3) / 3, atol=2e-3)
    # Every rotation has a centre near, and about as many rotations have each cell for their nearest.
    nearest = (random_rotations(20000, rng).reshape(-1, 9) @ rotations.reshape(-1, 9).T).argmax(axis=1)
    counts = np.bincount(nearest, minlength=len(pixel))
    assert counts.min() > 0 or (counts == 0).mean() < 0.03
    assert counts.max() < 20
    children = cell_children(level, pixel, turn)
    fine = cell_rotations(*children)
    angles = rotation_angle(fine, rotations[:, None])
    assert angles.max() < 15
    assert angles.min() > 3
    keys = children[1] * 1000 + children[2]
    assert len(np.unique(keys)) == 8 * len(pixel) == 12 * 64 * 48
    # The mean direction of the children lies within the parent.
    mean = fine.mean(axis=1)
    assert rotation_angle(mean / np.cbrt(np.linalg.det(mean))[:, None, None], rotations).max() < 4


def test_children_lie_within_cells_however_fine(rng):
    level = np.arange(1, 14).repeat(50)
    pixel, turn = rng.integers(0, 12 * 4**level), rng.integers(0, 6 * 2**level)
    angles = rotation_angle(
        cell_rotations(*cell_children(level, pixel, turn)), cell_rotations(level, pixel, turn)[:, None]
    )
    assert (angles < 0.8 * 60 * 0.5 ** level[:, None]).all()


@pytest.mark.parametrize("bandwidth", [4, 8, 9, 12])
def test_euler_grid_is_interpolated_at_the_cells(bandwidth, rng):
    level = joint._first_level(bandwidth)
    pixel, turn, share, places, weights = joint._first_cells(bandwidth, level, "C1", "cpu")
    assert (share == 0).all()
    assert len(pixel) == 72 * 8**level
    assert places.min() >= 0
    assert places.max() < (2 * bandwidth) ** 3
    beta, angle = grid_angles(bandwidth)
    g, a, b = np.meshgrid(angle, angle, beta, indexing="ij")
    matrix = rng.standard_normal((3, 3))
    values = (euler_to_matrix(np.stack([a, b, g], axis=-1)) * matrix).sum(axis=(-2, -1)).ravel()
    expected = (cell_rotations(np.full(len(pixel), level), pixel, turn) * matrix).sum(axis=(-2, -1))
    found = at_places(np.stack([values, 2 * values]).astype(np.float32), places, weights)
    np.testing.assert_allclose(found[1], 2 * (values[places] * weights).sum(axis=1), atol=1e-5)
    error = found[0] - expected
    # Linear over a step of pi / L, of a function of degree 1: step^2 / 8 of it along each of three axes.
    assert abs(error).max() < 3 / 8 * (np.pi / bandwidth) ** 2 * abs(expected).max()


def dense_evidence(case, particle, k, spacing=0.5):
    """log of the integral over all rotations and shifts by brute force: every cell of 15 degrees, all its shifts."""
    rotations = cell_rotations(*all_cells(2))
    shifts = marginal.shift_grid(MAX_SHIFT, spacing)
    total = [logsumexp(case.log_posterior(particle, k, part, shifts)) for part in np.array_split(rotations, 10)]
    return logsumexp(total) - np.log(len(rotations)) + 3 * np.log(spacing)


def test_integral_and_class_posterior_against_every_pose(case):
    evidence = np.empty((3, 2))
    for k in range(2):
        candidates, volumes = case.integrate(k)
        assert candidates.gain.shape == volumes.shape == (3, 400)  # whatever the class
        value = candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2) + volumes
        evidence[:, k] = logsumexp(value, axis=1)
        for b in range(2):
            # Brute force with cells of 7.5 degrees says the same to 0.02 nats.
            assert abs(evidence[b, k] - dense_evidence(case, b, k)) < 0.3
    found = [case.integrate(k) for k in range(2)]
    posterior = expectation(
        case.observation, case.references, [f[0] for f in found], [f[1] for f in found], np.array([0.5, 0.5]),
        case.sigma2, ZETA,
    )  # fmt: skip
    expected = np.exp(evidence - logsumexp(evidence, axis=1)[:, None])
    np.testing.assert_allclose(posterior.class_probability, expected, atol=0.01)


@pytest.mark.parametrize(
    ("max_shift", "zeta"),
    [
        (0.0, 1.0),  # no shifts: what a point of the lattice stands for must not depend on how finely cells are split
        (0.5, 1.0),  # less than the band alone would have its lattice of shifts, 0.8
        (2.0, 0.3),  # and so is the prior
    ],
)
def test_integral_where_particles_are_known_to_be_near_the_centre(oracles, max_shift, zeta):
    case = Case(oracles, 30.0)
    candidates, volumes = case.integrate(max_shift=max_shift, zeta=zeta)
    value = candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * zeta**2) + volumes
    spacing = min(0.5 * zeta, max_shift / 5) or 1.0
    shifts = marginal.shift_grid(min(max_shift, 4 * zeta), spacing)
    prior = (shifts**2).sum(axis=1) * (0.5 / ZETA**2 - 0.5 / zeta**2)
    rotations = cell_rotations(*all_cells(2))
    for b in range(2):
        parts = np.array_split(rotations, 20)
        total = [logsumexp(case.log_posterior(b, 0, part, shifts) + prior) for part in parts]
        expected = logsumexp(total) - np.log(len(rotations)) + 3 * np.log(spacing)
        assert abs(logsumexp(value[b]) - expected) < 0.3


def test_cells_that_stand_for_others_do_so_to_the_end(case, monkeypatch):
    """They stay where cells as light as they are would be left, and their children stand for theirs."""
    monkeypatch.setattr(joint, "_tolerance_of_round", lambda gain, i: 3.5 + 0 * gain)
    monkeypatch.setattr(joint, "SPREAD", np.inf)  # split, however many hold the mass
    candidates, volumes = case.integrate()
    evidence = logsumexp(candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2) + volumes, axis=1)
    for b in range(2):
        assert abs(evidence[b] - dense_evidence(case, b, 0)) < 0.3


def mass_of(case, particle, rotations, shifts):
    parts = np.array_split(rotations, 1 + len(rotations) // 1000)
    return np.concatenate([logsumexp(case.log_posterior(particle, 0, part, shifts), axis=1) for part in parts])


def poses_by_brute_force(case, particle, level):
    """Rotations of the cells of a level and their masses, summed over all shifts half a voxel apart.

    All cells of 15 degrees are tried, then the parts of those that hold more than 1e-5 of the largest mass.
    """
    shifts = marginal.shift_grid(MAX_SHIFT, 0.5)
    cells = all_cells(2)
    for _ in range(2, level):
        mass = mass_of(case, particle, cell_rotations(*cells), shifts)
        cells = [x[mass > mass.max() + np.log(1e-5)] for x in cells]
        cells = [x.reshape(-1) for x in cell_children(*cells)]
    rotations = cell_rotations(*cells)
    mass = mass_of(case, particle, rotations, shifts)
    return rotations, np.exp(mass - logsumexp(mass))


def moments(rotations, mass):
    """Means of the elements of R and of their products: all Wigner functions of degrees 1 and 2."""
    flat = rotations.reshape(-1, 9)
    return np.concatenate([mass @ flat, np.einsum("i,ij,ik->jk", mass, flat, flat).ravel()])


@pytest.mark.parametrize(
    ("gain", "level", "atol"),
    [
        (12.0, 3, 0.25),  # mass in hundreds to thousands of cells of 7.5 degrees, of which 48 + 48 are looked at
        (30.0, 3, 0.1),  # in some fifty to hundreds
        (60.0, 4, 0.03),  # in a few: 1 % of it is cut off, and cells that are not split stand for their centres
    ],
)
def test_posterior_over_rotations_against_every_pose(oracles, gain, level, atol):
    """A particle that says little is not given a few poses as if it were sure of them."""
    case = Case(oracles, gain)
    candidates, volumes = case.integrate(n=50)
    log_mass = candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2) + volumes
    for b in range(2):
        rotations, mass = candidates.rotations[b], np.exp(log_mass[b] - logsumexp(log_mass[b]))
        expected = poses_by_brute_force(case, b, level)
        np.testing.assert_allclose(moments(rotations, mass), moments(*expected), atol=atol)
        best = rotations[mass.argmax()]
        for angle in (10, 20, 40, 90):
            found, true = (m[rotation_angle(r, best) < angle].sum() for r, m in ((rotations, mass), expected))
            assert abs(found - true) < 0.15


def together(case, particles=slice(None)):
    observation = case.observation
    if particles != slice(None):
        observation = replace(observation, spectra=observation.spectra[particles], weight_index=case.index[particles])
    return joint.integrate(
        observation, case.references, case.precision, max_shift=MAX_SHIFT, zeta=ZETA, n_candidates=400
    )


def assert_alike(found, alone):
    for a, b in zip((*vars(found[0]).values(), found[1]), (*vars(alone[0]).values(), alone[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("screen", [None, 3])
@pytest.mark.parametrize("gain", [12.0, 22.0])
def test_classes_that_are_close_are_each_looked_at_in_full(oracles, gain, screen, monkeypatch):
    monkeypatch.setattr(joint, "screen_band", lambda r_max: screen)
    case = Case(oracles, gain)
    for k, found in enumerate(together(case)):
        assert_alike(found, case.integrate(k))


def test_a_class_that_is_far_behind_is_not_refined(oracles):
    """Each particle is shown the classes in both orders: it is the wrong class that stays coarse, whichever it is."""
    case = Case(oracles, 300.0)
    alone = [case.integrate(k) for k in range(2)]
    case.references.reverse()
    second, first = together(case)
    case.references.reverse()
    assert_alike(first, alone[0])
    assert_alike(together(case)[0], alone[0])
    evidence = [logsumexp(c.gain + v - (c.shifts**2).sum(axis=-1) / (2 * ZETA**2), axis=1) for c, v in (first, second)]
    refined = logsumexp(alone[1][0].gain + alone[1][1] - (alone[1][0].shifts ** 2).sum(axis=-1) / (2 * ZETA**2), axis=1)
    # It would have been no use: even refined it is nowhere near.
    assert (refined > evidence[1] + 1).any()
    assert (evidence[0] > refined + 20).all()
    assert (evidence[0] > evidence[1] + 20).all()


def test_a_class_that_is_far_behind_by_the_inner_shells_is_hardly_looked_at(oracles, monkeypatch):
    case = Case(oracles, 300.0)
    monkeypatch.setattr(joint, "screen_band", lambda r_max: 3)
    cells, score = {}, joint._Scorer.score

    def counted(self, particle, *arguments):
        if self.observation.support.r_max == R_MAX:
            key = next(k for k in range(2) if self.reference is case.references[k])
            cells[key] = cells.get(key, 0) + np.bincount(np.asarray(particle), minlength=3)
        return score(self, particle, *arguments)

    alone = case.integrate(0)
    monkeypatch.setattr(joint._Scorer, "score", counted)
    found = together(case)
    assert_alike(found[0], alone)
    assert ((cells[1] > 0) & (cells[1] <= joint.FOREMOST)).all()
    assert (cells[0] > 5 * joint.FOREMOST).all()
    # Known to be far behind, it has a mass all the same.
    evidence = [logsumexp(c.gain + v - (c.shifts**2).sum(axis=-1) / (2 * ZETA**2), axis=1) for c, v in found]
    assert np.isfinite(evidence[1]).all()
    assert (evidence[0] > evidence[1] + 20).all()


def test_gain_is_the_residuals(case):
    candidates, _ = case.integrate(0, n=50)
    for b in range(3):
        for i in (0, 20):
            expected = case.log_posterior(b, 0, candidates.rotations[b, i : i + 1], candidates.shifts[b, i : i + 1])
            expected = expected[0, 0] + (candidates.shifts[b, i] ** 2).sum() / (2 * ZETA**2)
            assert abs(candidates.gain[b, i] - expected) < 0.3  # trilinear samples of the reference
    assert (abs(candidates.correlation) <= 1).all()


def test_cut_keeps_the_mass(case):
    """Fewer candidates stand for more: the integral stays what it was."""
    sums = []
    for n in (400, 20, 3):
        candidates, volumes = case.integrate(n=n)
        assert candidates.rotations.shape[1] <= n
        prior = (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2)
        sums.append(logsumexp(candidates.gain - prior + volumes, axis=1))
    np.testing.assert_allclose(sums[1], sums[0], atol=1e-3)
    np.testing.assert_allclose(sums[2], sums[0], atol=1e-3)


def test_mass_of_a_rotation_is_that_of_all_its_shifts(case, nothing_drawn, monkeypatch):
    """However few of its shifts are candidates; the same factor for all rotations of one cell size."""
    monkeypatch.setattr(joint, "MASS", 2.0)  # nothing is left out
    monkeypatch.setattr(joint, "SELECTED", 20)
    shifts = marginal.shift_grid(MAX_SHIFT, BOX / (joint.FINE_STEP * R_MAX))
    for n_shifts in (1, 4):
        candidates, volumes = case.integrate(n=20 * n_shifts, n_shifts=n_shifts, rounds=0)
        mass = candidates.gain - (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2) + volumes
        for b in range(3):
            matrices = candidates.rotations[b, : candidates.count[b]].round(9)
            rotations, which = np.unique(matrices, axis=0, return_inverse=True)
            assert np.bincount(which.ravel()).max() <= n_shifts
            held = [logsumexp(mass[b, : candidates.count[b]][which.ravel() == i]) for i in range(len(rotations))]
            expected = logsumexp(case.log_posterior(b, 0, rotations, shifts), axis=1)
            assert np.std(held - expected) < 0.1  # trilinear samples of the reference
            assert len(rotations) >= 4


@pytest.mark.parametrize("gain", [6.0, 60.0])
def test_mean_square_shift_is_that_of_all_shifts(oracles, gain, nothing_drawn, monkeypatch):
    """That of the best shift of each rotation alone is not."""
    case = Case(oracles, gain)
    monkeypatch.setattr(joint, "MASS", 2.0)  # nothing is left out
    shifts = marginal.shift_grid(MAX_SHIFT, BOX / (joint.FINE_STEP * R_MAX))
    candidates, volumes = case.integrate(n=100, rounds=0)
    posterior = expectation(
        case.observation, case.references[:1], [candidates], [volumes], np.ones(1), case.sigma2, ZETA
    )
    for b in range(3):
        log_p = case.log_posterior(b, 0, candidates.rotations[b, : candidates.count[b]], shifts)
        expected = np.exp(log_p - logsumexp(log_p, axis=1)[:, None]) @ (shifts**2).sum(axis=1)
        # Trilinear samples of the reference, of cells that hold next to nothing too.
        np.testing.assert_allclose(candidates.shift2[b, : candidates.count[b]], expected, rtol=0.07)
        mine = posterior.particle == b
        whole = np.exp(log_p - logsumexp(log_p)).sum(axis=1) @ expected
        assert posterior.probability[mine] @ posterior.shift2[mine] == pytest.approx(whole, rel=0.03)


def test_zeta_is_of_the_mean_square_shifts(monkeypatch):
    rng = np.random.default_rng(0)
    particles = ArrayParticles(rng.standard_normal((3, 16, 16, 16)).astype(np.float32), 10.0)
    plan = Plan.make(particles, Options(resolution=40, sampler="joint", seed=1))
    begun = faml.begin(plan, particles, None, False)
    zeta = faml.iterate(plan, particles, begun).state.zeta

    def wider(*arguments):
        posterior = expectation(*arguments)
        return replace(posterior, shift2=posterior.shift2 + 3)

    monkeypatch.setattr(faml, "expectation", wider)
    assert faml.iterate(plan, particles, begun).state.zeta ** 2 == pytest.approx(zeta**2 + 1, rel=1e-3)


def test_lattice_of_shifts_does_not_matter(case, monkeypatch):
    sums = []
    for fine in (joint.FINE_STEP, 2 * joint.FINE_STEP):
        monkeypatch.setattr(joint, "FINE_STEP", fine)
        candidates, volumes = case.integrate(max_shift=9.0)  # so far that the prior leaves nothing at the edge
        prior = (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2)
        sums.append(logsumexp(candidates.gain - prior + volumes, axis=1))
    np.testing.assert_allclose(*sums, atol=0.1)


@pytest.mark.parametrize(("gain", "degrees"), [(150.0, 4.0), (2000.0, 2.5)])
def test_noise_free_poses_are_found(oracles, gain, degrees):
    case = Case(oracles, gain)
    case.observation = case.observe(case.clean)
    candidates, volumes = case.integrate()
    best = candidates.gain.argmax(axis=1)
    rows = np.arange(3)
    assert (rotation_angle(candidates.rotations[rows, best], case.rotations) < degrees).all()
    assert (np.abs(candidates.shifts[rows, best] - case.shifts) < 0.25).all()
    valid = np.arange(volumes.shape[1]) < candidates.count[:, None]
    assert np.isfinite(volumes[valid]).all()
    assert (candidates.shifts**2).sum(axis=-1).max() <= MAX_SHIFT**2 + 1e-6


@pytest.mark.parametrize(("r_max", "width"), [(9, 0.94), (31, 0.94), (63, 0.47), (127, 0.24)])
def test_the_finest_cells_are_as_narrow_as_the_band_can_tell(r_max, width):
    """From 7.5 degrees on three rounds at least; turned by 52 / r_max, what lies 0.35 boxes out has lost its phase."""
    found = cell_width(joint._first_level(L) + joint._rounds(L, r_max, None))
    assert found == pytest.approx(width, abs=0.01)
    assert found <= 52 / r_max
    assert joint._rounds(L, r_max, 2) == 2


@pytest.mark.parametrize("gain", [12.0, 60.0, 400.0])
def test_cells_are_screened_without_loss(oracles, gain, monkeypatch):
    """By the inner shells first: the same integral and best pose from fewer shifts and cells at the whole band."""
    case = Case(oracles, gain)
    work = {}
    score = joint._Scorer.score

    def counted(self, particle, rotations, centre, spacing, reach):
        if self.observation.support.r_max == R_MAX:
            work[screen] = work.get(screen, 0) + len(particle) * (2 * reach + 1) ** 3
        return score(self, particle, rotations, centre, spacing, reach)

    monkeypatch.setattr(joint._Scorer, "score", counted)
    found = {}
    for screen in (None, 3):
        monkeypatch.setattr(joint, "screen_band", lambda r_max, inner=screen: inner)
        candidates, volumes = case.integrate(max_shift=7.0)
        prior = (candidates.shifts**2).sum(axis=-1) / (2 * ZETA**2)
        best = candidates.gain.argmax(axis=1)
        found[screen] = logsumexp(candidates.gain - prior + volumes, axis=1), candidates.rotations[range(3), best]
    np.testing.assert_allclose(found[3][0], found[None][0], atol=0.01)
    assert (rotation_angle(found[3][1], found[None][1]) < 5).all()
    # Of cells that stand for thousands, all are worth it.
    assert work[3] < 0.9 * work[None] if gain > 12 else work[3] <= work[None]


def test_inner_shells_only(case):
    """What `within` compares by is the sum over these shells."""
    observation = replace(case.observation, unseen=UnseenGain(*(np.full((2, 4, 4, 4), x, np.float32) for x in (5, 3))))
    observation = replace(
        observation, unseen=UnseenGain(observation.unseen.table, case.index, observation.unseen.index)
    )
    weight = case.weights**2 * case.precision
    group = np.eye(3)[None]
    scorer = joint._Scorer(observation, case.references[0], weight, MAX_SHIFT, ZETA, 0.8, 1, group, 0.0, np.zeros(3))
    inner = scorer.within(3)
    assert inner.fine == pytest.approx(min(BOX / (joint.FINE_STEP * 3), MAX_SHIFT / 2))
    assert inner.reach == int(np.ceil(MAX_SHIFT / inner.fine))
    outside = case.support.shell > 3
    cut = replace(scorer, weight=np.where(outside, 0, weight).astype(np.float32))
    arguments = np.arange(3), case.rotations, np.zeros((3, 3)), 0.9, 2
    mass, shift, value, spread, power, shift2 = cut.score(*arguments)
    found = inner.score(*arguments)
    np.testing.assert_allclose(found[0], mass - 5 + 3, atol=2e-3)
    np.testing.assert_array_equal(found[1], shift)
    np.testing.assert_allclose(found[2], value - 5 + 3, atol=2e-3)
    np.testing.assert_allclose(found[3], spread, rtol=1e-3)
    np.testing.assert_allclose(found[4], power, rtol=1e-4)
    np.testing.assert_allclose(found[5], shift2, rtol=1e-3)


def test_chunks_do_not_matter(case, nothing_drawn, monkeypatch):
    shifts = marginal.shift_grid(MAX_SHIFT, 1.0)
    arguments = case.observation, case.references, case.precision, shifts, ZETA
    whole, found = marginal.log_marginal(*arguments)[0], case.integrate()
    for module in (translations, marginal):
        # One particle, one shift, one rotation at a time.
        monkeypatch.setattr(module, "working_bytes", lambda _, cached=False: 1)
    np.testing.assert_allclose(marginal.log_marginal(*arguments)[0], whole, atol=2e-3)
    again = case.integrate()
    np.testing.assert_allclose(again[0].gain[:, :20], found[0].gain[:, :20], atol=2e-3)
    np.testing.assert_allclose(again[1][:, :20], found[1][:, :20], atol=5e-3)


@pytest.mark.parametrize("screen", [None, 3])
def test_on_a_gpu_the_same(oracles, emulated_gpu, nothing_drawn, screen, monkeypatch):
    import cupy

    monkeypatch.setattr(joint, "screen_band", lambda r_max: screen)
    if screen is not None:  # a first look at the shifts too
        monkeypatch.setattr(marginal, "INNER_R", screen)
        monkeypatch.setattr(marginal, "WORTHWHILE", 1)
    case = Case(oracles, 12.0)
    found = case.integrate(n=40)
    o = case.observation
    joint.forget_tables()
    try:
        on_gpu = Observation(
            case.support.to("cuda:0"), *(cupy.asarray(x) for x in (o.spectra, o.weights, o.weight_index)), o.weight_ids
        )
        reference = marginal.make_joint_reference(cupy.asarray(case.grids[0]), 3, R_MAX, L)
        [(candidates, volumes)] = joint.integrate(
            on_gpu, [reference], cupy.asarray(case.precision), max_shift=MAX_SHIFT, zeta=ZETA, n_candidates=40
        )
    finally:
        joint.forget_tables()
    assert isinstance(volumes, cupy.ndarray)
    np.testing.assert_array_equal(to_host(candidates.count), found[0].count)
    for name in ("gain", "rotations", "shifts"):
        np.testing.assert_allclose(
            to_host(getattr(candidates, name))[:, :10], getattr(found[0], name)[:, :10], atol=2e-3
        )
    np.testing.assert_allclose(to_host(volumes)[:, :10], found[1][:, :10], atol=5e-3)
