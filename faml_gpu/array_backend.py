"""NumPy or CuPy, decided by the arrays themselves: array type in = array type out. No global switch.

Also the few things that differ between the two: the FFT module, the thread count, the memory of a batch,
profiler ranges.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numba
import numpy as np
import scipy.fft
from threadpoolctl import threadpool_limits

__all__ = ["Array", "cpu_count", "cpu_threads", "fft_module", "namespace", "on_host", "step", "to_host", "twin"]

Array = Any  # numpy.ndarray or cupy.ndarray; shapes and dtypes are in the docstrings
Function = TypeVar("Function", bound=Callable[..., Any])


def on_host(array: Array) -> bool:
    """Whether an array is NumPy's."""
    return isinstance(array, np.ndarray)


def namespace(array: Array) -> Any:
    """The module, `numpy` or `cupy`, an array belongs to."""
    if on_host(array):
        return np
    cupy = sys.modules.get("cupy")  # an array of CuPy's exists only if CuPy is already imported
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    raise TypeError(f"expected a numpy.ndarray or cupy.ndarray, found {type(array).__name__}")


def fft_module(array: Array) -> Any:
    """`scipy.fft` (keeps float32, uses the threads of `cpu_threads`) or `cupyx.scipy.fft`."""
    if on_host(array):
        return scipy.fft
    import cupyx.scipy.fft

    return cupyx.scipy.fft


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy array with the same values."""
    return array if on_host(array) else np.asarray(array.get())


def twin(cpu: Function, cuda: Function, array: Array) -> Function:
    """The CPU or the CUDA twin of an operation, by the type of its leading array."""
    return cpu if namespace(array) is np else cuda


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextmanager
def cpu_threads(n: int | None) -> Iterator[int]:
    """One knob for the threads of Numba, BLAS and FFT inside the block; None takes every core allowed."""
    count = min(n or cpu_count(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        with threadpool_limits(limits=count), scipy.fft.set_workers(count):
            yield count
    finally:
        numba.set_num_threads(before)


@contextmanager
def step(name: str) -> Iterator[None]:
    """A profiler (NVTX) range around a step of the algorithm; nothing where CuPy is not in use."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        yield
        return
    cupy.cuda.nvtx.RangePush(name)
    try:
        yield
    finally:
        cupy.cuda.nvtx.RangePop()
