"""The one trilinear sample all CPU voxel loops share."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["GATHER_FLOPS", "U", "sample_complex", "sample_real"]

GATHER_FLOPS = 50  # 15 to rotate, 8 for the cell and its weights, 28 for the two sums of eight; one way of counting

# Numba adds float32 and integers in float64, and asks of every signed index whether it is negative: numbers of the
# coordinates' own type and unsigned indices make these loops twice as fast. (Numba keeps what it compiled by the date
# of the caller's file alone: after a change here, delete *.nbi and *.nbc in __pycache__.)
U = np.uint32
R, I = U(0), U(1)  # where the real and the imaginary part are


@numba.njit(inline="always", cache=True)
def _cell(c: int, x: Any, y: Any, z: Any) -> Any:
    """Where (x, y, z) lies, turned to x >= 0 by `sign`: corners of the cell, weights of its edges along x, place.

    The edges lie at (y0, z0), (y1, z0), (y0, z1) and (y1, z1).
    """
    real = type(x)
    one = real(1)
    sign = -one if x < 0 else one
    x, y, z = sign * x, sign * y + real(c), sign * z + real(c)
    ix, iy, iz = np.int32(x), np.int32(y), np.int32(z)
    fx, fy, fz = x - real(ix), y - real(iy), z - real(iz)
    x0, y0, z0, x1, y1, z1 = U(ix), U(iy), U(iz), U(ix + 1), U(iy + 1), U(iz + 1)
    a, b, d, e = (one - fz) * (one - fy), (one - fz) * fy, fz * (one - fy), fz * fy
    return sign, x0, x1, y0, y1, z0, z1, a, b, d, e, fx


@numba.njit(inline="always", cache=True)
def sample_complex(grid: Any, c: int, x: Any, y: Any, z: Any) -> Any:
    """(re, im) at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1, 2); x < 0 by Hermitian symmetry."""
    sign, x0, x1, y0, y1, z0, z1, a, b, d, e, fx = _cell(c, x, y, z)
    re0 = a * grid[z0, y0, x0, R] + b * grid[z0, y1, x0, R] + d * grid[z1, y0, x0, R] + e * grid[z1, y1, x0, R]
    re1 = a * grid[z0, y0, x1, R] + b * grid[z0, y1, x1, R] + d * grid[z1, y0, x1, R] + e * grid[z1, y1, x1, R]
    im0 = a * grid[z0, y0, x0, I] + b * grid[z0, y1, x0, I] + d * grid[z1, y0, x0, I] + e * grid[z1, y1, x0, I]
    im1 = a * grid[z0, y0, x1, I] + b * grid[z0, y1, x1, I] + d * grid[z1, y0, x1, I] + e * grid[z1, y1, x1, I]
    return re0 + fx * (re1 - re0), sign * (im0 + fx * (im1 - im0))


@numba.njit(inline="always", cache=True)
def sample_real(grid: Any, c: int, x: Any, y: Any, z: Any) -> Any:
    """Value at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1) of a point-symmetric real function."""
    _, x0, x1, y0, y1, z0, z1, a, b, d, e, fx = _cell(c, x, y, z)
    v0 = a * grid[z0, y0, x0] + b * grid[z0, y1, x0] + d * grid[z1, y0, x0] + e * grid[z1, y1, x0]
    v1 = a * grid[z0, y0, x1] + b * grid[z0, y1, x1] + d * grid[z1, y0, x1] + e * grid[z1, y1, x1]
    return v0 + fx * (v1 - v0)
