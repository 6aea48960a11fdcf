"""Correlation on SO(3): against the double sum written out, against sums over voxels, against every rotation tried."""

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from faml_gpu import fourier, ops
from faml_gpu.fast_alignment import shift_window, translations
from faml_gpu.fast_alignment.align import Observation, align, make_reference, normalised_scores
from faml_gpu.fast_alignment.harmonics import shell_harmonics
from faml_gpu.fast_alignment.so3 import correlate, grid_angles, interpolate
from faml_gpu.geometry import euler_to_matrix, random_rotations, rotation_angle


def with_negative_m(c):
    """(r, L, n_l) for m >= 0 to {(l, m): (r,)} for all m, by c_l,-m = (-1)^m conj c_lm."""
    out = {}
    for i in range(c.shape[2]):
        l = 2 * i
        for m in range(l + 1):
            out[l, m] = c[:, m, i].astype(complex)
            out[l, -m] = (-1) ** m * np.conj(out[l, m])
    return out


def random_coefficients(rng, r_max, bandwidth):
    n_l = (bandwidth + 1) // 2
    c = rng.standard_normal((r_max, bandwidth, n_l)) + 1j * rng.standard_normal((r_max, bandwidth, n_l))
    c[:, np.arange(bandwidth)[:, None] > 2 * np.arange(n_l)] = 0
    c[:, 0] = c[:, 0].real
    return c.astype(np.complex64)


def double_sum(p, q, alpha, beta, gamma):
    """sum over l, m, m', r of conj p_lm(r) D^l_mm'(R) q_lm'(r), D by matrix exponentials, float64."""
    p, q = with_negative_m(p), with_negative_m(q)
    total = 0.0
    for l in sorted({l for l, _ in p}):
        m = np.arange(-l, l + 1)
        j_plus = np.diag(np.sqrt((l - m[:-1]) * (l + m[:-1] + 1.0)), -1)
        j_y = (j_plus - j_plus.T) / 2j
        j_z = np.diag(m).astype(complex)
        big_d = expm(-1j * alpha * j_z) @ expm(-1j * beta * j_y) @ expm(-1j * gamma * j_z)
        for a in m:
            for b in m:
                total += (np.conj(p[l, a]) * q[l, b]).sum() * big_d[a + l, b + l]
    return total


@pytest.mark.parametrize("bandwidth", [4, 7])
def test_is_the_double_harmonic_sum(bandwidth, rng):
    p = np.stack([random_coefficients(rng, 3, bandwidth) for _ in range(3)])
    q = random_coefficients(rng, 3, bandwidth)
    before = q.copy()
    found = correlate(p, q)
    assert found.shape == (3, 2 * bandwidth, 2 * bandwidth, 2 * bandwidth)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(q, before)
    beta, angle = grid_angles(bandwidth)
    scale = np.abs(found).max()
    for b, j, g, a in rng.integers(0, [3, *[2 * bandwidth] * 3], (8, 4)):
        expected = double_sum(p[b], q, angle[a], beta[j], angle[g])
        assert abs(expected.imag) < 1e-5 * scale
        assert abs(found[b, j, g, a] - expected.real) < 1e-5 * scale  # complex64 throughout


@pytest.fixture(scope="module")
def case(oracles):
    """A structure of blobs in a box of 24, its reference, and a rotated copy seen through a wedge."""
    rng = np.random.default_rng(3)
    box, r_max, bandwidth = 24, 8, 16
    structure = oracles.blobs(rng, 12, 5.0, 1.2)
    volume = oracles.blob_volume(box, *structure)
    support = fourier.make_support(box, r_max)
    grid = fourier.interpolation_grid(volume.astype(np.float32), r_max, 2)
    reference = make_reference(grid, 2, r_max, bandwidth)
    weight = oracles.half_of_cube(oracles.wedge_cube(box, [0, 0, 1], np.tan(np.deg2rad(30)))).astype(np.float32)
    return box, r_max, bandwidth, structure, support, reference, support.gather(weight)


