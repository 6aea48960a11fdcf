"""Spherical harmonics at many points: the tables that take functions on Fourier shells to their coefficients."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.ops._check import require
from faml_gpu.profile import tally

__all__ = ["harmonics"]

FLOPS = 6  # of each (l, m): two products and a difference of the recurrence, the two parts and a sign
LANES = 16  # points that the CPU takes side by side: the recurrence waits for its own last step, point by point


def harmonics(points: Array, bandwidth: int, *, even: bool = True) -> Array:
    """Conj Y_lm(n) for m >= 0, by the three-term recurrence in l of the normalised Legendre functions.

    Y_lm are orthonormal with the Condon-Shortley phase (`scipy.special.sph_harm_y`).

    Parameters
    ----------
    points : (n, 3) float64
        Directions; not zero, need not be unit vectors.
    bandwidth : int
        L; degrees l < L.
    even : bool
        Only even l.

    Returns
    -------
    (n, 2, L, n_l) float32
        Real and imaginary part; axes [point, part, m, l], 0 where l < m.
    """
    require(points, "points", np.float64, (None, 3))
    if bandwidth < 1:
        raise ValueError(f"bandwidth: found {bandwidth}, expected at least 1")
    out = twin(_harmonics_cpu, _harmonics_cuda, points)(points, bandwidth, 2 if even else 1)
    tally(points, out, flops=FLOPS * len(points) * bandwidth * (bandwidth + 1) // 2)
    return out


@lru_cache(maxsize=8)
def _recurrence(bandwidth: int) -> NDArray[np.float64]:
    """Factors (L, L, 2) float64, [m, l]: P_lm = a (z P_l-1,m - b P_l-2,m) for l > m; at l = m that from m - 1 to m.

    Roots and quotients, the same for every point: one by one they take ten times as long as all the rest.
    """
    table = np.zeros((bandwidth, bandwidth, 2))
    for m in range(bandwidth):
        table[m, m, 0] = -np.sqrt((2 * m + 1) / (2 * m)) if m else 1 / np.sqrt(4 * np.pi)
        l = np.arange(m + 1, bandwidth)
        table[m, m + 1 :, 0] = np.sqrt((4 * l * l - 1) / (l * l - m * m))
        table[m, m + 1 :, 1] = np.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
    return table


def _harmonics_cpu(points: Array, bandwidth: int, step: int) -> Array:
    table = np.empty((len(points), 2, bandwidth, -(-bandwidth // step)), np.float32)
    _harmonics_loop(points, _recurrence(bandwidth), step, table)
    return table


def _harmonics_cuda(points: Array, bandwidth: int, step: int) -> Array:
    xp = namespace(points)
    n = len(points)
    table = xp.empty((n, 2, bandwidth, -(-bandwidth // step)), np.float32)
    blocks = -(-n // kernels.THREADS["harmonics"])
    factors = xp.asarray(_recurrence(bandwidth))
    kernels.launch("harmonics", np.float32, blocks, (points, factors, n, bandwidth, step, table))
    return table


@numba.njit(parallel=True, nogil=True, cache=True)
def _harmonics_loop(points: Any, factors: Any, step: int, table: Any) -> None:
    bandwidth = factors.shape[0]
    for block in numba.prange(-(-points.shape[0] // LANES)):
        first = block * LANES
        n = min(LANES, points.shape[0] - first)
        x, y, z = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
        for j in range(n):
            table[first + j] = 0.0
            a, b, c = points[first + j, 0], points[first + j, 1], points[first + j, 2]
            length = np.sqrt(a * a + b * b + c * c)
            x[j], y[j], z[j] = a / length, b / length, c / length
        # sin(theta) exp(i phi) = x + i y: its m-th power carries the phase and the factor sin^m(theta), and what is
        # left of Y_lm is a polynomial in z.
        real, imaginary = np.full(LANES, factors[0, 0, 0]), np.zeros(LANES)
        before, now = np.empty(LANES), np.empty(LANES)
        for m in range(bandwidth):
            if m:
                a = factors[m, m, 0]
                for j in range(LANES):
                    b = a * (x[j] * real[j] - y[j] * imaginary[j])
                    imaginary[j] = a * (x[j] * imaginary[j] + y[j] * real[j])
                    real[j] = b
            before[:], now[:] = 0.0, 1.0
            for l in range(m, bandwidth):
                if l > m:
                    a = factors[m, l, 0]
                    b = a * factors[m, l, 1]
                    for j in range(LANES):
                        c = a * z[j] * now[j] - b * before[j]
                        before[j], now[j] = now[j], c
                if l % step == 0:
                    for j in range(n):
                        table[first + j, 0, m, l // step] = now[j] * real[j]
                        table[first + j, 1, m, l // step] = -now[j] * imaginary[j]
