"""Fourier shell correlation, and low-pass filters with the same shells."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from faml_gpu.errors import InputError

__all__ = ["fsc", "lowpass", "resolution_at", "shell_index"]

Float64 = NDArray[np.float64]


def shell_index(box: int) -> NDArray[np.int64]:
    """Shell of each Fourier voxel, |ξ| rounded to the next integer, (N, N, N//2 + 1) int64, rfftn layout."""
    return np.rint(_frequency_radius(box)).astype(np.int64)


def fsc(first: ArrayLike, second: ArrayLike, mask: ArrayLike | None = None) -> Float64:
    """Fourier shell correlation Re Σ F G* / sqrt(Σ|F|² Σ|G|²) over the full Fourier volume.

    Parameters
    ----------
    first, second : (N, N, N) arrays
    mask : (N, N, N) array both are multiplied by, or None

    Returns
    -------
    (N//2 + 1,) float64 array
        Shells |ξ| = 0 .. N//2 (rounded); 0 where either map has no power. The corners beyond are left out.

    Raises
    ------
    InputError
        If the maps are not cubes of the same size.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _check_cube(a, "fsc: first map")
    if b.shape != a.shape:
        raise InputError(f"fsc: second map has shape {b.shape}, expected {a.shape} as the first")
    if mask is not None:
        window = np.asarray(mask, dtype=np.float64)
        a, b = a * window, b * window
    box = a.shape[0]
    fa, fb = fft.rfftn(a), fft.rfftn(b)
    # The half volume holds one of each conjugate pair, but both on the planes ξx = 0 and (even N) N/2.
    copies = np.full(box // 2 + 1, 2.0)
    copies[0] = 1.0
    if box % 2 == 0:
        copies[-1] = 1.0
    shells = shell_index(box).ravel()

    def per_shell(values: Float64) -> Float64:
        sums = np.bincount(shells, weights=(values * copies).ravel())
        return np.asarray(sums[: box // 2 + 1], dtype=np.float64)

    cross = per_shell((fa * fb.conj()).real)
    power = np.sqrt(per_shell(np.abs(fa) ** 2) * per_shell(np.abs(fb) ** 2))
    return np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)


def resolution_at(curve: ArrayLike, threshold: float, voxel_size: float, box: int) -> float:
    """Resolution in Angstrom at which a shell correlation first falls below a threshold.

    Interpolated linearly between the last shell at or above the threshold and the first below it. Shell 0 (the
    mean) is not looked at.

    Parameters
    ----------
    curve : (S,) array, shells 0 .. S - 1
    threshold : 0.143, 0.5 ...
    voxel_size : Angstrom
    box : N, voxels

    Returns
    -------
    float
        Angstrom; that of the last shell if the curve never falls below, infinity if it starts below.
    """
    values = np.asarray(curve, dtype=np.float64)
    below = np.flatnonzero(values[1:] < threshold) + 1
    if len(below) == 0:
        return box * voxel_size / (len(values) - 1)
    shell = int(below[0])
    if shell == 1:
        return float("inf")
    drop = (values[shell - 1] - threshold) / (values[shell - 1] - values[shell])
    return float(box * voxel_size / (shell - 1 + drop))


def lowpass(volume: ArrayLike, resolution: float, voxel_size: float, edge: float = 2.0) -> NDArray[np.float32]:
    """Low-pass filter with a raised-cosine edge, half height at the resolution.

    Parameters
    ----------
    volume : (N, N, N) array
    resolution : Angstrom
    voxel_size : Angstrom
    edge : width of the edge, Fourier voxels, centred on the cut; 0 is a sharp cut (|ξ| <= cut kept)

    Returns
    -------
    (N, N, N) float32 array
    """
    values = np.asarray(volume, dtype=np.float32)
    _check_cube(values, "low-pass filter: map")
    if not resolution > 0:
        raise InputError(f"low-pass filter: found a resolution of {resolution} A, expected more than 0")
    box = values.shape[0]
    cut = box * voxel_size / resolution
    radius = _frequency_radius(box)
    if edge > 0:
        gain = 0.5 + 0.5 * np.cos(np.pi * np.clip((radius - cut) / edge + 0.5, 0.0, 1.0))
    else:
        gain = (radius <= cut).astype(np.float64)
    return np.asarray(fft.irfftn(fft.rfftn(values) * gain.astype(np.float32), s=values.shape), dtype=np.float32)


def _frequency_radius(box: int) -> Float64:
    """|ξ| in Fourier voxels, (N, N, N//2 + 1), rfftn layout."""
    full = np.fft.fftfreq(box, 1.0 / box) ** 2
    half = np.arange(box // 2 + 1) ** 2
    return np.sqrt(full[:, None, None] + full[:, None] + half)


def _check_cube(volume: NDArray[np.floating], what: str) -> None:
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InputError(f"{what} has shape {volume.shape}, expected a cube (N, N, N)")
