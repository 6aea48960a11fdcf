"""Noise curves of groups, and premultiplied boxes, against sums written out and simulated noise of known variance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from faml_gpu import expectation as expectation_module
from faml_gpu import faml, fourier, maximization, noise
from faml_gpu.data import Batch, Checkpoint, Groups, State
from faml_gpu.errors import InputError
from faml_gpu.evaluation import snr
from faml_gpu.expectation import BatchPosterior, expectation, fitted_scale, log_normaliser
from faml_gpu.fast_alignment import Candidates, Observation, Reference
from faml_gpu.halves import Subset
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.noise import SCALES, NoiseGroups, new_scale, noise_groups
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.posteriors import one_hot
from faml_gpu.run_folder import RunFolder, read_checkpoint
from faml_gpu.starting import final_averages
from faml_gpu.weights import missing_wedge

BOX, VOXEL = 16, 10.0
BACK = 0.03  # of interpolation
HALF = (BOX, BOX, BOX // 2 + 1)
SHELLS = fourier.full_band(BOX) + 1
BEFORE = np.array([[1.0], [0.5], [3.0]]) * np.ones(SHELLS)  # relative noise that is to be forgotten
OPTIONS = Options(iterations=1, mask_radius=50.0, max_shift=10.0, bandwidth=6, candidates=4, device="cpu", threads=1)


def symmetric(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A random weight in rfftn layout with w(-k) = w(k): |FFT| of a real volume has that."""
    values = abs(np.fft.rfftn(rng.standard_normal((BOX,) * 3)))
    return (low + (high - low) * values / values.max()).astype(np.float32)


def coloured(rng: np.random.Generator, n: int, variance: np.ndarray) -> np.ndarray:
    """Real noise whose complex Fourier coefficients have this variance in each shell, (n, N, N, N//2 + 1) complex."""
    white = fourier.transform(rng.standard_normal((n, BOX, BOX, BOX))) / BOX**1.5
    shell = np.minimum(fourier.shells_of_half(BOX), len(variance) - 1)
    return white * np.sqrt(variance)[shell]


def boxes_of(spectra: np.ndarray) -> np.ndarray:
    return fourier.inverse_transform(spectra, BOX).astype(np.float32)


def state_of(sigma2: np.ndarray, relative: np.ndarray | None, maps: np.ndarray | None = None, **rest: Any) -> State:
    maps = np.zeros((1, BOX, BOX, BOX), np.float32) if maps is None else maps
    names = None if relative is None else np.array([noise.COMMON, *(f"g{i}" for i in range(1, len(relative)))])
    return State(0, maps, np.full(len(maps), 1 / len(maps)), sigma2, 1.0, None, relative, names, **rest)


# --- the E-step and the M-step of two groups ------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["groups", "groups and scales"])
def scene(request: pytest.FixtureRequest, rng: np.random.Generator, oracles: Any) -> dict[str, Any]:
    """Six particles in two groups, weights and groups crossed, each group with a noise curve of its own.

    Of the eight of the state they are numbers 1 to 6.
    """
    toy = oracles.Toy(rng, BOX, oracles.Lattice, fractional=True, n_particles=6)
    half = np.stack([oracles.half_of_cube(w) for w in toy.weights])
    rows = np.array([1, 1, 2, 2, 1, 2])
    relative = np.stack([np.ones(SHELLS), rng.uniform(0.3, 0.8, SHELLS), rng.uniform(1.5, 6, SHELLS)])
    scale = rng.uniform(0.5, 2, 8) if request.param else None
    state = state_of(toy.sigma2, relative, scale=scale)
    groups = NoiseGroups(("all", "g1", "g2"), np.concatenate([[0], rows, [0]]))
    plain = Batch(toy.particles, half, toy.weight_index, ("a", "b"))
    batch, spectra = groups.weigh(plain, fourier.transform(toy.particles), 1 + np.arange(len(toy.particles)), state)
    own = np.ones(6) if scale is None else scale[1:7]
    return {
        "toy": toy, "rows": rows, "state": state, "plain": plain, "batch": batch, "spectra": spectra, "scale": own,
    }  # fmt: skip


def e_step(scene: dict[str, Any]) -> tuple[BatchPosterior, Observation, list[Reference]]:
    toy, batch = scene["toy"], scene["batch"]
    support = fourier.make_support(BOX, toy.r_max)
    spectra, weights = support.gather(scene["spectra"]), support.gather(batch.weights)
    observation = Observation(support, spectra, weights, batch.weight_index, batch.weight_ids)
    grids = fourier.interpolation_grid(toy.maps, toy.r_max, 1, compensate=False)
    references = [Reference(g, 1, 0, np.zeros(0), np.zeros(0)) for g in grids]
    lists = zip(toy.rotations, toy.shifts, toy.count, strict=True)
    candidates = [Candidates(r, t, np.zeros(r.shape[:2]), c) for r, t, c in lists]
    volumes = list(toy.log_volumes)
    found = expectation(observation, references, candidates, volumes, toy.alpha, toy.sigma2, toy.zeta)
    return found, observation, references


