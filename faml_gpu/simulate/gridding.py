"""Accurate values of a volume's Fourier transform at any frequency, by Kaiser-Bessel gridding.

The simulator must not share the averaging code's interpolation error (2 % at padding 2, trilinear): here a kernel of
four samples on a grid padded twice leaves below 0.1 %. Kernel and its transform: Jackson et al., IEEE Trans.
Med. Imaging 10 (1991) 473; its width parameter: Beatty et al., ibid. 24 (2005) 799.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from faml_gpu.array_backend import Array, namespace, on_host, working_bytes
from faml_gpu.fourier import transform

__all__ = ["KERNEL_WIDTH", "FourierGrid", "fourier_grid", "kernel", "kernel_transform", "sample"]

KERNEL_WIDTH = 4  # samples of the padded grid
PADDING = 2
_BETA = float(np.pi * np.sqrt((KERNEL_WIDTH / PADDING) ** 2 * (PADDING - 0.5) ** 2 - 0.8))
_TABLE_STEPS = 4096  # per sample of the grid; linear interpolation in the table errs by 1e-7
_MARGIN = KERNEL_WIDTH // 2
_BYTES_PER_SAMPLE = 500  # of `sample_vectorised`: three axes of four taps in int64 and float32, and what comes of them


def kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kaiser-Bessel window at distances in grid samples; 1 at 0, 0 from half the width on."""
    inside = 1.0 - (2.0 * np.asarray(distance) / KERNEL_WIDTH) ** 2
    window = np.i0(_BETA * np.sqrt(np.maximum(inside, 0.0))) / np.i0(_BETA)
    return np.asarray(np.where(inside > 0, window, 0.0))


