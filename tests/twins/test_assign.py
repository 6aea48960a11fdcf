"""Nearest candidates on every executor, against a loop over the metric."""

import numpy as np
import pytest

from faml_gpu.geometry import random_rotations

NAMES = ["^point_rotations", "^point_units", "^rotations", "^shifts", "^count"]


def literal(points, units, rotations, shifts, count, weight):
    out = np.zeros(rotations.shape[:2], int)
    for b, n in enumerate(count):
        if n == 0:
            continue
        low, high = shifts[b, :n].min(axis=0), shifts[b, :n].max(axis=0)
        for r, u in zip(points, units, strict=True):
            t = low + u * (high - low)
            tau2 = [
                np.linalg.norm(np.eye(3) - r.T @ rotations[b, i]) ** 2 + weight * ((t - shifts[b, i]) ** 2).sum()
                for i in range(n)
            ]
            out[b, np.argmin(tau2)] += 1
    return out


def case(rng, n_points, n_particles, n_poses):
    return [
        random_rotations(n_points, rng),
        rng.random((n_points, 3)),
        random_rotations(n_particles * n_poses, rng).reshape(n_particles, n_poses, 3, 3),
        rng.uniform(-2, 2, (n_particles, n_poses, 3)),
        rng.integers(0, n_poses + 1, n_particles),
        1.0,
    ]


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("size", [(300, 3, 7), (1, 1, 1), (257, 5, 50), (100, 2, 1), (0, 2, 3)])
def test_assign(run, size, weight, rng):
    arguments = case(rng, *size)
    arguments[5] = weight
    found = run("assign", *arguments)
    assert found.dtype == np.int64
    # Counts, exactly: float64 on both sides, and no random point is within rounding of a tie.
    np.testing.assert_array_equal(found, literal(*arguments))
    np.testing.assert_array_equal(found.sum(axis=1), np.where(arguments[4] > 0, size[0], 0))


def test_no_candidates_at_all(run, rng):
    arguments = case(rng, 50, 3, 4)
    arguments[4][:] = 0
    np.testing.assert_array_equal(run("assign", *arguments), 0)


def test_a_tie_goes_to_the_first(run, rng):
    arguments = case(rng, 50, 1, 4)
    arguments[2][:], arguments[3][:], arguments[4][:] = np.eye(3), 1.5, 4
    np.testing.assert_array_equal(run("assign", *arguments), [[50, 0, 0, 0]])


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
def test_refuses(run, position, how, rng):
    arguments = case(rng, 20, 3, 4)
    a = arguments[position]
    if how == "dtype":
        arguments[position] = a.astype(np.int32 if a.dtype.kind == "i" else np.float32)
    elif how == "strided":
        arguments[position] = np.repeat(a, 2, axis=-1)[..., ::2]
    else:
        arguments[position] = a[..., :-1].copy()
    with pytest.raises((TypeError, ValueError), match=NAMES[position]):
        run("assign", *arguments)
