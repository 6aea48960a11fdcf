"""Cells of equal volume that tile SO(3), each made of eight of the next level."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, namespace

__all__ = ["all_cells", "cell_children", "cell_rotations", "cell_width"]


def cell_rotations(level: Array, pixel: Array, turn: Array) -> Array:
    """Centres (..., 3, 3) of cells of SO(3) that all have the same volume at a level, 1 / (72 * 8^level).

    Directions (alpha, beta) are pixels of the HEALPix sphere (Gorski et al. 2005, nested order), 12 * 4^level of equal
    area; gamma has 6 * 2^level steps.
    """
    xp = namespace(pixel)
    side = 2.0**level
    face = pixel >> (2 * level)
    inside = pixel - (face << (2 * level))
    u, v = (_every_other_bit(inside) + 0.5) / side, (_every_other_bit(inside >> 1) + 0.5) / side
    row = face // 4
    ring = 2.0 + row - u - v  # 0 at the north pole, 4 at the south pole
    polar = xp.where(ring < 1, ring, xp.where(ring > 3, 4 - ring, 1.0))
    cap = 1 - polar**2 / 3
    cosine = xp.where(ring < 1, cap, xp.where(ring > 3, -cap, (2 - ring) * 2 / 3))
    longitude = 2 * (face % 4) + xp.where(row == 1, 0, 1)
    aside = np.pi / 4 * (u - v) / polar
    alpha = np.pi / 4 * longitude + aside
    # Carried along in parallel: near a pole neighbours differ much in alpha, and gamma has to make up for it. The
    # volume stays, cells stay compact.
    gamma = 2 * np.pi * (turn + 0.5) / (6 * side) - aside * cosine
    sine = xp.sqrt(1 - cosine**2)
    ca, sa, cc, sc = xp.cos(alpha), xp.sin(alpha), xp.cos(gamma), xp.sin(gamma)
    flat = [
        ca * cosine * cc - sa * sc, -ca * cosine * sc - sa * cc, ca * sine,
        sa * cosine * cc + ca * sc, -sa * cosine * sc + ca * cc, sa * sine,
        -sine * cc, sine * sc, cosine,
    ]  # fmt: skip
    return xp.stack(flat, axis=-1).reshape(*pixel.shape, 3, 3)


def _every_other_bit(x: Array) -> Array:
    """The number made of the bits 0, 2, 4, ... of numbers of 32 bits."""
    x = x & 0x55555555
    for shift, mask in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        x = (x | (x >> shift)) & mask
    return x


def all_cells(level: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Level, pixel and turn of every cell of a level, (72 * 8^level,) each."""
    side = 2**level
    pixel, turn = np.repeat(np.arange(12 * side**2), 6 * side), np.tile(np.arange(6 * side), 12 * side**2)
    return np.full(len(pixel), level), pixel, turn


def cell_children(level: Array, pixel: Array, turn: Array) -> tuple[Array, Array, Array]:
    """The eight cells (..., 8) of the next level that make up a cell."""
    xp = namespace(pixel)
    k = xp.arange(8)
    return (level + 1)[..., None] + 0 * k, 4 * pixel[..., None] + k // 2, 2 * turn[..., None] + k % 2


def cell_width(level: int) -> float:
    """Of cells of a level, degrees."""
    return float(60 * 0.5**level)
