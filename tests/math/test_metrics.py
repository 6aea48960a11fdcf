from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import metrics
from faml_gpu.errors import InputError
from faml_gpu.fourier import full_band, make_support, transform
from faml_gpu.fsc import lowpass
from faml_gpu.masks import soft_sphere
from faml_gpu.simulate import Phantom, density, groel, ribosome
from faml_gpu.simulate.forward import simulate_particle
from faml_gpu.weights import missing_wedge


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.rad2deg(Rotation.from_matrix(a.T @ b).magnitude()))


def test_correlation_is_pearson_inside_the_mask() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 10, 10, 10)) + 5
    mask = soft_sphere(10, 3, 0)
    inside = mask > 0
    assert metrics.correlation(a, b, mask) == pytest.approx(np.corrcoef(a[inside], b[inside])[0, 1], abs=1e-12)
    assert metrics.correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-12)
    assert metrics.correlation(a, 7 - 2 * a, mask) == pytest.approx(-1)
    assert metrics.correlation(a, np.ones_like(a), mask) == 0.0
    # A weight of 2 counts a voxel twice.
    x, y = a[0, :, 0], b[0, :, 0]
    twice = metrics.correlation(x, y, np.where(np.arange(10) < 5, 2, 1))
    assert twice == pytest.approx(np.corrcoef(np.r_[x, x[:5]], np.r_[y, y[:5]])[0, 1])


# --- gauge --------------------------------------------------------------------------------------------------


def poses(n: int, symmetry: np.ndarray, outliers: float, seed: int) -> tuple[np.ndarray, ...]:
    """Poses found with 3 degrees and 0.3 voxel of error in a random gauge modulo symmetry, some of them plain wrong."""
    rng = np.random.default_rng(seed)
    true_r, true_t = Rotation.random(n, rng).as_matrix(), rng.uniform(-3, 3, (n, 3))
    gauge, u = Rotation.random(None, rng).as_matrix(), rng.uniform(-4, 4, 3)
    # R_i Q S_i = R*_i, t_i + R_i u = t*_i, solved for (R_i, t_i).
    error = Rotation.from_rotvec(np.deg2rad(3) / np.sqrt(3) * rng.standard_normal((n, 3))).as_matrix()
    pick = symmetry[rng.integers(len(symmetry), size=n)]
    r = error @ true_r @ np.swapaxes(pick, 1, 2) @ gauge.T
    wrong = rng.permutation(n)[: int(outliers * n)]
    r[wrong] = Rotation.random(len(wrong), rng).as_matrix() if len(wrong) else r[wrong]
    t = true_t - r @ u + 0.3 / np.sqrt(3) * rng.standard_normal((n, 3))
    t[wrong] = rng.uniform(-8, 8, (len(wrong), 3))
    return r, t, true_r, true_t, gauge, u, wrong


