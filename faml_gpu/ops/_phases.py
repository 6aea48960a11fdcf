"""The phases of a shift, as all CPU voxel loops make them."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["fill_phases"]


@numba.njit(nogil=True, cache=True)
def fill_phases(phase: Any, shift: Any, box: float) -> None:
    """exp(2 pi i k t / N) along each axis, into phase (3, 2 r_max + 1, 2); of shift t (3,), or of -t for box -N.

    xi is on the lattice, so the phase of a voxel is a product of three of these.
    """
    r_max = phase.shape[1] // 2
    for axis in range(3):
        for k in range(-r_max, r_max + 1):
            angle = 2 * np.pi * k * shift[axis] / box
            phase[axis, k + r_max, 0] = np.cos(angle)
            phase[axis, k + r_max, 1] = np.sin(angle)
