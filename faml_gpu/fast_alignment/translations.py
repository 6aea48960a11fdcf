"""Shifts: the maximum of the band-limited cross-correlation within a radius, to a fraction of a voxel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from faml_gpu.array_backend import Array, namespace
from faml_gpu.fourier import Support

__all__ = ["ShiftWindow", "shift_window"]

CHUNK_BYTES = 1 << 27  # of the dense cross spectra worked on at a time


@dataclass(frozen=True)
class ShiftWindow:
    """Lattice shifts |t| <= radius, and the separable DFT that takes cross spectra on S to them.

    Only a few voxels of shift are wanted: three small matrix products cost less than a full inverse FFT.
    """

    support: Support
    radius: float
    place: Array  # (M,) flat index of each voxel of S in the dense crop (2r + 1, 2r + 1, r + 1)
    matrix: Array  # (2r + 1, T) complex64, exp(2 pi i k t / N)
    inside: Array  # (T, T, T) bool, axes [z, y, x]

    def correlate(self, cross: Array) -> Array:
        """c(t) = sum over S of C(xi) exp(2 pi i xi.t / N) for C (n, M): (n, T, T, T) float32, axes [z, y, x]."""
        xp = namespace(cross)
        r, d = self.support.r_max, 2 * self.support.r_max + 1
        dense = xp.zeros((len(cross), d * d * (r + 1)), np.complex64)
        dense[:, self.place] = cross
        t = self.matrix.shape[1]
        out = dense.reshape(-1, r + 1) @ self.matrix[r:]
        out = self.matrix.T @ out.reshape(-1, d, t)
        out = self.matrix.T @ out.reshape(-1, d, t * t)
        return 2 * out.real.reshape(-1, t, t, t)

    def best(self, cross: Array) -> tuple[Array, Array]:
        """Shifts (n, 3) float64 in voxels (x, y, z) and the correlation (n,) at each maximum.

        Refined by a parabola along each axis where both neighbours were computed.
        """
        xp = namespace(cross)
        n, t = len(cross), self.matrix.shape[1]
        chunk = max(1, CHUNK_BYTES // (8 * (2 * self.support.r_max + 1) ** 2 * (self.support.r_max + 1)))
        shifts, values = xp.zeros((n, 3)), xp.zeros(n)
        for start in range(0, n, chunk):
            c = self.correlate(cross[start : start + chunk])
            rows = xp.arange(len(c))
            top = xp.where(self.inside, c, -np.inf).reshape(len(c), -1).argmax(axis=1)
            index = xp.stack(xp.unravel_index(top, (t, t, t)))  # z, y, x
            peak = c[(rows, *index)].astype(np.float64)
            values[start : start + chunk] = peak
            for axis in range(3):
                step = np.zeros((3, 1), np.int64)
                step[axis] = 1
                step = xp.asarray(step)
                low = c[(rows, *xp.maximum(index - step, 0))]
                high = c[(rows, *xp.minimum(index + step, t - 1))]
                curvature = low + high - 2 * peak
                usable = (index[axis] > 0) & (index[axis] < t - 1) & (curvature < 0)
                offset = xp.where(usable, 0.5 * (low - high) / xp.where(usable, curvature, 1), 0)
                shifts[start : start + chunk, 2 - axis] = index[axis] - t // 2 + xp.clip(offset, -0.5, 0.5)
                values[start : start + chunk] -= 0.25 * (low - high) * offset
        return shifts, values


def shift_window(support: Support, radius: float) -> ShiftWindow:
    """The window of shifts up to `radius` voxels."""
    r, n = support.r_max, support.box
    c = support.coords.astype(np.int64)
    place = ((c[:, 2] + r) * (2 * r + 1) + c[:, 1] + r) * (r + 1) + c[:, 0]
    reach = int(np.floor(radius))
    t = np.arange(-reach, reach + 1)
    matrix = np.exp(2j * np.pi / n * np.arange(-r, r + 1)[:, None] * t).astype(np.complex64)
    z, y, x = np.meshgrid(t, t, t, indexing="ij")
    return ShiftWindow(support, radius, place, matrix, x * x + y * y + z * z <= radius * radius)
