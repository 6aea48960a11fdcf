"""Fourier volumes: the active support S, transforms about the box centre, and grids to interpolate in.

All transforms are unscaled DFTs with the box centre (voxel N//2) as origin. A real volume's transform is
Hermitian, so S is held as a list of half its voxels, one of each pair (xi, -xi): a sum over S is twice the
sum over the list. r_max <= ceil(N/2) - 1 keeps the Nyquist planes, which have no partner, out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, fft_module, namespace, on_host, to_device
from faml_gpu.profile import tally
from faml_gpu.threads import map_threads

__all__ = [
    "Support",
    "full_band",
    "interpolation_grid",
    "inverse_transform",
    "make_support",
    "mean_of_half",
    "shells_of_half",
    "transform",
    "weight_grid",
]


@dataclass(frozen=True)
class Support:
    """The active support 0 < |xi| <= r_max of a box of N voxels, as M of its 2M voxels, sorted by shell.

    Attributes
    ----------
    box, r_max : N and r_max
    coords : (M, 3) int32, xi = (x, y, z)
    shell : (M,) int32, |xi| rounded, 1 .. r_max
    shell_start : (r_max + 2,) int64, always NumPy; shell s is the slice shell_start[s] : shell_start[s + 1]
    index : (M,) int64, flat index of xi in an rfftn array (N, N, N//2 + 1)
    """

    box: int
    r_max: int
    coords: Array
    shell: Array
    shell_start: NDArray[np.int64]
    index: Array

    def __len__(self) -> int:
        return len(self.shell)

    def to(self, device: str) -> Support:
        """The same with its arrays on another device."""
        coords, shell, index = (to_device(a, device) for a in (self.coords, self.shell, self.index))
        return replace(self, coords=coords, shell=shell, index=index)

    def within(self, r_max: int) -> Support:
        """That of fewer shells: its voxels are the first ones of this."""
        m = int(self.shell_start[r_max + 1])
        coords, shell, index = self.coords[:m], self.shell[:m], self.index[:m]
        start = self.shell_start[: r_max + 2]
        return replace(self, r_max=r_max, coords=coords, shell=shell, shell_start=start, index=index)

    def gather(self, spectrum: Array) -> Array:
        """Values (..., M) on the list, from rfftn arrays (..., N, N, N//2 + 1)."""
        return namespace(spectrum).take(spectrum.reshape(*spectrum.shape[:-3], -1), self.index, axis=-1)

    def scatter(self, values: Array) -> Array:
        """rfftn arrays (..., N, N, N//2 + 1), zero off S, from values (..., M) on the list."""
        xp = namespace(values)
        n = self.box
        flat = xp.zeros((*values.shape[:-1], n * n * (n // 2 + 1)), values.dtype)
        flat[..., self.index] = values
        # In the plane kx = 0 both voxels of a pair are stored.
        plane = xp.nonzero(self.coords[:, 0] == 0)[0]
        y, z = -self.coords[plane, 1] % n, -self.coords[plane, 2] % n
        flat[..., (z * n + y) * (n // 2 + 1)] = values[..., plane].conj()
        return flat.reshape(*values.shape[:-1], n, n, n // 2 + 1)

    def shell_sums(self, values: Array) -> Array:
        """Sums (..., r_max + 1) over the voxels of S in each shell (both of each pair), float64."""
        xp = namespace(values)
        out = xp.zeros((*values.shape[:-1], self.r_max + 1), np.float64)
        for s in range(1, self.r_max + 1):
            part = values[..., self.shell_start[s] : self.shell_start[s + 1]]
            out[..., s] = 2 * part.sum(axis=-1, dtype=np.float64)
        return out


def mean_of_half(values: Array) -> Array:
    """Means (...,) float64 over the whole cube of point-symmetric values (..., N, N, N//2 + 1), rfftn layout."""
    n = values.shape[-2]
    planes = values.sum(axis=(-3, -2), dtype=np.float64)
    # All kx but 0 and, for even N, N/2 stand for -kx too.
    return (
        2 * planes[..., : (n + 1) // 2].sum(axis=-1) - planes[..., 0] + planes[..., (n + 1) // 2 :].sum(axis=-1)
    ) / n**3


def shells_of_half(box: int) -> NDArray[np.int64]:
    """Fourier shell |xi|, rounded, of each voxel of an rfftn array (N, N, N//2 + 1)."""
    k = np.rint(np.fft.fftfreq(box) * box)
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(box // 2 + 1.0) ** 2
    return np.asarray(np.rint(np.sqrt(square)), np.int64)


def full_band(box: int) -> int:
    """Largest r_max of a box: ceil(N/2) - 1."""
    return (box + 1) // 2 - 1


@lru_cache(maxsize=4)
def make_support(box: int, r_max: int) -> Support:
    """The active support of a box of N voxels; kept, so its arrays are not to be written to.

    Raises
    ------
    ValueError
        unless 1 <= r_max <= ceil(N/2) - 1.
    """
    if not 1 <= r_max <= full_band(box):
        raise ValueError(f"r_max: found {r_max}, expected 1 to {full_band(box)} for a box of {box}")
    k = np.arange(-r_max, r_max + 1)
    z, y, x = np.meshgrid(k, k, np.arange(r_max + 1), indexing="ij")
    # Of each pair (xi, -xi): x > 0, or x = 0 and (y > 0, or y = 0 and z > 0).
    half = (x > 0) | (y > 0) | ((y == 0) & (z > 0))
    half &= x * x + y * y + z * z <= r_max * r_max
    coords = np.stack([x[half], y[half], z[half]], axis=1).astype(np.int32)
    shell = np.rint(np.sqrt((coords.astype(np.float64) ** 2).sum(axis=1))).astype(np.int32)
    order = np.argsort(shell, kind="stable")
    coords, shell = np.ascontiguousarray(coords[order]), np.ascontiguousarray(shell[order])
    start = np.searchsorted(shell, np.arange(r_max + 2)).astype(np.int64)
    wide = coords.astype(np.int64) % box
    index = (wide[:, 2] * box + wide[:, 1]) * (box // 2 + 1) + coords[:, 0]
    return Support(box, r_max, coords, shell, start, index)


def support_rows(support: Support) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The voxels of a support along kz: their order (M,), and rows (n, 5) of kx, ky, first kz, start and stop; kept.

    Neighbours in a row are neighbours in every volume they are turned into; those in a shell are all over it.
    """
    return _rows(support.box, support.r_max, len(support))


@lru_cache(maxsize=8)
def _rows(box: int, r_max: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    coords = make_support(box, r_max).coords
    if len(coords) != m:  # `within` has all of the shell r_max, also what of it lies beyond the radius
        coords = make_support(box, r_max + 1).coords[:m]
    order = np.lexsort(coords.T[::-1])  # by x, then y, then z: within a row kz goes up in steps of 1
    x, y, z = coords[order].T
    start = np.nonzero(np.diff(x, prepend=-1) | np.diff(y, prepend=y[0] - 1))[0]
    rows = np.stack([x[start], y[start], z[start], start, np.append(start[1:], m)], axis=1)
    return order, np.ascontiguousarray(rows, np.int32)


def transform(volumes: Array) -> Array:
    """Unscaled DFT (..., N, N, N//2 + 1) of real volumes (..., N, N, N), origin at the box centre."""
    xp = namespace(volumes)
    axes = (-3, -2, -1)
    return fft_module(volumes).rfftn(xp.fft.ifftshift(volumes, axes=axes), axes=axes)


def inverse_transform(spectra: Array, box: int) -> Array:
    """Real volumes (..., N, N, N) from `transform`'s output."""
    xp, fft = namespace(spectra), fft_module(spectra)
    # Axis by axis, the half axis last: cuFFT's real transform of several axes takes it for granted that the planes
    # kx = 0 and N/2 are Hermitian, and spectra times weights as users have them need not be.
    return xp.fft.fftshift(fft.irfft(fft.ifftn(spectra, axes=(-3, -2)), n=box), axes=(-3, -2, -1))


def interpolation_grid(volumes: Array, r_max: int, padding: int, *, compensate: bool = True) -> Array:
    """Padded, centred half transforms to interpolate in, cropped to what |xi| <= r_max can reach.

    Zero padding by `padding` refines the Fourier grid; dividing the volume by the transform of the
    trilinear kernel (sinc^2 along each axis) beforehand makes up for the kernel's attenuation. Volumes
    should be masked: what lies near the border of the box interpolates worst.

    Parameters
    ----------
    volumes : (..., N, N, N) float32 or float64
    r_max : int, Fourier voxels of the box
    padding : int
    compensate : bool
        False leaves lattice rotations (90 degrees) exact at padding 1.

    Returns
    -------
    (..., 2c + 1, 2c + 1, c + 1) complex64 or complex128
        c = padding * r_max + 1; axes [kz + c, ky + c, kx], in steps of 1 / padding Fourier voxel.
    """
    xp = namespace(volumes)
    n = volumes.shape[-1]
    size = n * padding
    if compensate:
        line = xp.sinc((xp.arange(n) - n // 2) / size) ** 2
        kernel = line[:, None, None] * line[:, None] * line
        volumes = volumes / kernel.astype(volumes.dtype)
    c = padding * r_max + 1
    if on_host(volumes) and volumes.ndim > 3 and len(volumes):
        # One by one: a few stay in the caches, and the threads have something to share.
        flat = volumes.reshape(-1, n, n, n)
        grids = np.stack(map_threads(lambda volume: _padded_transform(volume, size, c), flat, volumes))
        return grids.reshape(*volumes.shape[:-3], *grids.shape[1:])
    return _padded_transform(volumes, size, c)


def _padded_transform(volumes: Array, size: int, c: int) -> Array:
    """Centred half transforms of width c of volumes (..., N, N, N) padded to `size`, axis by axis.

    What is 0 before and what is cut off after each axis is left out: half the work of transforming the padded cube.
    """
    fft, take = fft_module(volumes), namespace(volumes).arange(-c, c + 1) % size
    along_x = fft.rfft(_padded(volumes, -1, size), axis=-1)
    width = min(c, along_x.shape[-1] - 1) + 1  # beyond the stored band (padding 1 only) there is nothing
    along_y = fft.fft(_padded(along_x[..., :width], -2, size), axis=-2, overwrite_x=True)
    # Axes [y, z, x] for a while: lines along an axis with others inside are transformed faster if these are few.
    turned = along_y.swapaxes(-3, -2)[..., take, :, :]
    along_z = fft.fft(_padded(turned, -2, size), axis=-2, overwrite_x=True).swapaxes(-3, -2)[..., take, :, :]
    lines = volumes.size + 2 * (along_y.size + turned.size // turned.shape[-2] * size)  # 2.5 of real, 5 of complex data
    tally(volumes, along_z, flops=2.5 * lines * np.log2(size))
    out = namespace(volumes).zeros((*along_z.shape[:-1], c + 1), along_z.dtype)
    out[..., :width] = along_z
    return out


def _padded(array: Array, axis: int, size: int) -> Array:
    """Zeros beside an axis (-3 to -1): the origin, voxel N//2, goes to index 0, what lies before it to the far end."""
    n = array.shape[axis]
    shape = list(array.shape)
    shape[axis] = size
    out, after = namespace(array).zeros(shape, array.dtype), (slice(None),) * (-1 - axis)
    out[(..., slice(0, n - n // 2), *after)] = array[(..., slice(n // 2, None), *after)]
    out[(..., slice(size - n // 2, None), *after)] = array[(..., slice(0, n // 2), *after)]
    return out


def weight_grid(weights: Array, r_max: int) -> Array:
    """Centred half grids (..., 2c + 1, 2c + 1, c + 1), c = r_max + 1, of weights (..., N, N, N//2 + 1)."""
    return _crop(weights, r_max + 1)


def _crop(spectra: Array, c: int) -> Array:
    """Centred half grid of half-width c; what lies beyond the stored band (padding 1 only) is 0."""
    xp = namespace(spectra)
    n = spectra.shape[-3]
    width = min(c, spectra.shape[-1] - 1) + 1
    take = xp.arange(-c, c + 1) % n
    out = xp.zeros((*spectra.shape[:-3], 2 * c + 1, 2 * c + 1, c + 1), spectra.dtype)
    out[..., :width] = spectra[..., take[:, None], take[None, :], :width]
    return out
