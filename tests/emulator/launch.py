"""Run a compiled kernel on NumPy arrays and report what a GPU would leave undefined.

Arrays are copied between guard zones; the grid runs twice, with blocks and threads in rising and in falling order,
from the same input; both results must be the same bit for bit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faml_emulator.compiler import Library

__all__ = [
    "MAX_DYNAMIC",
    "POISON",
    "UNORDERED",
    "EmulatorError",
    "Kernel",
    "LaunchError",
    "OutOfBoundsError",
    "RaceError",
    "SyncError",
    "poison",
]

# Kernels whose result may depend on the order of threads, and why. Results of the two orders are handed out in turn,
# so that no caller comes to rely on one of them.
UNORDERED = {"so3_maxima": "an atomic counter deals out the places of its list"}

POISON = np.uint32(0xFFF5A5A5)  # NaN as float32 and as float64, a large odd number as an integer
GUARD = 16 * 1024  # bytes on either side of an array
ALIGNMENT = 512  # of device memory, as CUDA's allocator gives it
MAX_DYNAMIC = 64 * 1024  # dynamic shared memory a kernel may opt in to: kMaxDynamic of the shim
MAX_SHARED = 48 * 1024  # without opting in
MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)

LOCK = threading.Lock()  # a library has one set of fibers


class EmulatorError(RuntimeError):
    """What a kernel did that a GPU would leave undefined."""


class RaceError(EmulatorError):
    """The result depends on the order in which threads or blocks run."""


class SyncError(EmulatorError):
    """Threads that can never meet at the barrier or in the exchange they wait in."""


class OutOfBoundsError(EmulatorError):
    """Memory touched outside of the arrays given."""


class LaunchError(EmulatorError):
    """A launch that CUDA refuses (CuPy: CUDADriverError)."""


def poison(array: np.ndarray) -> None:
    """Fill a C-contiguous array with the pattern of memory nobody has written yet."""
    data = array.reshape(-1).view(np.uint8)
    data[:] = np.resize(np.frombuffer(POISON.tobytes(), np.uint8), data.shape)


class Guarded:
    """A copy of an array between two guard zones."""

    def __init__(self, array: np.ndarray) -> None:
        self.memory = np.empty(2 * GUARD + ALIGNMENT + array.nbytes, np.uint8)
        start = GUARD + (-self.memory.ctypes.data - GUARD) % ALIGNMENT
        self.before, self.after = self.memory[:start], self.memory[start + array.nbytes :]
        self.data = self.memory[start : start + array.nbytes]
        self.guard = np.resize(np.frombuffer(POISON.tobytes(), np.uint8), 2 * GUARD)
        self.before[:] = self.guard[: self.before.size]
        self.after[:] = self.guard[: self.after.size]
        self.fill(array)

    def fill(self, array: np.ndarray) -> None:
        self.data[:] = array.reshape(-1).view(np.uint8)

    def overrun(self) -> int | None:
        """Offset in bytes from the array's start of a write outside of it, if there was one."""
        for zone, start in ((self.before, -self.before.size), (self.after, self.data.size)):
            wrong = np.flatnonzero(zone != self.guard[: zone.size])
            if wrong.size:
                return start + int(wrong[-1 if start < 0 else 0])
        return None


def code(dtype: np.dtype) -> str:
    """A dtype as `Library.signature` writes types."""
    return f"{ {'b': 'b', 'i': 'i', 'u': 'u', 'f': 'f'}.get(dtype.kind, 'V') }{dtype.itemsize}"


def fits(array: np.ndarray, pointee: str) -> bool:
    """Whether a pointer to this type may be given this array.

    Complex numbers may be read as pairs of reals, and structures of reals may be numbers along the last axis.
    """
    size = int(pointee[1:])
    if pointee[0] == "V":
        last = array.shape[-1] * array.itemsize if array.ndim else 0
        return array.itemsize == size if array.dtype.kind in "cV" else last == size
    if array.dtype.kind == "c":
        return pointee == f"f{array.itemsize // 2}"
    return code(array.dtype) == pointee