def kernel_transform(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral of kernel(s) cos(2 pi s x) over s; x in periods of the grid, -1/2 .. 1/2."""
    square = _BETA**2 - (np.pi * KERNEL_WIDTH * np.asarray(x)) ** 2
    root = np.sqrt(np.abs(square))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(square >= 0, np.sinh(root) / root, np.sin(root) / root)
    return np.asarray(KERNEL_WIDTH / np.i0(_BETA) * np.where(root == 0, 1.0, value))


@dataclass(frozen=True)
class FourierGrid:
    """A volume's transform, ready to be sampled.

    Attributes
    ----------
    values : (2h + 1, 2h + 1, h + 3) complex64, axes [kz + h, ky + h, kx + 2], in steps of 1 / (2 box)
        cycles per voxel, box centre as origin
    box : of the volume, voxels
    limit : cycles per voxel; beyond it the transform is taken to be 0
    table : kernel values
    """

    values: Array
    box: int
    limit: float
    table: Array


def fourier_grid(volume: Array, limit: float = 0.5) -> FourierGrid:
    """Prepare a volume for `sample`.

    Parameters
    ----------
    volume : (N, N, N) float32, `[z, y, x]`; its content should keep off the border by a few voxels
    limit : cycles per voxel, at most 1/2
    """
    xp = namespace(volume)
    n = volume.shape[0]
    size = PADDING * n
    line = kernel_transform((np.arange(n) - n // 2) / size)
    weight = xp.asarray(1.0 / line, dtype=np.float32)
    before = size // 2 - n // 2
    padded = xp.zeros((size,) * 3, np.float32)
    inner = slice(before, before + n)
    padded[inner, inner, inner] = volume * weight[:, None, None] * weight[:, None] * weight
    spectrum = transform(padded)
    half = int(np.ceil(limit * size)) + _MARGIN
    along = xp.arange(-half, half + 1) % size
    values = xp.empty((2 * half + 1, 2 * half + 1, half + 1 + _MARGIN), np.complex64)
    # Modulo the size: the transform is periodic, and the kernel reaches over the Nyquist planes.
    kx = xp.arange(-_MARGIN, half + 1) % size
    stored = kx <= size // 2
    plain, mirrored = xp.nonzero(stored)[0], xp.nonzero(~stored)[0]
    values[:, :, plain] = spectrum[along[:, None, None], along[None, :, None], kx[plain]]
    back = (-along) % size
    values[:, :, mirrored] = spectrum[back[:, None, None], back[None, :, None], size - kx[mirrored]].conj()
    table = kernel(np.arange(_MARGIN * _TABLE_STEPS + 2) / _TABLE_STEPS)
    return FourierGrid(values, n, float(limit), xp.asarray(table, dtype=np.float32))


def sample(grid: FourierGrid, frequencies: Array, rotation: Any = None, shift: Any = None) -> Array:
    """The transform of the volume moved to the pose (R, t), F(R^T f) exp(-2 pi i f.t), or to each of several poses.

    Parameters
    ----------
    grid : of the volume
    frequencies : (n, 3) float32, cycles per voxel, (x, y, z)
    rotation : (..., 3, 3) R; None is the identity
    shift : (..., 3) t, voxels; None is 0

    Returns
    -------
    (..., n) complex64, the unscaled DFT about the box centre; 0 beyond the grid's limit
    """
    xp = namespace(grid.values)
    turn = np.eye(3) if rotation is None else np.asarray(rotation, dtype=np.float64)
    move = np.zeros(3) if shift is None else np.asarray(shift, dtype=np.float64)
    lead = np.broadcast_shapes(turn.shape[:-2], move.shape[:-1])
    # Rows f @ R = R^T f, in steps of the grid.
    matrices = (PADDING * grid.box * np.broadcast_to(turn, (*lead, 3, 3))).astype(np.float32).reshape(-1, 3, 3)
    moves = np.broadcast_to(move, (*lead, 3)).astype(np.float32).reshape(-1, 3)
    limit = np.float32(PADDING * grid.box * grid.limit * (1 + 1e-5))  # a frequency at the limit is within, as rounded
    n = len(frequencies)
    out = xp.empty((len(matrices), n), np.complex64)
    if on_host(frequencies):
        for one, matrix, by in zip(out, matrices, moves, strict=True):
            _sample_numba(grid.values, grid.table, frequencies, matrix, by, limit, one)
    else:
        matrices, moves = xp.asarray(matrices), xp.asarray(moves)
        step = max(1, working_bytes(frequencies) // (_BYTES_PER_SAMPLE * max(1, len(moves))))
        for start in range(0, n, step):
            part = slice(start, start + step)
            out[:, part] = sample_vectorised(grid, frequencies[part], matrices, moves, limit)
    return out.reshape(*lead, n)


@numba.njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, cache=True)
def _sample_numba(
    values: Any, table: Any, frequencies: Any, matrix: Any, shift: Any, limit: Any, out: Any
) -> None:  # pragma: no cover
    half = values.shape[0] // 2
    weights = np.empty((3, 4), np.float32)
    corner = np.empty(3, np.int64)
    at = np.empty(3, np.float32)
    square = limit * limit
    for i in range(frequencies.shape[0]):
        fx, fy, fz = frequencies[i, 0], frequencies[i, 1], frequencies[i, 2]
        for axis in range(3):
            at[axis] = fx * matrix[0, axis] + fy * matrix[1, axis] + fz * matrix[2, axis]
        if at[0] * at[0] + at[1] * at[1] + at[2] * at[2] > square:
            out[i] = 0
            continue
        mirrored = at[0] < 0
        for axis in range(3):
            position = -at[axis] if mirrored else at[axis]
            first = int(np.floor(position)) - 1
            corner[axis] = first
            for tap in range(4):
                distance = abs(position - first - tap) * np.float32(4096)
                index = int(distance)
                part = distance - index
                weights[axis, tap] = table[index] * (1 - part) + table[index + 1] * part
        x0, y0, z0 = corner[0] + 2, corner[1] + half, corner[2] + half
        real, imag = np.float32(0), np.float32(0)
        for c in range(4):
            for b in range(4):
                weight = weights[2, c] * weights[1, b]
                row_real, row_imag = np.float32(0), np.float32(0)
                for a in range(4):
                    value = values[z0 + c, y0 + b, x0 + a]
                    row_real += weights[0, a] * value.real
                    row_imag += weights[0, a] * value.imag
                real += weight * row_real
                imag += weight * row_imag
        if mirrored:
            imag = -imag
        phase = np.float32(-2 * np.pi) * (fx * shift[0] + fy * shift[1] + fz * shift[2])
        cosine, sine = np.cos(phase), np.sin(phase)
        out[i] = complex(real * cosine - imag * sine, real * sine + imag * cosine)


def sample_vectorised(grid: FourierGrid, frequencies: Array, matrices: Array, shifts: Array, limit: Any) -> Array:
    """What `_sample_numba` does, for poses (..., 3, 3) and (..., 3) in whole-array steps: (..., n).

    For CuPy, and to check the one against the other.
    """
    xp = namespace(grid.values)
    depth, height, width = grid.values.shape
    half = height // 2
    at = frequencies @ matrices
    inside = (at**2).sum(axis=-1) <= limit * limit
    mirrored = at[..., 0] < 0
    position = xp.where(mirrored[..., None], -at, at)
    position = xp.where(inside[..., None], position, np.float32(0))
    first = xp.floor(position) - 1  # whole numbers in float32: exact
    distance = abs((position - first)[..., None] - xp.arange(KERNEL_WIDTH, dtype=np.float32)) * _TABLE_STEPS
    index = distance.astype(np.int64)
    part = distance - index.astype(np.float32)
    weights = grid.table[index] * (1 - part) + grid.table[index + 1] * part
    corner = first.astype(np.int64)
    corner = ((corner[..., 2] + half) * height + corner[..., 1] + half) * width + corner[..., 0] + _MARGIN
    rows = corner[..., None] + xp.arange(KERNEL_WIDTH)
    values = grid.values.reshape(depth * height * width)
    total = xp.zeros(at.shape[:-1], np.complex64)
    for c in range(KERNEL_WIDTH):
        for b in range(KERNEL_WIDTH):
            row = (values[rows + (c * height + b) * width] * weights[..., 0, :]).sum(axis=-1)
            total += weights[..., 2, c] * weights[..., 1, b] * row
    total = xp.where(mirrored, total.conj(), total)
    phase = np.float32(-2 * np.pi) * (frequencies @ shifts[..., None])[..., 0]
    moved: Array = xp.where(inside, total * xp.exp(1j * phase), 0).astype(np.complex64)
    return moved
