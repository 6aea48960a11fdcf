"""Cross spectra of particles with rotated references, fused: rotate, conjugate, weigh, multiply, lay out for a DFT."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support, support_rows
from faml_gpu.ops._check import half_grid, real_view, require
from faml_gpu.ops._phases import fill_phases
from faml_gpu.ops._trilinear import GATHER_FLOPS, I, R, U, sample_complex
from faml_gpu.profile import tally

__all__ = ["cross"]

FLOPS = (
    GATHER_FLOPS + 30
)  # of a voxel: power 4, product with the particle and its weight 8, phase 12, product with it 6


def cross(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    """C = v X conj(R A) exp(2 pi i xi.c / N) and sum v |R A|^2 for a list of (particle, rotation) entries.

    The sum over S of C exp(2 pi i xi.t / N) is the correlation of X with the reference rotated and shifted by c + t.

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
        c.
    support : Support
    padding : int
        Of the grid.

    Returns
    -------
    crops : (n, r_max + 1, 2 r_max + 1, 2 r_max + 1) complex, dtype of `grid`
        C, axes [n, kx, ky + r_max, kz + r_max]; 0 where the support has no voxel.
    power : (n,) float64
        Both voxels of each pair counted.
    """
    n, m = len(particle), len(support)
    half_grid(grid, "grid", "c", padding * support.r_max)
    require(spectra, "spectra", grid.dtype, (None, m))
    require(weights, "weights", grid.real.dtype, (None, m))
    require(weight_index, "weight_index", np.int64, (len(spectra),))
    require(particle, "particle", np.int64, (n,))
    require(rotations, "rotations", np.float64, (n, 3, 3))
    require(centres, "centres", np.float64, (n, 3))
    crops, power = twin(_cross_cpu, _cross_cuda, grid)(
        grid, spectra, weights, weight_index, particle, rotations, centres, support, padding
    )
    tally(grid, spectra, weights, crops, flops=FLOPS * m * n)
    return crops, power


def _cross_cpu(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    real, side = real_view(grid), 2 * support.r_max + 1
    crops, power = np.empty((len(particle), support.r_max + 1, side, side), grid.dtype), np.zeros(len(particle))
    order, rows = support_rows(support)
    _cross_loop(
        real,
        real_view(np.take(spectra, order, axis=1)),
        np.take(weights, order, axis=1),
        weight_index,
        particle,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        centres,
        rows,
        support.box,
        support.r_max,
        real_view(crops.reshape(len(particle), (support.r_max + 1) * side, side)),
        power,
    )
    return crops, power


def _cross_cuda(
    grid: Array,
    spectra: Array,
    weights: Array,
    weight_index: Array,
    particle: Array,
    rotations: Array,
    centres: Array,
    support: Support,
    padding: int,
) -> tuple[Array, Array]:
    xp, n, side = namespace(grid), len(particle), 2 * support.r_max + 1
    real = grid.real.dtype
    crops, power = xp.empty((n, support.r_max + 1, side, side), grid.dtype), xp.empty(n)
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
            particle,
            rotations.astype(real) * padding,
            centres,
            support.coords,
            len(support),
            support.r_max,
            support.box,
            crops,
            power,
        ),
        shared=(3 * side + side % 2) * grid.dtype.itemsize + 8 * (kernels.THREADS["cross"] // 32),
    )
    return crops, power


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _cross_loop(
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
    crops: Any,
    power: Any,
) -> None:
    c, side = grid.shape[2] - 1, 2 * r_max + 1
    real = type(rotations[0, 0, 0])
    for e in numba.prange(len(particle)):
        r, centre, crop = rotations[e], centres[e], crops[e]
        crop[:] = 0
        phase = np.empty((3, side, 2), grid.dtype)
        fill_phases(phase, centre, box)
        x_particle, w_particle = spectra[particle[e]], weights[weight_index[particle[e]]]
        total = 0.0
        for row in range(rows.shape[0]):
            kx, ky, first, start, stop = rows[row]
            x, y = real(kx), real(ky)
            x0, y0, z0 = r[0, 0] * x + r[1, 0] * y, r[0, 1] * x + r[1, 1] * y, r[0, 2] * x + r[1, 2] * y
            px, py = phase[0, kx + r_max], phase[1, ky + r_max]
            qr, qi = px[0] * py[0] - px[1] * py[1], px[0] * py[1] + px[1] * py[0]
            line = crop[kx * side + ky + r_max]
            for j in range(start, stop):
                w = w_particle[U(j)]
                if w == 0:
                    continue
                kz = np.int32(first + (j - start))
                z, uz = real(kz), U(kz + r_max)
                re, im = sample_complex(grid, c, x0 + r[2, 0] * z, y0 + r[2, 1] * z, z0 + r[2, 2] * z)
                total += w * (re * re + im * im)
                xr, xi = x_particle[U(j), R], x_particle[U(j), I]
                a, b = w * (xr * re + xi * im), w * (xi * re - xr * im)
                zr, zi = phase[2, uz, R], phase[2, uz, I]
                pr, pi = qr * zr - qi * zi, qr * zi + qi * zr
                line[uz, R], line[uz, I] = a * pr - b * pi, a * pi + b * pr
        power[e] = 2 * total