@pytest.mark.parametrize("outliers", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("phantom", [ribosome(), groel()], ids=["C1", "D7"])
def test_common_gauge_is_found(phantom, outliers: float) -> None:
    symmetry = phantom.rotations()
    for seed in range(5):
        r, t, true_r, true_t, gauge, u, wrong = poses(100, symmetry, outliers, seed)
        found, offset = metrics.common_gauge(r, t, true_r, true_t, symmetry)
        # 3 degrees over 100 poses leave 0.3; 0.3 voxel leaves 0.03 (and 3 degrees of a 6 voxel offset as much again).
        assert min(angle(found, gauge @ s) for s in symmetry) < 1.5
        assert np.linalg.norm(offset - u) < 0.3
        angles, distances = metrics.pose_errors(r, t, true_r, true_t, symmetry)
        right = np.setdiff1d(np.arange(100), wrong)
        assert np.median(angles[right]) == pytest.approx(2.7, abs=0.8)  # median of 3 degrees root mean square: 2.66
        assert angles[right].max() < 12
        assert np.median(distances[right]) < 0.6
        if outliers and len(symmetry) == 1:
            assert np.median(angles[wrong]) > 60


def test_exact_poses_have_no_error() -> None:
    rng = np.random.default_rng(1)
    r, t = Rotation.random(30, rng).as_matrix(), rng.uniform(-3, 3, (30, 3))
    q, u = Rotation.random(None, rng).as_matrix(), np.array([1.0, -2.0, 0.5])
    angles, distances = metrics.pose_errors(r, t, r @ q, t + r @ u)
    np.testing.assert_allclose(angles, 0, atol=1e-5)
    np.testing.assert_allclose(distances, 0, atol=1e-9)
    # A gauge is one for all: the same rotation on the other side is none.
    angles, _ = metrics.pose_errors(r, t, q @ r, t)
    assert np.median(angles) > 10


def test_wrong_shifts_do_not_move_the_gauge() -> None:
    """Rotations all right, a fifth of the shifts 6 voxels off in one direction."""
    rng = np.random.default_rng(4)
    r, t = Rotation.random(50, rng).as_matrix(), rng.uniform(-3, 3, (50, 3))
    u = np.array([1.0, -2.0, 0.5])
    found = t + r @ u
    found[:10] += r[:10] @ [0.0, 0.0, 6.0]
    _, offset = metrics.common_gauge(r, found, r, t)
    np.testing.assert_allclose(offset, -u, atol=1e-9)
    _, distances = metrics.pose_errors(r, found, r, t)
    np.testing.assert_allclose(distances, np.repeat([6.0, 0.0], [10, 40]), atol=1e-9)


def test_pose_errors_refuse_different_numbers() -> None:
    with pytest.raises(InputError, match="poses"):
        metrics.pose_errors(np.eye(3)[None], np.zeros((1, 3)), np.zeros((2, 3, 3)), np.zeros((2, 3)))


# --- classes ------------------------------------------------------------------------------------------------


def test_best_labels_and_scores_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    found = np.array([2, 2, 2, 0, 0, 0, 0, 1, 1, 2])
    named = metrics.best_labels(found, truth)
    assert named.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 0]
    np.testing.assert_allclose(metrics.precision(named, truth), [3 / 4, 3 / 4, 1])
    np.testing.assert_allclose(metrics.recall(named, truth), [3 / 4, 1, 2 / 3])
    np.testing.assert_allclose(metrics.f1_score(named, truth), [3 / 4, 6 / 7, 4 / 5])


def test_best_labels_is_the_best_assignment_not_the_greedy_one() -> None:
    # Found 0 has 5 of true 0 and 4 of true 1, found 1 has 4 of true 0: 4 + 4 agree when 0 becomes 1.
    truth = np.array([0] * 5 + [1] * 4 + [0] * 4)
    found = np.array([0] * 9 + [1] * 4)
    assert (metrics.best_labels(found, truth) == truth).sum() == 8


def test_scores_with_missing_and_extra_classes() -> None:
    truth = np.array([0, 0, 1, 1])
    everything = metrics.best_labels(np.zeros(4, int), truth)
    f1 = metrics.f1_score(everything, truth)
    assert sorted(f1.tolist()) == [0.0, pytest.approx(2 / 3)]
    split = metrics.best_labels(np.array([2, 2, 0, 1]), truth)
    assert split[:2].tolist() == [0, 0]
    assert sorted(split[2:].tolist()) == [1, 2]