def test_posterior_is_that_of_each_groups_own_sigma(
    scene: dict[str, Any], oracles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expectation_module, "KEPT_MASS", 1.0)
    toy, rows, batch = scene["toy"], scene["rows"], scene["batch"]
    found, observation, _ = e_step(scene)
    support, curves = observation.support, scene["state"].group_sigma2
    values, own = [], []
    for i, k, p in toy.entries():
        value, shells = oracles.log_joint(
            BOX,
            toy.r_max,
            toy.particles[i],
            toy.weights[toy.weight_index[i]],
            toy.sampler(scene["scale"][i] * toy.maps[k]),
            toy.rotations[k, i, p],
            toy.shifts[k, i, p],
            toy.log_volumes[k, i, p],
            toy.alpha[k],
            curves[rows[i]],
            toy.zeta,
        )
        values.append(value)
        own.append(shells)
    particle = np.array([i for i, _, _ in toy.entries()])
    evidence = np.array([np.logaddexp.reduce(np.array(values)[particle == i]) for i in range(6)])
    np.testing.assert_allclose(found.log_likelihood, evidence, rtol=1e-6)  # the weights are float32
    np.testing.assert_allclose(found.probability, np.exp(values - evidence[particle]), atol=1e-5)
    assert np.sort(found.probability)[-7] > 0.05  # spread out
    # Noise is that of the particles themselves: nothing of the weighing is left in the sums.
    gather = support.gather
    residual, observed = maximization.noise_sums(
        found,
        gather(batch.weights),
        batch.weight_index,
        support,
        rows=batch.noise_rows,
        relative=scene["state"].relative_noise,
        scale=batch.scale,
    )
    points, shell = oracles.ball(toy.r_max)
    for g in range(3):
        mine = rows[particle] == g
        expected = found.probability[mine] @ np.array(own)[mine]
        np.testing.assert_allclose(residual[g], expected, rtol=1e-5, atol=1e-12)
        squares = [oracles.at(toy.weights[toy.weight_index[i]], points) ** 2 for i in np.flatnonzero(rows == g)]
        seen = sum((np.bincount(shell, s, minlength=toy.r_max + 1) for s in squares), np.zeros(toy.r_max + 1))
        np.testing.assert_allclose(observed[g], seen, rtol=1e-5)


def test_fitted_scale_is_the_best_there_is(scene: dict[str, Any], oracles: Any) -> None:
    """Against direct sums with the particle's own noise: times the scale it has, it lowers the residual most.

    In the pose and class that explain it best with the scale that it has.
    """
    toy, rows = scene["toy"], scene["rows"]
    found, observation, references = e_step(scene)
    change = fitted_scale(found, observation, references, toy.sigma2)
    points, shell = oracles.ball(toy.r_max)
    for i in range(6):
        x = oracles.at(oracles.centred_cube(toy.particles[i]), points)
        w = oracles.at(toy.weights[toy.weight_index[i]], points) ** 2 / scene["state"].group_sigma2[rows[i], shell]
        fits = []
        for j in np.flatnonzero(found.particle == i):
            sampler = toy.sampler(toy.maps[found.class_index[j]])
            model = oracles.model(sampler, points, found.rotations[j], found.shifts[j], BOX)
            residual = (w * abs(x - scene["scale"][i] * model) ** 2).sum()
            fits.append((residual, (w * (x * model.conj()).real).sum() / (w * abs(model) ** 2).sum()))
        expected = min(fits)[1]
        np.testing.assert_allclose(change[i] * scene["scale"][i], expected, rtol=1e-4)


def test_scales_keep_their_median_and_bounds() -> None:
    old, change = np.array([1.0, 2.0, 0.5, 1.0, 1.0]), np.array([4.0, 2.0, 8.0, -7.0, 1e9])
    np.testing.assert_array_equal(new_scale(old, change), [1, 1, 1, SCALES[0], SCALES[1]])
    np.testing.assert_array_equal(new_scale(None, np.array([1.0, 2.0, np.nan])), [1, 2, 1])
    np.testing.assert_array_equal(new_scale(None, np.array([-1.0, -2.0, 3.0])), [1, 1, 1])


def test_pairs_of_weight_and_group_have_names_of_their_own(scene: dict[str, Any]) -> None:
    batch, plain, rows, scaled = scene["batch"], scene["plain"], scene["rows"], scene["state"].scale is not None
    pairs = [
        (plain.weight_ids[w], r, i * scaled) for i, (w, r) in enumerate(zip(plain.weight_index, rows, strict=True))
    ]
    distinct = 6 if scaled else 4
    assert len(batch.weights) == len(batch.weight_ids) == len(set(batch.weight_ids)) == len(set(pairs)) == distinct
    for i in range(6):
        for j in range(6):
            same = batch.weight_ids[batch.weight_index[i]] == batch.weight_ids[batch.weight_index[j]]
            assert same == (pairs[i] == pairs[j])
    # In a batch of others the name is the same.
    toy, state = scene["toy"], scene["state"]
    one = replace(plain, weight_index=toy.weight_index[2:3])
    groups = NoiseGroups(("all", "g1", "g2"), np.concatenate([[0], rows, [0]]))
    alone, spectra = groups.weigh(one, fourier.transform(toy.particles[2:3]), np.array([3]), state)
    np.testing.assert_array_equal(spectra[0], scene["spectra"][2])
    assert alone.weight_ids == (batch.weight_ids[batch.weight_index[2]],)
    np.testing.assert_array_equal(alone.weights[0], batch.weights[batch.weight_index[2]])


