"""Rotations: the conventions of DESIGN section 2, in one place.

A pose (R, t) says: the particle is the reference rotated by R, then shifted by t,
X(x) = A(R^-1 (x - t)). Vectors and matrices are in (x, y, z) order. Euler angles appear only at the
edges (files, the SO(3) grid): ZYZ, R = Rz(alpha) Ry(beta) Rz(gamma).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "beam_directions",
    "dynamo_to_matrix",
    "euler_to_matrix",
    "matrix_to_dynamo",
    "matrix_to_euler",
    "matrix_to_relion",
    "random_euler",
    "random_rotations",
    "relion_to_matrix",
    "rotation_angle",
]

Floats = NDArray[np.float64]


def euler_to_matrix(angles: ArrayLike) -> Floats:
    """Rotation matrices R = Rz(alpha) Ry(beta) Rz(gamma).

    Parameters
    ----------
    angles : (..., 3) array, radians
        alpha, beta, gamma.

    Returns
    -------
    (..., 3, 3) float64 array
    """
    a, b, c = np.moveaxis(np.asarray(angles, dtype=np.float64), -1, 0)
    ca, sa, cb, sb, cc, sc = np.cos(a), np.sin(a), np.cos(b), np.sin(b), np.cos(c), np.sin(c)
    rows = [
        [ca * cb * cc - sa * sc, -ca * cb * sc - sa * cc, ca * sb],
        [sa * cb * cc + ca * sc, -sa * cb * sc + ca * cc, sa * sb],
        [-sb * cc, sb * sc, cb],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrices: ArrayLike) -> Floats:
    """ZYZ angles (radians) of rotation matrices; at the poles gamma is 0.

    Parameters
    ----------
    matrices : (..., 3, 3) array

    Returns
    -------
    (..., 3) float64 array
        alpha and gamma in (-pi, pi], beta in [0, pi].
    """
    r = np.asarray(matrices, dtype=np.float64)
    sin_beta = np.hypot(r[..., 0, 2], r[..., 1, 2])
    beta = np.arctan2(sin_beta, r[..., 2, 2])
    pole = sin_beta < 1e-9
    # At a pole only alpha +- gamma is defined: all of it goes into alpha.
    alpha = np.where(pole, np.arctan2(-r[..., 0, 1], r[..., 1, 1]), np.arctan2(r[..., 1, 2], r[..., 0, 2]))
    gamma = np.where(pole, 0.0, np.arctan2(r[..., 2, 1], -r[..., 2, 0]))
    return np.stack([alpha, beta, gamma], axis=-1)


def relion_to_matrix(rot_tilt_psi: ArrayLike) -> Floats:
    """Our R for RELION's (rlnAngleRot, rlnAngleTilt, rlnAnglePsi) in degrees.

    Parameters
    ----------
    rot_tilt_psi : (..., 3) array, degrees

    Returns
    -------
    (..., 3, 3) float64 array
        `scipy.spatial.transform.Rotation.from_euler("ZYZ", angles, degrees=True).inv()`.
    """
    matrices = euler_to_matrix(np.deg2rad(np.asarray(rot_tilt_psi, dtype=np.float64)))
    return np.ascontiguousarray(np.swapaxes(matrices, -1, -2))


def matrix_to_relion(matrices: ArrayLike) -> Floats:
    """(rlnAngleRot, rlnAngleTilt, rlnAnglePsi) in degrees of our R: the inverse of `relion_to_matrix`."""
    return np.rad2deg(matrix_to_euler(np.swapaxes(np.asarray(matrices, dtype=np.float64), -1, -2)))


def dynamo_to_matrix(tdrot_tilt_narot: ArrayLike) -> Floats:
    """Our R for Dynamo's (tdrot, tilt, narot) in degrees.

    Parameters
    ----------
    tdrot_tilt_narot : (..., 3) array, degrees

    Returns
    -------
    (..., 3, 3) float64 array
        `scipy.spatial.transform.Rotation.from_euler("zxz", angles, degrees=True).inv()`.
    """
    tdrot, tilt, narot = np.moveaxis(np.asarray(tdrot_tilt_narot, dtype=np.float64), -1, 0)
    # x is y turned by -90 degrees about z.
    zyz = np.deg2rad(np.stack([narot - 90, tilt, tdrot + 90], axis=-1))
    return np.ascontiguousarray(np.swapaxes(euler_to_matrix(zyz), -1, -2))


def matrix_to_dynamo(matrices: ArrayLike) -> Floats:
    """(tdrot, tilt, narot) in degrees of our R, in (-180, 180]: the inverse of `dynamo_to_matrix`."""
    alpha, beta, gamma = np.moveaxis(np.rad2deg(matrix_to_euler(np.swapaxes(np.asarray(matrices), -1, -2))), -1, 0)
    angles = np.stack([gamma - 90, beta, alpha + 90], axis=-1)
    return np.asarray(180 - (180 - angles) % 360)


def beam_directions(rotations: ArrayLike, frames: ArrayLike) -> Floats:
    """Where the beam comes from as each particle sees it: unit vectors in the frame of its average.

    R takes what is in the average to the box, A_sub what is in the box to the tomogram, where the beam lies along z. So
    A_sub R takes the direction d that is asked for to z, and d = (A_sub R)^T z, its third row.

    Parameters
    ----------
    rotations : (n, 3, 3) array, R of poses in their boxes
    frames : (n, 3, 3) array, A_sub of their boxes, see `io.positions.box_frames`

    Returns
    -------
    (n, 3) float64 array, (x, y, z)
    """
    beam = np.asarray(frames, np.float64)[:, 2, :]  # in the box
    return np.asarray(np.einsum("nj,njk->nk", beam, np.asarray(rotations, np.float64)))


def rotation_angle(first: ArrayLike, second: ArrayLike) -> Floats:
    """Angle in degrees between rotations, (..., 3, 3) each (broadcast).

    Uses the chord ||R1 - R2||_F = 2 sqrt(2) sin(angle / 2), which keeps its accuracy at small angles.
    """
    chord = np.linalg.norm(np.asarray(first, np.float64) - np.asarray(second, np.float64), axis=(-2, -1))
    return np.asarray(np.rad2deg(2 * np.arcsin(np.clip(chord / np.sqrt(8.0), 0.0, 1.0))))


def random_rotations(n: int, rng: np.random.Generator) -> Floats:
    """n rotation matrices from the invariant (Haar) measure of SO(3), (n, 3, 3) float64."""
    q = rng.standard_normal((n, 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    return _quaternion_to_matrix(q)


def random_euler(n: int, rng: np.random.Generator) -> Floats:
    """n rotation matrices with each ZYZ angle uniform in [0, 2 pi), as the paper draws them (not Haar)."""
    return euler_to_matrix(rng.uniform(0.0, 2 * np.pi, (n, 3)))


def _quaternion_to_matrix(q: NDArray[Any]) -> Floats:
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