# --- maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [40, 41])
def test_rotate_map_is_the_analytic_density(box: int) -> None:
    phantom = ribosome()
    reference = density(phantom, box, 8.0, resolution=30.0)
    for seed in range(3):
        rotation, shift = Rotation.random(random_state=seed).as_matrix(), np.array([1.5, -2.25, 0.75])
        moved = metrics.rotate_map(reference, rotation, shift)
        exact = density(phantom, box, 8.0, rotation, shift, resolution=30.0)
        # Cubic splines on blobs of 1.5 voxels: 0.5 %
        assert np.linalg.norm(moved - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("phantom", [ribosome(), groel()], ids=["C1", "D7"])
def test_align_map_finds_the_pose(phantom) -> None:
    rng = np.random.default_rng(2)
    reference = density(phantom, 64, 6.0)
    rotation, shift = Rotation.random(None, rng).as_matrix(), np.array([3.2, -2.6, 1.4])
    clean = density(phantom, 64, 6.0, rotation, shift)
    noisy = clean + (0.3 * rng.standard_normal(clean.shape)).astype(np.float32)
    found_r, found_t, r, aligned = metrics.align_map(
        noisy, reference, voxel_size=6.0, mask_radius=phantom.radius, resolution=30.0
    )
    assert min(angle(found_r, rotation @ s) for s in phantom.rotations()) < 1.5
    assert np.linalg.norm(found_t - shift) < 0.25
    # r is what noise leaves at 30 A when the pose is exact, within what the spline costs.
    mask = soft_sphere(64, phantom.radius / 6, 0)
    best = metrics.correlation(lowpass(reference + (noisy - clean), 30.0, 6.0), lowpass(reference, 30.0, 6.0), mask)
    assert r == pytest.approx(best, abs=0.01)
    assert metrics.correlation(lowpass(aligned, 30.0, 6.0), lowpass(reference, 30.0, 6.0), mask) > best - 0.01


def test_align_map_agrees_with_the_gauge() -> None:
    """The pose of the average with respect to the truth is the gauge between its poses and the true ones."""
    phantom, rng = ribosome(), np.random.default_rng(7)
    q, u = Rotation.random(None, rng).as_matrix(), np.array([1.0, -1.5, 2.0])
    true_r, true_t = Rotation.random(20, rng).as_matrix(), rng.uniform(-2, 2, (20, 3))
    # Particles in true poses (R*, t*) of the truth are in poses (R, t) of an average that is the truth in pose (Q, u).
    r = true_r @ q.T
    t = true_t - r @ u
    found_q, found_u = metrics.common_gauge(r, t, true_r, true_t)
    average = density(phantom, 32, 12.0, q, u)
    map_r, map_t, _, _ = metrics.align_map(
        average, density(phantom, 32, 12.0), voxel_size=12.0, mask_radius=phantom.radius, resolution=40.0
    )
    assert angle(map_r, found_q) < 1.0
    assert np.linalg.norm(map_t - found_u) < 0.1


def test_align_map_of_nothing_is_zero() -> None:
    reference = density(ribosome(), 32, 12.0)
    _, _, r, aligned = metrics.align_map(np.zeros_like(reference), reference, voxel_size=12.0, mask_radius=135.0)
    assert r == 0.0
    assert np.isfinite(aligned).all()
    with pytest.raises(InputError, match="shape"):
        metrics.align_map(np.zeros((8, 8, 8)), reference, voxel_size=12.0, mask_radius=135.0)


# --- point groups -------------------------------------------------------------------------------------------

GOLDEN = (1 + np.sqrt(5)) / 2


def holds(group: np.ndarray, angle: float, axis: tuple[float, float, float]) -> bool:
    """Whether the rotation by an angle (degrees) about an axis is in the group."""
    rotation = Rotation.from_rotvec(np.deg2rad(angle) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    return bool(np.abs(group - rotation).max(axis=(1, 2)).min() < 1e-9)


@pytest.mark.parametrize(
    ("name", "order", "inside", "outside"),
    [
        ("C1", 1, [], [(180, (0, 0, 1))]),
        ("c7", 7, [(360 / 7, (0, 0, 1))], [(180, (1, 0, 0))]),
        ("D2", 4, [(180, (0, 0, 1)), (180, (1, 0, 0)), (180, (0, 1, 0))], [(90, (0, 0, 1))]),
        ("D7", 14, [(360 / 7, (0, 0, 1)), (180, (1, 0, 0))], [(180, (0, 1, 0))]),
        ("T", 12, [(120, (0, 0, 1)), (180, (0, 2**0.5, 1))], [(180, (0, 0, 1)), (120, (1, 1, 1))]),
        ("O", 24, [(90, (0, 0, 1)), (90, (1, 0, 0)), (120, (1, 1, 1)), (180, (1, 1, 0))], [(72, (0, 1, GOLDEN))]),
        ("I", 60, [(180, (0, 0, 1)), (120, (1, 1, 1)), (72, (1, 0, GOLDEN))], [(72, (0, 1, GOLDEN))]),
        ("I1", 60, [(72, (0, 1, GOLDEN)), (72, (GOLDEN, 0, 1))], [(72, (1, 0, GOLDEN))]),
        ("I2", 60, [(180, (0, 1, 0)), (120, (1, 1, 1)), (72, (1, 0, GOLDEN))], [(72, (0, 1, GOLDEN))]),
    ],
)
def test_point_groups_have_their_axes(name: str, order: int, inside: list, outside: list) -> None:
    group = metrics.point_group(name)
    assert group.shape == (order, 3, 3)
    np.testing.assert_allclose(group[0], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(group), 1)
    assert all(holds(group, *rotation) for rotation in inside)
    assert not any(holds(group, *rotation) for rotation in outside)
    products = np.einsum("aij,bjk->abik", group, group).reshape(-1, 1, 3, 3)
    distances = np.abs(products - group).max(axis=(2, 3))
    assert distances.min(axis=1).max() < 1e-9  # closed
    assert (distances < 1e-6).sum() == order**2  # no element twice


@pytest.mark.parametrize("name", ["", "C", "C0", "D0", "X", "I3", "C1234", "Oh", "D7x"])
def test_unknown_point_groups_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="point group"):
        metrics.point_group(name)


@pytest.mark.parametrize("name", ["C7", "D7", "T", "O", "I"])
def test_pose_errors_modulo_the_point_group(name: str) -> None:
    symmetry = metrics.point_group(name)
    r, t, true_r, true_t, *_ = poses(150, symmetry, 0.0, 11)
    angles, distances = metrics.pose_errors(r, t, true_r, true_t, symmetry)
    assert np.median(angles) == pytest.approx(2.7, abs=0.8)
    assert angles.max() < 12
    assert np.median(distances) < 0.6
    # The same poses taken as those of an asymmetric structure are mostly wrong.
    assert np.mean(metrics.pose_errors(r, t, true_r, true_t)[0] > 20) > 0.5


@pytest.mark.parametrize("name", ["C1", "D7", "O"])
def test_pose_errors_do_not_depend_on_the_gauge(name: str) -> None:
    """The average turned and moved as a whole, and each true pose replaced by an equivalent one: the same errors."""
    rng, symmetry = np.random.default_rng(5), metrics.point_group(name)
    r, t, true_r, true_t, *_ = poses(60, symmetry, 0.2, 3)
    before = metrics.pose_errors(r, t, true_r, true_t, symmetry)
    q, u = Rotation.random(None, rng).as_matrix(), np.array([2.0, -1.0, 0.5])
    pick = symmetry[rng.integers(len(symmetry), size=60)]
    after = metrics.pose_errors(r @ q, t + r @ u, true_r @ pick, true_t, symmetry)
    np.testing.assert_allclose(after, before, atol=1e-4)


# --- confusion, correlation, hand ---------------------------------------------------------------------------


def test_confusion_matrix_by_hand() -> None:
    found, truth = [0, 0, 2, 2, 2, 1], [1, 1, 0, 0, 1, 0]
    assert metrics.confusion_matrix(found, truth).tolist() == [[0, 2], [1, 0], [2, 1]]
    assert metrics.confusion_matrix(found, truth, (4, 3)).tolist() == [[0, 2, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0]]


def test_correlation_not_about_the_mean_is_the_overlap() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 10, 10, 10)) + 5
    mask = soft_sphere(10, 3, 0)
    x, y = a[mask > 0], b[mask > 0]
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    assert metrics.correlation(a, b, mask, about_mean=False) == pytest.approx(expected)
    assert expected > 0.9  # which a background alone gives
    assert metrics.correlation(a, np.zeros_like(a), mask, about_mean=False) == 0.0


