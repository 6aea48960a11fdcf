"""Masked residual sums of the E-step, fused: rotate, shift, subtract, weigh, square, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support
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
        k shifts of each rotation: on the CPU they share its samples.
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
    _residual_loop(
        real,
        real_view(spectra),
        weights,
        weight_index,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        shifts,
        count,
        support.coords,
        support.shell_start,
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
    coords: Any,
    shell_start: Any,
    box: int,
    r_max: int,
    out: Any,
) -> None:
    c = grid.shape[2] - 1
    n, n_shifts = shifts.shape[1:3]
    widest = np.diff(shell_start).max()
    real = type(rotations[0, 0, 0, 0])
    for task in numba.prange(rotations.shape[0] * n):
        b, i = task // n, task % n
        if i >= count[b]:
            continue
        r = rotations[b, i]
        # exp(-2 pi i k t / N) per axis: xi is on the lattice, so the phase is a product of three table entries.
        phase = np.empty((n_shifts, 3, 2 * r_max + 1, 2), grid.dtype)
        for q in range(n_shifts):
            for axis in range(3):
                for k in range(-r_max, r_max + 1):
                    angle = -2 * np.pi * k * shifts[b, i, q, axis] / box
                    phase[q, axis, k + r_max, 0] = np.cos(angle)
                    phase[q, axis, k + r_max, 1] = np.sin(angle)
        x_particle, w_particle = spectra[b], weights[weight_index[b]]
        sample = np.empty((widest, 2), grid.dtype)
        for s in range(1, r_max + 1):
            start, stop = shell_start[s], shell_start[s + 1]
            for j in range(start, stop):
                if w_particle[j] == 0:
                    continue
                x, y, z = real(coords[j, 0]), real(coords[j, 1]), real(coords[j, 2])
                sample[j - start] = sample_complex(
                    grid,
                    c,
                    r[0, 0] * x + r[1, 0] * y + r[2, 0] * z,
                    r[0, 1] * x + r[1, 1] * y + r[2, 1] * z,
                    r[0, 2] * x + r[1, 2] * y + r[2, 2] * z,
                )
            for q in range(n_shifts):
                total = 0.0
                for j in range(start, stop):
                    w = w_particle[j]
                    if w == 0:
                        continue
                    re, im = sample[j - start, 0], sample[j - start, 1]
                    kx, ky, kz = U(coords[j, 0] + r_max), U(coords[j, 1] + r_max), U(coords[j, 2] + r_max)
                    ax, bx = phase[q, U(0), kx, R], phase[q, U(0), kx, I]
                    ay, by = phase[q, U(1), ky, R], phase[q, U(1), ky, I]
                    az, bz = phase[q, U(2), kz, R], phase[q, U(2), kz, I]
                    axy, bxy = ax * ay - bx * by, ax * by + bx * ay
                    pr, pi = axy * az - bxy * bz, axy * bz + bxy * az
                    dr = w * (x_particle[j, 0] - (re * pr - im * pi))
                    di = w * (x_particle[j, 1] - (re * pi + im * pr))
                    total += dr * dr + di * di
                out[b, i, q, s] = 2 * total
