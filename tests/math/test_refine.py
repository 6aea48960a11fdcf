"""Refined candidates: back to the truth from nearby, and never worse."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import fourier, ops
from faml_gpu.fast_alignment import Candidates, Observation, carry_over, refine
from faml_gpu.fast_alignment.align import make_reference
from faml_gpu.geometry import random_rotations, rotation_angle


def small_turn(rng, degrees):
    axis = rng.standard_normal(3)
    return Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis)).as_matrix()


@pytest.fixture(scope="module")
def scene(oracles):
    """Four noise-free, wedge-masked particles in known poses, transforms evaluated analytically."""
    rng = np.random.default_rng(11)
    box, r_max, bandwidth = 24, 8, 16
    structure = oracles.blobs(rng, 14, 6.0, 1.2)
    support = fourier.make_support(box, r_max)
    grid = fourier.interpolation_grid(oracles.blob_volume(box, *structure).astype(np.float32), r_max, 2)
    reference = make_reference(grid, 2, r_max, bandwidth)
    rotations, shifts = random_rotations(4, rng), rng.uniform(-2, 2, (4, 3))
    spectra = np.stack(
        [
            oracles.blob_transform(box, support.coords @ r, *structure) * oracles.phase(support.coords, t, box)
            for r, t in zip(rotations, shifts, strict=True)
        ]
    ).astype(np.complex64)
    weight = support.gather(oracles.half_of_cube(oracles.wedge_cube(box, [0, 0, 1], np.tan(np.deg2rad(30)))))
    weight = weight.astype(np.float32)[None]
    observation = Observation(support, spectra * weight, weight, np.zeros(4, np.int64), ("w",))
    return observation, reference, rotations, shifts


def residuals(observation, reference, candidates, precision):
    shells = ops.residual(
        reference.grid,
        observation.spectra,
        observation.weights,
        observation.weight_index,
        candidates.rotations,
        candidates.shifts,
        candidates.count,
        observation.support,
        reference.padding,
    )
    by_voxel = np.zeros(observation.support.r_max + 1)
    by_voxel[observation.support.shell] = precision
    return shells @ by_voxel


def test_returns_to_the_truth(scene, rng):
    observation, reference, truth, shifts = scene
    off = np.stack([small_turn(rng, 5.0) @ r for r in truth])
    moved = shifts + 0.5 * rng.choice([-1, 1], (4, 3))  # half a voxel along each axis
    start = Candidates(off[:, None].copy(), moved[:, None].copy(), np.zeros((4, 1)), np.ones(4, np.int64))
    precision = np.ones(len(observation.support), np.float32)
    found = refine(observation, reference, start, precision, 1, 9.0)
    assert (rotation_angle(off, truth) > 4.9).all()
    # From 5 degrees and .87 voxel, two rounds of parabolas axis by axis.
    assert (rotation_angle(found.rotations[:, 0], truth) < 2.0).all()
    assert (np.linalg.norm(found.shifts[:, 0] - shifts, axis=1) < 0.2).all()
    again = refine(observation, reference, found, precision, 1, 9.0)
    assert (rotation_angle(again.rotations[:, 0], truth) < 0.8).all()
    assert (np.linalg.norm(again.shifts[:, 0] - shifts, axis=1) < 0.06).all()


def test_never_raises_the_residual_and_moves_only_the_likeliest(scene, rng):
    observation, reference, truth, shifts = scene
    n, m = 12, 3
    rotations = random_rotations(4 * n, rng).reshape(4, n, 3, 3)
    rotations[:, 4] = np.stack([small_turn(rng, 4.0) @ r for r in truth])
    moved = rng.uniform(-3, 3, (4, n, 3))
    moved[:, 4] = shifts
    start = Candidates(rotations, moved, rng.random((4, n)), np.array([n, 7, 5, 2]))
    precision = (1 / (1.0 + observation.support.shell)).astype(np.float32)
    kept = rotations.copy()
    before = residuals(observation, reference, start, precision)
    found = refine(observation, reference, start, precision, m, 9.0)
    after = residuals(observation, reference, found, precision)
    np.testing.assert_array_equal(start.rotations, kept)  # not in place
    np.testing.assert_array_equal(found.count, start.count)
    assert (after <= before).all()
    for b, count in enumerate(start.count):
        best = np.argsort(before[b, :count])[:m]
        changed = np.nonzero(after[b, :count] != before[b, :count])[0]
        assert set(changed) <= set(best)
        assert len(changed) > 0
    identity = found.rotations @ found.rotations.swapaxes(-1, -2)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(3), identity.shape), atol=1e-12)


def test_a_move_that_does_not_help_is_taken_back(scene, oracles):
    """Particles made of the reference's own samples: at the truth the residual is 0, and any move raises it."""
    observation, reference, truth, shifts = scene
    support, box = observation.support, observation.support.box
    spectra = ops.rotate(reference.grid, truth, support.coords, reference.padding)
    spectra = spectra * np.stack([oracles.phase(support.coords, t, box) for t in shifts])
    exact = Observation(support, spectra.astype(np.complex64), observation.weights, observation.weight_index, ("w",))
    start = Candidates(truth[:, None].copy(), shifts[:, None].copy(), np.zeros((4, 1)), np.ones(4, np.int64))
    precision = np.ones(len(support), np.float32)
    found = refine(exact, reference, start, precision, 1, 9.0)
    before, after = (residuals(exact, reference, c, precision) for c in (start, found))
    assert (after <= before).all()
    # A step away it is not 0.
    off = Candidates(truth[:, None] @ np.diag([1.0, -1, -1]), shifts[:, None].copy(), np.zeros((4, 1)), start.count)
    assert (before < 1e-6 * residuals(exact, reference, off, precision)).all()


