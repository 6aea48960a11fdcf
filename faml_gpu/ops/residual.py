"""Masked residual sums of the E-step, fused: rotate, shift, subtract, weigh, square, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import posed_particles, real_view
from faml_gpu.ops._phases import fill_phases
from faml_gpu.ops._trilinear import GATHER_FLOPS, I, R, U, sample_complex
from faml_gpu.profile import tally

__all__ = ["residual"]

FLOPS = (
    GATHER_FLOPS + 26
)  # of a voxel: phase 12, its product with the sample 6, difference 2, weight 2, squares and sums 4


def residual(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    support: Support,
    padding: int,
) -> Array:
    """Sum over each Fourier shell s of S of w^2 |X(xi) - A(R^T xi) exp(-2 pi i xi.t / N)|^2 (exponent of Eq. 15).

    Parameters
    ----------
    grid : (2c + 1, 2c + 1, c + 1) complex
        The class average, from `fourier.interpolation_grid`.
    spectra : (B, M) complex, dtype of `grid`
        The particles on the support.
    weights : (W, M) real
        Fourier weights on the support; particle b has row weight_index[b].
    weight_index : (B,) int64
    rotations : (B, n, 3, 3) float64
    shifts : (B, n, 3) float64, voxels
    count : (B,) int64
        Particle b has the poses [: count[b]]; the rest is left 0.
    support : Support
    padding : int
        Of the grid.

    Returns
    -------
    (B, n, r_max + 1) float64
        Both voxels of each pair (xi, -xi) counted: the sum over s is the sum over the full Fourier volume.
    """
    posed_particles(grid, spectra, weights, weight_index, rotations, shifts, count, support, padding)
    out = twin(_residual_cpu, _residual_cuda, grid)(
        grid, spectra, weights, weight_index, rotations, shifts, count, support, padding
    )
    tally(grid, spectra, weights, out, flops=FLOPS * rotations.shape[0] * rotations.shape[1] * len(support))
    return out


def _residual_cpu(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    support: Support,
    padding: int,
) -> Array:
    real = real_view(grid)
    out = np.zeros((*shifts.shape[:2], support.r_max + 1))
    order, rows = support_rows(support)
    _residual_loop(
        real,
        real_view(np.take(spectra, order, axis=1)),
        np.take(weights, order, axis=1),
        weight_index,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        shifts,
        count,
        rows,
        np.take(support.shell, order),
        support.box,
        support.r_max,
        out,
    )
    return out


def _residual_cuda(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    support: Support,
    padding: int,
) -> Array:
    xp = namespace(grid)
    real, itemsize = grid.real.dtype, grid.dtype.itemsize
    b, n = shifts.shape[:2]
    out = xp.zeros((b, n, support.r_max + 1))
    arguments = (
        grid, grid.shape[-1] - 1, spectra, weights, weight_index, rotations.astype(real) * padding, shifts, count,
        support.coords, xp.asarray(support.shell_start), n, len(support), support.r_max, support.box, out,
    )  # fmt: skip
    shared = 3 * (2 * support.r_max + 1) * itemsize  # the table of phases
    kernels.launch("residual", real, b * n, arguments, shared=shared)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _residual_loop(
    grid: Any,
    spectra: Any,
    weights: Any,
    weight_index: Any,
    rotations: Any,
    shifts: Any,
    count: Any,
    rows: Any,
    shell: Any,
    box: int,
    r_max: int,
    out: Any,
) -> None:
    c, side = grid.shape[2] - 1, 2 * r_max + 1
    n = rotations.shape[1]
    real = type(rotations[0, 0, 0, 0])
    for task in numba.prange(rotations.shape[0] * n):
        b, i = task // n, task % n
        if i >= count[b]:
            continue
        r, sums = rotations[b, i], out[b, i]
        phase = np.empty((3, side, 2), grid.dtype)
        fill_phases(phase, shifts[b, i], -box)
        x_particle, w_particle = spectra[b], weights[weight_index[b]]
        for row in range(rows.shape[0]):
            kx, ky, first, start, stop = rows[row]
            x, y = real(kx), real(ky)
            x0, y0, z0 = r[0, 0] * x + r[1, 0] * y, r[0, 1] * x + r[1, 1] * y, r[0, 2] * x + r[1, 2] * y
            px, py, along = phase[0, kx + r_max], phase[1, ky + r_max], phase[2]
            qr, qi = px[0] * py[0] - px[1] * py[1], px[0] * py[1] + px[1] * py[0]
            for j in range(start, stop):
                w = w_particle[U(j)]
                if w == 0:
                    continue
                kz = np.int32(first + (j - start))
                z, uz = real(kz), U(kz + r_max)
                re, im = sample_complex(grid, c, x0 + r[2, 0] * z, y0 + r[2, 1] * z, z0 + r[2, 2] * z)
                zr, zi = along[uz, R], along[uz, I]
                pr, pi = qr * zr - qi * zi, qr * zi + qi * zr
                dr = w * (x_particle[U(j), R] - (re * pr - im * pi))
                di = w * (x_particle[U(j), I] - (re * pi + im * pr))
                sums[U(shell[U(j)])] += dr * dr + di * di
        for s in range(r_max + 1):
            sums[s] *= 2
