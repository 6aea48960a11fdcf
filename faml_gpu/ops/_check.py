"""Checks of the arrays handed to an operation: a compiled loop or a kernel validates nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from faml_gpu.array_backend import Array
from faml_gpu.fourier import Support

__all__ = ["half_grid", "posed_particles", "real_view", "require"]


def require(array: Array, name: str, dtype: Any, shape: tuple[int | None, ...]) -> None:
    """Refuse an array of another dtype or shape (None: any length), or one that is not C-contiguous."""
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name}: found dtype {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(e is not None and e != f for e, f in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name}: found shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array")


def real_view(array: Array) -> Array:
    """Complex (...,) as real (..., 2), without a copy."""
    if array.dtype.kind != "c" or not array.flags.c_contiguous:
        raise TypeError(f"expected a C-contiguous complex array, found {array.dtype}")
    return array.view(array.real.dtype).reshape(*array.shape, 2)


def half_grid(array: Array, name: str, kind: str, reach: int) -> None:
    """Refuse what is no stack of centred half grids (2c + 1, 2c + 1, c + 1), or does not reach `reach` steps."""
    c = array.shape[-1] - 1
    if array.dtype.kind != kind:
        raise TypeError(f"{name}: found dtype {array.dtype}, expected {'complex' if kind == 'c' else 'real'}")
    if array.shape[-3:] != (2 * c + 1, 2 * c + 1, c + 1) or c < reach + 1:
        raise ValueError(f"{name}: found shape {array.shape}, expected (2c + 1, 2c + 1, c + 1) with c > {reach}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array")


def posed_particles(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    support: Support,
    padding: int,
) -> None:
    """Refuse particles, poses of each, and an average to hold against them, that are not as `residual` says."""
    b, n = rotations.shape[:2]
    m = len(support)
    half_grid(grid, "grid", "c", padding * support.r_max)
    require(spectra, "spectra", grid.dtype, (b, m))
    require(weights, "weights", grid.real.dtype, (None, m))
    require(weight_index, "weight_index", np.int64, (b,))
    require(rotations, "rotations", np.float64, (b, n, 3, 3))
    require(shifts, "shifts", np.float64, (b, n, 3))
    require(count, "count", np.int64, (b,))
