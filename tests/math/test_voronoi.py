"""Voronoi weights against cases solved by hand and against the metric written out."""

import numpy as np
import pytest

from faml_gpu.geometry import euler_to_matrix, random_rotations
from faml_gpu.voronoi import ALPHA_TRD, N_POINTS, PosePoints, draw_points, log_volumes

# Standard deviation of a share near 1/2 at 10^4 points is .005: .02 is four of them.
STATISTICAL = 0.02


@pytest.fixture(scope="module")
def haar():
    return draw_points(N_POINTS, "haar", np.random.default_rng(1))


def shares(points, rotations, shifts):
    rotations, shifts = np.asarray(rotations, float)[None], np.asarray(shifts, float)[None]
    return np.exp(log_volumes(points, rotations, shifts, np.array([rotations.shape[1]])))[0]


def test_one_candidate_has_all(haar):
    np.testing.assert_allclose(shares(haar, [np.eye(3)], [[3.0, 2, 1]]), 1)


@pytest.mark.parametrize("seed", range(4))
def test_two_rotations_halve_under_haar(haar, seed):
    rotations = random_rotations(2, np.random.default_rng(seed))
    np.testing.assert_allclose(shares(haar, rotations, np.zeros((2, 3))), 0.5, atol=STATISTICAL)


def test_two_rotations_do_not_halve_under_euler(haar):
    # Uniform Euler angles crowd at beta = 0 and pi (Haar has a factor sin beta), so the identity, at a pole, and a
    # rotation at the equator share them unevenly.
    euler = draw_points(N_POINTS, "euler", np.random.default_rng(2))
    pair = euler_to_matrix([[0, 0, 0], [np.pi, np.pi / 2, 0]])
    # The share as an integral over the three angles, each uniform: midpoint rule.
    angle = 2 * np.pi * (np.arange(60) + 0.5) / 60
    every = euler_to_matrix(np.stack(np.meshgrid(angle, angle, angle, indexing="ij"), axis=-1).reshape(-1, 3))
    expected = (np.einsum("nij,ij->n", every, pair[0]) > np.einsum("nij,ij->n", every, pair[1])).mean()
    assert abs(expected - 0.5) > 2 * STATISTICAL
    np.testing.assert_allclose(shares(euler, pair, np.zeros((2, 3))), [expected, 1 - expected], atol=STATISTICAL)
    np.testing.assert_allclose(shares(haar, pair, np.zeros((2, 3))), 0.5, atol=STATISTICAL)


def test_measures_are_what_they_say():
    haar = draw_points(N_POINTS, "haar", np.random.default_rng(3)).rotations
    euler = draw_points(N_POINTS, "euler", np.random.default_rng(3)).rotations
    for r in (haar, euler):
        np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(3), r.shape), atol=1e-12)
    # R_zz = cos beta: uniform in [-1, 1] under Haar (variance 1/3), of variance 1/2 for a uniform beta.
    assert abs((haar[:, 2, 2] ** 2).mean() - 1 / 3) < 0.02
    assert abs((euler[:, 2, 2] ** 2).mean() - 1 / 2) < 0.02
    # Haar is invariant: any entry is distributed alike. Traces of characters vanish: the mean of tr R is 0.
    assert abs(np.trace(haar, axis1=1, axis2=2).mean()) < 0.05


def test_points_repeat_with_their_seed():
    a, b = (draw_points(10, "haar", np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(a.rotations, b.rotations)
    np.testing.assert_array_equal(a.units, b.units)
    assert a.units.shape == (10, 3)
    assert ((a.units >= 0) & (a.units < 1)).all()


def test_two_shifts_along_a_line_halve(haar):
    # One rotation: only the shifts tell, and the plane halfway between them cuts their bounding box in two.
    for end in ([4.0, 0, 0], [1.0, -2.0, 3.0]):
        np.testing.assert_allclose(shares(haar, [np.eye(3)] * 2, [[0, 0, 0], end]), 0.5, atol=STATISTICAL)


def test_three_shifts_along_a_line(haar):
    # At 0, 1 and 4 of a line of length 4: cut at .5 and 2.5.
    found = shares(haar, [np.eye(3)] * 3, [[0, 0, 0], [0, 1, 0], [0, 4, 0]])
    np.testing.assert_allclose(found, [0.125, 0.5, 0.375], atol=STATISTICAL)


def test_identical_shifts_do_not_matter(haar):
    rotations = random_rotations(5, np.random.default_rng(4))
    here = shares(haar, rotations, np.zeros((5, 3)))
    there = shares(haar, rotations, np.full((5, 3), 2.5))
    np.testing.assert_allclose(here, there, atol=1e-12)
    assert np.isfinite(here).all()


def test_same_pose_twice_stays_finite(haar):
    found = shares(haar, [np.eye(3)] * 2, np.ones((2, 3)))
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(), 1)


def test_shares_are_positive_and_sum_to_one(haar, rng):
    rotations = random_rotations(7 * 20, rng).reshape(7, 20, 3, 3)
    count = np.array([20, 1, 2, 20, 7, 0, 3])
    found = np.exp(log_volumes(haar, rotations, rng.uniform(-3, 3, (7, 20, 3)), count))
    for row, n in zip(found, count, strict=True):
        assert (row[:n] > 0).all()
        np.testing.assert_allclose(row[:n].sum(), 1 if n else 0, rtol=1e-12)


def test_shares_are_counts_of_the_metric(rng):
    """v~ = (count + 1/2) / (points + n / 2), tau^2 = ||I - R1^T R2||_F^2 + alpha ||t1 - t2||^2 with alpha = 1."""
    assert ALPHA_TRD == 1.0
    points = PosePoints(random_rotations(500, rng), rng.random((500, 3)))
    rotations, shifts = random_rotations(6, rng), rng.uniform(-2, 2, (6, 3))
    low, high = shifts.min(axis=0), shifts.max(axis=0)
    count = np.zeros(6)
    for r, u in zip(points.rotations, points.units, strict=True):
        t = low + u * (high - low)
        tau2 = [
            np.linalg.norm(np.eye(3) - r.T @ r_i) ** 2 + ((t - t_i) ** 2).sum()
            for r_i, t_i in zip(rotations, shifts, strict=True)
        ]
        count[np.argmin(tau2)] += 1
    np.testing.assert_allclose(shares(points, rotations, shifts), (count + 0.5) / (500 + 3), rtol=1e-12)
