"""A tilt series of one particle, and the subtomogram reconstructed from it.

Images are twice as wide as the box: what the CTF spreads beyond the box, and the noise there, take part, and the box
is cut out of the reconstruction as from a tomogram. Along the tilt axis nothing has to be interpolated, so the
reconstruction is one sparse matrix between image rows and the plane across the axis, the same for every particle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from faml_gpu.array_backend import Array, fft_module, namespace
from faml_gpu.errors import InputError
from faml_gpu.simulate.gridding import KERNEL_WIDTH, FourierGrid, kernel, kernel_transform, sample

__all__ = ["Optics", "TiltSeries", "ctf", "electron_wavelength", "image_frequencies", "mtf", "tilt_angles"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

FIELD = 2  # width of the images over that of the box
# A weight below this counts as not observed: the voxel is set to 0.
WEIGHT_FLOOR = 0.02


@dataclass(frozen=True)
class Optics:
    """The microscope.

    Attributes
    ----------
    defocus : micrometre, underfocus is positive
    voltage : kV
    cs : spherical aberration, mm
    amplitude_contrast : share, 0 .. 1
    """

    defocus: float = 6.0
    voltage: float = 300.0
    cs: float = 2.7
    amplitude_contrast: float = 0.07


def electron_wavelength(voltage: float) -> float:
    """Relativistic wavelength of electrons, Angstrom, for a voltage in kV."""
    volts = 1e3 * voltage
    # h / sqrt(2 m e V), and the correction e / (2 m c^2), CODATA 2018.
    return float(12.2642594 / np.sqrt(volts * (1 + 0.978475598e-6 * volts)))


def ctf(frequency: ArrayLike, optics: Optics) -> Float64:
    """Contrast transfer function, positive at low frequencies: protein, dark in an underfocused image, is bright here.

    sin(gamma + arcsin A), gamma = pi lambda defocus k^2 - pi/2 Cs lambda^3 k^4: the usual sqrt(1 - A^2) sin(gamma)
    + A cos(gamma).

    Parameters
    ----------
    frequency : array, 1 / Angstrom
    optics : microscope

    Returns
    -------
    float64 array
    """
    wavelength = electron_wavelength(optics.voltage)
    square = np.asarray(frequency, dtype=np.float64) ** 2
    gamma = np.pi * wavelength * 1e4 * optics.defocus * square
    gamma -= 0.5 * np.pi * 1e7 * optics.cs * wavelength**3 * square**2
    return np.asarray(np.sin(gamma + np.arcsin(optics.amplitude_contrast)))


def mtf(omega: ArrayLike) -> Float64:
    """The paper's modulation transfer of the detector, sin(pi omega / 2) / (pi omega / 2).

    Parameters
    ----------
    omega : array, fraction of the Nyquist frequency
    """
    return np.asarray(np.sinc(np.asarray(omega, dtype=np.float64) / 2))


def tilt_angles(tilt_range: tuple[float, float], step: float) -> Float64:
    """The tilts LO, LO + step ... up to HI (HI itself where the step fits), degrees.

    Raises
    ------
    InputError
        A range that is not LO < HI within +-90 degrees; a step that is not positive, or larger than the range.
    """
    low, high = tilt_range
    if not -90.0 <= low < high <= 90.0:
        raise InputError(
            f"--tilt-range: found {low:g} {high:g} degrees, expected LO < HI, both within -90 and 90 (e.g. -60 60)"
        )
    if not 0 < step <= high - low:
        raise InputError(
            f"--tilt-step: found {step:g} degrees, expected more than 0 and at most the range of {high - low:g}"
        )
    return np.asarray(low + step * np.arange(int((high - low) / step + 1e-6) + 1))


def image_frequencies(size: int, angles: ArrayLike, axis: str) -> Float32:
    """Where the Fourier pixels of tilt images lie in the volume's transform.

    The beam is along Z. Axis Y: image coordinates are u = x cos(theta) + z sin(theta) and v = y, so the pixel (ku, kv)
    lies at (ku cos(theta), kv, ku sin(theta)). Axis X: u = y cos(theta) + z sin(theta) and v = x.

    Parameters
    ----------
    size : P, pixels
    angles : (T,) degrees
    axis : tilt axis, "x" or "y"

    Returns
    -------
    (T, P, P // 2 + 1, 3) float32, cycles per pixel, (x, y, z); axes [tilt, ku, kv], ku in FFT order, kv = 0 .. P // 2
    """
    theta = np.deg2rad(np.asarray(angles, dtype=np.float64))[:, None]
    ku = np.fft.fftfreq(size)
    out = np.zeros((len(theta), size, size // 2 + 1, 3), np.float32)
    across, along = (0, 1) if axis == "y" else (1, 0)
    out[..., across] = (ku * np.cos(theta))[:, :, None]
    out[..., 2] = (ku * np.sin(theta))[:, :, None]
    out[..., along] = np.arange(size // 2 + 1) / size
    return out


class TiltSeries:
    """The linear steps from a density to a subtomogram, prepared once for all particles.

    Parameters
    ----------
    box : N of the subtomograms, voxels; images have 2 N pixels
    voxel_size : Angstrom
    angles : (T,) degrees, increasing
    axis : tilt axis, "x" or "y"
    optics : the microscope; None: no CTF
    detector : apply the MTF
    wiener : noise-to-signal ratio that the CTF correction assumes for a Fourier voxel seen in one image
    xp : numpy or cupy; the arrays are kept there

    Attributes
    ----------
    weight : (N, N, N // 2 + 1) float32 in [0, 1], rfftn layout: the share of the signal that the reconstruction returns
    transfer : (2 N, N + 1) float32, CTF times MTF of the images, axes [ku, kv]
    """

    def __init__(
        self,
        box: int,
        voxel_size: float,
        angles: ArrayLike,
        axis: Literal["x", "y"] = "y",
        *,
        optics: Optics | None,
        detector: bool = True,
        wiener: float = 0.1,
        xp: Any = np,
    ) -> None:
        self.box, self._axis = box, axis
        size = self.size = FIELD * box
        self.angles = np.asarray(angles, dtype=np.float64)
        ku, kv = np.fft.fftfreq(size)[:, None], np.arange(size // 2 + 1) / size
        frequency = np.hypot(ku, kv)  # cycles per pixel
        transfer = np.ones(frequency.shape)
        if optics is not None:
            transfer *= ctf(frequency / voxel_size, optics)
        if detector:
            transfer *= mtf(2 * frequency)
        self.transfer = transfer.astype(np.float32)
        matrix = _gridding_matrix(size, self.angles)
        squares = np.broadcast_to(self.transfer**2, (len(self.angles), *transfer.shape)).copy()
        squares[:, :, -1] = 0  # the Nyquist line has no partner
        seen = (matrix @ squares.reshape(-1, size // 2 + 1)).astype(np.float64).reshape(size, size, -1)
        noise = wiener * _images_per_voxel(size, self.angles)[:, :, None]
        denominator = np.where(seen > 0, seen + noise, 1.0)
        self.weight = self._box_weight(seen / denominator)
        self._matrix = _on(xp, matrix)
        self._transfer = xp.asarray(self.transfer)
        self._filter = xp.asarray(np.where(seen > 1e-6, 1.0 / denominator, 0.0), dtype=np.float32)
        self._observed = xp.asarray(self.weight > 0)
        frequencies = image_frequencies(size, self.angles, axis).reshape(-1, 3)
        self._frequencies = xp.asarray(frequencies)
        line = kernel_transform((np.arange(box) - box // 2) / size) / kernel_transform(np.zeros(1))
        self._compensation = xp.asarray(1.0 / (line[:, None] * line), dtype=np.float32)

    def project(self, grid: FourierGrid, rotation: ArrayLike, shift: ArrayLike) -> Array:
        """Transforms of the noise-free images, CTF and MTF applied: (..., T, 2N, N + 1) complex64, [tilt, ku, kv].

        Parameters
        ----------
        grid : of the structure
        rotation, shift : poses (..., 3, 3) and (..., 3); shifts in voxels
        """
        values = sample(grid, self._frequencies, rotation, shift)
        shape = (*values.shape[:-1], len(self.angles), self.size, self.size // 2 + 1)
        images: Array = values.reshape(shape) * self._transfer
        return images

    def noise(self, rngs: np.random.Generator | Sequence[np.random.Generator]) -> Array:
        """Transforms of images of white noise of variance 1 per pixel, laid out as those of `project`.

        Parameters
        ----------
        rngs : source of one particle's noise, or one for each of several particles
        """
        white = white_noise(rngs, (len(self.angles), self.size, self.size), namespace(self._transfer))
        spectra: Array = fft_module(white).rfft2(white)
        return spectra

    def reconstruct(self, images: Array) -> Array:
        """Direct Fourier inversion with CTF correction: boxes, (..., N, N, N) float32, `[z, y, x]`.

        sum(k w c I) / (sum(k w c^2) + wiener m) at every Fourier voxel of the plane across the axis, with the
        gridding kernel k, the area w that an image pixel stands for, its transfer c, and 1 / m the number of images
        that see the voxel. The kernel's transform is divided out in real space; voxels whose weight is 0 are set to 0.

        Parameters
        ----------
        images : (..., T, 2N, N + 1) complex64, as from `project`
        """
        xp, fourier = namespace(images), fft_module(images)
        size, n = self.size, self.box
        lead, along = images.shape[:-3], size // 2 + 1
        # Particles beside each other along a row: one product of the matrix serves all.
        rows = xp.moveaxis(images.reshape(-1, len(self.angles), size, along) * self._transfer, 0, 2)
        rows = xp.ascontiguousarray(rows).reshape(len(self.angles) * size, -1)
        # The matrix is real: complex numbers as pairs of columns.
        plane = xp.ascontiguousarray(self._matrix @ rows.view(np.float32)).view(np.complex64)
        plane = plane.reshape(size, size, -1, along) * self._filter[:, :, None]  # [kz, k across, particle, k along]
        plane = cut(fourier.ifft2(plane, axes=(0, 1)), n, (0, 1)) * self._compensation[:, :, None, None]
        volumes = xp.moveaxis(cut(fourier.irfft(plane, n=size, axis=3), n, (3,)), 2, 0)
        if self._axis == "y":
            volumes = volumes.transpose(0, 1, 3, 2)
        spectra = fourier.rfftn(xp.ascontiguousarray(volumes), axes=(1, 2, 3)) * self._observed
        boxes = xp.asarray(fourier.irfftn(spectra, s=(n, n, n), axes=(1, 2, 3)), dtype=np.float32)
        return boxes.reshape(*lead, n, n, n)

    @property
    def particle_bytes(self) -> int:
        """Bytes that a particle's images, and the plane across the axis that they become, take on their way."""
        pixels = self.size * (self.size // 2 + 1)
        return 4 * 8 * pixels * (len(self.angles) + self.size)

    def _box_weight(self, returned: Float64) -> Float32:
        """The weight on the box's Fourier grid, from that of the field's: a mean over the voxels around each.

        Cutting the box out of the field blurs its transform over about one voxel of the box's.
        """
        n = self.box
        for axis in (0, 1):
            returned = 0.5 * returned + 0.25 * (np.roll(returned, 1, axis) + np.roll(returned, -1, axis))
        before = np.concatenate([returned[:, :, 1:2], returned[:, :, :-1]], axis=2)
        after = np.concatenate([returned[:, :, 1:], returned[:, :, -2:-1]], axis=2)
        returned = 0.5 * returned + 0.25 * (before + after)
        k = np.rint(np.fft.fftfreq(n) * n).astype(np.int64) * FIELD
        if self._axis == "x":
            weight = returned[np.ix_(k, k, np.arange(n // 2 + 1) * FIELD)]  # [kz, ky, kx]
        else:  # the same for both signs of ky, along the axis
            weight = returned[np.ix_(k, k[: n // 2 + 1], np.abs(k))].transpose(0, 2, 1)
        # Nyquist planes have no partner in the images and are left out.
        off = 2 * np.abs(k) < FIELD * n
        keep = off[:, None, None] & off[:, None] & off[: n // 2 + 1]
        weight = np.where(keep & (weight >= WEIGHT_FLOOR), weight, 0.0)
        # Rounded: the weight of a symmetric tilt range is symmetric to the last digit.
        return np.ascontiguousarray(weight.round(6), dtype=np.float32)


def _gridding_matrix(size: int, angles: Float64) -> Any:
    """Kernel times area from image rows to the plane across the axis: (P P, T P) sparse float32.

    Rows [kz, k across], columns [tilt, ku], both in FFT order. Where images are dense the rows sum to 1.
    """
    ku = np.rint(np.fft.fftfreq(size) * size)
    theta = np.deg2rad(angles)
    across, z = ku * np.cos(theta)[:, None], ku * np.sin(theta)[:, None]
    # An image pixel stands for a ring sector |ku| dtheta; the one at ku = 0, for its part of the disc of radius 1/2.
    area = np.where(ku == 0, 0.25, np.abs(ku)) * _steps(theta)[:, None]
    area = np.where(2 * np.abs(ku) == size, 0.0, area) / kernel_transform(np.zeros(1)) ** 2
    taps = np.arange(KERNEL_WIDTH)
    first = [np.floor(position).astype(np.int64) - KERNEL_WIDTH // 2 + 1 for position in (z, across)]
    values = [
        kernel(position[..., None] - start[..., None] - taps)
        for position, start in zip((z, across), first, strict=True)
    ]
    weights = area[..., None, None] * values[0][..., :, None] * values[1][..., None, :]
    rows_z, rows_across = (start[..., None] + taps for start in first)
    half = (size - 1) // 2
    inside = (abs(rows_z) <= half)[..., :, None] & (abs(rows_across) <= half)[..., None, :]
    rows = (rows_z % size)[..., :, None] * size + (rows_across % size)[..., None, :]
    columns = np.broadcast_to(np.arange(across.size).reshape(*across.shape, 1, 1), rows.shape)
    keep = inside & (weights > 0)
    shape = (size * size, across.size)
    entries = (weights[keep].astype(np.float32), (rows[keep], columns[keep]))
    return scipy.sparse.csr_matrix(scipy.sparse.coo_matrix(entries, shape=shape))


def _steps(theta: Float64) -> Float64:
    """The angle each tilt stands for, radians: half the way to either neighbour, at the ends as far outwards."""
    if len(theta) == 1:
        return np.array([np.pi])
    gaps = np.diff(theta)
    return np.asarray(0.5 * (np.concatenate([gaps[:1], gaps]) + np.concatenate([gaps, gaps[-1:]])))


def _images_per_voxel(size: int, angles: Float64) -> Float64:
    """One over the number of images that see a voxel of the box at (kz, k across), (P, P), FFT order."""
    k = np.fft.fftfreq(size) * size / FIELD
    step = float(np.mean(_steps(np.deg2rad(angles))))
    return np.maximum(np.hypot(k[:, None], k) * step, 1.0 / len(angles))


def cut(values: Array, n: int, axes: tuple[int, ...]) -> Array:
    """The middle n of each axis, from arrays whose origin is at index 0 to arrays that have it at n // 2."""
    xp = namespace(values)
    for axis in axes:
        values = xp.take(values, xp.arange(-(n // 2), n - n // 2) % values.shape[axis], axis=axis)
    return values


def white_noise(rngs: np.random.Generator | Sequence[np.random.Generator], shape: tuple[int, ...], xp: Any) -> Array:
    """Normal numbers of variance 1 in float32: (*shape) from one source, (n, *shape) from n.

    Drawn on the CPU, each particle's from its own source: the same on every device and whatever goes beside it.
    """
    if isinstance(rngs, np.random.Generator):
        return xp.asarray(rngs.standard_normal(shape, dtype=np.float32))
    white = np.empty((len(rngs), *shape), np.float32)
    for one, rng in zip(white, rngs, strict=True):
        rng.standard_normal(dtype=np.float32, out=one)
    return xp.asarray(white)


def _on(xp: Any, matrix: Any) -> Any:
    """A sparse matrix for arrays of a module."""
    if xp is np:
        return matrix
    import cupyx.scipy.sparse

    return cupyx.scipy.sparse.csr_matrix(matrix)
