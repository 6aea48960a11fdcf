"""Headers of volumes in the EM format of the TOM toolbox, as Dynamo and PyTom write their boxes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from faml_gpu.errors import InputError
from faml_gpu.io.mrc import VolumeHeader, head_of

__all__ = ["read_em_header"]

_HEADER_BYTES = 512
_BIG_ENDIAN = (0, 2, 3, 4, 5)  # OS-9, Convex, SGI, Sun, Mac; 1 is VAX and 6 a PC
_TYPES = {1: "i1", 2: "i2", 4: "i4", 5: "f4", 9: "f8"}
_LARGEST = 1 << 20


def read_em_header(path: str | os.PathLike[str]) -> VolumeHeader:
    """Read and check the header of an EM volume; it says no voxel size. Data are x fastest.

    Raises
    ------
    InputError
        Missing or unreadable; not EM; truncated; complex or unknown type.
    """
    path = Path(path)
    raw, length = head_of(path, _HEADER_BYTES, "an EM volume")
    if len(raw) < _HEADER_BYTES:
        raise InputError(f"{path}: not an EM file ({length} bytes)")
    machine, kind = raw[0], raw[3]
    stated = ">" if machine in _BIG_ENDIAN else "<"
    for order in (stated, "<" if stated == ">" else ">"):  # not all programs state what they write
        nx, ny, nz = (int(size) for size in np.frombuffer(raw, f"{order}i4", 3, 4))
        if all(0 < size <= _LARGEST for size in (nx, ny, nz)):
            break
    else:
        machine = 255
    if machine > 6:
        raise InputError(f"{path}: not an EM file (machine {raw[0]}, {nx} x {ny} x {nz} voxels)")
    if kind not in _TYPES:
        raise InputError(f"{path}: EM data type {kind}, expected one of {', '.join(map(str, _TYPES))}")
    dtype, shape = np.dtype(order + _TYPES[kind]), (nz, ny, nx)
    expected = _HEADER_BYTES + math.prod(shape) * dtype.itemsize
    if length < expected:
        raise InputError(f"{path}: truncated, {length} bytes, expected {expected} from its header")
    return VolumeHeader(path, shape, (0.0, 0.0, 0.0), dtype, shape, _HEADER_BYTES, (0, 1, 2))
