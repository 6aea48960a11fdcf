"""Real-space masks, and the normalisation of boxes by what lies outside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu.errors import InputError

__all__ = ["independent_share", "normalise", "soft_sphere", "without_offset"]


def soft_sphere(box: int, radius: float, edge: float) -> NDArray[np.float32]:
    """A sphere about voxel N // 2 with a raised-cosine edge.

    1 up to `radius`, ½(1 + cos(π(r − radius)/edge)) over the edge, 0 from `radius + edge` on.

    Parameters
    ----------
    box : N, voxels
    radius : voxels
    edge : width of the edge, voxels; 0 is a sharp sphere

    Returns
    -------
    (N, N, N) float32 array, `[z, y, x]`

    Raises
    ------
    InputError
        If the radius is not positive or the edge negative.
    """
    if not radius > 0:
        raise InputError(f"mask radius: found {radius} voxels, expected more than 0")
    if not edge >= 0:
        raise InputError(f"mask edge: found {edge} voxels, expected 0 or more")
    square = (np.arange(box) - box // 2) ** 2
    r = np.sqrt(square[:, None, None] + square[:, None] + square)
    if edge == 0:
        profile = np.where(r <= radius, 1.0, 0.0)
    else:
        profile = 0.5 + 0.5 * np.cos(np.pi * np.clip((r - radius) / edge, 0.0, 1.0))
    return np.asarray(profile, dtype=np.float32)


def independent_share(mask: NDArray[np.float32]) -> float:
    """Share of the Fourier voxels of a masked map that are independent: it has as many numbers as the mask voxels."""
    square = np.asarray(mask, np.float64) ** 2
    return float(square.sum() ** 2 / (square**2).sum() / mask.size)


def normalise(boxes: Any, mask: Any) -> Any:
    """Boxes minus their mean, over their standard deviation, both taken where the mask is 0, per box.

    Parameters
    ----------
    boxes : (B, N, N, N) float32 array, NumPy or CuPy
    mask : (N, N, N) array of the same module; outside is where it is exactly 0

    Returns
    -------
    (B, N, N, N) float32 array of the same module

    Raises
    ------
    InputError
        If fewer than two voxels are outside the mask, or a box is constant there.
    """
    background = _background(boxes, mask)
    # float64: the mean of a box may be large against its standard deviation (uint8 tomograms).
    mean = background.mean(axis=1, dtype=np.float64)
    std = background.std(axis=1, dtype=np.float64)
    flat = ~(std > 1e-6 * abs(mean))
    if bool(flat.any()):
        first = int(flat.argmax())
        raise InputError(
            f"normalisation: {int(flat.sum())} of {len(boxes)} boxes are constant outside the mask "
            f"(the first is number {first} of this batch, from 0); expected noise there"
        )
    return ((boxes - mean[:, None, None, None]) / std[:, None, None, None]).astype(np.float32)


def without_offset(boxes: Any, mask: Any) -> Any:
    """Boxes minus their mean where the mask is 0, per box: `normalise` without the division.

    The zero frequency takes no part in the likelihood; but a box is masked before it is averaged, and the mask would
    spread a constant over the lowest shells.

    Parameters
    ----------
    boxes : (B, N, N, N) float32 array, NumPy or CuPy
    mask : (N, N, N) array of the same module

    Returns
    -------
    (B, N, N, N) float32 array of the same module

    Raises
    ------
    InputError
        If fewer than two voxels are outside the mask.
    """
    mean = _background(boxes, mask).mean(axis=1, dtype=np.float64)
    return (boxes - mean[:, None, None, None]).astype(np.float32)


def _background(boxes: Any, mask: Any) -> Any:
    """The voxels (B, n) where the mask is 0."""
    outside = (mask.ravel() == 0).nonzero()[0]  # taken by number: by a mask of three axes it is four times slower
    count = len(outside)
    if count < 2:
        raise InputError(
            f"normalisation: the mask leaves {count} of {mask.size} voxels outside, expected at least 2; "
            "use a smaller mask radius"
        )
    return boxes.reshape(len(boxes), -1).take(outside, axis=1)
