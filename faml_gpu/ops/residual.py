"""Masked residual sums of the E-step, fused: rotate, shift, subtract, weigh, square, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import half_grid, real_view, require
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
    shifts : (B, n, 3) or (B, n, k, 3) float64, voxels
        k shifts of each rotation, which share its samples.
    count : (B,) int64
        Particle b has the poses [: count[b]]; the rest is left 0.
    support : Support
    padding : int
        Of the grid.

    Returns
    -------
    (B, n, r_max + 1) or (B, n, k, r_max + 1) float64
        Both voxels of each pair (xi, -xi) counted: the sum over s is the sum over the full Fourier volume.
    """
    b, n = rotations.shape[:2]
    m = len(support)
    half_grid(grid, "grid", "c", padding * support.r_max)
    require(spectra, "spectra", grid.dtype, (b, m))
    require(weights, "weights", grid.real.dtype, (None, m))
    require(weight_index, "weight_index", np.int64, (b,))
    require(rotations, "rotations", np.float64, (b, n, 3, 3))
    several = shifts.ndim == 4
    require(shifts, "shifts", np.float64, (b, n, None, 3) if several else (b, n, 3))
    require(count, "count", np.int64, (b,))
    shifts = shifts if several else shifts[:, :, None]
    out = twin(_residual_cpu, _residual_cuda, grid)(
        grid, spectra, weights, weight_index, rotations, shifts, count, support, padding
    )
    tally(grid, spectra, weights, out, flops=FLOPS * m * b * n * shifts.shape[2])
    return out if several else out[:, :, 0]


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
    out = np.zeros((*shifts.shape[:3], support.r_max + 1))
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
    b, n, k = shifts.shape[:3]
    table = 3 * (2 * support.r_max + 1) * itemsize  # of phases, of one shift
    out = xp.zeros((b, n, k, support.r_max + 1))
    rotations, shell_start = rotations.astype(real) * padding, xp.asarray(support.shell_start)
    shifts = xp.ascontiguousarray(shifts)
    fixed = (grid, grid.shape[-1] - 1, spectra, weights, weight_index)
    poses = (count, support.coords, shell_start, n)
    sizes = (len(support), support.r_max, support.box, out)
    shared = min(k, kernels.SHIFTS) * table
    if k > 1 and shared <= kernels.SHARED_BYTES:
        arguments = (*fixed, rotations, shifts, *poses, k, *sizes)
        blocks = b * n * -(-k // kernels.SHIFTS)
        kernels.launch("residual_shifts", real, blocks, arguments, file="residual", shared=shared)
        return out
    if k > 1:  # of boxes so large the tables of several do not fit
        rotations, poses = xp.repeat(rotations, k, axis=1), (count * k, support.coords, shell_start, n * k)
    kernels.launch("residual", real, b * n * k, (*fixed, rotations, shifts, *poses, *sizes), shared=table)
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
    n, n_shifts = shifts.shape[1:3]
    real = type(rotations[0, 0, 0, 0])
    for task in numba.prange(rotations.shape[0] * n):
        b, i = task // n, task % n
        if i >= count[b]:
            continue
        r, sums = rotations[b, i], out[b, i]
        # exp(-2 pi i k t / N) per axis: xi is on the lattice, so the phase is a product of three table entries.
        phase = np.empty((n_shifts, 3, side, 2), grid.dtype)
        for q in range(n_shifts):
            for axis in range(3):
                for k in range(-r_max, r_max + 1):
                    angle = -2 * np.pi * k * shifts[b, i, q, axis] / box
                    phase[q, axis, k + r_max, 0] = np.cos(angle)
                    phase[q, axis, k + r_max, 1] = np.sin(angle)
        x_particle, w_particle = spectra[b], weights[weight_index[b]]
        sample = np.empty((side, 2), grid.dtype)
        for row in range(rows.shape[0]):
            kx, ky, first, start, stop = rows[row]
            x, y = real(kx), real(ky)
            x0, y0, z0 = r[0, 0] * x + r[1, 0] * y, r[0, 1] * x + r[1, 1] * y, r[0, 2] * x + r[1, 2] * y
            for j in range(start, stop):
                if w_particle[U(j)] == 0:
                    continue
                z, u = real(np.int32(first + (j - start))), U(j - start)
                sample[u, R], sample[u, I] = sample_complex(
                    grid, c, x0 + r[2, 0] * z, y0 + r[2, 1] * z, z0 + r[2, 2] * z
                )
            for q in range(n_shifts):
                px, py, along, of_shells = phase[q, 0, kx + r_max], phase[q, 1, ky + r_max], phase[q, 2], sums[q]
                qr, qi = px[0] * py[0] - px[1] * py[1], px[0] * py[1] + px[1] * py[0]
                for j in range(start, stop):
                    w = w_particle[U(j)]
                    if w == 0:
                        continue
                    u, uz = U(j - start), U(first + (j - start) + r_max)
                    re, im, zr, zi = sample[u, R], sample[u, I], along[uz, R], along[uz, I]
                    pr, pi = qr * zr - qi * zi, qr * zi + qi * zr
                    dr = w * (x_particle[U(j), R] - (re * pr - im * pi))
                    di = w * (x_particle[U(j), I] - (re * pi + im * pr))
                    of_shells[U(shell[U(j)])] += dr * dr + di * di
        for q in range(n_shifts):
            for s in range(r_max + 1):
                sums[q, s] *= 2
