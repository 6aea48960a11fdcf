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


def gains(observation, reference, candidates, precision):
    """-1/2 of the residual against that of no reference, by their definitions."""
    weight = observation.weights[observation.weight_index]
    own = 2 * (weight**2 * precision * np.abs(observation.spectra) ** 2).sum(axis=1)
    return 0.5 * (own[:, None] - residuals(observation, reference, candidates, precision))


def test_the_gain_says_what_is_looked_at(scene, rng):
    """Of poses with a known gain only the first are looked at; one that is not known always is."""
    observation, reference, truth, shifts = scene
    n, m = 20, 2
    precision = np.full(len(observation.support), 1e-3, np.float32)
    rotations = random_rotations(4 * n, rng).reshape(4, n, 3, 3)
    for place in (7, 13):
        rotations[:, place] = np.stack([small_turn(rng, 4.0) @ r for r in truth])
    moved = np.repeat(shifts[:, None], n, axis=1)
    start = Candidates(rotations, moved, np.zeros((4, n)), np.full(4, n))
    exact = gains(observation, reference, start, precision)
    assert (np.sort(np.argsort(-exact, axis=1)[:, :2], axis=1) == [7, 13]).all()
    claimed = exact.copy()
    claimed[:, 7] = -1e6  # a good pose that claims to be hopeless, and one that claims nothing
    claimed[:, 13] = np.inf
    found = refine(observation, reference, Candidates(rotations, moved, start.correlation, start.count, claimed),
                   precision, m, 9.0)  # fmt: skip
    np.testing.assert_array_equal(found.rotations[:, 7], rotations[:, 7])
    assert (rotation_angle(found.rotations[:, 13], truth) < rotation_angle(rotations[:, 13], truth)).all()
    # What was looked at has its true gain, the rest what it claimed.
    after = gains(observation, reference, found, precision)
    np.testing.assert_allclose(found.gain[:, 13], after[:, 13], rtol=1e-5)
    assert (found.gain[:, 7] == -1e6).all()
    assert (found.gain[:, 13] > exact[:, 13]).all()


def test_what_is_too_far_behind_is_not_moved(scene, rng):
    observation, reference, truth, shifts = scene
    near = np.stack([small_turn(rng, 3.0) @ r for r in truth])
    rotations = np.stack([near, random_rotations(4, rng)], axis=1)
    start = Candidates(rotations, np.repeat(shifts[:, None], 2, axis=1), np.zeros((4, 2)), np.full(4, 2))
    for scale, moves in ((1.0, False), (1e-6, True)):
        precision = np.full(len(observation.support), scale, np.float32)
        gain = gains(observation, reference, start, precision)
        assert ((gain[:, 0] - gain[:, 1] > 1.5 * (30 + 0.05 * gain[:, 0])) != moves).all()
        found = refine(observation, reference, start, precision, 2, 9.0)
        assert (found.rotations[:, 1] != rotations[:, 1]).any() == moves
        assert (found.rotations[:, 0] != rotations[:, 0]).any(axis=(1, 2)).all()


def test_carried_poses_have_an_unknown_gain(rng):
    rotations, shifts = random_rotations(4, rng).reshape(2, 2, 3, 3), np.zeros((2, 2, 3))
    start = Candidates(rotations, shifts, np.ones((2, 2)), np.array([2, 1]), np.array([[5.0, 4.0], [3.0, 0.0]]))
    found = carry_over(start, rotations[:, :1], shifts[:, :1], np.array([1, 1]))
    np.testing.assert_array_equal(found.gain, [[5.0, np.inf], [3.0, np.inf]])
