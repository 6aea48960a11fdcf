"""Normal equations of a pose, fused: rotate, shift, differentiate, subtract, weigh, multiply, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import posed_particles, real_view
from faml_gpu.ops._pieces import PIECE, fill_coordinates, fill_moved, fill_phases, in_planes, longest, piece_starts
from faml_gpu.ops._trilinear import GATHER_FLOPS, empty_cells, fill_cells, fill_gradients
from faml_gpu.profile import tally

__all__ = ["normal_equations"]

# Of a voxel beside its sample: its derivatives 43, turned 30, crossed 18, phase 14, products with it 24 and with xi 6,
# the difference 4; 28 real parts of products and their sums 112.
FLOPS = GATHER_FLOPS + 251


def normal_equations(
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
    """Products of the derivatives of each pose's model, and of what it leaves over: for a step of Gauss and Newton.

    The model of particle b is m(xi) = A(R^T xi) exp(-2 pi i xi.t / N). Turned by a small rotation vector omega in the
    frame of the particle, R -> exp([omega]) R, it changes by (R grad A) x xi; moved, by -2 pi i xi / N of itself.

    Parameters
    ----------
    grid : (2c + 1, 2c + 1, c + 1) complex
        The class average, from `fourier.interpolation_grid`.
    spectra : (B, M) complex, dtype of `grid`
        The particles on the support.
    weights : (W, M) real
        w, such as that of the wedge over sigma; particle b has row weight_index[b].
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
    (B, n, 7, 7) float64
        sum of w^2 Re[conj(g_p) g_q] over both voxels of each pair, g the derivatives of the model along omega (3,
        radians) and t (3, voxels), and last X - m. So the last entry is the residual, the last column half its downhill
        gradient, and the first six rows and columns solved for it are the step to the minimum of the linear model.
    """
    posed_particles(grid, spectra, weights, weight_index, rotations, shifts, count, support, padding)
    out = twin(_normal_equations_cpu, _normal_equations_cuda, grid)(
        grid, spectra, weights, weight_index, rotations, shifts, count, support, padding
    )
    tally(grid, spectra, weights, out, flops=FLOPS * rotations.shape[0] * rotations.shape[1] * len(support))
    return out


def _normal_equations_cpu(
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
    out = np.zeros((*shifts.shape[:2], 7, 7))
    order, rows = support_rows(support)
    _normal_equations_loop(
        real,
        in_planes(np.take(spectra, order, axis=1)),
        np.take(weights, order, axis=1),
        weight_index,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        shifts,
        count,
        rows,
        piece_starts(rows, PIECE),
        support.box,
        support.r_max,
        out,
    )
    return out


def _normal_equations_cuda(
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
    xp, real = namespace(grid), grid.real.dtype
    b, n = rotations.shape[:2]
    out, width = xp.zeros((b, n, 7, 7)), 2 * support.r_max + 1
    arguments = (
        grid, grid.shape[-1] - 1, spectra, weights, weight_index, rotations.astype(real) * padding, shifts, count,
        support.coords, n, len(support), support.r_max, support.box, out,
    )  # fmt: skip
    sums = 28 * 8 * (kernels.THREADS["normal_equations"] // 32)
    kernels.launch("normal_equations", real, b * n, arguments, shared=sums + 3 * width * grid.dtype.itemsize)
    return out


@numba.njit(parallel=True, nogil=True, cache=True)
def _normal_equations_loop(
    grid: Any,
    spectra: Any,
    weights: Any,
    weight_index: Any,
    rotations: Any,
    shifts: Any,
    count: Any,
    rows: Any,
    starts: Any,
    box: int,
    r_max: int,
    out: Any,
) -> None:
    c, n_poses, piece = grid.shape[2] - 1, rotations.shape[1], longest(rows, starts)
    for task in numba.prange(rotations.shape[0] * n_poses):
        b, i = task // n_poses, task % n_poses
        if i >= count[b]:
            continue
        phase = np.empty((3, 2, 2 * r_max + 1), grid.dtype)
        fill_phases(phase, shifts[b, i], box)
        coords, cells = np.empty((3, piece), grid.dtype), empty_cells(piece, grid)
        samples, moved = np.empty((8, piece), grid.dtype), np.empty((2, piece), grid.dtype)
        g = np.empty((7, 2, piece), grid.dtype)
        for p in range(len(starts) - 1):
            some = rows[starts[p] : starts[p + 1]]
            start, n = some[0, 3], some[-1, 4] - some[0, 3]
            w = weights[weight_index[b], start : start + n]
            fill_coordinates(some, coords)
            # Only relative phases count: instead of the model and its derivatives the particle is moved, back.
            fill_moved(spectra[b, :, start : start + n], w, some, phase, moved)
            fill_cells(c, rotations[b, i], coords, n, cells)
            fill_gradients(grid, c, w, n, cells, samples)
            _fill_seven(rotations[b, i], coords, w, n, 2 * np.pi / box, samples, moved, g)
            _add_products(g, n, out[b, i])
        for p in range(7):
            for q in range(p + 1):
                out[b, i, p, q] = out[b, i, q, p] = 2 * out[b, i, q, p]


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _fill_seven(r: Any, coords: Any, w: Any, n: int, turn: float, samples: Any, moved: Any, g: Any) -> None:
    """w times the derivatives along omega and t, and times X - m, into g (7, 2, n): real and imaginary parts."""
    turn = type(w[0])(turn)
    xs, ys, zs = coords[0], coords[1], coords[2]
    for part in range(2):  # real, imaginary
        of_x, of_y, of_z = samples[2 + part], samples[4 + part], samples[6 + part]
        about_x, about_y, about_z = g[0, part], g[1, part], g[2, part]
        for j in range(n):
            # R grad A, with the padding; its vector product with xi.
            u = w[j] * (r[0, 0] * of_x[j] + r[0, 1] * of_y[j] + r[0, 2] * of_z[j])
            v = w[j] * (r[1, 0] * of_x[j] + r[1, 1] * of_y[j] + r[1, 2] * of_z[j])
            t = w[j] * (r[2, 0] * of_x[j] + r[2, 1] * of_y[j] + r[2, 2] * of_z[j])
            about_x[j], about_y[j], about_z[j] = v * zs[j] - t * ys[j], t * xs[j] - u * zs[j], u * ys[j] - v * xs[j]
    re, im, left_re, left_im, xr, xi = samples[0], samples[1], g[6, 0], g[6, 1], moved[0], moved[1]
    for j in range(n):
        left_re[j], left_im[j] = xr[j] - w[j] * re[j], xi[j] - w[j] * im[j]
    for axis in range(3):
        k, along_re, along_im = coords[axis], g[3 + axis, 0], g[3 + axis, 1]
        for j in range(n):
            a = turn * k[j] * w[j]
            along_re[j], along_im[j] = a * im[j], -a * re[j]


# reassoc: sums over a piece may be several partial ones, as vector instructions make them.
@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _add_products(g: Any, n: int, total: Any) -> None:
    """Add sum Re[conj(g_p) g_q] to total (7, 7), p <= q."""
    for p in range(7):
        one_re, one_im = g[p, 0], g[p, 1]
        for q in range(p, 7):
            other_re, other_im = g[q, 0], g[q, 1]
            of_piece = type(g[0, 0, 0])(0)
            for j in range(n):
                of_piece += one_re[j] * other_re[j] + one_im[j] * other_im[j]
            total[p, q] += of_piece
