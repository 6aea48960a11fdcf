"""Peaks on the SO(3) grid on every executor: against a literal search, and on functions whose maxima are known."""

import numpy as np
import pytest

from faml_gpu.fast_alignment.so3 import grid_angles
from faml_gpu.geometry import euler_to_matrix, random_rotations, rotation_angle

L = 12
STEP = 180 / L  # degrees, of all three angles (beta's is half of it)


def grid_rotations(bandwidth=L):
    """(2L, 2L, 2L, 3, 3), axes [beta, gamma, alpha]."""
    beta, angle = grid_angles(bandwidth)
    b, g, a = np.meshgrid(beta, angle, angle, indexing="ij")
    return euler_to_matrix(np.stack([a, b, g], axis=-1))


GRID = grid_rotations()


def bumps(centres, heights, sharpness=6.0, rotations=GRID):
    """Sum of h exp(k (tr(Q^T R) - 3)): smooth on SO(3), one maximum each (the width is 1 / sqrt k radian)."""
    out = np.zeros(rotations.shape[:3])
    for q, h in zip(centres, heights, strict=True):
        out += h * np.exp(sharpness * (np.einsum("...ij,ij->...", rotations, q) - 3))
    return out


def matrices(angles, count):
    return euler_to_matrix(angles[:count])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(4))
def test_finds_planted_maxima_off_the_grid(run, seed, dtype):
    rng = np.random.default_rng(seed)
    centres = []
    for q in random_rotations(30, rng):
        if len(centres) < 4 and (not centres or rotation_angle(q, np.array(centres)).min() > 80):
            centres.append(q)
    assert len(centres) >= 3
    heights = 1.0 - 0.15 * np.arange(len(centres))
    angles, values, count = run("peaks", bumps(centres, heights).astype(dtype)[None], 10, STEP)
    assert count[0] == len(centres)
    found = matrices(angles[0], count[0])
    # Best first. A quadratic through points a step of .7 widths apart is off by less than a fifth of the step.
    assert (rotation_angle(found, np.array(centres)) < 0.2 * STEP).all()
    np.testing.assert_allclose(values[0, : count[0]], heights, rtol=0.06)
    assert (angles[0, count[0] :] == 0).all()
    assert (values[0, count[0] :] == 0).all()


@pytest.mark.parametrize(
    "euler",
    [
        (0.3, 0.0, 0.4),  # at the poles, where only alpha +- gamma counts
        (1.1, np.pi, -0.7),
        (2.0, 0.06, 1.0),
        (2.0, np.pi - 0.1, 1.0),
        (0.9, 0.2, -2.0),
        (0.0, 1.2, 0.0),  # on the seams of alpha and gamma
        (-0.05, 1.7, 0.08),
        (0.1, 0.5, 2 * np.pi - 0.1),
    ],
)
def test_one_maximum_anywhere_is_found_once(run, euler):
    centre = euler_to_matrix(euler)
    angles, _, count = run("peaks", bumps([centre], [1.0])[None], 50, 2 * STEP)
    assert count[0] == 1
    # At a pole the angles are no good coordinates: the quadratic falls back to one axis at a time.
    assert rotation_angle(matrices(angles[0], 1)[0], centre) < 0.5 * STEP


def test_refinement_beats_the_grid(run, rng):
    centres = random_rotations(40, rng)
    scores = np.stack([bumps([q], [1.0]) for q in centres])
    angles, _, count = run("peaks", scores, 1, STEP)
    assert (count == 1).all()
    refined = rotation_angle(euler_to_matrix(angles[:, 0]), centres)
    best = GRID.reshape(-1, 3, 3)[scores.reshape(40, -1).argmax(axis=1)]
    on_grid = rotation_angle(best, centres)
    assert np.median(refined) < 0.3 * np.median(on_grid)
    assert refined.max() < 0.5 * STEP


