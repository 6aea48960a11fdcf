"""Correlations of particles with rotated references at a lattice of shifts, fused: rotate, multiply, sum over xi."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin, working_bytes
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import half_grid, real_view, require
from faml_gpu.ops._pieces import PIECE, fill_coordinates, fill_moved, fill_phases, in_planes, longest, piece_starts
from faml_gpu.ops._trilinear import GATHER_FLOPS, empty_cells, fill_cells, fill_samples
from faml_gpu.ops._window import SUMS, add_plane, add_rows, correlations_of, wave_tables
from faml_gpu.profile import tally

__all__ = ["correlations"]

# Of a voxel: power 4, product with the particle and its weight 8, phase 12, product with it 6.
FLOPS = GATHER_FLOPS + 30
TOGETHER = 8  # rotations worked on at a time: of those close together a piece reads nearly the same of the reference
CACHED = 1 << 18  # bytes of their sums: with many shifts only so many rotations go together as these allow


def correlations(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    waves: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    """sum v Re[X conj(R A) exp(2 pi i xi.(t0 + t) / N)] and sum v |R A|^2 for a list of particles, rotations R and t0.

    Both sums over both voxels of each pair. The first is the correlation of X with the reference rotated and shifted.

    Parameters
    ----------
    grid : (2c + 1, 2c + 1, c + 1) complex
        The class average, from `fourier.interpolation_grid`.
    spectra : (B, M) complex, dtype of `grid`
        The particles on the support.
    weights : (W, M) real
        v, such as w^2 / sigma^2; particle b has row weight_index[b].
    weight_index : (B,) int64
    particle : (n,) int64
    rotations : (n, 3, 3) float64
    centres : (n, 3) float64, voxels
        t0.
    waves : (T, 2 r_max + 1) complex, dtype of `grid`
        exp(2 pi i k t / N) for k = -r_max .. r_max at the shifts t along an axis, T of them symmetric about 0.
    support : Support
    padding : int
        Of the grid.

    Returns
    -------
    correlations : (n, T, T, T) real
        Axes [n, x, y, z].
    power : (n,) float64
    """
    n, m, side = len(particle), len(support), 2 * support.r_max + 1
    half_grid(grid, "grid", "c", padding * support.r_max)
    require(spectra, "spectra", grid.dtype, (None, m))
    require(weights, "weights", grid.real.dtype, (None, m))
    require(weight_index, "weight_index", np.int64, (len(spectra),))
    require(particle, "particle", np.int64, (n,))
    require(rotations, "rotations", np.float64, (n, 3, 3))
    require(centres, "centres", np.float64, (n, 3))
    require(waves, "waves", grid.dtype, (len(waves) | 1, side))
    found, power = twin(_correlations_cpu, _correlations_cuda, grid)(
        grid, spectra, weights, weight_index, particle, rotations, centres, waves, support, padding
    )
    t = len(waves)
    flops = 8 * t * (support.r_max + 1) * (side**2 + side * t + t**2)  # of the transform, had it no symmetries
    tally(grid, spectra, weights, found, flops=n * (FLOPS * m + flops))
    return found, power


def _correlations_cpu(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    waves: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    real, n, t = real_view(grid), len(particle), len(waves)
    found, power = np.empty((n, t, t, t), real.dtype), np.empty(n)
    order, rows = support_rows(support)
    # Callers give pieces of a list over a whole batch: only what occurs in a piece is put in order.
    used, particle = np.unique(particle, return_inverse=True)
    used_weights, weight_index = np.unique(weight_index[used], return_inverse=True)
    along, tables = wave_tables(waves, real.dtype)
    of_x = len(tables) * (t + 1) ** 2 * SUMS
    _correlations_loop(
        real,
        in_planes(spectra[used[:, None], order]),
        weights[used_weights[:, None], order],
        weight_index,
        particle,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        centres,
        rows,
        support.box,
        support.r_max,
        along,
        tables,
        min(TOGETHER, max(1, CACHED // (of_x * real.itemsize))),
        piece_starts(rows, PIECE),
        found,
        power,
    )
    return found, power


def _correlations_cuda(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    waves: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    """Cross spectra by a kernel, laid out densely, then three matrix products: fewer shifts than a full FFT has."""
    xp, r = namespace(grid), support.r_max
    real, side, t = grid.real.dtype, 2 * r + 1, len(waves)
    found, power = xp.empty((len(particle), t, t, t), real), xp.empty(len(particle))
    turned = rotations.astype(real) * padding
    at_once = max(1, working_bytes(grid) // (24 * (r + 1) * side**2))
    for first in range(0, len(particle), at_once):
        part = slice(first, first + at_once)
        n = len(particle[part])
        crops = xp.empty((n, r + 1, side, side), grid.dtype)
        kernels.launch(
            "cross",
            real,
            n,
            (
                grid,
                grid.shape[-1] - 1,
                spectra,
                weights,
                weight_index,
                particle[part],
                turned[part],
                centres[part],
                support.coords,
                len(support),
                r,
                support.box,
                crops,
                power[part],
            ),
            shared=(3 * side + side % 2) * grid.dtype.itemsize + 8 * (kernels.THREADS["cross"] // 32),
        )
        # The first product, which is most of the work, is one large GEMM however few functions there are.
        sums = crops.reshape(n * (r + 1) * side, side) @ waves.T
        sums = waves @ sums.reshape(n * (r + 1), side, t)
        sums = waves[:, r:] @ sums.reshape(n, r + 1, t * t)
        found[part] = 2 * sums.real.reshape(n, t, t, t)
    return found, power


@numba.njit(parallel=True, nogil=True, cache=True)
def _correlations_loop(
    grid: Any,
    spectra: Any,
    weights: Any,
    weight_index: Any,
    particle: Any,
    rotations: Any,
    centres: Any,
    rows: Any,
    box: int,
    r_max: int,
    along: Any,
    tables: Any,
    together: int,
    starts: Any,
    found: Any,
    power: Any,
) -> None:
    c, entries, n_y = grid.shape[2] - 1, len(particle), len(tables) * 2 * along.shape[2] * SUMS
    piece = longest(rows, starts)
    for group in numba.prange((entries + together - 1) // together):
        begin, end = group * together, min((group + 1) * together, entries)
        coords, cells = np.empty((3, piece), grid.dtype), empty_cells(piece, grid)
        samples, moved = np.empty((2, piece), grid.dtype), np.empty((2, piece), grid.dtype)
        phases = np.empty((end - begin, 3, 2, 2 * r_max + 1), grid.dtype)
        sums, of_y = np.empty(SUMS, grid.dtype), np.zeros((end - begin, n_y), grid.dtype)
        of_x = np.zeros((end - begin, n_y * 2 * along.shape[2]), grid.dtype)
        same = np.zeros(end - begin, np.bool_)  # particle and centre as of the entry before
        for e in range(begin, end):
            i, power[e] = e - begin, 0
            now, before = centres[e], centres[e - 1]
            still = now[0] == before[0] and now[1] == before[1] and now[2] == before[2]
            same[i] = i > 0 and particle[e] == particle[e - 1] and still
            if not same[i]:
                fill_phases(phases[i], centres[e], box)
        for p in range(len(starts) - 1):
            some = rows[starts[p] : starts[p + 1]]
            start, n = some[0, 3], some[-1, 4] - some[0, 3]
            fill_coordinates(some, coords)
            for e in range(begin, end):
                i = e - begin
                w = weights[weight_index[particle[e]], start : start + n]
                if not same[i]:
                    fill_moved(spectra[particle[e], :, start : start + n], w, some, phases[i], moved)
                fill_cells(c, rotations[e], coords, n, cells)
                fill_samples(grid, c, w, n, cells, samples)
                power[e] += 2 * _multiply(moved, w, n, samples)
                add_rows(samples, some, r_max, along, tables, sums, of_y[i])
            if starts[p + 1] == len(rows) or rows[starts[p + 1], 0] != some[0, 0]:
                for i in range(end - begin):
                    add_plane(some[0, 0] + r_max, along, of_y[i], of_x[i])
                of_y[:] = 0
        for e in range(begin, end):
            correlations_of(of_x[e - begin], found[e])


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _multiply(moved: Any, w: Any, n: int, samples: Any) -> Any:
    """sum v |R A|^2 over n samples, and in place of these their conjugates times `moved`."""
    re, im, xr, xi = samples[0], samples[1], moved[0], moved[1]
    total = type(w[0])(0)
    for j in range(n):
        p, q = re[j], im[j]
        total += w[j] * (p * p + q * q)
        re[j], im[j] = xr[j] * p + xi[j] * q, xi[j] * p - xr[j] * q
    return total