@pytest.mark.parametrize("box", [24, 25])
def test_mirrored_is_the_density_of_mirrored_atoms(box: int) -> None:
    phantom = ribosome()
    other = dataclasses.replace(phantom, centres=phantom.centres * [-1, 1, 1])
    expected = density(other, box, 16.0)
    np.testing.assert_allclose(metrics.mirrored(density(phantom, box, 16.0)), expected, atol=1e-5 * expected.max())


# --- radius, axis, symmetry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [80.0, 120.0])
def test_structure_radius_of_a_ball(radius: float) -> None:
    rng = np.random.default_rng(1)
    ball = soft_sphere(48, radius / 8, 0) + 0.05 * rng.standard_normal((48, 48, 48)) + 3.0
    ball[2, 2, 2:5] = 10.0  # a bead far off is no part of it
    # A level of a quarter lies a little outside the edge, which is at one half.
    assert radius < metrics.structure_radius(ball, 8.0) < radius + 16
    assert metrics.structure_radius(np.ones((16, 16, 16)), 8.0) == 7 * 8.0


@pytest.mark.parametrize("scale", [(0.4, 0.4, 1.0), (1.0, 1.0, 0.4)], ids=["rod", "disc"])
def test_principal_axis_of_rod_and_disc(scale: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(6)
    turn, shift = Rotation.from_euler("ZYZ", [20, 60, 0], degrees=True).as_matrix(), np.array([2.0, -1.0, 3.0])
    k = np.arange(40) - 20
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    points = (np.stack([x, y, z], axis=-1) - shift) @ turn / (14 * np.array(scale))
    body = (np.sum(points**2, axis=-1) < 1) + 0.05 * rng.standard_normal((40, 40, 40))
    axis, centre = metrics.principal_axis(body, 10.0)
    assert np.rad2deg(np.arccos(abs(axis @ turn[:, 2]))) < 1.0
    np.testing.assert_allclose(centre, shift, atol=0.1)


def test_symmetry_score_is_the_mean_over_all_pairs() -> None:
    """Four-fold about z of an odd box: rotations by 90 degrees move voxels onto voxels."""
    volume = np.random.default_rng(2).standard_normal((17, 17, 17)).astype(np.float32)
    volume += volume[::-1]
    inside = soft_sphere(17, 6.0, 0) > 0
    turned = [np.rot90(volume, k, axes=(1, 2))[inside] for k in range(4)]
    expected = np.mean([np.corrcoef(turned[i], turned[j])[0, 1] for i in range(4) for j in range(i)])
    assert metrics.symmetry_score(volume, 4, (0, 0, 2), mask_radius=6.0) == pytest.approx(expected, abs=1e-5)
    # About x instead, and about an axis that does not go through the box centre.
    sideways = np.transpose(volume, (1, 2, 0))
    assert metrics.symmetry_score(sideways, 4, (1, 0, 0), mask_radius=6.0) == pytest.approx(expected, abs=1e-5)
    moved = np.roll(volume, (1, -2), axis=(1, 2))
    score = metrics.symmetry_score(moved, 4, mask_radius=6.0, centre=(-2, 1, 0))
    assert score == pytest.approx(expected, abs=1e-5)
    assert metrics.symmetry_score(moved, 4, mask_radius=6.0) != pytest.approx(expected, abs=0.01)


def test_symmetry_score_of_noise_is_the_power_share_of_the_symmetric_part() -> None:
    rng = np.random.default_rng(9)
    noise = rng.standard_normal((2, 33, 33, 33))
    symmetric = sum(np.rot90(noise[0], k, axes=(1, 2)) for k in range(4)) / 2  # variance 1
    # Signal 1, noise 1: turned copies share half their power.
    score = metrics.symmetry_score(symmetric + noise[1], 4, mask_radius=15.0)
    assert score == pytest.approx(0.5, abs=0.03)  # 14,000 voxels: 1 %
    seven = density(groel(), 48, 5.0)
    assert metrics.symmetry_score(seven, 7, mask_radius=20.0) > 0.99
    assert metrics.symmetry_score(seven, 5, mask_radius=20.0) < 0.9
    with pytest.raises(InputError, match="order"):
        metrics.symmetry_score(seven, 1, mask_radius=20.0)


# --- signal to noise ----------------------------------------------------------------------------------------


def test_random_pairs_are_different_pairs() -> None:
    pairs = metrics.random_pairs(30, 200, np.random.default_rng(0))
    assert pairs.shape == (200, 2)
    assert len({tuple(pair) for pair in pairs.tolist()}) == 200
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs.max() < 30
    assert len(metrics.random_pairs(5, 200, np.random.default_rng(0))) == 10


@pytest.mark.parametrize("snr", [0.02, 0.5])
@pytest.mark.parametrize("wedge", [0.0, 0.4], ids=["whole", "wedge"])
def test_pair_snr_is_known_within_its_error(snr: float, wedge: float) -> None:
    """Coefficients of a fixed signal and noise of known variances, each particle lacking its own part of them."""
    n, voxels, deviations = 30, 2000, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        signal, *noise = rng.standard_normal((n + 1, voxels, 2)) @ [1, 1j]
        signal *= np.sqrt(2 * voxels * snr / np.sum(np.abs(signal) ** 2))
        observed = rng.random((n, voxels)) >= wedge
        spectra = np.where(observed, signal + np.array(noise), 100.0)  # what was not observed must not count
        result = metrics.pair_snr(spectra, observed, metrics.random_pairs(n, 300, rng))
        assert (result.pairs, result.snr) == (300, pytest.approx(result.correlation / (1 - result.correlation)))
        deviations.append((result.snr - snr) / result.snr_error)
    # The error is the standard deviation of the result over data sets, and the result has no bias beside it.
    assert abs(np.mean(deviations)) < 0.6
    assert 0.7 < np.std(deviations) < 1.4


def test_pair_snr_without_common_voxels_is_refused() -> None:
    observed = np.array([[True, False], [False, True]])
    with pytest.raises(InputError, match="same Fourier voxels"):
        metrics.pair_snr(np.ones((2, 2), complex), observed, [[0, 1]])


@pytest.mark.parametrize("box", [32, 33])
def test_aligned_spectrum_is_that_of_the_reference(box: int) -> None:
    """A particle in a known pose, turned back: the reference's own transform, where its wedge observed it."""
    phantom, rng = ribosome(), np.random.default_rng(8)
    support, mask = make_support(box, full_band(box)), soft_sphere(box, 13, 3)
    reference = density(phantom, box, 11.0, resolution=35.0)
    expected = support.gather(transform(mask * (reference - reference.mean())))
    rotation, shift = Rotation.random(None, rng).as_matrix(), np.array([1.4, -0.8, 2.1])
    particle = density(phantom, box, 11.0, rotation, shift, resolution=35.0)
    wedge = missing_wedge(box, (-60, 60))
    whole, _ = metrics.aligned_spectrum(particle, np.ones_like(wedge), rotation, shift, mask, support)
    # Trilinear interpolation at padding 2: 2 %.
    assert np.linalg.norm(whole - expected) < 0.04 * np.linalg.norm(expected)
    _, observed = metrics.aligned_spectrum(particle, wedge, rotation, shift, mask, support)
    x, _, z = (support.coords @ rotation.T).T  # Rξ: where the particle's own transform is looked up
    inside = np.abs(z) <= np.tan(np.deg2rad(60)) * np.abs(x)
    assert np.mean(observed == inside) > 0.96  # all but voxels on the edge


def rough(n: int) -> Phantom:
    """Narrow blobs of either sign at random: power at all frequencies alike, as no protein has it."""
    rng = np.random.default_rng(1)
    points = rng.uniform(-100, 100, (4 * n, 3))
    points = points[np.linalg.norm(points, axis=1) < 100][:n]
    return Phantom("rough", points, np.full(n, 9.6), rng.choice([-1.0, 1.0], n), "C1", 110.0)


@pytest.mark.parametrize("tilts", [None, (-60.0, 60.0)], ids=["whole", "wedge"])
@pytest.mark.parametrize(("phantom", "bias"), [(rough(200), 0.03), (ribosome(), 0.15)], ids=["rough", "ribosome"])
def test_snr_of_simulated_particles(phantom: Phantom, bias: float, tilts: tuple[float, float] | None) -> None:
    """Boxes in known poses with white noise: the ratio of signal and noise power in mask and band.

    The wedge's edge is a voxel wide, where interpolation mixes in what was not observed. It matters where the power is
    in the lowest shells, which are mostly edge: the ribosome's ratio comes out a tenth low.
    """
    box, rng, n = 32, np.random.default_rng(3), 40
    weight = np.ones((box, box, box // 2 + 1), np.float32) if tilts is None else missing_wedge(box, tilts)
    support, mask = make_support(box, full_band(box)), soft_sphere(box, 13, 3)
    rotations, shifts = Rotation.random(n, rng).as_matrix(), rng.uniform(-2, 2, (n, 3))
    aligned = []
    for rotation, shift in zip(rotations, shifts, strict=True):
        particle = simulate_particle(phantom, rotation, shift, weight, rng, box=box, voxel_size=12.0, snr=0.05)
        aligned.append(metrics.aligned_spectrum(particle, weight, rotation, shift, mask, support))
    spectra, observed = (np.stack(values) for values in zip(*aligned, strict=True))
    pairs = metrics.random_pairs(n, 500, rng)
    result = metrics.pair_snr(spectra, observed, pairs)
    reference = density(phantom, box, 12.0)
    power = np.abs(support.gather(transform(mask * (reference - reference.mean())))) ** 2
    noise = reference.var() / 0.05 * np.sum(mask.astype(float) ** 2)
    both = [observed[i] & observed[j] for i, j in pairs]
    expected = np.mean([power[seen].mean() / noise for seen in both])
    assert result.snr == pytest.approx(expected, abs=3 * result.snr_error + (bias if tilts else 0.01) * expected)
