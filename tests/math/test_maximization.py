"""The M-step against Eq. 10-13 written out over the full Fourier volume, float64."""

import numpy as np
import pytest
import scipy.ndimage

from faml_gpu import faml, fourier, ops
from faml_gpu.expectation import BatchPosterior
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import (
    COVERAGE_FLOOR,
    Accumulators,
    coverage_planes,
    covered,
    direct_average,
    noise_sums,
    rotate_back,
    update_average,
)
from faml_gpu.options import Options
from faml_gpu.weights import centred_from_half, missing_wedge


def random_posterior(toy, rng):
    """Any probabilities that sum to 1 per particle: the M-step does not ask where they come from."""
    entries = np.array(toy.entries())
    i, k, p = np.ascontiguousarray(entries.T)
    probability = rng.random(len(entries))
    probability /= np.bincount(i, probability)[i]
    return BatchPosterior(
        i,
        k,
        toy.rotations[k, i, p],
        toy.shifts[k, i, p],
        probability,
        np.zeros((len(entries), toy.r_max + 1)),
        np.zeros(len(entries)),
        np.zeros(len(toy.particles)),
        np.zeros((len(toy.particles), 2)),
        len(entries),
        np.zeros(len(toy.particles)),
    )


def package_sums(toy, oracles, posterior, support, *, weigh_twice=False, mask=None):
    half = np.stack([oracles.half_of_cube(w) for w in toy.weights])
    return rotate_back(
        fourier.transform(toy.particles),
        half,
        toy.weight_index,
        mask,
        posterior,
        support,
        toy.sampler.padding,
        2,
        weigh_twice=weigh_twice,
        compensate=toy.sampler.compensate,
    )


def back_rotated(toy, oracles, i, rotation, shift, points, power, mask=1.0):
    """R^-1 (w X) and R^-1 w at `points`: what a particle says of the average's voxel xi lies at R xi."""
    weight = toy.weights[toy.weight_index[i]] ** power
    volume = oracles.centred_volume(weight * oracles.centred_cube(toy.particles[i])) * mask
    there = points @ rotation.T
    wx = toy.sampler(volume).turned(there) * np.conj(oracles.phase(there, shift, toy.box))
    return wx, oracles.sample(weight, there)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("box", [12, 13])
@pytest.mark.parametrize("name", ["Lattice", "Padded"])
def test_eq_10_with_weights_of_0_and_1(name, box, twice, rng, oracles):
    toy = oracles.Toy(rng, box, getattr(oracles, name))
    posterior = random_posterior(toy, rng)
    support = fourier.make_support(box, toy.r_max)
    sums, weights = package_sums(toy, oracles, posterior, support, weigh_twice=twice)
    mass = np.bincount(posterior.class_index, posterior.probability, minlength=2)
    old = support.gather(fourier.transform(toy.maps))
    inside = np.ones(len(support), bool)
    filled = update_average(sums, weights, mass, old, inside)

    points, _ = oracles.ball(toy.r_max)
    numerator, coverage = np.zeros((2, len(points)), complex), np.zeros((2, len(points)))
    eq10 = np.zeros((2, len(points)), complex)
    for i, k, r, t, p in zip(
        posterior.particle,
        posterior.class_index,
        posterior.rotations,
        posterior.shifts,
        posterior.probability,
        strict=True,
    ):
        wx, w = back_rotated(toy, oracles, i, r, t, points, 1)
        seen = w * wx if twice else wx
        numerator[k] += p * seen
        coverage[k] += p * w
        eq10[k] += p * (seen + (1 - w) * oracles.at(oracles.centred_cube(toy.maps[k]), points))
    for k in range(2):
        lookup = dict(zip(map(tuple, points), range(len(points)), strict=True))
        rows = [lookup[tuple(c)] for c in support.coords]
        np.testing.assert_allclose(sums[k], numerator[k][rows], atol=1e-9 * np.abs(numerator).max())
        np.testing.assert_allclose(weights[k], coverage[k][rows], atol=1e-10)
        expected = eq10[k][rows] / mass[k]
        np.testing.assert_allclose(filled[k], expected, atol=1e-9 * np.abs(expected).max())
        assert (coverage[k] > COVERAGE_FLOOR * mass[k]).any()
        ratio = numerator[k][rows] / np.maximum(coverage[k][rows], COVERAGE_FLOOR * mass[k])
        found = direct_average(sums, weights, mass)[k]
        np.testing.assert_allclose(found, ratio, atol=1e-9 * np.abs(ratio).max())


