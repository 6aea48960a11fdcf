"""NumPy or CuPy, decided by the arrays themselves: array type in = array type out. No global switch.

Also the few things that differ between the two: the FFT module, memory and how it runs out, profiler ranges.
A device is named "cpu", "cuda:0", "cuda:1" ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import scipy.fft

from faml_gpu.errors import InputError
from faml_gpu.profile import timed

__all__ = [
    "Array",
    "Sender",
    "device_of",
    "fft_module",
    "free_memory",
    "namespace",
    "on_host",
    "out_of_memory",
    "release_memory",
    "step",
    "synchronize",
    "to_device",
    "to_host",
    "twin",
    "use_device",
    "working_bytes",
]

Array = Any  # numpy.ndarray or cupy.ndarray; shapes and dtypes are in the docstrings
Function = TypeVar("Function", bound=Callable[..., Any])

# CuPy's pool raises a MemoryError; CUDA's runtime and driver, cuFFT and cuBLAS say it in their own ways.
_NO_MEMORY = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "ALLOC_FAILED")
# Kept by CuPy for later calls; each may hold as much memory as the arrays it works on. Not bounded by bytes: a plan
# larger than such a bound is an error in CuPy. `release_memory` lets go of them.
FFT_PLANS = 16


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


def device_of(array: Array) -> str:
    """ "cpu", or "cuda:i" of the device that holds an array."""
    return "cpu" if on_host(array) else f"cuda:{array.device.id}"


def to_device(array: Array, device: str) -> Array:
    """The array on the CPU or, as CuPy's, on the current CUDA device; no copy if it is there."""
    if device == "cpu":
        return to_host(array)
    import cupy

    return cupy.asarray(array)


class Sender:
    """Sends arrays to a device from another thread, on a stream of its own: the device goes on computing meanwhile."""

    def __init__(self, device: str) -> None:
        self._device, self._stream = device, None
        if device != "cpu":
            import cupy

            with cupy.cuda.Device(_number_of(device)):
                self._stream = cupy.cuda.Stream(non_blocking=True)

    def mark(self) -> Any:
        """What the device has been given until now, in the thread that gives it; for `send` to wait for."""
        if self._stream is None:
            return None
        import cupy

        return cupy.cuda.get_current_stream().record()

    def send(self, arrays: Sequence[Array], after: Any) -> list[Array]:
        """The arrays on the device, there once this returns; for the CPU those given.

        CuPy's pool keeps what was allocated on a stream for that stream. So memory of arrays sent earlier is written
        again, and may be only when the device is through with what read it: with all up to `after`, a `mark`.
        """
        if self._stream is None:
            return list(arrays)
        import cupy
        import cupyx

        with cupy.cuda.Device(_number_of(self._device)), self._stream:
            self._stream.wait_event(after)
            there, locked = [], []
            for array in arrays:
                # A GPU fetches from page-locked memory by itself; from other memory the driver copies for it.
                locked.append(cupyx.empty_pinned(array.shape, array.dtype))
                locked[-1][...] = array
                there.append(cupy.empty(array.shape, array.dtype))
                there[-1].set(locked[-1], stream=self._stream)
            self._stream.synchronize()
        return there


def _number_of(device: str) -> int:
    return int(device.partition(":")[2])


@contextmanager
def use_device(device: str) -> Iterator[None]:
    """Inside the block new arrays of CuPy's lie on that device; nothing to do for "cpu".

    Raises
    ------
    InputError
        If the block runs out of the device's memory.
    """
    if device == "cpu":
        yield
        return
    import cupy

    with cupy.cuda.Device(_number_of(device)):
        cupy.fft.config.get_plan_cache().set_size(FFT_PLANS)
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"option device: found too little memory on {device} for even one particle at a time ({error}); "
                "free some, use a smaller bandwidth or padding, or the CPU"
            ) from error


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def free_memory(device: str) -> int:
    """Bytes of the current CUDA device that can still be had, with what CuPy's pool holds unused; of "cpu" 1 GiB."""
    if device == "cpu":
        return 1 << 30  # what a batch should take, however much there is: larger ones are no faster
    import cupy

    pool = cupy.get_default_memory_pool()
    return int(cupy.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())


def working_bytes(array: Array, *, cached: bool = False) -> int:
    """Bytes of intermediate arrays a step should make at a time, more to fill a GPU than a CPU.

    cached: that go through several short steps, and should stay in a CPU's caches meanwhile.
    """
    if on_host(array):
        return 1 << 24 if cached else 1 << 27
    return min(1 << 29, free_memory(device_of(array)) // 16)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a CUDA device has too little memory."""
    return isinstance(error, MemoryError) or any(text in f"{type(error).__name__} {error}" for text in _NO_MEMORY)


def release_memory(device: str) -> None:
    """Give what CuPy's pools and FFT plans hold unused back to the device."""
    if device != "cpu":
        import cupy

        cupy.fft.config.get_plan_cache().clear()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def twin(cpu: Function, cuda: Function, array: Array) -> Function:
    """The CPU or the CUDA twin of an operation, by the type of its leading array."""
    return cpu if namespace(array) is np else cuda


@contextmanager
def step(name: str) -> Iterator[None]:
    """A step of the algorithm: timed for `--profile`, and an NVTX range for NVIDIA's profilers where CuPy is in use."""
    cupy = sys.modules.get("cupy")
    with timed(name):
        if cupy is None:
            yield
            return
        cupy.cuda.nvtx.RangePush(name)
        try:
            yield
        finally:
            cupy.cuda.nvtx.RangePop()
