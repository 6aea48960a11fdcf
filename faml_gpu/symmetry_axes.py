"""Where the axes of a point group lie in a map: what a start from nothing has to find before they can be imposed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from faml_gpu import fourier, ops
from faml_gpu.fast_alignment import make_reference
from faml_gpu.fast_alignment.cells import all_cells, cell_rotations, cell_width
from faml_gpu.fast_alignment.harmonics import shell_harmonics
from faml_gpu.fast_alignment.so3 import correlate, interpolate
from faml_gpu.fourier import Support

__all__ = ["Axes", "find_axes", "moved_onto_axes"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Complex64 = NDArray[np.complex64]

LEVEL = 3  # of the cells in whose centres axes are looked for, 7.5 degrees apart
REFINED = 10  # of them
PADDING = 2


@dataclass(frozen=True)
class Axes:
    """A map is a copy, in the pose (rotation, shift), of one whose axes are those of `symmetry.point_group`.

    shift in voxels; agreement: mean correlation of the map's Fourier magnitudes (each less its shell's mean) with
    those of its symmetric copies, as a share of that with itself.
    """

    rotation: Float64
    shift: Float64
    agreement: float


def find_axes(volume: Float32, mask: Float32, r_max: int, bandwidth: int, group: Float64) -> Axes:
    """The pose of a map in which its copies under a group agree best with it.

    The rotation comes from the magnitudes, which no shift changes: with f(R) their correlation with themselves turned
    by R, it is the Q with the largest sum over S of f(Q S Q^T). Magnitudes add a centre of symmetry, which brings no
    further rotation to any point group. The shift c along what the group leaves no freedom to, in the turned map,
    follows from the shifts d = (S - 1) c between it and its copies.

    Parameters
    ----------
    volume, mask : (N, N, N) float32
    r_max : Fourier shells used
    bandwidth : L
    group : (g, 3, 3), g > 1, the identity first

    Returns
    -------
    Axes
    """
    box = len(volume)
    support = fourier.make_support(box, r_max)
    masked = np.asarray(volume * mask, np.float32)[None]
    grid = fourier.interpolation_grid(masked, r_max, PADDING)[0]
    magnitude = np.abs(support.gather(fourier.transform(masked)))
    mean = support.shell_sums(magnitude) / np.maximum(support.shell_sums(np.ones_like(magnitude)), 1)
    centred = (magnitude - mean[:, support.shell]).astype(np.float32)
    reference = make_reference(grid, PADDING, r_max, bandwidth)
    table = correlate(shell_harmonics(support, bandwidth).coefficients(centred), reference.magnitude)
    copies = group[1:]

    def agreement(frames: Float64) -> Float64:
        turns = (frames[:, None] @ copies @ frames.transpose(0, 2, 1)[:, None]).reshape(-1, 3, 3)
        values = interpolate(table, np.zeros(len(turns), np.int64), turns)
        return np.asarray(values.reshape(len(frames), -1).mean(axis=1))

    frames = cell_rotations(*all_cells(LEVEL))
    scores = np.concatenate([agreement(part) for part in np.array_split(frames, 1 + len(frames) * len(group) // 10**5)])
    best, rotation = -np.inf, np.eye(3)
    simplex = np.deg2rad(cell_width(LEVEL)) * np.vstack([np.zeros(3), np.eye(3)])
    for near in frames[np.argsort(-scores, kind="stable")[:REFINED]]:

        def disagreement(v: Float64, near: Float64 = near) -> float:
            return -float(agreement((Rotation.from_rotvec(v).as_matrix() @ near)[None])[0])

        found = minimize(
            disagreement, np.zeros(3), method="Nelder-Mead", options={"initial_simplex": simplex, "maxfev": 150}
        )
        if -found.fun > best:
            best, rotation = -found.fun, Rotation.from_rotvec(found.x).as_matrix() @ near
    itself = interpolate(table, np.zeros(1, np.int64), np.eye(3)[None])[0]
    turned = ops.rotate(grid, group @ rotation.T, support.coords, PADDING)  # the map in the group's frame, its copies
    cross = [fourier.inverse_transform(support.scatter((turned[0].conj() * copy)[None]), box)[0] for copy in turned[1:]]
    peaks = np.stack([_peak(volume) for volume in cross])
    equations = (copies - np.eye(3)).reshape(-1, 3)
    centre = np.linalg.lstsq(equations, peaks.ravel(), rcond=1e-6)[0]
    return Axes(rotation, rotation @ centre, float(best / max(itself, np.finfo(np.float32).tiny)))


def _peak(correlation: Float32) -> Float64:
    """Shift (x, y, z), voxels from the centre, where a map (N, N, N) is largest, to a parabola along each axis."""
    box = len(correlation)
    top = np.array(np.unravel_index(int(correlation.argmax()), correlation.shape))
    shift = np.empty(3)
    for axis in range(3):
        step = np.eye(3, dtype=np.int64)[axis]
        low, high = (float(correlation[tuple((top + s * step) % box)]) for s in (-1, 1))
        curvature = low + high - 2 * float(correlation[tuple(top)])
        shift[axis] = top[axis] - box // 2 + (0.5 * (low - high) / curvature if curvature < 0 else 0.0)
    return shift[::-1].copy()


def moved_onto_axes(volume: Float32, axes: Axes, group: Float64, support: Support) -> Complex64:
    """The map in the frame of the group, averaged over its copies: its transform (M,) complex64 on a support.

    volume : (N, N, N) float32, 0 around the structure
    """
    spectrum = fourier.transform(np.asarray(volume, np.float32)[None])
    k = np.fft.fftfreq(support.box) * 2j * np.pi
    x, y, z = (np.exp(k * shift).astype(np.complex64) for shift in axes.shift)
    spectrum *= z[:, None, None] * y[:, None] * x[: support.box // 2 + 1]
    centred = fourier.inverse_transform(spectrum, support.box)
    grid = fourier.interpolation_grid(centred, support.r_max, PADDING)[0]
    total = np.zeros(len(support), np.complex128)
    for element in group:
        total += ops.rotate(grid, (element @ axes.rotation.T)[None], support.coords, PADDING)[0]
    return (total / len(group)).astype(np.complex64)