def grid_rotations(bandwidth, places):
    beta, angle = grid_angles(bandwidth)
    j, g, a = np.asarray(places).T
    return euler_to_matrix(np.stack([angle[a], beta[j], angle[g]], axis=1))


def between_shells(support, rotation, magnitude, power):
    """The rotated reference as the harmonics hold it: |A|^power on integer shells, linear in |xi| in between.

    `magnitude(points)` is |A| at points (n, 3).
    """
    radius = np.linalg.norm(support.coords, axis=1)[:, None]
    direction = support.coords / radius @ rotation
    low = np.minimum(np.floor(radius), support.r_max)
    high = np.minimum(low + 1, support.r_max)
    fraction = (radius - low)[:, 0]
    return (1 - fraction) * magnitude(low * direction) ** power + fraction * magnitude(high * direction) ** power


def test_c0_and_c1_are_voxel_sums(case, rng, oracles):
    box, _, bandwidth, structure, support, reference, weight = case
    places = rng.integers(0, 2 * bandwidth, (12, 3))
    at = tuple(places.T)
    rotations = grid_rotations(bandwidth, places)
    harmonics = shell_harmonics(support, bandwidth)

    def exact(points):
        return np.abs(oracles.blob_transform(box, points, *structure))

    magnitude = exact(support.coords).astype(np.float32)
    c0 = correlate(harmonics.coefficients((weight * magnitude)[None]), reference.magnitude)[0][at]
    c1 = correlate(harmonics.coefficients(weight[None]), reference.power)[0][at]

    # Left over are the trilinear samples of the reference and the end of the series at l < L: 1 %.
    shells = np.stack([between_shells(support, r, exact, 1) for r in rotations])
    np.testing.assert_allclose(c0, 2 * (weight * magnitude * shells).sum(axis=1), rtol=0.01)
    shells = np.stack([between_shells(support, r, exact, 2) for r in rotations])
    np.testing.assert_allclose(c1, 2 * (weight * shells).sum(axis=1), rtol=0.01)

    # Against the voxels themselves: |A|, and more so |A|^2, falls steeply and is convex from shell to shell, so linear
    # interpolation is too high where most of the power is; but by the same factor for every rotation.
    for rotated in (
        np.stack([exact(support.coords @ r) for r in rotations]),
        np.abs(ops.rotate(reference.grid, rotations, support.coords, reference.padding)),
    ):
        ratio0 = c0 / (2 * (weight * magnitude * rotated).sum(axis=1))
        ratio1 = c1 / (2 * (weight * rotated**2).sum(axis=1))
        assert abs(ratio0.mean() - 1) < 0.05
        assert ratio0.std() < 0.01
        assert abs(ratio1.mean() - 1) < 0.15
        assert ratio1.std() < 0.015
    # They vary enough over rotations for this to mean something.
    assert c0.std() > 0.02 * c0.mean()
    assert c1.std() > 0.01 * c1.mean()


def test_maximum_is_where_trying_every_rotation_finds_it(oracles):
    rng = np.random.default_rng(5)
    box, r_max, bandwidth = 16, 6, 8
    structure = oracles.blobs(rng, 8, 4.0, 1.1)
    support = fourier.make_support(box, r_max)
    grid = fourier.interpolation_grid(oracles.blob_volume(box, *structure).astype(np.float32), r_max, 2)
    reference = make_reference(grid, 2, r_max, bandwidth)
    n = 2 * bandwidth
    places = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    every = np.abs(ops.rotate(grid, grid_rotations(bandwidth, places), support.coords, 2))
    weight = support.gather(oracles.half_of_cube(oracles.wedge_cube(box, [0, 0, 1], 0.5))).astype(np.float32)
    for truth in ([3, 5, 9], [14, 0, 7]):
        rotation = grid_rotations(bandwidth, [truth])[0]
        spectrum = oracles.blob_transform(box, support.coords @ rotation, *structure)
        spectrum *= oracles.phase(support.coords, [1.3, -0.4, 2.2], box)  # magnitudes do not see the shift
        observation = Observation(
            support, spectrum[None].astype(np.complex64), weight[None], np.zeros(1, np.int64), ("w",)
        )
        precision = np.ones(len(support), np.float32)
        found = normalised_scores(observation, reference, precision, centred=False)[0]
        brute = (weight * np.abs(spectrum) * every).sum(axis=1) / np.sqrt((weight * every**2).sum(axis=1))
        # Absolute scale: c~0 over the root of c~1^2, each over both voxels of a pair; c~1^2 is a tenth too high (see
        # above) for all rotations alike.
        ratio = found.ravel() / (np.sqrt(2) * brute)
        assert abs(ratio.mean() - 1) < 0.08
        assert ratio.std() < 0.02
        assert brute.std() > 0.02 * brute.mean()
        best = np.unravel_index(found.argmax(), found.shape)
        assert best == np.unravel_index(brute.argmax(), found.shape) == tuple(truth)