def test_average_of_two_groups_is_weighted_by_their_inverse_variances(scene: dict[str, Any], oracles: Any) -> None:
    """All particles lie as the average does: the closed form, voxel by voxel, weights of all values included."""
    toy, batch, rows = scene["toy"], scene["batch"], scene["rows"]
    support = fourier.make_support(BOX, toy.r_max)
    n = len(rows)
    posterior = BatchPosterior(
        np.arange(n), np.zeros(n, np.int64), np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3)), np.ones(n),
        np.zeros((n, toy.r_max + 1)), np.zeros(n), np.zeros(n), np.ones((n, 1)), n, np.zeros(n),
    )  # fmt: skip
    sums, weights = maximization.rotate_back(
        scene["spectra"], batch.weights, batch.weight_index, None, posterior, support, 1, 1, compensate=False
    )
    found = maximization.direct_average(sums, weights, np.array([float(n)]))[0]
    curves = scene["state"].group_sigma2[rows][:, support.shell]  # (n, M)
    w = support.gather(scene["plain"].weights)[toy.weight_index] ** 2 / curves
    scale = scene["scale"][:, None]
    total = (w * scale**2).sum(axis=0)
    spectra = support.gather(fourier.transform(toy.particles))
    expected = (w * scale * spectra).sum(axis=0) / np.maximum(total, 1e-30)
    covered = total * toy.sigma2[support.shell] > 1.01 * maximization.COVERAGE_FLOOR * n
    assert covered.mean() > 0.9
    np.testing.assert_allclose(found[covered], expected[covered], rtol=1e-5)


def test_normaliser_counts_each_group_with_its_own_variance() -> None:
    observed = np.array([[9.0, 4, 6], [9.0, 2, 8]])
    curves = np.array([[9.0, 2, 3, 7], [9.0, 5, 11, 7]])
    by_hand = -0.5 * (4 * np.log(2) + 6 * np.log(3) + 2 * np.log(5) + 8 * np.log(11)) - 1.5 * 3 * np.log(1.3**2)
    np.testing.assert_allclose(log_normaliser(observed, curves, 1.3, 3), by_hand)


# --- variances recovered from noise alone ---------------------------------------------------------------------


def recovered(particles: ArrayParticles, relative: np.ndarray | None, groups: NoiseGroups) -> State:
    """The state after one iteration from next to nothing as reference."""
    maps = np.random.default_rng(0).standard_normal((1, BOX, BOX, BOX)).astype(np.float32) * 1e-6
    options = replace(OPTIONS, normalize=False, sampler="magnitude", update="ratio")
    plan = Plan.make(particles, replace(options, resolution=None), 2 * VOXEL)
    state = state_of(np.full(SHELLS, 1.0), relative, maps)
    if relative is not None:
        state.noise_groups = np.array(groups.names)

    n = len(particles)
    start = one_hot(np.zeros(n, np.int64), np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3)), 1, known=False)
    return faml.iterate(plan, particles, Checkpoint(state, start, [])).state