def test_no_candidate_is_left_alone(scene):
    observation, reference, _, _ = scene
    start = Candidates(np.tile(np.eye(3), (4, 2, 1, 1)), np.zeros((4, 2, 3)), np.zeros((4, 2)), np.zeros(4, np.int64))
    found = refine(observation, reference, start, np.ones(len(observation.support), np.float32), 3, 9.0)
    np.testing.assert_array_equal(found.count, 0)
    assert np.isfinite(found.rotations).all()


def test_carry_over_puts_earlier_poses_last(rng):
    n = 4
    rotations, shifts = random_rotations(3 * n, rng).reshape(3, n, 3, 3), rng.standard_normal((3, n, 3))
    start = Candidates(rotations, shifts, np.ones((3, n)), np.array([4, 1, 0]))
    old, old_shifts = random_rotations(6, rng).reshape(3, 2, 3, 3), rng.standard_normal((3, 2, 3))
    found = carry_over(start, old, old_shifts, np.array([2, 2, 1]))
    np.testing.assert_array_equal(found.count, [4, 3, 1])
    np.testing.assert_array_equal(found.rotations[0, :2], rotations[0, :2])
    np.testing.assert_array_equal(found.rotations[0, 2:4], old[0])
    np.testing.assert_array_equal(found.rotations[1, 0], rotations[1, 0])
    np.testing.assert_array_equal(found.rotations[1, 1:3], old[1])
    np.testing.assert_array_equal(found.shifts[1, 1:3], old_shifts[1])
    np.testing.assert_array_equal(found.rotations[2, 0], old[2, 0])


def test_no_refined_shift_is_longer_than_the_limit(scene):
    observation, reference, truth, shifts = scene
    start = Candidates(truth[:, None].copy(), np.zeros((4, 1, 3)), np.zeros((4, 1)), np.ones(4, np.int64))
    precision = np.ones(len(observation.support), np.float32)
    limit = 0.25
    assert (np.linalg.norm(shifts, axis=1) > limit).all()
    found = refine(observation, reference, start, precision, 1, limit)
    assert (np.linalg.norm(found.shifts[:, 0], axis=1) <= limit + 1e-9).all()
    assert (found.shifts[:, 0] != 0).any()
