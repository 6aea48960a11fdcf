"""Boxes that lie in one file: a stack in MRC or NumPy's format."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from faml_gpu.errors import InputError
from faml_gpu.io.mrc import VolumeHeader, read_stack

__all__ = ["STACKS", "stack_headers"]

STACKS = (".mrc", ".mrcs", ".npy")


def stack_headers(path: str | os.PathLike[str]) -> list[VolumeHeader]:
    """Where each box of a stack lies: MRC cubes one after the other, or an array (n, N, N, N), `[z, y, x]` each.

    Raises
    ------
    InputError
        No such file, or none that holds cubes.
    """
    path = Path(path)
    return _of_array(path) if path.suffix.lower() == ".npy" else read_stack(path)


def _of_array(path: Path) -> list[VolumeHeader]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers from Python 2: they are read, or not
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected an array of boxes") from None
    except Exception as error:  # of a broken header: ValueError, EOFError, TokenError, SyntaxError, OverflowError ...
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not an array in NumPy's format ({reason})") from None
    if not isinstance(array, np.memmap) or array.dtype.kind not in "iuf":
        raise InputError(f"{path}: found {getattr(array, 'dtype', 'an archive')}, expected real numbers")
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or len(array) == 0 or len(set(array.shape[1:])) != 1 or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran's order"
        raise InputError(f"{path}: array of shape {array.shape}{order}, expected (n, N, N, N) with n >= 1 in C's order")
    shape = (int(array.shape[1]),) * 3
    each = array.itemsize * shape[0] ** 3
    return [
        VolumeHeader(path, shape, (0.0, 0.0, 0.0), array.dtype, shape, int(array.offset) + i * each, (0, 1, 2))
        for i in range(len(array))
    ]
