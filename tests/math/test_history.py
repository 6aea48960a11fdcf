"""The record of an iteration: how far poses moved."""

import dataclasses

import numpy as np

from faml_gpu.data import BestPoses, Posterior
from faml_gpu.geometry import euler_to_matrix
from faml_gpu.history import _pose_change
from faml_gpu.symmetry import point_group


def about_z(degrees):
    return euler_to_matrix(np.deg2rad([degrees, 0, 0]))


def test_pose_change_is_to_the_nearest_pose_before_in_the_same_class():
    """Particle 0 changes between two poses as good as each other, 1 turns by 7 degrees, 2 changes class."""
    degrees = [0, 120, 240, 50, 10]
    before = Posterior(
        particle=np.array([0, 0, 0, 1, 2]),
        class_index=np.array([0, 0, 0, 1, 1]),
        rotations=np.stack([about_z(d) for d in degrees]),
        shifts=np.zeros((5, 3)),
        probability=np.array([0.34, 0.33, 0.33, 1, 1]),
        log_likelihood=np.zeros(3),
        class_probability=np.eye(2)[[0, 1, 1]],
        n_significant=np.ones(3, np.int64),
    )
    now = BestPoses(np.array([0, 1, 0]), np.stack([about_z(d) for d in (239, 57, 10)]), np.zeros((3, 3)), np.ones(3))
    np.testing.assert_allclose(_pose_change(before, now, point_group("C1")), [1, 7, 180], atol=1e-6)
    # With C6 imposed (steps of 60 degrees about z) all of particle 0's poses are one, and 57 is 7 from 50.
    tilted = euler_to_matrix(np.deg2rad([0, 50, 0]))  # the copies are those of the structure, before the pose
    before = dataclasses.replace(before, rotations=tilted @ before.rotations)
    turned = np.stack([tilted @ about_z(d) for d in (61, 117, 8)])
    now = BestPoses(np.array([0, 1, 1]), turned, np.zeros((3, 3)), np.ones(3))
    np.testing.assert_allclose(_pose_change(before, now, point_group("C6")), [1, 7, 2], atol=1e-6)
