"""Rotational correlation on SO(3) by sums over shells and degrees and an FFT, for a batch of particles."""

from __future__ import annotations

from itertools import product
from typing import Any

import numba
import numpy as np
import scipy.fft

from faml_gpu.array_backend import Array, device_of, fft_module, namespace, twin
from faml_gpu.fast_alignment.wigner import folded_d_table, small_d_table
from faml_gpu.profile import tally
from faml_gpu.threads import map_threads

__all__ = ["at_places", "correlate", "grid_angles", "interpolate"]


def correlate(p: Array, q: Array) -> Array:
    """c(R) = sum_j f_j g(R^-1 xi_j) at every rotation of the Euler grid.

    With T^l_mm' = sum_r p_lm(r) conj q_lm'(r),
    c(alpha, beta, gamma) = sum_lmm' T^l_mm' d^l_mm'(beta) exp(i m alpha) exp(i m' gamma):
    a GEMM over the shells, a sum over l (on a GPU another GEMM), and an inverse FFT over (m, m').

    Parameters
    ----------
    p : (B, r_max, L, n_l) complex64
        Of f, from `harmonics.ShellHarmonics`.
    q : (r_max, L, n_l) complex64
        Of g, at the same radii.

    Returns
    -------
    (B, 2L, 2L, 2L) float32
        Axes [b, beta, gamma, alpha] at `grid_angles(L)`.
    """
    if p.dtype != np.complex64:
        raise TypeError(f"p: found dtype {p.dtype}, expected complex64")
    return twin(_correlate_cpu, _correlate_cuda, p)(p, q)


def _all_orders(q: Array) -> Array:
    """conj q_lm', (n_l, r_max, 2L - 1) for m' = -L + 1 .. L - 1, by c_l,-m = (-1)^m conj c_lm."""
    xp, l_max = namespace(q), q.shape[1]
    sign = (1 - 2 * (xp.arange(l_max - 1, 0, -1) % 2)).astype(np.float32)[:, None]
    full = xp.concatenate([sign * q[:, :0:-1].conj(), q], axis=1).astype(np.complex64)
    return full.conj().transpose(2, 0, 1)