def deviations(found: np.ndarray, truth: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
    """In standard errors: of J coefficients, each with its conjugate, the variance is known to sqrt(2 / J)."""
    support = fourier.make_support(BOX, SHELLS - 1)
    count = n * support.shell_sums(support.gather((weight > 0).astype(float)))
    return ((found / truth - 1) / np.sqrt(2 / np.maximum(count, 1)))[1:]


def test_variance_of_coloured_noise_is_recovered_by_group(rng: np.random.Generator) -> None:
    n, weight = 40, missing_wedge(BOX, (-60, 60))
    curves = np.array([np.linspace(30, 5, SHELLS), np.linspace(40, 300, SHELLS)])
    index = np.arange(2 * n) % 2
    spectra = np.concatenate([coloured(rng, 1, curves[g]) for g in index]) * weight
    groups = {"optics": Groups(("quiet", "loud"), index)}
    particles = ArrayParticles(boxes_of(spectra), VOXEL, weight, groups=groups)
    found = noise_groups(particles, replace(OPTIONS, normalize=False))
    assert found.names == ("all", "quiet", "loud")
    np.testing.assert_array_equal(found.row, 1 + index)
    new = recovered(particles, BEFORE, found)
    assert new.group_sigma2.shape == (3, SHELLS)
    for g in (0, 1):
        off = deviations(new.group_sigma2[1 + g], curves[g], weight, n)
        assert abs(off).max() < 4, off  # five shells
    # The first curve is that of all, and nothing but the state's common one.
    np.testing.assert_array_equal(new.relative_noise[0], 1)  # type: ignore[index]
    np.testing.assert_allclose(new.sigma2[1:], new.group_sigma2[1:, 1:].mean(axis=0), rtol=1e-6)
    # Start and iteration agree: the start takes 20 particles of each.
    begun = faml.start(Plan.make(particles, replace(OPTIONS, normalize=False)), particles, None, None).state
    for g in (0, 1):
        assert abs(deviations(begun.group_sigma2[1 + g], curves[g] * (1 + 1 / 80), weight, 20)).max() < 4
    assert list(begun.noise_groups) == ["all", "quiet", "loud"]  # type: ignore[arg-type]


@pytest.mark.parametrize("grouped", [False, True])
def test_variance_of_premultiplied_noise_is_recovered(grouped: bool, rng: np.random.Generator) -> None:
    """sqrt(W) noise, W with multiplicities and without a wedge of zeros: sigma^2 is that of the noise, whatever W.

    One particle of five has the larger W, and may have noise of its own.
    """
    n, curves = 100, np.array([np.linspace(30, 5, SHELLS)] * 2)
    curves[1] *= 4 if grouped else 1
    wedge = missing_wedge(BOX, (-50, 60))
    products = np.stack([symmetric(rng, 0.1, 4.0) * wedge, symmetric(rng, 2.0, 9.0) * wedge])
    index = (np.arange(n) % 5 == 0).astype(np.int64)
    spectra = np.sqrt(products)[index] * np.concatenate([coloured(rng, 1, curves[g]) for g in index])
    groups = {"optics": Groups(("few", "many"), index)} if grouped else None
    particles = ArrayParticles(boxes_of(spectra), VOXEL, products, index, groups=groups, premultiplied=True)
    batch = particles.read(np.array([1, 0]))
    shell = fourier.shells_of_half(BOX)
    seen = products > 0
    # What w^2 is W over, is one number a shell, so that its mean is 1.
    common = np.array([np.mean([p[(shell == s) & o].mean() for p, o in zip(products, seen, strict=True)])
                       for s in range(1, SHELLS)])  # fmt: skip
    for w, p, o in zip(batch.weights, products, seen, strict=True):
        inside = o & (shell >= 1) & (shell < SHELLS)
        np.testing.assert_allclose(w[inside] ** 2 * common[shell[inside] - 1], p[inside], rtol=1e-5)
        assert not w[~o].any()
    found = noise_groups(particles, replace(OPTIONS, normalize=False))
    new = recovered(particles, BEFORE if grouped else None, found)
    begun = faml.start(Plan.make(particles, replace(OPTIONS, normalize=False)), particles, None, None).state
    truth = curves / np.append(1, common)
    for g in (0, 1) if grouped else (0,):
        members = (np.arange(n)[index == g]) if grouped else np.arange(n)
        off = deviations(new.group_sigma2[g + grouped], truth[g], wedge, len(members))
        assert abs(off).max() < 4, off
        # And so it is at the start, from 20 of them; the mean of all takes some away.
        off = deviations(begun.group_sigma2[g + grouped], truth[g], wedge, 20)
        assert abs(off).max() < 5, off


# --- premultiplied boxes --------------------------------------------------------------------------------------


@pytest.fixture
def premultiplied(rng: np.random.Generator, oracles: Any) -> dict[str, Any]:
    """Four boxes X' = W A + sqrt(W) noise, as they lie; W differs, with multiplicities and zeros."""
    wedge = missing_wedge(BOX, (-50, 60))
    products = np.stack([symmetric(rng, 0.0, 3.0) * wedge, symmetric(rng, 1.0, 12.0) * wedge])
    products[0][products[0] < 0.4] = 0
    volume = oracles.blob_volume(BOX, *oracles.blobs(rng, 6, 1.8, 1.1)) * BOX**1.5
    truth = fourier.transform(volume)
    index = np.array([0, 1, 1, 0])
    signal = products[index] * truth
    spectra = signal + np.sqrt(products)[index] * coloured(rng, 4, np.full(SHELLS, 4.0))
    return {"products": products, "index": index, "truth": truth, "signal": signal, "spectra": spectra}


def opened(case: dict[str, Any], spectra: np.ndarray, **options: Any) -> tuple[ArrayParticles, Plan]:
    particles = ArrayParticles(boxes_of(spectra), VOXEL, case["products"], case["index"], premultiplied=True)
    return particles, Plan.make(particles, replace(OPTIONS, normalize=False, **options))


def log_likelihoods(particles: ArrayParticles, plan: Plan, models: np.ndarray, sigma2: np.ndarray) -> np.ndarray:
    """(particles, models) by the package's own weights and transforms, models (m, N, N, N//2 + 1)."""
    batch = particles.read(np.arange(len(particles)))
    support = fourier.make_support(BOX, SHELLS - 1)
    x, w = support.gather(plan.spectra(batch)), support.gather(batch.weights)[batch.weight_index]
    apart = w[:, None] ** 2 * abs(x[:, None] - support.gather(models)) ** 2
    return -(support.shell_sums(apart)[..., 1:] / (2 * sigma2[1:])).sum(axis=-1)


def test_likelihood_of_premultiplied_boxes_is_the_direct_sum(
    premultiplied: dict[str, Any], rng: np.random.Generator, oracles: Any
) -> None:
    """-|X' - W R A|^2 / (2 sigma^2 W) over all voxels with W > 0 of the whole cube, between any two models."""
    particles, plan = opened(premultiplied, premultiplied["spectra"])
    models = premultiplied["truth"] * np.array([1.0, 0.8, 0.0])[:, None, None, None]
    models[1] += fourier.transform(rng.standard_normal((BOX,) * 3))
    points, shell = oracles.ball(SHELLS - 1)
    sigma2 = rng.uniform(2, 6, SHELLS)
    expected = np.empty((4, 3))
    for i, row in enumerate(premultiplied["index"]):
        w = oracles.at(oracles.cube_of_half(premultiplied["products"][row].astype(float), BOX), points)
        x = oracles.at(oracles.centred_cube(boxes_of(premultiplied["spectra"])[i].astype(float)), points)
        for j, model in enumerate(models):
            a = oracles.at(oracles.cube_of_half(model, BOX), points)
            seen = w > 0
            terms = abs(x - w * a)[seen] ** 2 / (2 * sigma2[shell[seen]] * w[seen])
            expected[i, j] = -terms.sum()
    # The package's weights are W over one number a shell; sigma^2 takes that up.
    common = np.mean([by_shell(p, p > 0) for p in premultiplied["products"]], axis=0)
    found = log_likelihoods(particles, plan, models, sigma2 / common)
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-4)
    assert abs(np.diff(expected)).min() > 50


