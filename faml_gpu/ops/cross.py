"""Cross spectra of particles with rotated references, fused: rotate, conjugate, weigh, multiply, lay out for a DFT."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.fourier import Support
from faml_gpu.ops._check import half_grid, real_view, require
from faml_gpu.ops._trilinear import GATHER_FLOPS, U, sample_complex
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
    _cross_loop(
        real,
        real_view(spectra),
        weights,
        weight_index,
        particle,
        rotations.astype(real.dtype) * real.dtype.type(padding),
        centres,
        support.coords,
        support.box,
        np.int32(support.r_max),
        real_view(crops.reshape(len(particle), (support.r_max + 1) * side**2)),
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
    coords: Any,
    box: int,
    r_max: Any,
    crops: Any,
    power: Any,
) -> None:
    c, side = grid.shape[2] - 1, U(2 * r_max + 1)
    real = type(rotations[0, 0, 0])
    for e in numba.prange(len(particle)):
        r, centre, crop = rotations[e], centres[e], crops[e]
        crop[:] = 0
        still = centre[0] == 0 and centre[1] == 0 and centre[2] == 0
        phase = np.empty((3, 2 * r_max + 1, 2), grid.dtype)
        if not still:
            for axis in range(3):
                for k in range(-r_max, r_max + 1):
                    angle = 2 * np.pi * k * centre[axis] / box
                    phase[axis, k + r_max, 0] = np.cos(angle)
                    phase[axis, k + r_max, 1] = np.sin(angle)
        x_particle, w_particle = spectra[particle[e]], weights[weight_index[particle[e]]]
        total = 0.0
        for j in range(coords.shape[0]):
            w = w_particle[j]
            if w == 0:
                continue
            kx, ky, kz = coords[j, 0], coords[j, 1], coords[j, 2]
            x, y, z = real(kx), real(ky), real(kz)
            re, im = sample_complex(
                grid,
                c,
                r[0, 0] * x + r[1, 0] * y + r[2, 0] * z,
                r[0, 1] * x + r[1, 1] * y + r[2, 1] * z,
                r[0, 2] * x + r[1, 2] * y + r[2, 2] * z,
            )
            total += w * (re * re + im * im)
            xr, xi = x_particle[j, 0], x_particle[j, 1]
            a, b = w * (xr * re + xi * im), w * (xi * re - xr * im)
            ux, uy, uz = U(kx), U(ky + r_max), U(kz + r_max)
            if not still:
                px, py, pz = phase[0, U(kx + r_max)], phase[1, uy], phase[2, uz]
                qr, qi = px[0] * py[0] - px[1] * py[1], px[0] * py[1] + px[1] * py[0]
                pr, pi = qr * pz[0] - qi * pz[1], qr * pz[1] + qi * pz[0]
                a, b = a * pr - b * pi, a * pi + b * pr
            place = U(U(U(ux * side) + uy) * side) + uz
            crop[U(place), 0], crop[U(place), 1] = a, b
        power[e] = 2 * total