def _correlate_cpu(p: Array, q: Array) -> Array:
    """One by one: all that is made of one stays in the caches, and the threads have something to share.

    Each is the same to the last bit whatever it is beside, as `weight_harmonics` promises: with BLAS in one thread, as
    inside `cpu_threads`.
    """
    b, r, l_max, _ = p.shape
    n = 2 * l_max
    orders, table, out = _all_orders(q), folded_d_table(l_max), np.empty((b, n, n, n), np.float32)

    def one(i: int) -> None:
        t = np.ascontiguousarray(p[i].transpose(2, 1, 0)) @ orders
        spectrum = np.zeros((n, n, l_max + 1), np.complex64)
        _sum_over_degrees(t, table, spectrum)
        # Axis by axis: scipy's irfft2 would copy the spectrum first.
        rows = scipy.fft.ifft(spectrum, axis=-2, norm="forward", overwrite_x=True)
        out[i] = scipy.fft.irfft(rows, n, axis=-1, norm="forward")
        # The sums over shells; those over l of four pairs (m, m') for each row of the table; the transforms of planes.
        flops = 8 * r * t.size + 16 * table.size + 2.5 * n**3 * np.log2(n * n)
        tally(p[i], q, table, spectrum, out[i], flops=flops)

    map_threads(one, range(b), p)
    return out


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _sum_over_degrees(t: Any, table: Any, spectrum: Any) -> None:
    """Fill the spectrum (2L, 2L, L + 1), axes [beta, m' in FFT order, m], from t (n_l, L, 2L - 1) [l, m, m' + L - 1].

    Each row of `wigner.folded_d_table`, d^l_mm' with |m'| <= m at beta below pi / 2, is all that is needed of four
    pairs of orders: d_m,-m'(pi - beta) is (-1)^(l + m) times it, d_m'm (-1)^(m - m') times, d_-m',-m the same.
    """
    n_l, l_max = t.shape[0], t.shape[1]
    n, zero = 2 * l_max, l_max - 1
    total = np.empty((8, l_max), np.float32)
    row = 0
    for m in range(l_max):
        for k in range(m + 1):
            for sign in (1, -1):  # m' = sign * k
                total[:] = 0
                for l in range((m + 1) // 2, n_l):
                    first, turned = t[l, m, zero + sign * k], t[l, m, zero - sign * k]
                    swapped, both = t[l, k, zero + sign * m], t[l, k, zero - sign * m]
                    for j in range(l_max):
                        d = table[row, j]
                        total[0, j] += d * first.real
                        total[1, j] += d * first.imag
                        total[2, j] += d * turned.real
                        total[3, j] += d * turned.imag
                        total[4, j] += d * swapped.real
                        total[5, j] += d * swapped.imag
                        total[6, j] += d * both.real
                        total[7, j] += d * both.imag
                    row += 1
                of_m, of_k = np.float32(1 - 2 * (m % 2)), np.float32(1 - 2 * (k % 2))
                of_swap = of_m * of_k if sign > 0 else np.float32(1)
                plus, minus = sign * k % n, -sign * k % n
                plus_m, minus_m = sign * m % n, -sign * m % n
                for j in range(l_max):
                    beyond = n - 1 - j
                    spectrum[j, plus, m] = complex(total[0, j], total[1, j])
                    spectrum[beyond, minus, m] = of_m * complex(total[2, j], total[3, j])
                    spectrum[j, plus_m, k] = of_swap * complex(total[4, j], total[5, j])
                    spectrum[beyond, minus_m, k] = of_k * of_swap * complex(total[6, j], total[7, j])


def _correlate_cuda(p: Array, q: Array) -> Array:
    xp = namespace(p)
    b, r, l_max, n_l = p.shape
    t = xp.ascontiguousarray(p.transpose(3, 0, 2, 1)).reshape(n_l, b * l_max, r) @ _all_orders(q)
    # d is real: the complex T goes through one real GEMM with (particle, Re/Im) as columns.
    t = xp.ascontiguousarray(t.reshape(n_l, b, l_max, 2 * l_max - 1).transpose(2, 3, 0, 1)).view(np.float32)
    d = small_d_table(l_max, 2 * l_max, device=device_of(p))
    s = (d @ t).view(np.complex64)  # (m, m', beta, b)
    n = 2 * l_max
    spectrum = xp.zeros((b, n, n, l_max + 1), np.complex64)
    s = s.transpose(3, 2, 1, 0)
    spectrum[:, :, :l_max, :l_max], spectrum[:, :, l_max + 1 :, :l_max] = s[:, :, l_max - 1 :], s[:, :, : l_max - 1]
    # Of each pair (m, m'): the sums over shells and over l at each beta; then the transforms of 2L planes.
    pairs = b * l_max * (2 * l_max - 1) * n_l
    tally(p, q, spectrum, flops=pairs * (8 * r + 4 * n) + 2.5 * b * n**3 * np.log2(n * n))
    return fft_module(p).irfft2(spectrum, s=(n, n), axes=(-2, -1), norm="forward", overwrite_x=True)


def interpolate(table: Array, index: Array, rotations: Array) -> Array:
    """Values (n,) at rotations (n, 3, 3) of functions (W, 2L, 2L, 2L) on the grid of `correlate`, one `index` each.

    Trilinear in the angles. Beyond the first and last beta, (alpha, -beta, gamma) is (alpha + pi, beta, gamma + pi).
    """
    return twin(_interpolate_cpu, _interpolate_cuda, table)(table, index, rotations)


def _interpolate_cpu(table: Array, index: Array, rotations: Array) -> Array:
    out = np.empty(len(rotations))
    _interpolate_loop(table, index, rotations, out)
    return out


@numba.njit(parallel=True, nogil=True, cache=True)
def _interpolate_loop(table: Any, index: Any, rotations: Any, out: Any) -> None:
    n = table.shape[1]
    for i in numba.prange(len(rotations)):
        r, of = rotations[i], table[index[i]]
        sine = np.sqrt(r[0, 2] ** 2 + r[1, 2] ** 2)
        if sine < 1e-9:  # where only alpha +- gamma is defined: all of it goes into alpha
            alpha, gamma = np.arctan2(-r[0, 1], r[1, 1]), 0.0
        else:
            alpha, gamma = np.arctan2(r[1, 2], r[0, 2]), np.arctan2(r[2, 1], -r[2, 0])
        x, y, z = np.arctan2(sine, r[2, 2]) * n / np.pi - 0.5, gamma * n / (2 * np.pi), alpha * n / (2 * np.pi)
        row, column, depth = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
        total = 0.0
        for a in range(2):
            beyond = row + a < 0 or row + a >= n
            half, j = n // 2 if beyond else 0, min(max(row + a, 0), n - 1)
            for b in range(2):
                for c in range(2):
                    weight = abs(1 - a - (x - row)) * abs(1 - b - (y - column)) * abs(1 - c - (z - depth))
                    total += weight * of[j, (column + b + half) % n, (depth + c + half) % n]
        out[i] = total


def _interpolate_cuda(table: Array, index: Array, rotations: Array) -> Array:
    xp = namespace(table)
    n = table.shape[1]
    sine = xp.sqrt(rotations[:, 0, 2] ** 2 + rotations[:, 1, 2] ** 2)
    beta = xp.arctan2(sine, rotations[:, 2, 2])
    pole = sine < 1e-9  # where only alpha +- gamma is defined: all of it goes into alpha
    alpha = xp.where(
        pole,
        xp.arctan2(-rotations[:, 0, 1], rotations[:, 1, 1]),
        xp.arctan2(rotations[:, 1, 2], rotations[:, 0, 2]),
    )
    gamma = xp.where(pole, 0.0, xp.arctan2(rotations[:, 2, 1], -rotations[:, 2, 0]))
    place = [beta * n / np.pi - 0.5, gamma * n / (2 * np.pi), alpha * n / (2 * np.pi)]
    lower = [xp.floor(x) for x in place]
    out = xp.zeros(len(rotations))
    for corner in product((0, 1), repeat=3):
        row, column, depth = (low.astype(np.int64) + step for low, step in zip(lower, corner, strict=True))
        weight = 1.0
        for x, low, step in zip(place, lower, corner, strict=True):
            weight = weight * (x - low if step else 1 - (x - low))
        over = (row < 0) | (row >= n)
        half = xp.where(over, n // 2, 0)
        out += weight * table[index, xp.clip(row, 0, n - 1), (column + half) % n, (depth + half) % n]
    return out


def at_places(values: Array, places: Array, weights: Array) -> Array:
    """Sums (B, n) float32 of some of the values (B, m) float32: of each of n the same `places` and `weights` (n, p)."""
    return twin(_at_places_cpu, _at_places_cuda, values)(values, places, weights)


def _at_places_cpu(values: Array, places: Array, weights: Array) -> Array:
    out = np.empty((len(values), len(places)), values.dtype)
    _at_places_loop(values, places, weights, out)
    return out


@numba.njit(parallel=True, nogil=True, cache=True)
def _at_places_loop(values: Any, places: Any, weights: Any, out: Any) -> None:
    for i in numba.prange(places.shape[0]):
        for b in range(values.shape[0]):
            total = values.dtype.type(0)
            for p in range(places.shape[1]):
                total += weights[i, p] * values[b, places[i, p]]
            out[b, i] = total


def _at_places_cuda(values: Array, places: Array, weights: Array) -> Array:
    return sum(values[:, places[:, p]] * weights[:, p] for p in range(places.shape[1]))


def grid_angles(bandwidth: int) -> tuple[Any, Any]:
    """beta (2L,) and alpha = gamma (2L,) of the grid, radians; no point lies on a pole."""
    n = 2 * bandwidth
    return np.pi * (np.arange(n) + 0.5) / n, 2 * np.pi * np.arange(n) / n