def test_a_mask_is_applied_to_w_x_in_real_space(rng, oracles):
    toy = oracles.Toy(rng, 12, oracles.Padded)
    posterior = random_posterior(toy, rng)
    support = fourier.make_support(12, toy.r_max)
    mask = rng.random((12, 12, 12))
    sums, _ = package_sums(toy, oracles, posterior, support, mask=mask)
    expected = np.zeros((2, len(support)), complex)
    for n in range(len(posterior.particle)):
        wx, _ = back_rotated(
            toy, oracles, posterior.particle[n], posterior.rotations[n], posterior.shifts[n], support.coords, 1, mask
        )
        expected[posterior.class_index[n]] += posterior.probability[n] * wx
    assert oracles.relative(sums, expected) < 1e-10


def q_function(toy, oracles, posterior, support, averages):
    """-sum P w^2 |X - RA|^2 / (2 sigma^2): what the M-step over A has to raise; averages (2, M) on the support."""
    half = np.stack([oracles.half_of_cube(w) for w in toy.weights])
    spectra, weights = support.gather(fourier.transform(toy.particles)), support.gather(half)
    maps = fourier.inverse_transform(support.scatter(averages), toy.box)
    total = 0.0
    for k, volume in enumerate(maps):
        mine = posterior.class_index == k
        i = posterior.particle[mine]
        shells = ops.residual(
            fourier.interpolation_grid(volume, toy.r_max, 1, compensate=False),
            spectra[i],
            weights,
            toy.weight_index[i],
            posterior.rotations[mine][:, None],
            posterior.shifts[mine][:, None],
            np.ones(len(i), np.int64),
            support,
            1,
        )[:, 0]
        total -= posterior.probability[mine] @ (shells[:, 1:] / (2 * toy.sigma2[1:])).sum(axis=1)
    return total


@pytest.mark.parametrize("box", [12, 13])
def test_squared_weights_maximise_the_likelihood(box, rng, oracles):
    """The residual is weighed by w^2: with fractions the ratio of sums of w^2 is the maximiser, that of w is not."""
    toy = oracles.Toy(rng, box, oracles.Lattice, fractional=True, n_particles=6)
    posterior = random_posterior(toy, rng)
    support = fourier.make_support(box, toy.r_max)
    mass = np.bincount(posterior.class_index, posterior.probability, minlength=2)
    sums, weights = package_sums(toy, oracles, posterior, support)
    squared = direct_average(sums, weights, mass)
    assert (weights > COVERAGE_FLOOR * mass[:, None]).mean() > 0.9
    # Where a floor is at work the ratio is not meant to be a maximum.
    free = weights > COVERAGE_FLOOR * mass[:, None]
    plain_sums, plain_weights = np.zeros_like(sums), np.zeros_like(weights)
    for n in range(len(posterior.particle)):
        wx, w = back_rotated(
            toy, oracles, posterior.particle[n], posterior.rotations[n], posterior.shifts[n], support.coords, 1
        )
        plain_sums[posterior.class_index[n]] += posterior.probability[n] * wx
        plain_weights[posterior.class_index[n]] += posterior.probability[n] * w
    plain = direct_average(plain_sums, plain_weights, mass)
    best = q_function(toy, oracles, posterior, support, squared)
    slopes = []
    for _ in range(3):
        step = (rng.standard_normal(squared.shape) + 1j * rng.standard_normal(squared.shape)) * free
        step *= 1e-2 * np.linalg.norm(squared) / np.linalg.norm(step)
        for a, kind in ((squared, "w^2"), (plain, "w")):
            up, down = (q_function(toy, oracles, posterior, support, a + sign * step) for sign in (1, -1))
            middle = q_function(toy, oracles, posterior, support, a)
            # Q is quadratic: the central difference is its slope exactly, the second one its curvature.
            slopes.append((kind, abs(up - down) / abs(up + down - 2 * middle)))
            if kind == "w^2":
                assert max(up, down) < best
    assert max(s for kind, s in slopes if kind == "w^2") < 1e-8
    assert min(s for kind, s in slopes if kind == "w") > 1e-4
    # The code's sums are of w^2 indeed.
    assert oracles.relative(weights, plain_weights) > 0.05


