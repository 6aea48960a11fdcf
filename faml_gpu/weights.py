"""Fourier weights: the missing wedge of a tilt series, and the file layouts of 3-D weights.

Inside the package a weight is an (N, N, N//2 + 1) float32 array, 0 or more, in the layout of `rfftn`:
axes `[kz, ky, kx]`, kz and ky in FFT order (0, 1 .. -1; for even N the entry N/2 stands for -N/2),
kx = 0 .. N//2. Weights are point-symmetric, w(-k) = w(k), as real-space data are real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from faml_gpu.errors import InputError
from faml_gpu.fourier import shells_of_half

__all__ = [
    "WedgeFigures",
    "amplitudes",
    "centred_from_half",
    "divisible",
    "half_from_centred",
    "missing_wedge",
    "read_layout",
    "shell_means",
    "tapered",
    "wedge_consistency",
    "wedge_warning",
]

Float32 = NDArray[np.float32]

# Rounding in files (float16, interpolation) is no reason to refuse a weight; it is clipped to [0, 1].
ROUNDING = 1e-3
FLOOR = 1e-4  # of the largest W of a premultiplied box
# Mirrored against stated wedge: the power differs by sampling noise of about 1 % for a few boxes of 32^3.
MARGIN = 1.05
UNSEEN = 1e-3  # of the largest weight: up to this a voxel counts as not observed
DYNAMIC_RANGE = 1e-7  # of the shell with most power
# `WedgeFigures.beyond` from which on a warning comes. Measured with weights that are right: 0.001 on the 40 real
# ribosomes (all four weights); 0.001 on simulated tilt series with their own weight, 0.002 to 0.016 with the tilt
# range given instead, whose edge is sharp where the reconstruction's is a voxel wide; 0.001 to 0.009 on boxes of 24
# to 48 voxels cut from a tomogram, of white noise or of power that falls with frequency^-4. Noise of 32^3 voxels in a
# wedge of +-60: 0.17 where +-50 is stated, 0.54 where +-40, 0.79 where the other axis; simulated tilt series 0.3 to
# 0.9. Errors of 5 degrees (0.02 at 32^3, 0.2 at 64^3), and of 10 at less than 32^3, may go unseen: they are not much
# wider than a voxel.
BEYOND = 0.05
MIRRORED, TURNED, BOTH = "mirrored", "about the other axis", "mirrored about the other axis"
ADVICE = {
    MIRRORED: "if the tilts have the other sign, give --tilt-range -HI -LO (weight files: turn z round)",
    TURNED: "the tilt axis seems to be the other one: --tilt-axis (weight files: exchange x and y)",
    BOTH: "the tilt axis seems to be the other one (--tilt-axis), the sign of the tilts too (--tilt-range -HI -LO)",
}


def missing_wedge(box: int, tilt_range: tuple[float, float], axis: str = "y") -> Float32:
    """Weight of a tilt series: 1 where observed, 0 in the missing wedge.

    The beam is along Z. Tilt axis Y: positive tilt theta is x' = x cos(theta) + z sin(theta) (right-handed about +Y),
    so a voxel is observed if tan(lo) |kx| <= sgn(kx) kz <= tan(hi) |kx|. Tilt axis X: positive tilt is defined alike,
    y' = y cos(theta) + z sin(theta) (that is, by -theta right-handed about +X), with ky in place of kx. On the plane
    kx = 0 (ky = 0) only kz = 0 is observed. Data of a program with the other sign have the range (-hi, -lo).

    For even N the rule is applied to the frequency that the layout stores (+N/2 in kx, -N/2 in ky and kz); these
    Nyquist voxels are outside any active support.

    Parameters
    ----------
    box : N, voxels
    tilt_range : (lo, hi), degrees
    axis : tilt axis, "x" or "y"

    Returns
    -------
    (N, N, N//2 + 1) float32 array of 0 and 1, rfftn layout

    Raises
    ------
    InputError
        Range not finite, reversed, or beyond +-90 degrees; unknown axis.
    """
    low, high = (float(angle) for angle in tilt_range)
    if axis not in ("x", "y"):
        raise InputError(f"--tilt-axis: found {axis!r}, expected 'x' or 'y'")
    if not -90.0 <= low < high <= 90.0:
        raise InputError(
            f"--tilt-range: found {low:g} {high:g} degrees, expected LO < HI, both within -90 and 90 (e.g. -60 60)"
        )
    k = np.rint(np.fft.fftfreq(box) * box)
    kz = k[:, None, None]
    across = np.arange(box // 2 + 1.0)[None, None, :] if axis == "y" else k[None, :, None]
    along = np.where(across < 0, -kz, kz)
    slack = 1e-9 * box  # tan(45 degrees) is just below 1 in floating point
    tangent_low, tangent_high = np.tan(np.deg2rad([low, high]))
    observed = (along >= tangent_low * np.abs(across) - slack) & (along <= tangent_high * np.abs(across) + slack)
    return np.ascontiguousarray(np.broadcast_to(observed, (box, box, box // 2 + 1)), dtype=np.float32)


def _negated(n: int) -> NDArray[np.int64]:
    """Index of -k for each index of k in FFT order; -N/2 (even N) has no partner and stays."""
    return -np.arange(n) % n


def half_from_centred(cube: NDArray[Any]) -> Float32:
    """rfftn layout of a cube whose zero frequency is at voxel N//2 of each axis.

    The values at kx >= 0 are taken as they are, nothing is averaged. For even N the cube holds kx = -N/2 only, while
    the half volume ends at +N/2: that plane is read point-mirrored, w(N/2, ky, kz) = w(-N/2, -ky, -kz).

    Parameters
    ----------
    cube : (N, N, N) array, axes [kz, ky, kx]

    Returns
    -------
    (N, N, N//2 + 1) float32 array
    """
    n = len(cube)
    full = np.fft.ifftshift(np.asarray(cube, dtype=np.float32))
    half = np.ascontiguousarray(full[:, :, : n // 2 + 1])
    if n % 2 == 0:
        back = _negated(n)
        half[:, :, -1] = full[back[:, None], back[None, :], n // 2]
    return half


def centred_from_half(half: NDArray[Any], box: int) -> Float32:
    """Centred cube of a weight in rfftn layout; the values at kx < 0 follow from w(-k) = w(k).

    Undoes `half_from_centred`: half -> cube -> half is the identity.

    Parameters
    ----------
    half : (N, N, N//2 + 1) array
    box : N (not to be told from the shape of `half` alone)

    Returns
    -------
    (N, N, N) float32 array, axes [kz, ky, kx], zero frequency at N//2
    """
    positive = (box + 1) // 2  # kx = 0 .. positive - 1 is stored at the same index in FFT order
    back = _negated(box)
    full = np.empty((box, box, box), dtype=np.float32)
    full[:, :, :positive] = half[:, :, :positive]
    full[:, :, positive:] = half[back[:, None, None], back[None, :, None], back[None, None, positive:]]
    return np.ascontiguousarray(np.fft.fftshift(full))


def read_layout(array: NDArray[Any], box: int, name: str = "weight", *, premultiplied: bool = False) -> Float32:
    """A weight as stored in a file, in rfftn layout.

    Parameters
    ----------
    array : (N, N, N) centred cube, or (N, N, N//2 + 1) FFTW half, axes [kz, ky, kx]; or, of premultiplied boxes, two
        halves on top of each other (2N, N, N//2 + 1), the sum of CTF^2 first and then how often each voxel was
        measured, as RELION 4 writes them
    box : N of the subtomograms
    name : for messages, e.g. the file
    premultiplied : the weight is the W that boxes were multiplied by, a sum of CTF^2: 0 or more, unbounded

    Returns
    -------
    (N, N, N//2 + 1) float32 array, in [0, 1] if not of premultiplied boxes
        Of a centred cube, the half kx >= 0 as it is: weights made by placing slices voxel by voxel are a few
        per cent asymmetric, and are used as given.

    Raises
    ------
    InputError
        Other shape; NaN or values outside [0, 1] (or below 0, of premultiplied boxes); 0 everywhere.
    """
    cube, half, stacked = (box, box, box), (box, box, box // 2 + 1), (2 * box, box, box // 2 + 1)
    if array.shape not in (cube, half, stacked):
        raise InputError(
            f"{name}: Fourier weight of shape (z, y, x) = {array.shape}, expected a centred cube {cube}, an FFTW half "
            f"{half} or two of them on top of each other for subtomograms of {box} voxels"
        )
    if array.shape == stacked:
        if not premultiplied:
            raise InputError(
                f"{name}: Fourier weight with multiplicities behind it, shape (z, y, x) = {array.shape}, expected "
                "boxes that are multiplied by their CTF (rlnCtfDataAreCtfPremultiplied 1): of others nothing says whether "
                "they are sums or means of their images, and so what noise they have"
            )
        # The boxes are sums of CTF * image, their noise has the variance sigma^2 * sum of CTF^2: how many images those
        # sums have adds nothing to it.
        array = array[:box]
    low, high = float(array.min()), float(array.max())  # NaN if any value is
    if premultiplied:
        if not (low >= -ROUNDING * max(high, 0.0) and np.isfinite(high)):
            raise InputError(
                f"{name}: Fourier weight from {low:g} to {high:g}, expected 0 or more: of boxes multiplied by their "
                "CTF (rlnCtfDataAreCtfPremultiplied) it is a sum of CTF^2"
            )
    elif not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise InputError(
            f"{name}: Fourier weight from {low:g} to {high:g}, expected values in 0 .. 1 (no signed CTF; CTF^2 with "
            "multiplicities only where the boxes are multiplied by it, rlnCtfDataAreCtfPremultiplied 1)"
        )
    if high <= 0:
        raise InputError(f"{name}: Fourier weight is 0 everywhere, expected values in 0 .. 1")
    weight = np.clip(np.asarray(array, dtype=np.float32), 0.0, None if premultiplied else 1.0)
    if array.shape == half:
        return np.ascontiguousarray(weight)
    return half_from_centred(weight)


def divisible(multiplied: Float32) -> Float32:
    """W (N, N, N//2 + 1) of premultiplied boxes, 0 where it is at most `FLOOR` of its largest value.

    There a box has next to no signal, and what windows and rounding leave would be divided by next to nothing.
    """
    return np.where(multiplied > FLOOR * multiplied.max(), multiplied, np.float32(0))


def shell_means(multiplied: Float32) -> NDArray[np.float64]:
    """Mean of W (N, N, N//2 + 1) where it is not 0, per Fourier shell; 0 in a shell without."""
    shell, seen = shells_of_half(len(multiplied)), multiplied > 0
    total = np.bincount(shell.ravel(), multiplied.ravel())
    return np.asarray(total / np.maximum(np.bincount(shell.ravel(), seen.ravel()), 1))


def amplitudes(multiplied: Float32, means: NDArray[np.float64]) -> Float32:
    """Weights w = sqrt(W / m) (N, N, N//2 + 1) that premultiplied boxes have once they are divided by W.

    m is common to all boxes, one number per Fourier shell: it is the noise variance that takes it up. With the mean of
    W for m, w^2 has the mean 1, as if each voxel were observed once.
    """
    common = np.where(means > 0, means, 1.0)[shells_of_half(len(multiplied))]
    return np.sqrt(multiplied / common).astype(np.float32)


@dataclass(frozen=True)
class WedgeFigures:
    """How well a weight fits the power of its boxes.

    Attributes
    ----------
    beyond : mean power in the layer of voxels that lies two voxels beyond what the weight says was observed, over that
        of observed voxels of the same Fourier shell; NaN where there is no such layer
    others : the same for the weight mirrored (kz -> -kz, tilt range -HI .. -LO), with the other tilt axis (kx and ky
        exchanged), and both; only where that is another weight, and only if `beyond` is too much
    stated_only : mean power, relative to the mean of its shell, where the weight says observed (w > 1/2) and its mirror
        does not; NaN where there is no such voxel
    mirrored_only : where the mirror says observed, and the weight does not
    voxels : values that are averaged in the smaller of these two
    """

    beyond: float
    others: dict[str, float]
    stated_only: float
    mirrored_only: float
    voxels: int


def tapered(boxes: NDArray[Any]) -> NDArray[Any]:
    """Boxes (B, N, N, N), less their mean, brought down to 0 at their faces by a half-wave of the sine along each axis.

    Opposite faces of a box cut from a tomogram do not fit together. Their step would spread power along the axes of
    Fourier space, one of which lies in the missing wedge.
    """
    n = boxes.shape[-1]
    wave = np.sin(np.pi * (np.arange(n) + 1) / (n + 1)).astype(np.float32)
    window = wave[:, None, None] * wave[:, None] * wave
    return np.asarray((boxes - boxes.mean(axis=(1, 2, 3), keepdims=True)) * window)


def wedge_consistency(power: NDArray[Any], weight: NDArray[Any]) -> WedgeFigures:
    """Compare the power of boxes with the weight stated for them.

    Parameters
    ----------
    power : (N, N, N//2 + 1) or (n, N, N, N//2 + 1) array, |FFT|^2 of boxes (`tapered`), rfftn layout
    weight : (N, N, N//2 + 1) array, that of all of them

    Returns
    -------
    WedgeFigures
        Compared are voxels of the same Fourier shell, 1 <= |k| <= ceil(N/2) - 1: the spectrum's fall with resolution
        drops out.
    """
    n = power.shape[-2]
    k = np.rint(np.fft.fftfreq(n) * n)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.arange(n // 2 + 1.0) ** 2)
    shell = np.rint(radius).astype(np.int64)
    support = (shell >= 1) & (radius <= (n + 1) // 2 - 1)
    powers = power.reshape(-1, n, n, n // 2 + 1)
    of_boxes = powers.mean(axis=0, dtype=np.float64)
    beyond = _beyond(of_boxes, weight, shell, support)
    mirror = weight[_negated(n)]
    others = {}
    if beyond > BEYOND:
        turned = half_from_centred(centred_from_half(weight, n).transpose(0, 2, 1))
        known = [_observed(weight)[support]]
        for name, other in ((MIRRORED, mirror), (TURNED, turned), (BOTH, turned[_negated(n)])):
            observed = _observed(other)[support]
            if not any(np.array_equal(observed, before) for before in known):
                others[name] = _beyond(of_boxes, other, shell, support)
            known.append(observed)
    mean = np.bincount(shell[support], of_boxes[support]) / np.maximum(np.bincount(shell[support]), 1)
    relative = of_boxes[support] / np.maximum(mean, np.finfo(np.float64).tiny)[shell[support]]
    stated, mirrored = weight[support] > 0.5, mirror[support] > 0.5
    sets = [stated & ~mirrored, mirrored & ~stated]
    only, mirrored_only = (float(relative[chosen].mean()) if chosen.any() else np.nan for chosen in sets)
    return WedgeFigures(beyond, others, only, mirrored_only, len(powers) * min(int(chosen.sum()) for chosen in sets))


def _observed(weight: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(weight > UNSEEN * weight.max())


def _beyond(
    power: NDArray[np.float64], weight: NDArray[Any], shell: NDArray[np.int64], support: NDArray[np.bool_]
) -> float:
    """See `WedgeFigures`; power (N, N, N//2 + 1)."""
    n = len(power)
    seen = _observed(weight)
    cube = centred_from_half(seen, n).astype(np.uint8)
    near, far = (ndimage.maximum_filter(cube, size, mode="nearest") for size in (3, 5))
    layer = np.fft.ifftshift(far > near)[:, :, : n // 2 + 1] & support
    count, total = (
        np.bincount(shell[seen & support], values, shell.max() + 1) for values in (None, power[seen & support])
    )
    mean = total / np.maximum(count, 1)
    # What lies beyond a filter of the boxes is rounding, the same in and out of the wedge.
    layer &= (mean > DYNAMIC_RANGE * mean.max())[shell]
    return float((power[layer] / mean[shell[layer]]).mean()) if layer.any() else float("nan")


def wedge_warning(figures: WedgeFigures) -> str | None:
    """What to tell the user about `figures`, or None if the stated weight fits the data."""
    # Comparisons with NaN (no such voxels) are false: no missing wedge, or a symmetric one.
    if figures.beyond > BEYOND:
        text = (
            f"two voxels beyond what the weight observes there is {_percent(figures.beyond)} of the power of observed "
            f"voxels of the same resolution, expected less than {_percent(BEYOND)}"
        )
        fitting = [name for name, value in figures.others.items() if value <= BEYOND]
        told = ", ".join(f"{name} {_percent(value)}" for name, value in figures.others.items())
        if fitting:
            best = min(fitting, key=figures.others.__getitem__)
            return f"{text}; {told}: {ADVICE[best]}"
        return f"{text}{f'; {told}' if told else ''}: check the tilt range and axis, or the weights"
    # The means are of so many values of an exponential distribution: each is off by its share 1 / sqrt(voxels).
    if figures.mirrored_only > (MARGIN + 4 / np.sqrt(max(figures.voxels, 1))) * figures.stated_only:
        return (
            "the mirrored wedge fits the boxes better: relative power "
            f"{figures.mirrored_only:.2f} where only the tilt range -HI -LO observes, "
            f"{figures.stated_only:.2f} where only the stated one does; {ADVICE[MIRRORED]}"
        )
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
