"""Conventions checked against numbers written by hand: nothing here uses the package's geometry to get its answer."""

from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.data import Posterior
from faml_gpu.geometry import euler_to_matrix, matrix_to_relion, relion_to_matrix
from faml_gpu.metrics import rotate_map
from faml_gpu.run_folder import particle_columns
from faml_gpu.simulate import Phantom, density

# Quarter turns, written out: columns are where x, y, z go.
QUARTER_Z = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # x -> y -> -x
QUARTER_Y = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]  # z -> x -> -z
CYCLE = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # x -> y -> z -> x


def blob(x: float, y: float, z: float) -> Phantom:
    return Phantom("blob", np.array([[x, y, z]]), np.array([6.0]), np.array([1000.0]), "C1", 20.0)


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [  # where p = (5, 3, -2) voxels and then t = (1, -2, 4) take it, counted on fingers
        (QUARTER_Z, (-3 + 1, 5 - 2, -2 + 4)),
        (QUARTER_Y, (-2 + 1, 3 - 2, -5 + 4)),
        (CYCLE, (-2 + 1, 5 - 2, 3 + 4)),
    ],
)
def test_blob_at_p_ends_at_rp_plus_t(box: int, rotation: list[list[int]], expected: tuple[int, int, int]) -> None:
    voxel = 4.0
    volume = density(blob(5 * voxel, 3 * voxel, -2 * voxel), box, voxel, rotation, (1, -2, 4))
    z, y, x = np.unravel_index(np.argmax(volume), volume.shape)
    assert (x - box // 2, y - box // 2, z - box // 2) == expected


@pytest.mark.parametrize("box", [32, 33])
def test_rotate_map_moves_a_voxel_to_rp_plus_t(box: int) -> None:
    volume = np.zeros((box,) * 3, dtype=np.float32)
    c = box // 2
    volume[c - 2, c + 3, c + 5] = 1.0  # p = (5, 3, -2)
    moved = rotate_map(volume, CYCLE, (1, -2, 4), order=1)
    z, y, x = np.unravel_index(np.argmax(moved), moved.shape)
    assert (x - c, y - c, z - c) == (-1, 3, 7)
    assert moved[z, y, x] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("angles", "x_to", "y_to", "z_to"),
    [
        # RELION's angles give the inverse of Rz(rot) Ry(tilt) Rz(psi): here by turning the axes back by hand.
        ((90, 0, 0), (0, -1, 0), (1, 0, 0), (0, 0, 1)),
        ((0, 90, 0), (0, 0, 1), (0, 1, 0), (-1, 0, 0)),
        ((0, 0, 90), (0, -1, 0), (1, 0, 0), (0, 0, 1)),
        # Undo rot about z, then tilt about y, then psi about z: x -> -y -> -y -> -x.
        ((90, 90, 90), (-1, 0, 0), (0, 0, 1), (0, 1, 0)),
        # x -> -y -> -y; y -> x -> z; z -> z -> -x.
        ((90, 90, 0), (0, -1, 0), (0, 0, 1), (-1, 0, 0)),
    ],
)
def test_relion_angles_turn_the_axes(
    angles: tuple[float, ...], x_to: tuple[int, ...], y_to: tuple[int, ...], z_to: tuple[int, ...]
) -> None:
    matrix = relion_to_matrix(angles)
    np.testing.assert_allclose(matrix @ [1, 0, 0], x_to, atol=1e-12)
    np.testing.assert_allclose(matrix @ [0, 1, 0], y_to, atol=1e-12)
    np.testing.assert_allclose(matrix @ [0, 0, 1], z_to, atol=1e-12)


# (rot, tilt, psi) = (30, 60, 45). With sin and cos of 30, 60, 45 = ½, √3/2; √3/2, ½; √½, √½ the entries of the
# inverse of Rz(rot) Ry(tilt) Rz(psi) are
#   first row   √½(½·√3/2 − ½),   √½(½·½ + √3/2),   −√½·√3/2
#   second row  −√½(½·√3/2 + ½),  √½(√3/2 − ½·½),   √½·√3/2
#   third row   √3/2·√3/2,        √3/2·½,           ½
KNOWN = np.array(
    [
        [-0.04736717, 0.78914913, -0.61237244],
        [-0.65973961, 0.43559574, 0.61237244],
        [0.75, 0.43301270, 0.5],
    ]
)


def test_relion_angles_of_a_known_pose() -> None:
    np.testing.assert_allclose(relion_to_matrix([30, 60, 45]), KNOWN, atol=1e-8)
    np.testing.assert_allclose(matrix_to_relion(KNOWN), [30, 60, 45], atol=1e-5)


def test_relion_columns_of_a_known_pose() -> None:
    """Shift (1.5, -2, 0.25) voxels of 4 Angstrom: origins are minus that, -6, 8 and -1 Angstrom."""
    posterior = Posterior(
        particle=np.zeros(1, dtype=np.int64),
        class_index=np.zeros(1, dtype=np.int64),
        rotations=KNOWN[None],
        shifts=np.array([[1.5, -2.0, 0.25]]),
        probability=np.ones(1),
        log_likelihood=np.zeros(1),
        n_significant=np.ones(1, dtype=np.int64),
        class_probability=np.ones((1, 1)),
    )
    columns = particle_columns(posterior, 4.0)
    found = [float(columns[f"rlnAngle{name}"][0]) for name in ("Rot", "Tilt", "Psi")]
    np.testing.assert_allclose(found, [30, 60, 45], atol=1e-5)
    assert [float(columns[f"rlnOrigin{axis}Angst"][0]) for axis in "XYZ"] == [-6.0, 8.0, -1.0]


def test_zyz_turns_about_z_last() -> None:
    """alpha = 90 degrees, beta = 90: z goes to x by Ry, then to y by Rz."""
    np.testing.assert_allclose(euler_to_matrix([np.pi / 2, np.pi / 2, 0]) @ [0, 0, 1], [0, 1, 0], atol=1e-12)
