"""Rotations against scipy's, an independent library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from faml_gpu.geometry import (
    beam_directions,
    euler_to_matrix,
    matrix_to_euler,
    matrix_to_relion,
    random_euler,
    random_rotations,
    relion_to_matrix,
    rotation_angle,
)

RNG = np.random.default_rng(5)
ANGLES = RNG.uniform(-np.pi, np.pi, (50, 3))
POLES = np.array([[0.3, 0.0, 1.1], [-2.0, np.pi, 0.4], [0.0, 0.0, 0.0], [3.0, 1e-12, -1.0]])


def test_euler_to_matrix_is_intrinsic_zyz() -> None:
    expected = Rotation.from_euler("ZYZ", ANGLES).as_matrix()
    np.testing.assert_allclose(euler_to_matrix(ANGLES), expected, atol=1e-14)
    np.testing.assert_allclose(euler_to_matrix(ANGLES.reshape(5, 10, 3)).reshape(-1, 3, 3), expected, atol=1e-14)


@pytest.mark.parametrize("angles", [ANGLES, POLES], ids=["generic", "poles"])
def test_matrix_to_euler_gives_the_matrix_back(angles: np.ndarray) -> None:
    matrices = Rotation.from_euler("ZYZ", angles).as_matrix()
    found = matrix_to_euler(matrices)
    np.testing.assert_allclose(Rotation.from_euler("ZYZ", found).as_matrix(), matrices, atol=1e-9)
    assert (found[:, 1] >= 0).all()
    assert (found[:, 1] <= np.pi).all()


def test_gamma_is_zero_at_the_poles() -> None:
    found = matrix_to_euler(Rotation.from_euler("ZYZ", POLES).as_matrix())
    np.testing.assert_array_equal(found[:, 2], 0.0)
    assert found[0, 0] == pytest.approx(1.4)  # alpha + gamma at beta = 0
    assert found[1, 0] == pytest.approx(-2.4)  # alpha - gamma at beta = pi


def test_relion_angles() -> None:
    degrees = np.rad2deg(ANGLES)
    expected = Rotation.from_euler("ZYZ", degrees, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(relion_to_matrix(degrees), expected, atol=1e-14)
    again = Rotation.from_euler("ZYZ", matrix_to_relion(expected), degrees=True).inv().as_matrix()
    np.testing.assert_allclose(again, expected, atol=1e-12)


def test_rotation_angle() -> None:
    first, second = Rotation.random(50, random_state=1), Rotation.random(50, random_state=2)
    expected = np.rad2deg((first.inv() * second).magnitude())
    np.testing.assert_allclose(rotation_angle(first.as_matrix(), second.as_matrix()), expected, atol=1e-5)


def test_rotation_angle_keeps_small_angles() -> None:
    """The arc cosine of the trace would lose 1e-7 degrees altogether."""
    turn = Rotation.from_rotvec([0, np.deg2rad(1e-7), 0]).as_matrix()
    assert rotation_angle(turn, np.eye(3)) == pytest.approx(1e-7, rel=1e-3)


def test_random_rotations_are_haar() -> None:
    """Under Haar each axis is uniform on the sphere (cos beta uniform) and the angle w has density (1 - cos w) / pi."""
    matrices = random_rotations(20_000, np.random.default_rng(0))
    np.testing.assert_allclose(
        matrices @ np.swapaxes(matrices, 1, 2), np.broadcast_to(np.eye(3), (20_000, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrices), 1.0)
    # Uniform on -1 .. 1 has variance 1/3; five standard errors of 20,000 samples.
    np.testing.assert_allclose((matrices**2).mean(axis=0), 1 / 3, atol=5 * 0.3 / np.sqrt(20_000))
    angles = np.deg2rad(rotation_angle(matrices, np.eye(3)))
    assert angles.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=5 * 0.65 / np.sqrt(20_000))


def test_random_euler_is_uniform_in_each_angle() -> None:
    """Mean of cos² beta is ½ when beta is uniform (1/3 under Haar)."""
    matrices = random_euler(20_000, np.random.default_rng(0))
    assert (matrices[:, 2, 2] ** 2).mean() == pytest.approx(0.5, abs=5 * 0.36 / np.sqrt(20_000))


# rlnTomoSubtomogramRot/Tilt/Psi of the box, rlnAngleRot/Tilt/Psi in it, and where the particle sees the beam come from.
# A_sub R takes that direction to z: the box of tilt 90 has the tomogram's z along its x, (st cp, st sp, ct) in general.
BY_HAND = {
    "box as the tomogram": ([0, 0, 0], [0, 0, 0], [0, 0, 1]),
    "turned about the beam": ([25, 0, 0], [0, 0, 0], [0, 0, 1]),
    "tilted box": ([0, 90, 0], [0, 0, 0], [1, 0, 0]),
    "tilted towards y": ([90, 90, 0], [0, 0, 0], [0, 1, 0]),
    "psi turns the tomogram": ([0, 90, 70], [0, 0, 0], [1, 0, 0]),
    "pose in a box that is not turned": ([0, 0, 0], [90, 90, 0], [0, 1, 0]),
    # Rot 90 takes the particle's y to the box's x, tilt 90 its x to the box's z, and -z to its x.
    "pose about z of a tilted box": ([0, 90, 0], [90, 0, 0], [0, 1, 0]),
    "pose tilted in a tilted box": ([0, 90, 0], [0, 90, 0], [0, 0, -1]),
    "pose that undoes the box": ([0, 90, 0], [0, -90, 0], [0, 0, 1]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_beam_directions_by_hand(case: str) -> None:
    frame, pose, expected = BY_HAND[case]
    found = beam_directions(relion_to_matrix([pose]), relion_to_matrix([frame]))
    np.testing.assert_allclose(found, [expected], atol=1e-12)


angles_of_any_size = st.tuples(*[st.floats(-360, 360, allow_subnormal=False)] * 3)


@given(pose=angles_of_any_size, frame=angles_of_any_size, other=angles_of_any_size)
def test_beam_directions_of_a_particle_cut_in_any_frame(
    pose: tuple[float, ...], frame: tuple[float, ...], other: tuple[float, ...]
) -> None:
    """They belong to the particle in its tomogram: not to the frame its box was cut in."""
    placed = Rotation.from_euler("ZYZ", [frame, pose], degrees=True).inv()
    in_tomogram = placed[0] * placed[1]
    (found,) = beam_directions(relion_to_matrix([pose]), relion_to_matrix([frame]))
    np.testing.assert_allclose(in_tomogram.apply(found), [0, 0, 1], atol=1e-9)
    again = Rotation.from_euler("ZYZ", other, degrees=True).inv()  # another box of the same particle
    in_other = (again.inv() * in_tomogram).as_matrix()
    np.testing.assert_allclose(beam_directions(in_other[None], again.as_matrix()[None]), [found], atol=1e-9)
    # RELION's viewing direction of the composed pose.
    rot, tilt, _ = np.deg2rad(matrix_to_relion(in_tomogram.as_matrix()))
    expected = [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