@dataclass
class Kernel:
    """A kernel of a compiled library."""

    library: Library
    name: str
    dynamic_limit: int = MAX_SHARED
    launches: int = 0
    signature: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.signature = self.library.signature(self.name)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[Any], shared: int = 0) -> None:
        """Run it; the arrays that are not const are changed in place."""
        grid3, block3 = self.check_grid(grid, block, shared)
        self.check_arguments(arguments)
        arrays = {i: Guarded(value) for i, value in enumerate(arguments) if isinstance(value, np.ndarray)}
        with LOCK:
            forward = self.run(grid3, block3, arguments, arrays, shared, reverse=False)
            for i in forward:
                arrays[i].fill(arguments[i])
            backward = self.run(grid3, block3, arguments, arrays, shared, reverse=True)
        if self.name not in UNORDERED:
            self.compare(forward, backward)
        self.launches += 1
        for i, data in (forward if self.launches % 2 else backward).items():
            arguments[i].reshape(-1).view(np.uint8)[:] = data

    def check_grid(self, grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> tuple[list[int], list[int]]:
        """What the driver refuses."""
        threads = int(np.prod(block))
        bound = self.library.max_threads(self.name)
        for what, size, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if not 1 <= len(size) <= 3 or any(not 1 <= n <= limit for n, limit in zip(size, limits, strict=False)):
                raise LaunchError(f"kernel {self.name}: {what} {size}: every size is from 1 to {limits}")
        if threads > MAX_THREADS:
            raise LaunchError(f"kernel {self.name}: block {block} has {threads} threads, at most {MAX_THREADS} work")
        if threads > bound:
            raise LaunchError(
                f"kernel {self.name}: block {block} has {threads} threads, __launch_bounds__ says {bound}"
            )
        if shared < 0 or shared + self.library.static_shared() > self.dynamic_limit:
            raise LaunchError(
                f"kernel {self.name}: {shared} bytes of dynamic and {self.library.static_shared()} of static shared "
                f"memory; at most {self.dynamic_limit} work (max_dynamic_shared_size_bytes raises it to {MAX_DYNAMIC})"
            )
        return [*grid, 1, 1][:3], [*block, 1, 1][:3]

    def check_arguments(self, arguments: list[Any]) -> None:
        """What neither CUDA nor CuPy checks: number, type and contiguity of the arguments."""
        if len(arguments) != len(self.signature):
            raise TypeError(f"kernel {self.name}: found {len(arguments)} arguments, expected {len(self.signature)}")
        for i, (value, expected) in enumerate(zip(arguments, self.signature, strict=True)):
            place = f"kernel {self.name}, argument {i} ({expected})"
            if expected.endswith("*"):
                if not isinstance(value, np.ndarray):
                    raise TypeError(f"{place}: expected an array, found {type(value).__name__}")
                if not fits(value, expected.removeprefix("const ").removesuffix("*")):
                    raise TypeError(f"{place}: found an array of {value.dtype} {value.shape}")
                if not value.flags.c_contiguous:
                    raise TypeError(f"{place}: the array is not C-contiguous")
            elif not isinstance(value, np.generic) or code(value.dtype) != expected:
                raise TypeError(f"{place}: found {type(value).__name__}")
        for i in self.written():
            for j, other in enumerate(arguments):
                if i != j and isinstance(other, np.ndarray) and np.may_share_memory(arguments[i], other):
                    raise TypeError(f"kernel {self.name}: arguments {i} and {j} overlap, and {i} is written")

    def written(self) -> list[int]:
        """Parameters that are pointers to what is not const."""
        return [i for i, kind in enumerate(self.signature) if kind.endswith("*") and not kind.startswith("const ")]

    def run(
        self,
        grid: list[int],
        block: list[int],
        arguments: list[Any],
        arrays: dict[int, Guarded],
        shared: int,
        reverse: bool,
    ) -> dict[int, np.ndarray]:
        """The bytes of the written arrays after one run of the grid on copies."""
        # What each parameter holds: an address or a number.
        values = [np.array(arrays[i].data.ctypes.data if i in arrays else value) for i, value in enumerate(arguments)]
        addresses = [value.ctypes.data for value in values]
        status, message = self.library.launch(self.name, grid, block, shared, reverse, addresses)
        for i, array in arrays.items():
            offset = array.overrun()
            if offset is not None:
                raise OutOfBoundsError(
                    f"kernel {self.name}, argument {i} ({self.signature[i]}): written at byte {offset} of an array "
                    f"of {array.data.size} bytes" + (f"; {message}" if status else "")
                )
        if status:
            raise {1: SyncError, 2: OutOfBoundsError, 3: EmulatorError}[status](f"kernel {self.name}, {message}")
        return {i: arrays[i].data.copy() for i in self.written()}

    def compare(self, forward: dict[int, np.ndarray], backward: dict[int, np.ndarray]) -> None:
        """Refuse results that differ in a bit."""
        for i, data in forward.items():
            wrong = np.flatnonzero(data != backward[i])
            if wrong.size:
                kind = self.signature[i].removesuffix("*")
                raise RaceError(
                    f"kernel {self.name}, argument {i} ({kind}*): element {wrong[0] // int(kind[1:])} depends on the "
                    "order in which threads run"
                )