def by_shell(product: np.ndarray, seen: np.ndarray) -> np.ndarray:
    shell = fourier.shells_of_half(BOX)
    return np.array([product[(shell == s) & seen].mean() for s in range(SHELLS)])


def test_where_nothing_was_multiplied_nothing_counts(premultiplied: dict[str, Any], rng: np.random.Generator) -> None:
    """Anything may stand where W is 0, or too small against its largest value to divide by."""
    rubbish = 100 * fourier.transform(rng.standard_normal((4, BOX, BOX, BOX)))
    products, index = premultiplied["products"], premultiplied["index"]
    spoilt = premultiplied["spectra"] + rubbish * (products == 0)[index]
    models = premultiplied["truth"] * np.array([1.0, 0.5])[:, None, None, None]
    clean, dirty = (
        log_likelihoods(*opened(premultiplied, s), models, np.full(SHELLS, 4.0))
        for s in (premultiplied["spectra"], spoilt)
    )
    np.testing.assert_allclose(dirty, clean, rtol=1e-4)
    small = np.where(products == 0, 0.9e-4 * products.max(axis=(1, 2, 3), keepdims=True), products)
    particles, plan = opened(premultiplied | {"products": small.astype(np.float32)}, spoilt)
    np.testing.assert_allclose(log_likelihoods(particles, plan, models, np.full(SHELLS, 4.0)), clean, rtol=1e-4)
    batch = particles.read(np.arange(4))
    spectra = plan.spectra(batch)
    assert np.isfinite(spectra).all()
    assert not spectra[(products == 0)[index]].any()