@pytest.mark.parametrize("centred", [False, True])
def test_scores_are_eq_1_and_2(case, centred, rng, oracles):
    """Eq. 1-2 with magnitudes and precision, the mean per shell taken over what is observed."""
    box, r_max, bandwidth, structure, support, reference, weight = case
    fraction = weight * rng.uniform(0.3, 1.0, len(support)).astype(np.float32)
    rotation = random_rotations(1, rng)[0]
    spectrum = oracles.blob_transform(box, support.coords @ rotation, *structure) + 3.0 * (
        rng.standard_normal(len(support)) + 1j * rng.standard_normal(len(support))
    )
    precision = (1 / (1 + support.shell.astype(np.float32))).astype(np.float32)
    weights = np.stack([weight, fraction])
    observation = Observation(
        support, np.tile(spectrum.astype(np.complex64), (2, 1)), weights, np.array([1, 0]), ("a", "b")
    )
    kept = {}
    found = normalised_scores(observation, reference, precision, centred=centred, kept=kept)
    assert set(kept) == {"a", "b"}
    again = normalised_scores(observation, reference, precision, centred=centred, kept=kept)
    np.testing.assert_array_equal(found, again)
    places = rng.integers(0, 2 * bandwidth, (10, 3))
    rotations = grid_rotations(bandwidth, places)

    def interpolated(points):
        return np.abs(ops.rotate(reference.grid, np.eye(3)[None], points, 2)[0]).astype(float)

    first, second = (np.stack([between_shells(support, r, interpolated, power) for r in rotations]) for power in (1, 2))
    for b, w in enumerate([fraction, weight]):
        x = np.abs(spectrum)
        if centred:
            for s in range(1, r_max + 1):
                shell = support.shell == s
                x[shell] -= (w * x)[shell].sum() / w[shell].sum()
        c0 = 2 * (w**2 * precision * x * first).sum(axis=1)
        c1 = np.sqrt(2 * (w**2 * precision * second).sum(axis=1))
        # Left over: the series ends at l < L. Centred sums nearly cancel, so the bound is on the size of the terms.
        size = np.sqrt(2 * (w**2 * precision * x**2).sum())
        np.testing.assert_allclose(found[b][tuple(places.T)], c0 / c1, atol=0.01 * size)