@pytest.mark.parametrize("fractional", [False, True])
def test_filling_from_the_old_average_never_lowers_it(fractional, rng, oracles):
    toy = oracles.Toy(rng, 13, oracles.Lattice, fractional=fractional)
    posterior = random_posterior(toy, rng)
    support = fourier.make_support(13, toy.r_max)
    mass = np.bincount(posterior.class_index, posterior.probability, minlength=2)
    sums, weights = package_sums(toy, oracles, posterior, support)
    old = support.gather(fourier.transform(toy.maps))
    new = update_average(sums, weights, mass, old, np.ones(len(support), bool))
    assert q_function(toy, oracles, posterior, support, new) > q_function(toy, oracles, posterior, support, old)


def test_outside_the_active_support_the_average_is_divided_by_its_coverage(rng):
    sums = rng.standard_normal((1, 6)) + 1j * rng.standard_normal((1, 6))
    weights, mass, old = rng.uniform(0.5, 3, (1, 6)), np.array([4.0]), rng.standard_normal((1, 6)) + 0j
    inside = np.array([True, True, True, False, False, False])
    new = update_average(sums, weights, mass, old, inside)
    np.testing.assert_allclose(new[0, 3:], (sums / weights)[0, 3:])
    np.testing.assert_allclose(new[0, :3], ((sums + (4 - weights) * old) / 4)[0, :3])


def test_empty_class_keeps_its_average_and_stays_finite(rng):
    sums, weights = np.zeros((2, 5), complex), np.zeros((2, 5))
    sums[0], weights[0] = rng.standard_normal(5), 1.0
    mass, old = np.array([2.0, 0.0]), rng.standard_normal((2, 5)) + 1j
    new = update_average(sums, weights, mass, old, np.array([True, True, True, False, False]))
    np.testing.assert_array_equal(new[1], old[1])
    assert np.isfinite(direct_average(sums, weights, mass)).all()
    np.testing.assert_array_equal(covered(weights, mass), [1, 0])


def test_unseen_voxels_stay_empty(rng):
    """What leaks into a voxel that next to no particle observed is not divided by next to nothing."""
    sums, weights = np.full((1, 3), 1e-6 + 0j), np.array([[1e-6, 0.0, 1.0]])
    found = direct_average(sums, weights, np.array([1.0]))
    np.testing.assert_array_equal(found[0, :2], 0)
    assert found[0, 2] == 1e-6
    np.testing.assert_allclose(covered(weights, np.array([1.0])), [1 / 3])


@pytest.mark.parametrize("fractional", [False, True])
def test_noise_sums_are_eq_12s(fractional, rng, oracles):
    toy = oracles.Toy(rng, 12, oracles.Lattice, fractional=fractional)
    posterior = random_posterior(toy, rng)
    posterior.residual[:] = rng.random(posterior.residual.shape)
    support = fourier.make_support(12, toy.r_max)
    half = support.gather(np.stack([oracles.half_of_cube(w) for w in toy.weights]))
    (residual,), (observed,) = noise_sums(posterior, half, toy.weight_index, support)
    np.testing.assert_allclose(
        residual, sum(p * r for p, r in zip(posterior.probability, posterior.residual, strict=True))
    )
    points, shell = oracles.ball(toy.r_max)
    expected = sum(
        np.bincount(shell, oracles.at(toy.weights[w], points) ** 2, minlength=toy.r_max + 1) for w in toy.weight_index
    )
    np.testing.assert_allclose(observed, expected)