def test_average_of_premultiplied_boxes_is_the_structure(rng: np.random.Generator, oracles: Any) -> None:
    """Without noise A comes back, and not W A, by the ratio and by filling, which multiplicities do not make run away.

    W is smooth, so that W R A stays within the mask: a CTF^2, and many tilts that meet on their axis, Y.
    """
    n, (centres, widths, masses) = 24, oracles.blobs(rng, 6, 1.8, 1.1)
    shell, k = fourier.shells_of_half(BOX), np.fft.fftfreq(BOX) * BOX
    across = k[:, None, None] ** 2 + np.arange(BOX // 2 + 1.0) ** 2 + 0 * k[:, None]
    products = np.stack([3 * np.cos(0.3 * shell) ** 2, 0.3 + 9 * np.exp(-across / 8)]).astype(np.float32)
    index, rotations = np.arange(n) % 2, Rotation.random(n, random_state=5).as_matrix()
    turned = np.stack([oracles.blob_volume(BOX, centres @ r.T, widths, masses) for r in rotations])
    spectra = fourier.transform(turned) * products[index]
    particles, plan = opened({"products": products, "index": index}, spectra, padding=3)
    support = fourier.make_support(BOX, SHELLS - 1)
    expected = support.gather(fourier.transform(oracles.blob_volume(BOX, centres, widths, masses)))
    posterior = one_hot(np.zeros(n, np.int64), rotations, np.zeros((n, 3)), 1, known=True)
    found = support.gather(fourier.transform(final_averages(plan, particles, posterior)))[0]
    assert np.linalg.norm(found - expected) < BACK * np.linalg.norm(expected)
    old = np.zeros((1, len(support)), complex)
    batch = particles.read(np.arange(n))
    sums, weights = plan.rotate_back(posterior, batch, plan.spectra(batch), support, 1)
    for _ in range(40):
        old = maximization.update_average(sums, weights, np.array([float(n)]), old, np.ones(len(support), bool))
    assert np.linalg.norm(old[0] - expected) < BACK * np.linalg.norm(expected)
    # The paper's own preset multiplies by 0 and 1 twice, but not by W. Its poses are off by some of its grid's steps.
    volume = oracles.blob_volume(BOX, centres, widths, masses).astype(np.float32)
    paper = replace(OPTIONS, preset="paper", bandwidth=12, candidates=10, normalize=False)
    printed = faml.run(particles, paper, reference=volume).state.maps
    seen = support.gather(fourier.transform(printed))[0]
    assert 0.7 < np.linalg.norm(seen) / np.linalg.norm(expected) < 1.1


def test_weights_above_1_leave_nothing_to_fill() -> None:
    sums, weights, old = np.full((1, 3), 6.0 + 0j), np.array([[1.0, 2.0, 3.0]]), np.full((1, 3), 10.0 + 0j)
    new = maximization.update_average(sums, weights, np.array([2.0]), old, np.ones(3, bool))
    np.testing.assert_allclose(new[0], [(6 + 10) / 2, 3, 2])


def test_normalised_boxes_share_the_noise_not_the_background(rng: np.random.Generator) -> None:
    """Boxes of one noise level, multiplied by few tilts and by many, come out on one grey scale."""
    n = 12
    products = np.stack([symmetric(rng, 0.2, 1.0), symmetric(rng, 8.0, 20.0)])
    index = np.arange(n) % 2
    white = coloured(rng, n, np.full(SHELLS, 9.0))
    particles = ArrayParticles(
        boxes_of(np.sqrt(products)[index] * white) + 5.0, VOXEL, products, index, premultiplied=True
    )
    plan = Plan.make(particles, OPTIONS)
    batch = particles.read(np.arange(n))
    support = fourier.make_support(BOX, SHELLS - 1)
    spectra = support.gather(plan.spectra(batch) * np.sqrt(products)[index])
    # sigma^2 is N^3 of real noise of variance 1; some 1000 voxels outside the mask give it to 6 % of each box.
    levels = (abs(spectra) ** 2).mean(axis=1) / BOX**3
    assert abs(levels[index == 0].mean() - 1) < 0.06
    assert abs(levels[index == 1].mean() - 1) < 0.06


@pytest.mark.parametrize("box", [11, 12])
def test_mean_over_the_cube(box: int, rng: np.random.Generator) -> None:
    values = abs(np.fft.fftn(rng.standard_normal((box,) * 3)))
    np.testing.assert_allclose(fourier.mean_of_half(values[:, :, : box // 2 + 1]), values.mean())


# --- which groups there are -----------------------------------------------------------------------------------


@pytest.fixture
def crowd(rng: np.random.Generator) -> ArrayParticles:
    """70 boxes: optics groups of 30, 19 and 21, tomograms of 35."""
    optics = Groups(("A", "B", "C"), np.repeat([0, 1, 2], [30, 19, 21]))
    tomograms = Groups(("t1", "t2"), np.arange(70) % 2)
    boxes = rng.standard_normal((70, BOX, BOX, BOX)).astype(np.float32)
    return ArrayParticles(boxes, VOXEL, groups={"optics": optics, "tomogram": tomograms})


def test_small_groups_take_the_curve_of_all(crowd: ArrayParticles) -> None:
    found = noise_groups(crowd, Options(normalize=False))
    assert found.names == ("all", "A", "C")
    np.testing.assert_array_equal(found.row, np.repeat([1, 0, 2], [30, 19, 21]))
    np.testing.assert_array_equal(found.members(0), np.arange(70))
    np.testing.assert_array_equal(found.members(2), np.arange(49, 70))
    assert noise_groups(crowd, Options(noise_groups="optics")).names == ("all", "A", "C")
    assert noise_groups(crowd, Options(noise_groups="tomogram")).names == ("all", "t1", "t2")
    assert noise_groups(crowd, Options(scale_correction=True)).names == ("all", "A", "C")
    # Normalised and without scales, it is not the noise that differs.
    for options in (Options(noise_groups="none", normalize=False), Options(preset="paper", normalize=False), Options()):
        assert noise_groups(crowd, options).names == ("all",)
    # One large group and a small one are one.
    assert noise_groups(Subset(crowd, np.arange(49)), Options(normalize=False)).names == ("all",)


def test_groups_of_a_subset(crowd: ArrayParticles) -> None:
    chosen = np.array([69, 3, 35])
    groups = Subset(crowd, chosen).groups
    assert groups["optics"].names == ("A", "B", "C")
    np.testing.assert_array_equal(groups["optics"].index, [2, 0, 1])
    np.testing.assert_array_equal(groups["tomogram"].index, chosen % 2)


def test_groups_that_are_not_there(crowd: ArrayParticles) -> None:
    bare = ArrayParticles(crowd.read(np.arange(3)).boxes, VOXEL)
    assert noise_groups(bare, Options(normalize=False)).names == ("all",)
    with pytest.raises(InputError, match="noise-groups: found 'tomogram', but the particles have no rlnTomoName"):
        noise_groups(bare, Options(noise_groups="tomogram"))
    with pytest.raises(InputError, match="option noise_groups: found 'some'"):
        Options(noise_groups="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"groups\['optics'\]: expected 3 numbers from 0 to 0"):
        ArrayParticles(bare.read(np.arange(3)).boxes, VOXEL, groups={"optics": Groups(("a",), np.array([0, 0, 1]))})
    state = state_of(np.ones(SHELLS), np.ones((2, SHELLS)))
    with pytest.raises(InputError, match="found the groups all, A, C, expected all, g1 as in the run resumed"):
        noise_groups(crowd, Options(normalize=False), state)
    # A run that began with one curve goes on with one.
    assert noise_groups(crowd, Options(normalize=False), state_of(np.ones(SHELLS), None)).names == ("all",)


# --- whole runs -----------------------------------------------------------------------------------------------


def test_one_group_changes_nothing(crowd: ArrayParticles) -> None:
    """Bit for bit: all in one group, and none."""
    boxes = crowd.read(np.arange(24)).boxes
    weight = missing_wedge(BOX, (-60, 60))
    one = {"optics": Groups(("A",), np.zeros(24, np.int64))}
    runs = [
        faml.run(ArrayParticles(boxes, VOXEL, weight, groups=groups), replace(OPTIONS, iterations=2, normalize=False))
        for groups in (None, one)
    ]
    np.testing.assert_array_equal(runs[0].maps, runs[1].maps)
    np.testing.assert_array_equal(runs[0].state.sigma2, runs[1].state.sigma2)
    assert runs[1].state.relative_noise is None
    assert runs[0].history[-1].log_likelihood == runs[1].history[-1].log_likelihood


@pytest.mark.parametrize("update", ["ratio", "wiener"])
def test_what_the_curves_are_relative_to_does_not_matter(crowd: ArrayParticles, update: Any) -> None:
    """sigma_g^2 is the common curve times the group's: half of the one and twice the other are the same model."""
    plan = Plan.make(crowd, replace(OPTIONS, noise_groups="tomogram", update=update))
    begun = faml.start(plan, crowd, None, None)
    half, twice = begun.state.sigma2 / 2, 2 * begun.state.relative_noise  # type: ignore[operator]
    other = replace(begun, state=replace(begun.state, sigma2=half, relative_noise=twice))
    first, second = (faml.iterate(plan, crowd, c) for c in (begun, other))
    assert first.history[-1].log_likelihood == pytest.approx(second.history[-1].log_likelihood, rel=1e-6)
    np.testing.assert_allclose(first.state.group_sigma2[1:], second.state.group_sigma2[1:], rtol=1e-4)
    np.testing.assert_allclose(first.state.maps, second.state.maps, atol=1e-4 * first.state.maps.max())


def test_run_with_groups_goes_on_as_if_unbroken(crowd: ArrayParticles, tmp_path: Path) -> None:
    """Checkpoint and model file hold the groups' curves and scales; the run that goes on from them ends the same."""
    options, states = replace(OPTIONS, iterations=3, noise_groups="tomogram", scale_correction=True), []
    facts = {"options": {}, "input": {"fingerprint": "0"}, "start": {}, "versions": {}}
    with RunFolder(tmp_path) as folder:
        folder.begin(facts)

        def write(done: Any) -> None:
            states.append(done.state)
            folder.write_iteration(done, crowd)

        whole = faml.run(crowd, options, on_iteration=write)
    before = read_checkpoint(tmp_path / "run_it002_checkpoint")
    np.testing.assert_array_equal(before.state.relative_noise, states[1].relative_noise)
    again = faml.run(crowd, options, checkpoint=before)
    np.testing.assert_array_equal(again.maps, whole.maps)
    np.testing.assert_array_equal(again.state.group_sigma2, whole.state.group_sigma2)
    model = starfile.read(tmp_path / "run_it003_model.star")["model_noise_groups"]
    assert list(dict.fromkeys(model["famlNoiseGroup"])) == ["all", "t1", "t2"]
    mine = model["famlNoiseGroup"] == "t2"
    np.testing.assert_allclose(model["rlnSigma2Noise"][mine], whole.state.group_sigma2[2], rtol=1e-9)
    assert list(model["rlnSpectralIndex"][mine]) == list(range(SHELLS))
    np.testing.assert_array_equal(again.state.scale, whole.state.scale)
    scales = starfile.read(tmp_path / "run_it003_model.star")["model_scale"]["famlScale"]
    np.testing.assert_allclose(scales, whole.state.scale, rtol=1e-9)


def test_a_run_ends_with_the_weights_of_its_last_iteration(crowd: ArrayParticles) -> None:
    options = replace(OPTIONS, noise_groups="tomogram", scale_correction=True)
    found = faml.run(crowd, options)
    plan = Plan.make(crowd, options)
    expected = final_averages(plan, crowd, found.posterior, None, found.state)
    np.testing.assert_array_equal(found.maps, expected)
    for change in ({"scale": None}, {"relative_noise": None, "noise_groups": None}):
        assert (
            abs(final_averages(plan, crowd, found.posterior, None, replace(found.state, **change)) - expected).max() > 0
        )


def test_no_signal_to_noise_ratio_of_premultiplied_boxes(
    premultiplied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    particles, _ = opened(premultiplied, premultiplied["spectra"])
    monkeypatch.setattr(snr, "open_run_particles", lambda found: particles)
    notes: list[str] = []
    assert snr.snr_scores(None, None, 10, 0, print, notes) == []  # type: ignore[arg-type]
    assert notes == ["no signal-to-noise ratio: the particles are multiplied by their CTF"]


def test_scales_of_particles_are_found(rng: np.random.Generator, oracles: Any) -> None:
    """Signals of strength 1 and 2.5 in equal noise, random poses, from the structure: scales a factor of 2.5 apart."""
    n, (centres, widths, masses) = 24, oracles.blobs(rng, 6, 1.8, 1.1)
    strength = np.where(np.arange(n) % 2, 2.5, 1.0)
    rotations = Rotation.random(n, random_state=6).as_matrix()
    volumes = [s * oracles.blob_volume(BOX, centres @ r.T, widths, masses)
               for s, r in zip(strength, rotations, strict=True)]  # fmt: skip
    boxes = np.array(volumes) + 0.01 * rng.standard_normal((n, BOX, BOX, BOX))
    reference = oracles.blob_volume(BOX, centres, widths, masses).astype(np.float32)
    options = replace(OPTIONS, iterations=3, bandwidth=None, candidates=20, normalize=False, scale_correction=True)
    found = faml.run(ArrayParticles(boxes, VOXEL), options, reference=reference).state.scale
    assert found is not None
    np.testing.assert_allclose(found / found.mean(), strength / strength.mean(), rtol=0.1)


def test_final_average_trusts_the_quiet_group(rng: np.random.Generator, oracles: Any) -> None:
    """Known poses, noise three times as strong in half of the boxes: variance of the average by the textbook.

    Weighted by 1 / sigma_g^2 the noise that is left has the variance 1 / sum(1 / sigma_g^2); with equal weights it has
    sum(sigma_g^2) / n^2, for 1 and 9 that is 2.8 times as much.
    """
    n = 40
    index = np.arange(n) % 2
    volume = oracles.blob_volume(BOX, *oracles.blobs(rng, 6, 1.8, 1.1))
    curves = np.array([np.full(SHELLS, 1.0), np.full(SHELLS, 9.0)])
    spectra = fourier.transform(volume) + np.concatenate([coloured(rng, 1, curves[g]) for g in index])
    groups = {"optics": Groups(("quiet", "loud"), index)}
    particles = ArrayParticles(boxes_of(spectra), VOXEL, groups=groups)
    plan = Plan.make(particles, replace(OPTIONS, normalize=False))

    posterior = one_hot(np.zeros(n, np.int64), np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3)), 1, known=True)
    state = replace(state_of(np.full(SHELLS, 5.0), np.array([np.ones(SHELLS), *(curves / 5)])))
    state.noise_groups = np.array(["all", "quiet", "loud"])
    support = fourier.make_support(BOX, SHELLS - 1)
    inside = fourier.transform(volume * plan.wide_mask)
    left = [
        (
            abs(support.gather(fourier.transform(final_averages(plan, particles, posterior, None, s)) - inside)) ** 2
        ).mean()
        for s in (state, None)
    ]
    assert 2.0 < left[1] / left[0] < 3.8, left


@pytest.mark.parametrize("normalize", [True, False])
def test_an_offset_of_each_box_changes_nothing(normalize: bool, rng: np.random.Generator, oracles: Any) -> None:
    """Boxes with another constant each: the mask would spread it over the lowest shells, of averages and magnitudes."""
    n = 8
    volume = oracles.blob_volume(BOX, *oracles.blobs(rng, 6, 1.8, 1.1))
    boxes = volume + rng.standard_normal((n, BOX, BOX, BOX))
    offset = np.arange(n)[:, None, None, None] % 2 * 2.0
    rotations = Rotation.random(n, random_state=3).as_matrix()
    posterior = one_hot(np.zeros(n, np.int64), rotations, np.zeros((n, 3)), 1, known=True)
    maps = []
    for some in (boxes, boxes + offset):
        particles = ArrayParticles(some, VOXEL, missing_wedge(BOX, (-60, 60)))
        plan = Plan.make(particles, replace(OPTIONS, normalize=normalize))
        maps.append(final_averages(plan, particles, posterior))
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5 * np.abs(maps[0]).max())  # rounding of float32