def test_align_finds_pose_and_shift(case, oracles):
    box, _, _, structure, support, reference, weight = case
    truth = random_rotations(4, np.random.default_rng(8))
    shifts = np.array([[0.0, 0, 0], [1.4, -0.6, 0.3], [-2.0, 2.0, 1.0], [0.5, 0.5, -2.5]])
    spectra = np.stack(
        [
            oracles.blob_transform(box, support.coords @ r, *structure) * oracles.phase(support.coords, t, box)
            for r, t in zip(truth, shifts, strict=True)
        ]
    ).astype(np.complex64)
    observation = Observation(support, spectra * weight, weight[None], np.zeros(4, np.int64), ("w",))
    precision = np.ones(len(support), np.float32)
    found = align(observation, reference, precision, shift_window(support, 3.5), 20, centred=True)
    assert (found.count > 0).all()
    assert (found.count <= 20).all()
    best = found.correlation.argmax(axis=1)
    rows = np.arange(4)
    # One grid step is 180 / 16 = 11 degrees; noise-free, interpolated off the grid.
    assert (rotation_angle(found.rotations[rows, best], truth) < 4).all()
    assert (np.abs(found.shifts[rows, best] - shifts) < 0.35).all()
    assert (found.correlation[rows, best] > 0.95).all()
    assert (found.correlation <= 1.02).all()
    # The gain is that of the residual, as far as the parabola of the shift tells: a few per cent of the best.
    arguments = observation.spectra, observation.weights, observation.weight_index
    residual = ops.residual(reference.grid, *arguments, found.rotations, found.shifts, found.count, support, 2).sum(
        axis=2
    )
    gain = (abs(spectra * weight) ** 2).sum(axis=1)[:, None] - 0.5 * residual
    valid = np.arange(20) < found.count[:, None]
    assert np.abs(found.gain - gain)[valid].max() < 0.05 * gain.max()
    assert np.median(np.abs(found.gain - gain)[valid]) < 0.02 * gain.max()


def test_align_piece_by_piece(case, oracles, monkeypatch):
    """Candidates of several particles go through the shift search as one list: in pieces of it they are the same."""
    box, _, _, structure, support, reference, weight = case
    turned = random_rotations(3, np.random.default_rng(9))
    spectra = np.stack([oracles.blob_transform(box, support.coords @ r, *structure) for r in turned])
    index = np.zeros(3, np.int64)
    observation = Observation(support, (spectra * weight).astype(np.complex64), weight[None], index, ("w",))
    arguments = observation, reference, np.ones(len(support), np.float32), shift_window(support, 2.0), 5
    whole = align(*arguments, centred=True)
    monkeypatch.setattr(translations, "working_bytes", lambda _, cached: 1)  # one candidate at a time
    one_by_one = align(*arguments, centred=True)
    np.testing.assert_array_equal(whole.rotations, one_by_one.rotations)
    np.testing.assert_allclose(whole.shifts, one_by_one.shifts, atol=1e-3)
    np.testing.assert_allclose(whole.correlation, one_by_one.correlation, rtol=1e-4)


@pytest.mark.parametrize("where", ["numpy", "emulated"])
def test_between_the_points_of_the_grid(where, rng, request):
    """Trilinear in the angles, around all three circles: beyond a pole (alpha, -beta, gamma) is (alpha + pi, beta,
    gamma + pi)."""
    n = 8
    table, index = rng.random((3, n, n, n)).astype(np.float32), rng.integers(0, 3, 300)
    alpha, gamma = rng.uniform(-np.pi, np.pi, (2, 300))
    beta = np.concatenate([rng.uniform(0, np.pi, 200), rng.uniform(0, 0.2, 50), np.pi - rng.uniform(0, 0.2, 50)])
    beta[200], gamma[200] = 0, 0  # at the pole itself, all of the turn in alpha
    around = np.roll(table, (n // 2, n // 2), axis=(2, 3))  # (alpha + pi, beta, gamma + pi)
    whole = np.concatenate([around[:, :1], table, around[:, -1:]], axis=1)
    place = np.stack([beta * n / np.pi - 0.5 + 1, gamma * n / (2 * np.pi), alpha * n / (2 * np.pi)])
    wrapped = np.pad(whole, ((0, 0), (0, 0), (n, n), (n, n)), mode="wrap")
    place[1:] += n
    expected = np.array(
        [map_coordinates(wrapped[k], p[:, None], order=1)[0] for k, p in zip(index, place.T, strict=True)]
    )
    given = table, index, euler_to_matrix(np.stack([alpha, beta, gamma], axis=1))
    if where == "emulated":
        request.getfixturevalue("emulated_gpu")
        import cupy

        found = interpolate(*map(cupy.asarray, given)).get()
    else:
        found = interpolate(*given)
    np.testing.assert_allclose(found, expected, atol=1e-6)
