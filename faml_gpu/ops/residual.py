"""Masked residual sums of the E-step, fused: rotate, shift, subtract, weigh, square, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import posed_particles, real_view
from faml_gpu.ops._pieces import PIECE, fill_coordinates, fill_moved, fill_phases, in_planes, longest, piece_starts
from faml_gpu.ops._trilinear import GATHER_FLOPS, U, empty_cells, fill_cells, fill_samples
from faml_gpu.profile import tally

__all__ = ["residual"]

TOGETHER = 8  # poses of a particle worked on at a time: of those close together a piece reads the same of the average

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
        in_planes(np.take(spectra, order, axis=1)),
        np.take(weights, order, axis=1),
        weight_index,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        shifts,
        count,
        rows,
        piece_starts(rows, PIECE),
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


@numba.njit(parallel=True, nogil=True, cache=True)
def _residual_loop(
    grid: Any,
    spectra: Any,
    weights: Any,
    weight_index: Any,
    rotations: Any,
    shifts: Any,
    count: Any,
    rows: Any,
    starts: Any,
    shell: Any,
    box: int,
    r_max: int,
    out: Any,
) -> None:
    c, side, piece = grid.shape[2] - 1, 2 * r_max + 1, longest(rows, starts)
    groups = (rotations.shape[1] + TOGETHER - 1) // TOGETHER
    for task in numba.prange(rotations.shape[0] * groups):
        b, begin = task // groups, task % groups * TOGETHER
        end = min(begin + TOGETHER, count[b], rotations.shape[1])
        if begin >= end:
            continue
        phases = np.empty((end - begin, 3, 2, side), grid.dtype)
        for i in range(begin, end):
            fill_phases(phases[i - begin], shifts[b, i], box)
        coords, cells = np.empty((3, piece), grid.dtype), empty_cells(piece, grid)
        sums = np.zeros((end - begin, 4, r_max + 1))  # so that one addition need not wait for that before it
        samples, moved = np.empty((2, piece), grid.dtype), np.empty((2, piece), grid.dtype)
        for p in range(len(starts) - 1):
            some = rows[starts[p] : starts[p + 1]]
            start, n = some[0, 3], some[-1, 4] - some[0, 3]
            x, w = spectra[b, :, start : start + n], weights[weight_index[b], start : start + n]
            fill_coordinates(some, coords)
            for i in range(begin, end):
                # |X - A exp(-2 pi i xi.t / N)| with the particle moved back.
                fill_moved(x, w, some, phases[i - begin], moved)
                fill_cells(c, rotations[b, i], coords, n, cells)
                fill_samples(grid, c, w, n, cells, samples)
                _add_squares(moved, w, n, samples, shell[start : start + n], sums[i - begin])
        for i in range(begin, end):
            out[b, i] = 2 * sums[i - begin].sum(axis=0)


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _add_squares(moved: Any, w: Any, n: int, samples: Any, shell: Any, sums: Any) -> None:
    """Add |moved - w A|^2 of n samples to the sums (4, S) of their shells, by turns; the samples are lost."""
    re, im, xr, xi = samples[0], samples[1], moved[0], moved[1]
    for j in range(n):
        dr, di = xr[j] - w[j] * re[j], xi[j] - w[j] * im[j]
        re[j] = dr * dr + di * di
    for i in range(n):
        voxel = U(i)
        sums[voxel & U(3), U(shell[voxel])] += re[voxel]
