from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import metrics
from faml_gpu.errors import InputError
from faml_gpu.fsc import lowpass
from faml_gpu.masks import soft_sphere
from faml_gpu.simulate import density, groel, ribosome


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
