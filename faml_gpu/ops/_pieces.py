"""Rows of voxels in pieces, as the CPU's voxel loops take them: all of one step for a piece, then the next step.

A piece fits the caches, its steps go in vectors, and one that only gathers has many loads on their way at a time: what
a whole voxel takes is more than a processor looks ahead, and each would wait for its own.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["PIECE", "fill_coordinates", "fill_moved", "fill_phases", "in_planes", "longest", "piece_starts"]

PIECE = 512  # voxels


@numba.njit(nogil=True, cache=True)
def piece_starts(rows: Any, most: int) -> Any:
    """Numbers of the rows that pieces start with, and how many rows there are: (pieces + 1,).

    A piece is of one kx and, but for longer rows, has at most `most` voxels. rows (n, 5): from `fourier.support_rows`.
    """
    starts = np.empty(len(rows) + 1, np.int64)
    n = 0
    for i in range(len(rows)):
        if i == 0 or rows[i, 0] != rows[starts[n - 1], 0] or rows[i, 4] - rows[starts[n - 1], 3] > most:
            starts[n] = i
            n += 1
    starts[n] = len(rows)
    return starts[: n + 1]


@numba.njit(nogil=True, cache=True)
def longest(rows: Any, starts: Any) -> int:
    """Voxels of the largest piece."""
    most = 0
    for i in range(len(starts) - 1):
        most = max(most, rows[starts[i + 1] - 1, 4] - rows[starts[i], 3])
    return most


@numba.njit(nogil=True, cache=True)
def fill_coordinates(rows: Any, coords: Any) -> None:
    """xi of the voxels of some rows, (3, n), in the type of the array."""
    xs, ys, zs = coords[0], coords[1], coords[2]
    for i in range(len(rows)):
        kx, ky, first, start, stop = rows[i]
        for j in range(stop - start):
            at = start - rows[0, 3] + j
            xs[at], ys[at], zs[at] = kx, ky, first + j


@numba.njit(nogil=True, cache=True)
def fill_phases(phase: Any, shift: Any, box: float) -> None:
    """exp(2 pi i k t / N) along each axis, real and imaginary parts, into phase (3, 2, 2 r_max + 1); of shift t (3,).

    xi is on the lattice, so the phase of a voxel is a product of three of these.
    """
    r_max = phase.shape[2] // 2
    for axis in range(3):
        for k in range(-r_max, r_max + 1):
            angle = 2 * np.pi * k * shift[axis] / box
            phase[axis, 0, k + r_max] = np.cos(angle)
            phase[axis, 1, k + r_max] = np.sin(angle)


@numba.njit(nogil=True, cache=True)
def fill_moved(spectrum: Any, w: Any, rows: Any, phase: Any, moved: Any) -> None:
    """w X exp(2 pi i xi.t / N) of some rows, real and imaginary parts (2, n) as X has them; phase: of t, as above."""
    r_max = phase.shape[2] // 2
    for i in range(len(rows)):
        kx, ky, first, start, stop = rows[i]
        x, y, z, at, n = kx + r_max, ky + r_max, first + r_max, start - rows[0, 3], stop - start
        qr = phase[0, 0, x] * phase[1, 0, y] - phase[0, 1, x] * phase[1, 1, y]
        qi = phase[0, 0, x] * phase[1, 1, y] + phase[0, 1, x] * phase[1, 0, y]
        _fill_row(
            spectrum[0, at : at + n],
            spectrum[1, at : at + n],
            w[at : at + n],
            qr,
            qi,
            phase[2, 0, z : z + n],
            phase[2, 1, z : z + n],
            moved[0, at : at + n],
            moved[1, at : at + n],
        )


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _fill_row(xr: Any, xi: Any, w: Any, qr: Any, qi: Any, zr: Any, zi: Any, re: Any, im: Any) -> None:
    nothing = type(w[0])(0)
    for k in range(len(w)):
        pr, pi = qr * zr[k] - qi * zi[k], qr * zi[k] + qi * zr[k]
        unseen = w[k] == 0  # whatever X is where nothing was observed
        a, b = nothing if unseen else w[k] * xr[k], nothing if unseen else w[k] * xi[k]
        re[k], im[k] = a * pr - b * pi, a * pi + b * pr


def in_planes(array: NDArray[Any]) -> NDArray[Any]:
    """Complex (..., n) as real (..., 2, n): real parts, then imaginary ones."""
    return np.stack([array.real, array.imag], axis=-2)