def test_accumulators_add_up(rng):
    def some():
        a = Accumulators.zero(2, 5, 3)
        a.sums += rng.standard_normal((2, 5)) + 1j
        a.weights += rng.random((2, 5))
        a.mass += rng.random(2)
        a.residual += rng.random(4)
        a.observed += rng.random(4)
        a.shift2, a.log_evidence, a.n = 2.0, -3.0, 4
        return a

    rows, every = ("sums", "weights", "mass"), [some() for _ in range(4)]
    total = Accumulators.zero(2, 5, 3, parts=3)
    for part, sums in zip((0, 1, 1, 2), every, strict=True):
        total.merge(sums, part)

    def added(name, members=range(4)):
        return sum(getattr(every[i], name) for i in members)

    whole = total.together()
    assert total.parts == 3
    assert whole.parts == 1
    for name in vars(whole).keys() - {"parts"}:
        np.testing.assert_allclose(getattr(whole, name), added(name))
    np.testing.assert_allclose(total.by_part()[1], added("sums", [1, 2]))
    for part, others in ((0, [1, 2, 3]), (1, [0, 3]), (2, [0, 1, 2])):
        for name in rows:
            np.testing.assert_allclose(getattr(total.without(part), name), added(name, others))


@pytest.mark.parametrize("box", [12, 13])
def test_planes_of_what_was_measured(box):
    """One particle as it lies: its own wedge, of which the planes are known; and one class without particles."""
    support = fourier.make_support(box, 4)
    wedge = support.gather(missing_wedge(box, (-45, 45))).astype(float)
    planes = coverage_planes(np.stack([3 * wedge, 0 * wedge]), np.array([3.0, 0.0]), support)
    assert planes.shape == (2, 3, box, box)
    row, column = np.indices((box, box)) - box // 2
    radius = np.hypot(row, column)
    inside = (radius > 0) & (radius <= 4)
    np.testing.assert_array_equal(np.isfinite(planes), np.broadcast_to(inside, planes.shape))
    assert (planes[1][:, inside] == 0).all()
    xy, xz, yz = planes[0]
    # Tilts to 45 degrees about y: |z| <= |x| was measured; of x = 0 only z = 0.
    np.testing.assert_array_equal(xz[inside], (abs(row) <= abs(column))[inside])
    np.testing.assert_array_equal(yz[inside], (row == 0)[inside])
    assert (xy[inside] == 1).all()


def test_planes_of_a_run(small_simulation):
    """What a particle in the pose R measured at R xi belongs to xi of the average: summed by hand over all poses."""
    data = small_simulation
    result = faml.run(ArrayParticles(data.boxes, data.voxel_size, data.weight), Options(iterations=1, bandwidth=6))
    found = result.state.seen[0]
    posterior, box = result.posterior, len(data.boxes[0])
    cube = centred_from_half(data.weight, box)
    steps = np.indices((box, box)).reshape(2, -1)[::-1] - box // 2
    axes = {"xy": (0, 1), "xz": (0, 2), "yz": (1, 2)}
    for plane, name in zip(found, axes, strict=True):
        xi = np.zeros((3, box**2))
        xi[list(axes[name])] = steps
        known = np.isfinite(plane.ravel())
        there = np.einsum("pij,jm->pim", posterior.rotations, xi[:, known]) + box // 2
        read = [scipy.ndimage.map_coordinates(cube, x[::-1], order=1) for x in there]
        expected = (np.array(read) * posterior.probability[:, None]).sum(axis=0) / posterior.probability.sum()
        assert np.corrcoef(plane.ravel()[known], expected)[0, 1] > 0.9, name
