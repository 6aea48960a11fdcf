"""Normal equations of a pose, fused: rotate, shift, differentiate, subtract, weigh, multiply, reduce."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import posed_particles, real_view
from faml_gpu.ops._phases import fill_phases
from faml_gpu.ops._trilinear import GATHER_FLOPS, I, R, U, sample_gradient
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
        real_view(np.take(spectra, order, axis=1)),
        np.take(weights, order, axis=1),
        weight_index,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        shifts,
        count,
        rows,
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


# reassoc: sums along a row may be several partial ones, as vector instructions make them.
@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _normal_equations_loop(
    grid: Any,
    spectra: Any,
    weights: Any,
    weight_index: Any,
    rotations: Any,
    shifts: Any,
    count: Any,
    rows: Any,
    box: int,
    r_max: int,
    out: Any,
) -> None:
    c, side = grid.shape[2] - 1, 2 * r_max + 1
    n = rotations.shape[1]
    real = type(rotations[0, 0, 0, 0])
    turn = real(2 * np.pi / box)
    for task in numba.prange(rotations.shape[0] * n):
        b, i = task // n, task % n
        if i >= count[b]:
            continue
        r = rotations[b, i]
        phase = np.empty((3, side, 2), grid.dtype)
        fill_phases(phase, shifts[b, i], -box)
        x_particle, w_particle = spectra[b], weights[weight_index[b]]
        g, total = np.empty((7, 2, side), grid.dtype), np.zeros((7, 7))  # w times the seven, along a row
        for row in range(rows.shape[0]):
            kx, ky, first, start, stop = rows[row]
            x, y = real(kx), real(ky)
            x0, y0, z0 = r[0, 0] * x + r[1, 0] * y, r[0, 1] * x + r[1, 1] * y, r[0, 2] * x + r[1, 2] * y
            px, py, along = phase[0, kx + r_max], phase[1, ky + r_max], phase[2]
            qr, qi = px[0] * py[0] - px[1] * py[1], px[0] * py[1] + px[1] * py[0]
            seen = U(0)
            for j in range(start, stop):
                w = w_particle[U(j)]
                if w == 0:
                    continue
                kz = np.int32(first + (j - start))
                z, uz = real(kz), U(kz + r_max)
                re, im, xr, xi, yr, yi, zr, zi = sample_gradient(
                    grid, c, x0 + r[2, 0] * z, y0 + r[2, 1] * z, z0 + r[2, 2] * z
                )
                ar, ai = along[uz, R], along[uz, I]
                pr, pi = w * (qr * ar - qi * ai), w * (qr * ai + qi * ar)
                # R grad A, with the padding; its vector product with xi.
                ur, ui = r[0, 0] * xr + r[0, 1] * yr + r[0, 2] * zr, r[0, 0] * xi + r[0, 1] * yi + r[0, 2] * zi
                vr, vi = r[1, 0] * xr + r[1, 1] * yr + r[1, 2] * zr, r[1, 0] * xi + r[1, 1] * yi + r[1, 2] * zi
                wr, wi = r[2, 0] * xr + r[2, 1] * yr + r[2, 2] * zr, r[2, 0] * xi + r[2, 1] * yi + r[2, 2] * zi
                fr, fi = vr * z - wr * y, vi * z - wi * y
                hr, hi = wr * x - ur * z, wi * x - ui * z
                lr, li = ur * y - vr * x, ui * y - vi * x
                g[0, 0, seen], g[0, 1, seen] = fr * pr - fi * pi, fr * pi + fi * pr
                g[1, 0, seen], g[1, 1, seen] = hr * pr - hi * pi, hr * pi + hi * pr
                g[2, 0, seen], g[2, 1, seen] = lr * pr - li * pi, lr * pi + li * pr
                mr, mi = re * pr - im * pi, re * pi + im * pr
                g[3, 0, seen], g[3, 1, seen] = turn * x * mi, -turn * x * mr
                g[4, 0, seen], g[4, 1, seen] = turn * y * mi, -turn * y * mr
                g[5, 0, seen], g[5, 1, seen] = turn * z * mi, -turn * z * mr
                g[6, 0, seen], g[6, 1, seen] = w * x_particle[U(j), R] - mr, w * x_particle[U(j), I] - mi
                seen += U(1)
            for p in range(7):
                for q in range(p, 7):
                    one_re, one_im, other_re, other_im = g[p, 0], g[p, 1], g[q, 0], g[q, 1]
                    of_row = real(0)
                    for j in range(seen):
                        of_row += one_re[U(j)] * other_re[U(j)] + one_im[U(j)] * other_im[U(j)]
                    total[p, q] += of_row
        for p in range(7):
            for q in range(7):
                out[b, i, p, q] = 2 * total[min(p, q), max(p, q)]
