"""How sure a result is: closed forms, written-out sums, and when a preferred orientation is worth a warning."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.data import Posterior
from faml_gpu.geometry import random_rotations, relion_to_matrix
from faml_gpu.uncertainty import (
    angular_coverage,
    effective_particles,
    pose_entropy,
    preferred_orientations,
    shifts_at_limit,
)


def posterior(particle: list[int], probability: list[float]) -> Posterior:
    """One class; the poses do not matter."""
    index, n = np.array(particle), max(particle) + 1
    return Posterior(
        index,
        np.zeros(len(index), np.int64),
        np.tile(np.eye(3), (len(index), 1, 1)),
        np.zeros((len(index), 3)),
        np.array(probability),
        np.zeros(n),
        np.bincount(index),
        np.ones((n, 1)),
    )


def in_poses(rotations: np.ndarray) -> Posterior:
    one = posterior(list(range(len(rotations))), [1.0] * len(rotations))
    one.rotations = rotations
    return one


def coverage(rotations: np.ndarray, frames: np.ndarray | None = None) -> np.ndarray:
    """Of boxes that lie as their tomogram does, unless frames are given."""
    return angular_coverage(
        in_poses(rotations), np.tile(np.eye(3), (len(rotations), 1, 1)) if frames is None else frames
    )


def test_entropy_of_equal_and_single_poses() -> None:
    found = posterior([0, 1, 1, 1, 1, 2, 2], [1.0, 0.25, 0.25, 0.25, 0.25, 0.9, 0.1])
    expected = [0.0, np.log(4), -0.9 * np.log(0.9) - 0.1 * np.log(0.1)]
    np.testing.assert_allclose(pose_entropy(found), expected, atol=1e-15)


def test_a_pose_of_no_probability_adds_nothing() -> None:
    assert pose_entropy(posterior([0, 0], [1.0, 0.0]))[0] == 0


def test_kish() -> None:
    probability = np.array([[1.0, 0.2, 0], [0.5, 0.2, 0], [0.5, 0.2, 0]])
    np.testing.assert_allclose(effective_particles(probability), [4 / 1.5, 3, 0])


def test_coverage_of_one_axis_a_circle_and_all_directions(rng: np.random.Generator) -> None:
    angles = np.arange(60) * 6.0
    about = {axis: Rotation.from_euler(axis, angles[:, None], degrees=True).as_matrix() for axis in "yz"}
    np.testing.assert_allclose(coverage(about["z"]), 0, atol=1e-12)  # about the beam
    np.testing.assert_allclose(coverage(about["y"]), 0.75)
    # 4000 directions: the largest eigenvalue is 1/3 to about 1 %.
    assert coverage(random_rotations(4000, rng))[0] == pytest.approx(1, abs=0.03)


def test_coverage_is_in_the_frame_of_the_average(rng: np.random.Generator) -> None:
    """Poses turned on the side of the average (all of it in another frame) mean the same; in the box they do not."""
    turned = Rotation.from_euler("z", np.arange(12)[:, None] * 30.0, degrees=True).as_matrix()
    other = random_rotations(1, rng)[0]
    np.testing.assert_allclose(coverage(turned @ other), 0, atol=1e-12)
    tilted = Rotation.from_euler("y", 90, degrees=True).as_matrix()
    np.testing.assert_allclose(coverage(tilted @ turned), 0.75, rtol=1e-12)


def test_coverage_is_of_the_tomogram_not_of_the_box(rng: np.random.Generator) -> None:
    """RELION 4 and 5 cut boxes in turned frames: all particles upright in those may still be seen from all sides."""
    frames = random_rotations(500, rng)
    upright = relion_to_matrix(np.stack([rng.uniform(-180, 180, 500), np.zeros(500), np.zeros(500)], axis=-1))
    assert coverage(upright)[0] == pytest.approx(0, abs=1e-12)
    assert coverage(upright, frames)[0] > 0.9  # even, but for chance
    # And the other way round: poses of all kinds in frames that undo them.
    poses = random_rotations(500, rng)
    assert coverage(poses, upright @ np.swapaxes(poses, 1, 2))[0] == pytest.approx(0, abs=1e-12)
    # Of several poses of a particle each has the frame of that particle.
    two = posterior([0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5])
    two.rotations = np.concatenate([frames[:1].transpose(0, 2, 1)] * 2 + [frames[1:2].transpose(0, 2, 1)] * 2)
    assert angular_coverage(two, frames[:2])[0] == pytest.approx(0, abs=1e-12)


def test_warning_needs_uneven_views_and_a_gap() -> None:
    (text,) = preferred_orientations([0.1, 0.1, 0.9, 0.1], [0.7, 1.0, 0.7, 0.7], [50, 50, 50, 3])
    assert "class 1 " in text
    assert "0.10" in text
    assert "30 %" in text


def test_warning_of_shifts_that_pile_up_at_the_limit(rng: np.random.Generator) -> None:
    directions = rng.standard_normal((2000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    even = 6 * directions * rng.random((2000, 1)) ** (1 / 3)  # fills the sphere: nothing says that there is more
    assert shifts_at_limit(even, 12.0, 2.0) == []
    cut = np.where(np.linalg.norm(1.6 * even, axis=1, keepdims=True) < 6, 1.6 * even, 6 * directions)
    (text,) = shifts_at_limit(cut, 12.0, 2.0)
    assert "12 A" in text
    assert "--max-shift" in text
    share = (np.linalg.norm(cut, axis=1) > 0.9 * 6).mean()
    assert text.startswith(f"{100 * share:.0f} %")
    assert shifts_at_limit(cut, 14.0, 2.0) == []
    assert shifts_at_limit(6 * directions[:9], 12.0, 2.0) == []
    assert len(shifts_at_limit(6 * directions[:10], 12.0, 2.0)) == 1
