"""Shifts: the maximum of the band-limited cross-correlation within a radius, to a fraction of a voxel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, device_of, namespace, to_device, working_bytes
from faml_gpu.fourier import Support

__all__ = ["ShiftWindow", "correlated_at_once", "shift_waves", "shift_window"]


@dataclass(frozen=True)
class ShiftWindow:
    """Lattice shifts |t| <= radius, and the waves of the separable DFT that takes cross spectra on S to them.

    Only a few voxels of shift are wanted: the small sums of `ops.correlations` cost less than a full inverse FFT.
    """

    radius: float
    waves: Array  # (T, 2r + 1) complex64, exp(2 pi i k t / N)
    inside: Array  # (T, T, T) bool

    @property
    def r_max(self) -> int:
        """Radius of the support that the waves are for."""
        return int(self.waves.shape[1]) // 2

    @property
    def at_once(self) -> int:
        """How many rotations to work on at a time."""
        return correlated_at_once(self.waves)

    def best(self, correlations: Array) -> tuple[Array, Array]:
        """Shifts (n, 3) float64 in voxels (x, y, z) and the correlation (n,) at each maximum.

        correlations (n, T, T, T), from `ops.correlations`. Refined by a parabola along each axis where both neighbours
        were computed.
        """
        xp, c = namespace(correlations), correlations
        n, t = len(c), len(self.waves)
        row = xp.arange(n)
        top = xp.where(self.inside, c, -np.inf).reshape(-1, t**3).argmax(axis=1)
        index = xp.stack([top // (t * t), top // t % t, top % t])  # x, y, z
        peak = c[(row, *index)].astype(np.float64)
        shifts, values = xp.zeros((n, 3)), peak.copy()
        for axis in range(3):
            step = xp.zeros((3, 1), np.int64)
            step[axis] = 1
            low = c[(row, *xp.maximum(index - step, 0))]
            high = c[(row, *xp.minimum(index + step, t - 1))]
            curvature = low + high - 2 * peak
            usable = (index[axis] > 0) & (index[axis] < t - 1) & (curvature < 0)
            offset = xp.where(usable, 0.5 * (low - high) / xp.where(usable, curvature, 1), 0)
            offset = xp.clip(offset, -0.5, 0.5)  # at the rim the best within the radius may be no maximum
            shifts[:, axis] = index[axis] - t // 2 + offset
            values += 0.5 * offset * (high - low + curvature * offset)
        # A lattice shift at the rim may be refined to just beyond it.
        if self.radius > 0:
            length = xp.sqrt((shifts**2).sum(axis=1))
            shifts *= (self.radius / xp.maximum(length, self.radius))[:, None]
        return shifts, values


def shift_waves(support: Support, line: NDArray[Any]) -> Array:
    """exp(2 pi i k t / N) of the shifts t (T,) along an axis, (T, 2r + 1) complex64, for `ops.correlations`."""
    k = np.arange(-support.r_max, support.r_max + 1)
    waves = np.exp(2j * np.pi / support.box * line[:, None] * k).astype(np.complex64)
    return to_device(waves, device_of(support.coords))


def correlated_at_once(waves: Array) -> int:
    """How many rotations to work on at a time, by the size of their correlations at the shifts of these waves."""
    return max(1, working_bytes(waves, cached=True) // (64 * len(waves) ** 3))


def shift_window(support: Support, radius: float) -> ShiftWindow:
    """The window of shifts up to `radius` voxels."""
    reach = int(np.floor(radius))
    t = np.arange(-reach, reach + 1)
    x, y, z = np.meshgrid(t, t, t, indexing="ij")
    inside = x * x + y * y + z * z <= radius * radius
    return ShiftWindow(radius, shift_waves(support, t), to_device(inside, device_of(support.coords)))
