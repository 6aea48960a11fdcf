"""MRC volumes (MRC2014): read as float32 `[z, y, x]` (or float16 as they are), written atomically.

Headers are read with `mrcfile`'s record layout but without its readers: those report defects as Python warnings, whose
filters are global and not safe in threads, and boxes are read in threads.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from faml_gpu.errors import InputError
from faml_gpu.io.atomic import atomic_path

__all__ = [
    "VolumeHeader",
    "head_of",
    "read_float16",
    "read_header",
    "read_mrc",
    "read_stack",
    "read_volume",
    "write_mrc",
]

Float32 = NDArray[np.float32]

_HEADER_BYTES = 1024
_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_KNOWN_MODES = (*_TYPES, 3, 4, 101)
_LARGEST = 1 << 20
_STACK = 401  # space group of a stack of volumes
_IMOD_STAMP = 1146047817  # IMOD: mode 0 is unsigned unless bit 0 of the flags that follow the stamp is set


@dataclass(frozen=True)
class VolumeHeader:
    """What a header says of the volume behind it.

    Attributes
    ----------
    path : the file
    shape : (z, y, x), voxels
    sampling : (x, y, z) voxel sizes, Angstrom; 0 where the header has none
    dtype, stored_shape, offset : of the data block (sections, rows, columns; bytes)
    order : axes of the data block that are z, y, x
    """

    path: Path
    shape: tuple[int, int, int]
    sampling: tuple[float, float, float]
    dtype: np.dtype[Any]
    stored_shape: tuple[int, int, int]
    offset: int
    order: tuple[int, int, int]

    @property
    def float16(self) -> bool:
        """Whether the voxels are (mode 12)."""
        return self.dtype.kind == "f" and self.dtype.itemsize == 2

    @property
    def voxel_size(self) -> float | None:
        """Angstrom, or None where the header has none.

        Raises
        ------
        InputError
            The axes differ by more than 1 %.
        """
        if not all(math.isfinite(size) and size > 0 for size in self.sampling):
            return None
        if max(self.sampling) > 1.01 * min(self.sampling):
            sizes = " ".join(f"{size:.4g}" for size in self.sampling)
            raise InputError(f"{self.path}: voxel size (x, y, z) of {sizes} A in the header, expected equal sizes")
        return self.sampling[0]


def read_header(path: str | os.PathLike[str]) -> VolumeHeader:
    """Read and check the header of an MRC volume; the data block is not touched, only its length is checked.

    Raises
    ------
    InputError
        Missing or unreadable; not MRC; truncated; mode other than 0, 1, 2, 6, 12; a 2-D image or a stack; axis order
        that is no permutation.
    """
    header, group = _read_any(path)
    if header.stored_shape[0] == 1 or header.path.suffix.lower() in (".mrcs", ".st") or group >= _STACK:
        size = " x ".join(map(str, header.stored_shape[::-1]))
        raise InputError(f"{header.path}: a 2-D image or a stack ({size}), expected one 3-D volume")
    return header


def read_stack(path: str | os.PathLike[str]) -> list[VolumeHeader]:
    """A header for each cube of a stack of cubes in one MRC file, or one for a file with a single cube.

    Raises
    ------
    InputError
        As `read_header`; sections that are no whole number of cubes.
    """
    whole, _ = _read_any(path)
    n_sections, rows, columns = whole.stored_shape
    if rows != columns or n_sections % rows or whole.order != (0, 1, 2):
        size = " x ".join(map(str, whole.stored_shape[::-1]))
        raise InputError(f"{whole.path}: {size} voxels, expected cubes one after the other ({rows} sections each)")
    cube = (rows, rows, rows)
    each = rows**3 * whole.dtype.itemsize
    return [
        replace(whole, shape=cube, stored_shape=cube, offset=whole.offset + i * each) for i in range(n_sections // rows)
    ]


def _read_any(path: str | os.PathLike[str]) -> tuple[VolumeHeader, int]:
    """The header of whatever an MRC file holds, and its space group."""
    path = Path(path)
    raw, length = head_of(path, _HEADER_BYTES, "an MRC volume")
    if len(raw) < _HEADER_BYTES or raw[208:211] != b"MAP":
        raise InputError(f"{path}: not an MRC file ({length} bytes, no 'MAP' at byte 208)")
    record, byte_order = _in_byte_order(raw, path)
    mode = int(record["mode"])
    if mode not in _TYPES:
        raise InputError(f"{path}: MRC mode {mode}, expected one of {', '.join(map(str, _TYPES))}")
    stored = (int(record["nz"]), int(record["ny"]), int(record["nx"]))
    axes = tuple(int(record[name]) for name in ("maps", "mapr", "mapc"))
    if axes == (0, 0, 0):  # left unset by old programs
        axes = (3, 2, 1)
    if sorted(axes) != [1, 2, 3]:
        raise InputError(f"{path}: axis order mapc, mapr, maps = {axes[::-1]}, expected a permutation of 1, 2, 3")
    order = (axes.index(3), axes.index(2), axes.index(1))
    dtype = np.dtype(byte_order + _TYPES[mode])
    if mode == 0:
        stamp, flags = np.frombuffer(raw, f"{byte_order}i4", 2, 152)
        if stamp == _IMOD_STAMP and not flags & 1:
            dtype = np.dtype("u1")
    offset = _HEADER_BYTES + max(int(record["nsymbt"]), 0)
    expected = offset + math.prod(stored) * dtype.itemsize
    if length < expected:
        raise InputError(f"{path}: truncated, {length} bytes, expected {expected} from its header")
    sampling = tuple(
        float(record["cella"][axis]) / int(record[f"m{axis}"]) if int(record[f"m{axis}"]) > 0 else 0.0 for axis in "xyz"
    )
    shape = (stored[order[0]], stored[order[1]], stored[order[2]])
    header = VolumeHeader(path, shape, (sampling[0], sampling[1], sampling[2]), dtype, stored, offset, order)
    return header, int(record["ispg"])


def head_of(path: Path, size: int, expected: str) -> tuple[bytes, int]:
    """The first bytes of a file, and its length; `InputError` if it cannot be read."""
    try:
        with path.open("rb") as handle:
            return handle.read(size), os.fstat(handle.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from None


def _in_byte_order(raw: bytes, path: Path) -> tuple[Any, str]:
    """The header record, and its byte order: that of the machine stamp, or the other where only that makes sense."""
    stated = ">" if raw[212] == 0x11 else "<"
    for byte_order in (stated, "<" if stated == ">" else ">"):
        record = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(byte_order))[0]
        sizes = (int(record["nx"]), int(record["ny"]), int(record["nz"]))
        if int(record["mode"]) in _KNOWN_MODES and all(0 < size <= _LARGEST for size in sizes):
            return record, byte_order
    raise InputError(f"{path}: not an MRC file (size or mode in the header make no sense in either byte order)")


def read_volume(header: VolumeHeader) -> Float32:
    """The volume behind a header, (z, y, x) float32, its axes in that order whatever the file's order.

    Raises
    ------
    InputError
        The file changed or vanished since its header was read.
    """
    with np.errstate(over="ignore"):  # too large for float32: infinite, and refused as such
        return np.ascontiguousarray(_stored(header), dtype=np.float32)


def read_float16(header: VolumeHeader) -> NDArray[np.float16]:
    """As `read_volume`, of what is stored as float16 (`VolumeHeader.float16`)."""
    return np.ascontiguousarray(_stored(header), dtype=np.float16)


def _stored(header: VolumeHeader) -> NDArray[Any]:
    count = math.prod(header.stored_shape)
    try:
        data = np.fromfile(header.path, header.dtype, count, offset=header.offset)
    except OSError as error:
        raise InputError(f"{header.path}: cannot be read ({error.strerror})") from None
    if data.size != count:
        raise InputError(f"{header.path}: truncated, {data.size} voxels, expected {count}")
    return data.reshape(header.stored_shape).transpose(header.order)


def read_mrc(path: str | os.PathLike[str]) -> tuple[Float32, float | None]:
    """Read an MRC volume (modes 0, 1, 2, 6, 12; any axis and byte order).

    Returns
    -------
    volume : (z, y, x) float32 array
    voxel_size : Angstrom, or None where the header has none

    Raises
    ------
    InputError
        As `read_header`; voxel sizes that differ between the axes.
    """
    header = read_header(path)
    return read_volume(header), header.voxel_size


def write_mrc(path: str | os.PathLike[str], volume: NDArray[Any], voxel_size: float, *, float16: bool = False) -> None:
    """Write a volume: mode 2, ispg 1, voxel size in the header; atomic.

    Parameters
    ----------
    path : file; replaced only once the new one is complete
    volume : (z, y, x) array of finite values
    voxel_size : Angstrom
    float16 : mode 12 instead, half the size; numbers have 11 bits then, and none is beyond 65504

    Raises
    ------
    ValueError
        Not three axes, or NaN or Inf in the volume, as stored.
    OSError
        It cannot be written (disk full ...); a file that was there is unchanged.
    """
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(volume, dtype=np.float16 if float16 else np.float32)
    if data.ndim != 3 or not np.isfinite(data).all():
        raise ValueError(f"{path}: expected a 3-D volume of finite values, got shape {data.shape}")
    with atomic_path(path) as temporary, mrcfile.new(temporary, data) as mrc:
        mrc.voxel_size = voxel_size
        # The default label holds the time: the same volume gives the same file.
        mrc.header.label[0] = b"faml_gpu"
        mrc.header.nlabl = 1
