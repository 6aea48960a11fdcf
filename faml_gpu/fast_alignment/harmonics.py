"""Spherical harmonics: Y_lm at given directions, and coefficients of functions on Fourier shells.

Y_lm are orthonormal with the Condon-Shortley phase (as `scipy.special.sph_harm_y`). A real function has
c_l,-m = (-1)^m conj c_lm, so only m >= 0 is held, dense: coefficient arrays are (..., L, n_l), axes [m, l],
zero where l < m. n_l counts the degrees in use: all l < L, or the even ones (magnitudes are point-symmetric,
so their odd degrees vanish).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from faml_gpu import ops
from faml_gpu.array_backend import Array, device_of, fft_module, free_memory, namespace, on_host, to_device
from faml_gpu.fourier import Support, make_support
from faml_gpu.profile import tally
from faml_gpu.threads import Once, map_threads

__all__ = ["ShellHarmonics", "SphereGrid", "degrees", "forget_tables", "shell_harmonics", "sphere_grid"]

STREAM_ABOVE = 1 << 30  # bytes of Y_lm at the voxels above which a CPU computes them shell by shell and keeps none
PIECE = 1 << 9  # orbits of a shell that it then takes at a time: their table stays in its caches


def degrees(bandwidth: int, *, even: bool = True) -> NDArray[np.int64]:
    """The degrees l < L in use."""
    return np.arange(0, bandwidth, 2 if even else 1)


@dataclass(frozen=True)
class SphereGrid:
    """Gauss-Legendre grid of a sphere, exact for products of degree < 2L.

    directions (2L^2, 3): theta by theta, at each 2L phi from 0. `legendre` (L, L, n_l) float32, axes [m, theta, l]:
    quadrature weight times Y_lm at phi = 0.
    """

    directions: Array
    legendre: Array
    bandwidth: int

    def coefficients(self, values: Array) -> Array:
        """(..., L, n_l) complex coefficients of real functions (..., 2L^2) sampled at `directions`.

        A Fourier transform along phi, then for each m a product over theta.
        """
        xp, n = namespace(values), self.bandwidth
        along_phi = fft_module(values).rfft(values.reshape(-1, n, 2 * n), axis=-1)[..., :n]
        by_m = xp.ascontiguousarray(along_phi.transpose(2, 0, 1)).astype(np.complex64)  # [m, function, theta]
        parts = xp.stack([by_m.real, by_m.imag], axis=1).reshape(n, -1, n) @ self.legendre
        tally(values, self.legendre, parts, flops=2 * parts.size * n + 2.5 * values.size * np.log2(2 * n))
        real, imaginary = parts.reshape(n, 2, -1, self.legendre.shape[2]).transpose(1, 2, 0, 3)
        return (real + 1j * imaginary).reshape(*values.shape[:-1], n, -1)


@partial(Once, keep=8)
def sphere_grid(bandwidth: int, *, even: bool = True, device: str = "cpu") -> SphereGrid:
    """The grid for degrees l < L (L nodes in theta, 2L in phi)."""
    nodes, quadrature = np.polynomial.legendre.leggauss(bandwidth)
    phi = np.pi * np.arange(2 * bandwidth) / bandwidth
    z, f = np.meshgrid(nodes, phi, indexing="ij")
    sine = np.sqrt(1 - z * z)
    directions = np.stack([sine * np.cos(f), sine * np.sin(f), z], axis=-1).reshape(-1, 3)
    at_zero = ops.harmonics(np.ascontiguousarray(directions[:: 2 * bandwidth]), bandwidth, even=even)[:, 0]  # real
    legendre = at_zero.transpose(1, 0, 2) * (quadrature * np.pi / bandwidth).astype(np.float32)[:, None]
    return SphereGrid(to_device(directions, device), to_device(np.ascontiguousarray(legendre), device), bandwidth)


@dataclass(frozen=True)
class ShellHarmonics:
    """Harmonics at the voxels of a support, for p_lm(r) = sum_j f_j conj Y_lm(xi_j).

    The measure is the voxels' own: with a reference whose coefficients are q_lm(r) at integer radii and which is
    linear in between, sum_r sum_lm conj(p) q D equals the sum over voxels of f times the rotated reference, with
    no r^2 dr to be matched. (The r^2 dr of the continuous integral is, per shell, the number of its voxels / 4 pi.)
    What is left is the linear interpolation: of a steep |A|^2 it makes c1^2 7-19 % too high, of |A| c0 1-4 %, nearly
    the same for every rotation (standard deviation under 1 %), so the order of rotations holds.

    Voxels that differ in signs of their coordinates only share one row of the tables. With f(-xi) = f(xi), what is
    even and odd under phi -> -phi and phi -> pi - phi goes by itself: to the real and the imaginary parts of even m,
    and to those of odd m.

    images (4, n): the voxels at phi, -phi, pi - phi and pi + phi of each of n orbits, as indices into the support;
    share (n,): of the four, what the orbit has of its own. directions (n, 3). shell_start (r_max + 1,), NumPy: orbits
    between the radii r and r + 1 are the slice shell_start[r - 1] : shell_start[r]; fraction (n,): how far.
    pairs: flat places m * n_l + l of the even m <= l and of the odd ones.
    tables: for each piece of a bin the four matrices (voxels, pairs); None: too large to be kept.
    """

    support: Support
    bandwidth: int
    images: Array
    share: Array
    directions: Array
    shell_start: NDArray[np.int64]
    fraction: Array
    pairs: tuple[Array, Array]
    tables: tuple[tuple[Array, ...], ...] | None

    def _table(self, orbits: slice) -> tuple[Array, ...]:
        """conj Y_lm of some orbits: Re and Im of even m, Re and Im of odd m, (orbits, pairs) each."""
        xp = namespace(self.directions)
        dense = ops.harmonics(self.directions[orbits], self.bandwidth)
        flat = dense.reshape(*dense.shape[:2], -1)
        return tuple(xp.ascontiguousarray(flat[:, part][:, pairs]) for pairs in self.pairs for part in (0, 1))

    def _pieces(self) -> Iterator[tuple[int, slice]]:
        """Bin, and its orbits: all of them, or as many as are streamed at a time."""
        stream = self.tables is None and on_host(self.directions)
        for r, (start, stop) in enumerate(pairwise(self.shell_start.tolist()), 1):
            size = PIECE if stream else max(1, stop - start)
            for first in range(start, stop, size):
                yield r, slice(first, min(first + size, stop))

    def coefficients(self, values: Array) -> Array:
        """p_lm(r) of real functions given on the support.

        Sums run over both voxels of each pair, f(-xi) = f(xi): the odd degrees cancel, the even ones double.

        Parameters
        ----------
        values : (B, M) float32

        Returns
        -------
        (B, r_max, L, n_l) complex64
        """
        xp, b, r_max = namespace(values), len(values), self.support.r_max
        plus, minus, mirrored, turned = (values[:, image] * self.share for image in self.images)
        even, odd = plus + minus, plus - minus
        even_back, odd_back = mirrored + turned, turned - mirrored
        parts = even + even_back, odd + odd_back, even - even_back, odd - odd_back
        out = [xp.zeros((2, r_max + 1, b, len(pairs)), np.float32) for pairs in self.pairs for _ in range(2)]

        def work(piece: tuple[int, tuple[int, slice]]) -> list[Array]:
            i, (_, orbits) = piece
            tables = self._table(orbits) if self.tables is None else self.tables[i]
            # A voxel between the radii r and r + 1 counts for both, as linear interpolation does.
            upper, products = self.fraction[orbits], []
            for part, table in zip(parts, tables, strict=True):
                some = part[:, orbits]
                products.append(xp.concatenate([some * (1 - upper), some * upper]) @ table)
                tally(some, table, products[-1], flops=2 * products[-1].size * len(table))
            return products

        pieces = list(enumerate(self._pieces()))
        for (_, (r, _)), products in zip(pieces, map_threads(work, pieces, values), strict=True):
            for sums, both in zip(out, products, strict=True):
                sums[0, r - 1] += both[:b]
                sums[1, r] += both[b:]
        n_l = len(degrees(self.bandwidth))
        found = xp.zeros((b, r_max, self.bandwidth * n_l), np.complex64)
        for pairs, real, imaginary in zip(self.pairs, out[::2], out[1::2], strict=True):
            whole = (real.sum(axis=0) + 1j * imaginary.sum(axis=0))[:r_max].transpose(1, 0, 2)
            found[:, :, pairs] = 2 * whole
        return found.reshape(b, r_max, self.bandwidth, n_l)


@partial(Once, keep=1)  # tables of the bands before are of no use any more, and large
def _shell_harmonics(box: int, r_max: int, bandwidth: int, device: str) -> ShellHarmonics:
    support = make_support(box, r_max)
    orbits, share, images = _orbits(support)
    radius = np.sqrt((orbits.astype(np.float64) ** 2).sum(axis=1))
    lower = np.minimum(np.floor(radius).astype(np.int64), r_max)
    order = np.argsort(lower, kind="stable")
    m, l = np.meshgrid(np.arange(bandwidth), degrees(bandwidth), indexing="ij")
    pairs = tuple(np.nonzero(((m <= l) & (m % 2 == parity)).ravel())[0] for parity in (0, 1))
    bare = ShellHarmonics(
        support.to(device),
        bandwidth,
        to_device(np.ascontiguousarray(images[:, order]), device),
        to_device(share[order], device),
        to_device(orbits[order].astype(np.float64), device),
        np.searchsorted(lower[order], np.arange(1, r_max + 2)),
        to_device((radius - lower)[order].astype(np.float32), device),
        (to_device(pairs[0], device), to_device(pairs[1], device)),
        None,
    )
    size = len(orbits) * 2 * (len(pairs[0]) + len(pairs[1])) * 4
    if size > (STREAM_ABOVE if device == "cpu" else free_memory(device) // 4):
        return bare
    whole = pairwise(bare.shell_start.tolist())
    return replace(bare, tables=tuple(bare._table(slice(a, b)) for a, b in whole if a < b))


def _orbits(support: Support) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """The voxels x, y, z >= 0 of a support, (n, 3), with `share` (n,) and `images` (4, n) of `ShellHarmonics`."""
    r = support.r_max
    coords = support.coords.astype(np.int64)
    number = np.zeros((2 * r + 1,) * 3, np.int64)
    for sign in (1, -1):
        number[tuple((sign * coords + r).T)] = np.arange(len(coords))
    corner = np.stack(np.meshgrid(*[np.arange(r + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    square = (corner**2).sum(axis=1)
    orbits = corner[(square > 0) & (square <= r * r)]
    signs = np.array([(1, 1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1, 1)])
    images = np.stack([number[tuple((orbits * sign + r).T)] for sign in signs])
    # A coordinate of 0 has no other sign: every second image is there already.
    return orbits, np.where(orbits == 0, 0.5, 1.0).prod(axis=1).astype(np.float32), images


def shell_harmonics(support: Support, bandwidth: int) -> ShellHarmonics:
    """Even-degree harmonics at the voxels of a support (kept, as long as they fit, for later calls)."""
    return _shell_harmonics(support.box, support.r_max, bandwidth, device_of(support.coords))


def forget_tables() -> None:
    """Let go of the harmonics kept for later calls, where memory is short."""
    for cached in (_shell_harmonics, sphere_grid):
        cached.cache_clear()
