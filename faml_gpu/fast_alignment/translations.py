"""Shifts: the maximum of the band-limited cross-correlation within a radius, to a fraction of a voxel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from faml_gpu.array_backend import Array, device_of, namespace, to_device, working_bytes
from faml_gpu.fourier import Support
from faml_gpu.profile import tally

__all__ = ["ShiftWindow", "shift_window"]


@dataclass(frozen=True)
class ShiftWindow:
    """Lattice shifts |t| <= radius, and the separable DFT that takes cross spectra on S to them.

    Only a few voxels of shift are wanted: three small matrix products cost less than a full inverse FFT.
    """

    support: Support
    radius: float
    matrix: Array  # (T, 2r + 1) complex64, exp(2 pi i k t / N)
    inside: Array  # (T, T, T) bool

    @property
    def at_once(self) -> int:
        """How many cross spectra to work on at a time, by the size of their dense crops."""
        r = self.support.r_max
        return max(1, working_bytes(self.matrix, cached=True) // (8 * (2 * r + 1) ** 2 * (r + 1)))

    def crops(self, cross: Array) -> Array:
        """Cross spectra (n, M) on S laid out as `ops.cross` does, (n, r + 1, 2r + 1, 2r + 1), 0 off S."""
        r, d, n = self.support.r_max, 2 * self.support.r_max + 1, len(cross)
        x, y, z = self.support.coords.T
        dense = namespace(cross).zeros((n, r + 1, d, d), np.complex64)
        dense[:, x, y + r, z + r] = cross
        return dense

    def correlate(self, crops: Array) -> Array:
        """c(t) = sum over S of C(xi) exp(2 pi i xi.t / N) for C laid out as crops: (n, T, T, T) float32, [n, x, y, z].

        The first product, which is most of the work, is one large GEMM however few functions there are.
        """
        r, d, n = self.support.r_max, 2 * self.support.r_max + 1, len(crops)
        t = len(self.matrix)
        out = crops.reshape(n * (r + 1) * d, d) @ self.matrix.T
        out = self.matrix @ out.reshape(n * (r + 1), d, t)
        out = self.matrix[:, r:] @ out.reshape(n, r + 1, t * t)
        tally(crops, flops=8 * n * t * (r + 1) * (d * d + d * t + t * t))
        return 2 * out.real.reshape(n, t, t, t)

    def best(self, crops: Array) -> tuple[Array, Array]:
        """Shifts (n, 3) float64 in voxels (x, y, z) and the correlation (n,) at each maximum.

        Refined by a parabola along each axis where both neighbours were computed.
        """
        xp = namespace(crops)
        n, t = len(crops), len(self.matrix)
        chunk = self.at_once
        shifts, values = xp.zeros((n, 3)), xp.zeros(n)
        for start in range(0, n, chunk):
            c = self.correlate(crops[start : start + chunk])
            row = xp.arange(len(c))
            top = xp.where(self.inside, c, -np.inf).reshape(-1, t**3).argmax(axis=1)
            index = xp.stack([top // (t * t), top // t % t, top % t])  # x, y, z
            peak = c[(row, *index)].astype(np.float64)
            values[start : start + chunk] = peak
            for axis in range(3):
                step = xp.zeros((3, 1), np.int64)
                step[axis] = 1
                low = c[(row, *xp.maximum(index - step, 0))]
                high = c[(row, *xp.minimum(index + step, t - 1))]
                curvature = low + high - 2 * peak
                usable = (index[axis] > 0) & (index[axis] < t - 1) & (curvature < 0)
                offset = xp.where(usable, 0.5 * (low - high) / xp.where(usable, curvature, 1), 0)
                offset = xp.clip(offset, -0.5, 0.5)  # at the rim the best within the radius may be no maximum
                shifts[start : start + chunk, axis] = index[axis] - t // 2 + offset
                values[start : start + chunk] += 0.5 * offset * (high - low + curvature * offset)
        # A lattice shift at the rim may be refined to just beyond it.
        if self.radius > 0:
            length = xp.sqrt((shifts**2).sum(axis=1))
            shifts *= (self.radius / xp.maximum(length, self.radius))[:, None]
        return shifts, values


def shift_window(support: Support, radius: float) -> ShiftWindow:
    """The window of shifts up to `radius` voxels."""
    r, n, device = support.r_max, support.box, device_of(support.coords)
    reach = int(np.floor(radius))
    t = np.arange(-reach, reach + 1)
    matrix = np.exp(2j * np.pi / n * t[:, None] * np.arange(-r, r + 1)).astype(np.complex64)
    x, y, z = np.meshgrid(t, t, t, indexing="ij")
    inside = x * x + y * y + z * z <= radius * radius
    return ShiftWindow(support, radius, to_device(matrix, device), to_device(inside, device))