def brute_force(score):
    """Grid points not below any of their 26 neighbours, each found by its rotation and not by wrapping indices."""
    n = score.shape[0]
    beta, angle = grid_angles(n // 2)
    place = {}
    for j, g, a in np.ndindex(score.shape):
        place[tuple(np.round(euler_to_matrix([angle[a], beta[j], angle[g]]).ravel(), 9) + 0.0)] = (j, g, a)
    assert len(place) == score.size
    peaks = []
    for j, g, a in np.ndindex(score.shape):
        top = True
        for d in np.ndindex(3, 3, 3):
            if d == (1, 1, 1):
                continue
            # beta may step over a pole: the matrix knows where that is.
            moved = [angle[1] * (a + d[2] - 1), np.pi * (j + d[0] - 0.5) / n, angle[1] * (g + d[1] - 1)]
            other = place[tuple(np.round(euler_to_matrix(moved).ravel(), 9) + 0.0)]
            top &= score[other] < score[j, g, a]
        if top:
            peaks.append((score[j, g, a], angle[a], beta[j], angle[g]))
    return np.array(sorted(peaks, reverse=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bandwidth", [2, 3, 5])
def test_all_local_maxima_of_noise(run, bandwidth, dtype, rng):
    score = rng.standard_normal((2 * bandwidth,) * 3).astype(dtype)
    expected = brute_force(score)
    # At 0 degrees nothing is merged, and there are more places than maxima: each is there, moved by a step at most.
    angles, values, count = run("peaks", score[None], 300, 0.0)
    assert count[0] == len(expected)
    step = [np.pi / bandwidth, np.pi / (2 * bandwidth), np.pi / bandwidth]

    def near(found):
        moved = np.abs(found[:, None] - expected[None, :, 1:]) / step
        return (moved <= 1 + 1e-9).all(axis=2)

    pairs = near(angles[0, : count[0]])
    assert pairs.any(axis=0).all()
    assert pairs.any(axis=1).all()
    # Refined heights lie above the grid's.
    assert (np.sort(values[0, : count[0]]) >= np.sort(expected[:, 0]) - 1e-6).all()
    # Fewer places: the best.
    few, _, count = run("peaks", score[None], 2, 0.0)
    assert count[0] == 2
    assert near(few[0])[:, :2].any(axis=0).all()


def test_merging_drops_what_is_close_to_a_better_one(run, rng):
    score = rng.standard_normal((1, 10, 10, 10))
    every, _, n = run("peaks", score, 300, 0.0)
    merged, _, count = run("peaks", score, 300, 50.0)
    every, merged = matrices(every[0], n[0]), matrices(merged[0], count[0])
    assert 3 < count[0] < n[0]
    distance = rotation_angle(merged[:, None], merged[None])
    assert distance[~np.eye(count[0], dtype=bool)].min() >= 50
    distance = rotation_angle(every[:, None], merged[None]).min(axis=1)
    kept = distance < 1e-6
    assert kept.sum() == count[0]
    assert (distance[~kept] < 50).all()
    # The highest is never the one that is dropped.
    best, _, _ = run("peaks", score, 1, 0.0)
    assert rotation_angle(merged, matrices(best[0], 1)).min() < 1e-6


def test_ridge_at_a_pole_is_one_rotation(run):
    # A function of alpha + gamma alone near beta = 0: each of its maxima shows on a whole line of the grid.
    beta, angle = grid_angles(L)
    b, g, a = np.meshgrid(beta, angle, angle, indexing="ij")
    score = np.cos(a + g - 0.4) * (1 + np.cos(b)) / 2 - 0.3 * b
    angles, _, count = run("peaks", score[None], 50, 2 * STEP)
    found = matrices(angles[0], count[0])
    truth = euler_to_matrix([0.4, 0, 0])
    assert rotation_angle(found[0], truth) < 0.5 * STEP
    distance = rotation_angle(found[:, None], found[None])[~np.eye(count[0], dtype=bool)]
    assert count[0] == 1 or distance.min() >= 2 * STEP - 1e-6


def test_plateau_counts_once(run):
    score = np.zeros((1, 8, 8, 8))
    score[0, 3:5, 2:4, 5:7] = 1.0
    angles, _, count = run("peaks", score, 10, 1.0)
    beta, angle = grid_angles(4)
    top = [i for i in range(count[0]) if abs(angles[0, i, 1] - beta[3]) < 1 and abs(angles[0, i, 0] - angle[5]) < 1]
    assert len(top) == 1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_gives_one_candidate(run, value):
    # No point is above its neighbours; a particle without any candidate would have no posterior.
    angles, values, count = run("peaks", np.full((2, 8, 8, 8), value, np.float32), 5, 10.0)
    np.testing.assert_array_equal(count, 1)
    np.testing.assert_array_equal(values, [[value, 0, 0, 0, 0]] * 2)
    assert np.isfinite(angles).all()


def test_closed_ridge_gives_a_candidate_on_it(run):
    # A function of beta alone (an axially symmetric reference): every point of the ridge has an equal neighbour before.
    score = np.zeros((1, 8, 8, 8))
    score += np.sin(grid_angles(4)[0])[None, :, None, None]
    score[0, 4] += 0.01
    angles, _, count = run("peaks", score, 5, 10.0)
    assert count[0] >= 1
    assert abs(angles[0, 0, 1] - np.pi / 2) < np.pi / 8


def test_values_fall(run, rng):
    # Of two maxima the lower one lies on a grid point, the higher one between eight.
    beta, angle = grid_angles(L)
    on = euler_to_matrix([angle[3], beta[10], angle[5]])
    between = euler_to_matrix([angle[15] + angle[1] / 2, (beta[13] + beta[14]) / 2, angle[8] + angle[1] / 2])
    _, values, count = run("peaks", bumps([on, between], [0.95, 1.0], sharpness=3.0)[None], 5, STEP)
    assert count[0] == 2
    assert (np.diff(values[0, :2]) <= 0).all()


def test_rows_are_apart_and_may_be_none(run, rng):
    scores = rng.standard_normal((3, 8, 8, 8))
    together = run("peaks", scores, 7, 20.0)
    for b in range(3):
        alone = run("peaks", scores[b : b + 1], 7, 20.0)
        for x, y in zip(together, alone, strict=True):
            np.testing.assert_array_equal(x[b], y[0])
    angles, values, count = run("peaks", scores[:0], 7, 20.0)
    assert (angles.shape, values.shape, count.shape) == ((0, 7, 3), (0, 7), (0,))


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((8, 8, 8)),
        np.zeros((1, 8, 8, 6)),
        np.zeros((1, 7, 7, 7)),
        np.zeros((1, 8, 8, 8), np.float16),
        np.zeros((1, 8, 8, 8), np.int64),
        np.zeros((1, 8, 8, 16))[..., ::2],
    ],
    ids=["3-d", "not square", "odd", "half", "integers", "strided"],
)
def test_refuses(run, scores):
    with pytest.raises((TypeError, ValueError), match="scores"):
        run("peaks", scores, 5, 10.0)
