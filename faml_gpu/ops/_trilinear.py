"""The one trilinear sample all CPU voxel loops share."""

from __future__ import annotations

from typing import Any

import numba

__all__ = ["sample_complex", "sample_real"]


@numba.njit(inline="always", cache=True)
def sample_complex(grid: Any, c: int, x: Any, y: Any, z: Any) -> Any:
    """(re, im) at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1, 2); x < 0 by Hermitian symmetry."""
    negative = x < 0
    if negative:
        x, y, z = -x, -y, -z
    y += c
    z += c
    ix, iy, iz = int(x), int(y), int(z)
    fx, fy, fz = x - ix, y - iy, z - iz
    re = x * 0
    im = x * 0
    for dz in range(2):
        wz = fz if dz else 1 - fz
        for dy in range(2):
            w = wz * (fy if dy else 1 - fy)
            row = grid[iz + dz, iy + dy]
            re += w * (row[ix, 0] + fx * (row[ix + 1, 0] - row[ix, 0]))
            im += w * (row[ix, 1] + fx * (row[ix + 1, 1] - row[ix, 1]))
    if negative:
        im = -im
    return re, im


@numba.njit(inline="always", cache=True)
def sample_real(grid: Any, c: int, x: Any, y: Any, z: Any) -> Any:
    """Value at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1) of a point-symmetric real function."""
    if x < 0:
        x, y, z = -x, -y, -z
    y += c
    z += c
    ix, iy, iz = int(x), int(y), int(z)
    fx, fy, fz = x - ix, y - iy, z - iz
    value = x * 0
    for dz in range(2):
        wz = fz if dz else 1 - fz
        for dy in range(2):
            w = wz * (fy if dy else 1 - fy)
            row = grid[iz + dz, iy + dy]
            value += w * (row[ix] + fx * (row[ix + 1] - row[ix]))
    return value
