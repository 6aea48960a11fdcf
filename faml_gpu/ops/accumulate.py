"""Sums of the M-step (Eq. 10): particles rotated back into the frame of the averages."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import half_grid, real_view, require
from faml_gpu.ops._pieces import PIECE, fill_coordinates, fill_moved, in_planes, longest, piece_starts
from faml_gpu.ops._trilinear import GATHER_FLOPS, empty_cells, fill_cells, fill_real, fill_samples
from faml_gpu.profile import tally

__all__ = ["accumulate"]

FLOPS = GATHER_FLOPS + 46  # of a voxel: the sample of the weight 24, phase, its product and both sums 22


def accumulate(
    grids: Array,
    weight_grids: Array,
    weight_index: Array,
    particle: Array,
    class_index: Array,
    rotations: Array,
    shifts: Array,
    probability: Array,
    support: Support,
    padding: int,
    n_classes: int,
    *,
    weigh_twice: bool = False,
) -> tuple[Array, Array]:
    """Sum of P R^-1(w X) and of P R^-1 w per class, over a list of (particle, class, pose) entries.

    (R^-1 X)(xi) = X(R xi) exp(2 pi i (R xi).t / N). Each output voxel gathers its samples in the order of
    the list, so the sums do not depend on the number of threads.

    Parameters
    ----------
    grids : (B, 2c + 1, 2c + 1, c + 1) complex
        The weighted particles w X, from `fourier.interpolation_grid`.
    weight_grids : (W, 2d + 1, 2d + 1, d + 1) real
        From `fourier.weight_grid`; particle b has row weight_index[b].
    weight_index : (B,) int64
    particle, class_index : (n,) int64
    rotations : (n, 3, 3) float64
    shifts : (n, 3) float64, voxels
    probability : (n,) float64
    support : Support
        Where the sums are wanted.
    padding : int
        Of `grids`.
    n_classes : int
    weigh_twice : bool
        Sum R^-1 w R^-1(w X), the product of two interpolants, as Eq. 10 is printed.

    Returns
    -------
    sums : (K, M) complex128
    weight_sums : (K, M) float64
    """
    n = len(particle)
    half_grid(grids, "grids", "c", padding * support.r_max)
    half_grid(weight_grids, "weight_grids", "f", support.r_max)
    require(weight_grids, "weight_grids", grids.real.dtype, (None,) * 4)
    require(weight_index, "weight_index", np.int64, (len(grids),))
    require(particle, "particle", np.int64, (n,))
    require(class_index, "class_index", np.int64, (n,))
    require(rotations, "rotations", np.float64, (n, 3, 3))
    require(shifts, "shifts", np.float64, (n, 3))
    require(probability, "probability", np.float64, (n,))
    sums, weight_sums = twin(_accumulate_cpu, _accumulate_cuda, grids)(
        grids,
        weight_grids,
        weight_index,
        particle,
        class_index,
        rotations,
        shifts,
        probability,
        support,
        padding,
        n_classes,
        weigh_twice,
    )
    tally(grids, weight_grids, sums, weight_sums, flops=FLOPS * n * len(support))
    return sums, weight_sums


def _accumulate_cpu(
    grids: Array,
    weight_grids: Array,
    weight_index: Array,
    particle: Array,
    class_index: Array,
    rotations: Array,
    shifts: Array,
    probability: Array,
    support: Support,
    padding: int,
    n_classes: int,
    weigh_twice: bool,
) -> tuple[Array, Array]:
    real, k, m = real_view(grids), n_classes, len(support)
    sums, weight_sums = np.zeros((k, 2, m)), np.zeros((k, m))  # real and imaginary parts apart
    order, rows = support_rows(support)
    turned = np.ascontiguousarray(rotations.astype(real.dtype).transpose(0, 2, 1))  # R xi, the other loops have R^T xi
    _accumulate_loop(
        real,
        weight_grids.reshape(len(weight_grids), -1),
        weight_grids.shape[-1] - 1,
        weight_index,
        particle,
        class_index,
        turned,
        turned * real.dtype.type(padding),
        in_planes(_phase_tables(rotations, shifts, support, grids.dtype)),
        probability,
        rows,
        piece_starts(rows, PIECE),
        weigh_twice,
        sums,
        weight_sums,
    )
    complex_sums, ordered = np.empty((k, m), np.complex128), np.empty((k, m))
    complex_sums.real[:, order], complex_sums.imag[:, order] = sums[:, 0], sums[:, 1]
    ordered[:, order] = weight_sums
    return complex_sums, ordered


def _accumulate_cuda(
    grids: Array,
    weight_grids: Array,
    weight_index: Array,
    particle: Array,
    class_index: Array,
    rotations: Array,
    shifts: Array,
    probability: Array,
    support: Support,
    padding: int,
    n_classes: int,
    weigh_twice: bool,
) -> tuple[Array, Array]:
    xp = namespace(grids)
    real = grids.real.dtype
    n, m = len(particle), len(support)
    sums, weight_sums = xp.zeros((n_classes, m), np.complex128), xp.zeros((n_classes, m))
    order = xp.argsort(class_index * n + xp.arange(n))  # by class, and as listed within a class
    class_start = xp.searchsorted(class_index[order], xp.arange(n_classes + 1))
    # As many entries at a time as fit into shared memory, up to where more would not help.
    entry = 3 * (2 * support.r_max + 1) * grids.dtype.itemsize + 9 * real.itemsize
    tile = max(1, min(8, kernels.SHARED_BYTES // entry))
    kernels.launch(
        "accumulate",
        real,
        (-(-m // kernels.THREADS["accumulate"]), n_classes),
        (
            grids,
            grids.shape[-1] - 1,
            weight_grids,
            weight_grids.shape[-1] - 1,
            weight_index,
            particle,
            order,
            class_start,
            rotations.astype(real),
            _phase_tables(rotations, shifts, support, grids.dtype),
            probability,
            support.coords,
            m,
            support.r_max,
            padding,
            int(weigh_twice),
            tile,
            sums,
            weight_sums,
        ),
        shared=tile * entry,
    )
    return sums, weight_sums


def _phase_tables(rotations: Array, shifts: Array, support: Support, dtype: Any) -> Array:
    """exp(2 pi i k t'_axis / N), (n, 3, 2 r_max + 1), of the shifts turned into the frame of the average.

    (R xi).t = xi.(R^T t) = xi.t': with xi on the lattice the phase of a voxel is a product of three table entries.
    """
    xp = namespace(rotations)
    turned = (rotations * shifts[:, :, None]).sum(axis=1)
    k = xp.arange(-support.r_max, support.r_max + 1)
    return xp.exp(2j * np.pi / support.box * turned[:, :, None] * k).astype(dtype)


@numba.njit(parallel=True, nogil=True, cache=True)
def _accumulate_loop(
    grids: Any,
    weight_grids: Any,
    d: int,
    weight_index: Any,
    particle: Any,
    class_index: Any,
    rotations: Any,
    padded: Any,
    phase: Any,
    probability: Any,
    rows: Any,
    starts: Any,
    weigh_twice: bool,
    sums: Any,
    weight_sums: Any,
) -> None:
    c, piece = grids.shape[3] - 1, longest(rows, starts)
    for p in numba.prange(len(starts) - 1):
        some = rows[starts[p] : starts[p + 1]]
        start, n = some[0, 3], some[-1, 4] - some[0, 3]
        coords, cells, samples = (
            np.empty((3, piece), grids.dtype),
            empty_cells(piece, grids),
            np.empty((2, piece), grids.dtype),
        )
        w, ones, moved = np.empty(piece, grids.dtype), np.ones(piece, grids.dtype), np.empty((2, piece), grids.dtype)
        fill_coordinates(some, coords)
        for e in range(len(particle)):
            b, k = particle[e], class_index[e]
            fill_cells(d, rotations[e], coords, n, cells)
            fill_real(weight_grids[weight_index[b]], d, n, cells, w)
            fill_cells(c, padded[e], coords, n, cells)
            fill_samples(grids[b], c, ones, n, cells, samples)
            fill_moved(samples, w if weigh_twice else ones, some, phase[e], moved)
            part = slice(start, start + n)
            _add(probability[e], n, moved, w, sums[k, :, part], weight_sums[k, part])


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _add(p: float, n: int, moved: Any, w: Any, sums: Any, weight_sums: Any) -> None:
    """Add p times the samples, moved, and p times the weights."""
    re, im, sum_re, sum_im = moved[0], moved[1], sums[0], sums[1]
    for j in range(n):
        sum_re[j] += p * re[j]
        sum_im[j] += p * im[j]
        weight_sums[j] += p * w[j]
