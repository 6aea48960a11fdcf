"""Fourier shell correlation, what a mask does to it, and filters with the same shells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from faml_gpu.errors import InputError

__all__ = [
    "FscCurves",
    "check_b_factor",
    "crossings",
    "final_map",
    "fsc",
    "fsc_observed",
    "fsc_weight",
    "fsc_with_mask",
    "lowpass",
    "observed_voxels",
    "randomise_phases",
    "resolution_at",
    "shell_index",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

RANDOMISE_BELOW = 0.8  # of the unmasked curve (Chen et al. 2013)
NOT_CORRECTED = 2  # shells from where phases are random: intact neighbours leak into these, through any mask
DRAWS = 5  # of random phases, averaged, so that the correction adds little noise of its own
EDGE = 2.0  # Fourier voxels over which a low-pass filter falls to 0
OBSERVED = 0.1  # of a half's particles that must have observed a Fourier voxel
STRONGEST = 40.0  # exponent of a B-factor at Nyquist: what float32 has room for, with much to spare on both sides


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
    a, b = _pair(first, second)
    if mask is not None:
        window = np.asarray(mask, dtype=np.float64)
        a, b = a * window, b * window
    return _correlation(fft.rfftn(a), fft.rfftn(b), _copies(len(a)))


def fsc_observed(
    first: ArrayLike,
    second: ArrayLike,
    first_weight: ArrayLike,
    second_weight: ArrayLike,
    threshold: float = OBSERVED,
) -> tuple[Float64, Float64]:
    """Fourier shell correlation of two spectra over the voxels that both saw.

    What a missing wedge hides from all particles of a half is not data: there an average still holds what it started
    from, or 0. Where both halves started alike the correlation of these voxels would be 1.

    Parameters
    ----------
    first, second : (N, N, N//2 + 1) complex arrays, rfftn layout
    first_weight, second_weight : (N, N, N//2 + 1) arrays
        Accumulated weight of each voxel over that of a voxel all particles saw: 0 .. 1.
    threshold : both weights must reach it

    Returns
    -------
    curve : (N//2 + 1,) float64 array
        0 for shells without such a voxel.
    share : (N//2 + 1,) float64 array
        Of each shell's voxels that count.
    """
    a, b = np.asarray(first), np.asarray(second)
    copies = _copies(len(a))
    seen = copies * observed_voxels(first_weight, second_weight, threshold)
    return _correlation(a, b, seen), _per_shell(seen) / _per_shell(copies)


def observed_voxels(
    first_weight: ArrayLike, second_weight: ArrayLike, threshold: float = OBSERVED
) -> NDArray[np.bool_]:
    """Fourier voxels that both halves saw, (N, N, N//2 + 1) bool, see `fsc_observed`."""
    return (np.asarray(first_weight) >= threshold) & (np.asarray(second_weight) >= threshold)


@dataclass(frozen=True)
class FscCurves:
    """Fourier shell correlation of two half maps, shells 0 .. N//2.

    Attributes
    ----------
    box : N, voxels
    unmasked : (S,) of the maps as they are
    masked : (S,) of the maps times the mask; None without a mask
    randomised : (S,) the same with phases random from shell `randomised_from` on; None where nothing was randomised
    corrected : (S,) (masked - randomised) / (1 - randomised) from `randomised_from` + 2 on, the masked curve before
        (the unmasked one, without a mask)
    randomised_from : first shell at which the unmasked curve is below 0.8; None if there is none, or no mask
    observed : (S,) share of each shell's voxels that were looked at
    """

    box: int
    unmasked: Float64
    masked: Float64 | None
    randomised: Float64 | None
    corrected: Float64
    randomised_from: int | None
    observed: Float64


def fsc_with_mask(
    first: ArrayLike,
    second: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    observed: ArrayLike | None = None,
    seed: int = 0,
) -> FscCurves:
    """Fourier shell correlation inside a mask, less what the mask itself correlates.

    Multiplying by the same mask convolves both transforms with the same kernel: shells at which the maps do agree leak
    into those at which they do not. How much, the same maps show with all phases random beyond some shell, where any
    correlation left is the mask's: FSC_true = (FSC_masked - FSC_random) / (1 - FSC_random) (Chen et al. 2013,
    Ultramicroscopy 135, 24). Phases are randomised from the first shell on at which the unmasked curve is below 0.8;
    the two shells there take the masked value as it is, as RELION's postprocessing does: intact neighbours leak
    into them under any mask. FSC_random is the mean of five draws. Where it is 1, nothing is known, and the result 0.

    Parameters
    ----------
    first, second : (N, N, N) arrays
    mask : (N, N, N) array, soft, 0 .. 1; None gives the unmasked curve only
    observed : (N, N, N//2 + 1) bool array, rfftn layout: the Fourier voxels to look at (`observed_voxels`); None is all
    seed : of the random phases

    Raises
    ------
    InputError
        If the maps, or the mask, are not cubes of the same size.
    """
    a, b = _pair(first, second)
    box = len(a)
    copies = _copies(box)
    seen = copies if observed is None else copies * np.asarray(observed)
    share = _per_shell(seen) / _per_shell(copies)
    unmasked = _correlation(fft.rfftn(a), fft.rfftn(b), seen)
    if mask is None:
        return FscCurves(box, unmasked, None, None, unmasked, None, share)
    window = np.asarray(mask, dtype=np.float64)
    if window.shape != a.shape:
        raise InputError(f"fsc: mask has shape {window.shape}, expected {a.shape} as the maps")
    if not window.any():
        raise InputError("fsc: the mask is 0 everywhere, expected 1 where the structure is")
    masked = _correlation(fft.rfftn(a * window), fft.rfftn(b * window), seen)
    low = np.flatnonzero(unmasked[1:] < RANDOMISE_BELOW) + 1
    if len(low) == 0:
        return FscCurves(box, unmasked, masked, None, masked, None, share)
    start = int(low[0])
    draws = []
    for rng in np.random.default_rng(seed).spawn(DRAWS):
        random = [fft.rfftn(randomise_phases(volume, start, rng) * window) for volume in (a, b)]
        draws.append(_correlation(random[0], random[1], seen))
    randomised = np.mean(draws, axis=0)
    rest = 1 - randomised
    corrected = masked.copy()
    true = np.divide(masked - randomised, rest, out=np.zeros_like(masked), where=rest > 1e-6)
    corrected[start + NOT_CORRECTED :] = true[start + NOT_CORRECTED :]
    return FscCurves(box, unmasked, masked, randomised, corrected, start, share)


def randomise_phases(volume: ArrayLike, shell: int, rng: np.random.Generator) -> Float64:
    """A map with the phases of its Fourier coefficients random from a shell on, their amplitudes kept.

    Parameters
    ----------
    volume : (N, N, N) array
    shell : first shell (|ξ| rounded) with random phases
    rng : source of the phases

    Returns
    -------
    (N, N, N) float64 array
    """
    values = np.asarray(volume, dtype=np.float64)
    # White noise has uniform phases, and those of a real map: opposite at ξ and -ξ.
    noise = fft.rfftn(rng.standard_normal(values.shape))
    spectrum = fft.rfftn(values)
    random = np.abs(spectrum) * noise / np.abs(noise)
    spectrum = np.where(shell_index(len(values)) >= shell, random, spectrum)
    return np.asarray(fft.irfftn(spectrum, s=values.shape))


def crossings(curve: ArrayLike, threshold: float) -> Float64:
    """Every place at which a shell correlation falls below a threshold, in shells (interpolated), coarsest first.

    Where there are several, the first one counts (`resolution_at`): what is above the threshold again beyond it are
    shells that noise, a leaking mask or an unobserved wedge can lift. The mean (shell 0) is not looked at.
    """
    values = np.asarray(curve, dtype=np.float64)[1:]
    falls = np.flatnonzero((values[:-1] >= threshold) & (values[1:] < threshold))
    return falls + 1 + (values[falls] - threshold) / (values[falls] - values[falls + 1])


def resolution_at(curve: ArrayLike, threshold: float, voxel_size: float, box: int) -> float:
    """Resolution in Angstrom at which a shell correlation first falls below a threshold.

    Interpolated linearly between the last shell at or above the threshold and the first below it. Shell 0 (the
    mean) is not looked at. Of several crossings the first, coarsest one counts, see `crossings`.

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


def lowpass(volume: ArrayLike, resolution: float, voxel_size: float, edge: float = EDGE) -> NDArray[np.float32]:
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
    return _filtered(values, _lowpass_gain(_frequency_radius(box), box * voxel_size / resolution, edge))


def fsc_weight(curve: ArrayLike) -> Float64:
    """Weight of each shell of the sum of two half maps, sqrt(2 FSC / (1 + FSC)); 0 where the FSC is not above 0.

    The correlation of the full map with the truth (Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721).
    """
    values = np.clip(np.asarray(curve, dtype=np.float64), 0.0, 1.0)
    return np.asarray(np.sqrt(2 * values / (1 + values)))


def check_b_factor(b_factor: float, voxel_size: float) -> None:
    """Refuse a B-factor that would leave nothing of a map but its finest detail, or but its mean.

    Raises
    ------
    InputError
        exp(-B s² / 4) at Nyquist, s = 1 / (2 voxel size), is not within e^-40 .. e^40.
    """
    most = STRONGEST * 4 * (2 * voxel_size) ** 2
    if not abs(b_factor) <= most:
        raise InputError(
            f"option b-factor: found {b_factor:g} A^2, expected {-most:g} to {most:g} A^2 with voxels of "
            f"{voxel_size:g} A (such as -300; negative sharpens)"
        )


def final_map(
    volume: ArrayLike, curve: ArrayLike, resolution: float, voxel_size: float, b_factor: float | None = None
) -> Float32:
    """The average of two half maps weighted by their FSC, sharpened, and cut off at a resolution.

    Each Fourier voxel is multiplied by sqrt(2 FSC / (1 + FSC)) exp(-B s² / 4), with s = |ξ| / (N voxel size) and the
    weight (`fsc_weight`) linear in |ξ| between the shells, and by the gain of `lowpass`. The sign of B is RELION's: a
    negative one sharpens.

    All in one: a map that is sharpened before it is cut off holds little but the noise of its corners, to the
    precision of its numbers.

    Parameters
    ----------
    volume : (N, N, N) array
    curve : (S,) array, FSC of the half maps in shells 0 .. S - 1
    resolution : Angstrom; where it is infinite, the map is 0
    voxel_size : Angstrom
    b_factor : B, square Angstrom, within reach (`check_b_factor`); None or 0 does not sharpen

    Returns
    -------
    (N, N, N) float32 array

    Raises
    ------
    InputError
        The map is no cube.
    """
    values = np.asarray(volume, dtype=np.float32)
    _check_cube(values, "final map: map")
    if not np.isfinite(resolution):
        return np.zeros_like(values)
    extent, radius, weight = len(values) * voxel_size, _frequency_radius(len(values)), fsc_weight(curve)
    gain = np.interp(radius, np.arange(len(weight)), weight) * _lowpass_gain(radius, extent / resolution)
    if b_factor:
        gain *= np.exp(-b_factor * (radius / extent) ** 2 / 4)
    return _filtered(values, gain)


def _filtered(volume: Float32, gain: Float64) -> Float32:
    return np.asarray(fft.irfftn(fft.rfftn(volume) * gain.astype(np.float32), s=volume.shape), dtype=np.float32)


def _lowpass_gain(radius: Float64, cut: float, edge: float = EDGE) -> Float64:
    """Raised cosine, half its height at `cut`; all in Fourier voxels."""
    if edge > 0:
        return np.asarray(0.5 + 0.5 * np.cos(np.pi * np.clip((radius - cut) / edge + 0.5, 0.0, 1.0)))
    return (radius <= cut).astype(np.float64)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Float64, Float64]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _check_cube(a, "fsc: first map")
    if b.shape != a.shape:
        raise InputError(f"fsc: second map has shape {b.shape}, expected {a.shape} as the first")
    return a, b


def _copies(box: int) -> Float64:
    """How often each voxel of the half volume stands in the full one, (N, N, N//2 + 1).

    Of each conjugate pair it holds one, but both on the planes ξx = 0 and (even N) N/2.
    """
    line = np.full(box // 2 + 1, 2.0)
    line[0] = 1.0
    if box % 2 == 0:
        line[-1] = 1.0
    return np.broadcast_to(line, (box, box, box // 2 + 1))


def _per_shell(values: Float64) -> Float64:
    """Sums (N//2 + 1,) over the shells; the corners beyond are left out."""
    box = len(values)
    sums = np.bincount(shell_index(box).ravel(), weights=values.ravel())
    return np.asarray(sums[: box // 2 + 1], dtype=np.float64)


def _correlation(fa: NDArray[np.complexfloating], fb: NDArray[np.complexfloating], weight: Float64) -> Float64:
    """Re Σ F G* / sqrt(Σ|F|² Σ|G|²) per shell over weighted voxels, 0 where either has no power."""
    cross = _per_shell((fa * fb.conj()).real * weight)
    power = np.sqrt(_per_shell(np.abs(fa) ** 2 * weight) * _per_shell(np.abs(fb) ** 2 * weight))
    return np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)


def _frequency_radius(box: int) -> Float64:
    """|ξ| in Fourier voxels, (N, N, N//2 + 1), rfftn layout."""
    full = np.fft.fftfreq(box, 1.0 / box) ** 2
    half = np.arange(box // 2 + 1) ** 2
    return np.sqrt(full[:, None, None] + full[:, None] + half)


def _check_cube(volume: NDArray[np.floating], what: str) -> None:
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InputError(f"{what} has shape {volume.shape}, expected a cube (N, N, N)")
