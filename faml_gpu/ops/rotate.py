"""Rotated references: samples of a Fourier volume at rotated coordinates."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.ops._check import half_grid, real_view, require
from faml_gpu.ops._trilinear import GATHER_FLOPS, sample_complex
from faml_gpu.profile import tally

__all__ = ["rotate"]


def rotate(grid: Array, rotations: Array, coords: Array, padding: int) -> Array:
    """(R A)(xi) = A(R^T xi) for a batch of rotations.

    Parameters
    ----------
    grid : (2c + 1, 2c + 1, c + 1) complex64 or complex128
        From `fourier.interpolation_grid`.
    rotations : (n, 3, 3) float64
    coords : (M, 3) int32 or float
        xi = (x, y, z) in Fourier voxels of the box, |xi| <= r_max of the grid.
    padding : int
        Of the grid.

    Returns
    -------
    (n, M) array of the grid's dtype
    """
    half_grid(grid, "grid", "c", 0)
    require(rotations, "rotations", np.float64, (None, 3, 3))
    require(coords, "coords", coords.dtype, (None, 3))
    out = twin(_rotate_cpu, _rotate_cuda, grid)(grid, rotations, coords, padding)
    tally(grid, out, flops=GATHER_FLOPS * out.size)
    return out


def _rotate_cpu(grid: Array, rotations: Array, coords: Array, padding: int) -> Array:
    real = real_view(grid)
    out = np.empty((len(rotations), len(coords)), grid.dtype)
    padded = rotations.astype(real.dtype) * real.dtype.type(padding)
    _rotate_loop(real, padded, coords.astype(real.dtype), real_view(out))
    return out


def _rotate_cuda(grid: Array, rotations: Array, coords: Array, padding: int) -> Array:
    xp = namespace(grid)
    real = grid.real.dtype
    n, m = len(rotations), len(coords)
    out = xp.empty((n, m), grid.dtype)
    blocks = (-(-m // kernels.THREADS["rotate"]), min(n, kernels.MAX_ROWS))
    c = grid.shape[-1] - 1
    kernels.launch("rotate", real, blocks, (grid, c, rotations.astype(real) * padding, coords.astype(real), n, m, out))
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _rotate_loop(grid: Any, rotations: Any, coords: Any, out: Any) -> None:
    c = grid.shape[2] - 1
    blocks = 8  # so that few rotations still fill the threads
    size = (coords.shape[0] + blocks - 1) // blocks
    for task in numba.prange(rotations.shape[0] * blocks):
        i, block = task // blocks, task % blocks
        r = rotations[i]
        for j in range(block * size, min((block + 1) * size, coords.shape[0])):
            x, y, z = coords[j, 0], coords[j, 1], coords[j, 2]
            re, im = sample_complex(
                grid,
                c,
                r[0, 0] * x + r[1, 0] * y + r[2, 0] * z,
                r[0, 1] * x + r[1, 1] * y + r[2, 1] * z,
                r[0, 2] * x + r[1, 2] * y + r[2, 2] * z,
            )
            out[i, j, 0] = re
            out[i, j, 1] = im
