"""A stand-in for CuPy on NumPy arrays, strict where CuPy is: what passes here passes on a GPU.

Device arrays wrap a NumPy array and never become one by themselves. Only names and keywords of the real CuPy work
(cupy_api.json); what exists there and has no stand-in yet raises NotImplementedError. Memory that was never written is
NaN, allocations can hit a limit, and transfers, kernel launches and profiler ranges are counted.
"""

from __future__ import annotations

import json
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
from faml_emulator.compiler import CompileError, Library, compile_kernels
from faml_emulator.launch import MAX_DYNAMIC, Kernel, LaunchError, poison

__all__ = ["Session", "installed", "ndarray"]

API: dict[str, Any] = json.loads(Path(__file__).with_name("cupy_api.json").read_text())

MEMORY = 8 << 30  # bytes of the device, if `installed` is not told


class OutOfMemoryError(MemoryError):
    """Stands in for cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes, limit {limit:,})."
        )


class CUDARuntimeError(RuntimeError):
    """Stands in for cupy.cuda.runtime.CUDARuntimeError."""


@dataclass
class Transfers:
    """Copies between host and device, one way."""

    count: int = 0
    bytes: int = 0

    def add(self, n: int) -> None:
        self.count += 1
        self.bytes += n


def owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@dataclass
class Session:
    """What happened on the emulated device since `installed` began."""

    memory: int = MEMORY  # bytes there are
    devices: int = 1
    used: int = 0  # bytes of living arrays
    peak: int = 0
    to_device: Transfers = field(default_factory=Transfers)
    to_host: Transfers = field(default_factory=Transfers)
    launches: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # profiler ranges, as they were opened
    open_ranges: int = 0
    pool_freed: int = 0  # how often the memory pool was told to give back what it holds
    device: int = 0  # the current one
    owners: dict[int, int] = field(default_factory=dict)  # arrays that own memory, and the device they lie on

    def track(self, array: np.ndarray) -> None:
        """Count the memory an array lies in, once, until it is gone."""
        array = owner(array)
        key, size = id(array), array.nbytes
        if key in self.owners:
            return
        if self.used + size > self.memory:
            raise OutOfMemoryError(size, self.used, self.memory)
        self.used += size
        self.peak = max(self.peak, self.used)
        self.owners[key] = self.device
        weakref.finalize(array, self.release, key, size).atexit = False

    def release(self, key: int, size: int) -> None:
        del self.owners[key]
        self.used -= size


SESSION = Session()  # replaced by `installed`

# ------------------------------------------------------------------------------------------------------- rules


def unwrap(value: Any) -> Any:
    """The NumPy arrays inside an argument of a CuPy function; arrays of the host are refused."""
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: pass cupy arrays (or 0-d values)")
    if isinstance(value, list | tuple):
        return type(value)(unwrap(item) for item in value)
    if isinstance(value, slice) and any(isinstance(end, ndarray) for end in (value.start, value.stop, value.step)):
        raise TypeError("slice indices must be integers: int() of a cupy array is one")
    return value


def operand(value: Any) -> Any:
    """An operand: a device array or a number."""
    if isinstance(value, list | tuple):
        raise TypeError(f"Unsupported type {type(value)}")
    return unwrap(value)


def wrap(array: np.ndarray | np.generic) -> ndarray:
    """A device array around a NumPy array; a NumPy scalar becomes a 0-d array."""
    new = object.__new__(ndarray)
    new._a = np.asarray(array)
    SESSION.track(new._a)
    return new


def result(value: Any, known: Mapping[int, ndarray]) -> Any:
    """What NumPy returned as CuPy returns it; arrays that went in come out as the same objects."""
    if isinstance(value, np.ndarray):
        return known[id(value)] if id(value) in known else wrap(value)
    if isinstance(value, np.generic):
        return wrap(value)
    if isinstance(value, tuple | list):
        items = [result(item, known) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def arrays_in(values: Any) -> Iterator[ndarray]:
    """Device arrays among arguments."""
    for value in values:
        if isinstance(value, ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *also: ndarray) -> Any:
    """A NumPy function on device arrays."""
    known = {id(item._a): item for item in arrays_in([*args, *kwargs.values(), *also])}
    return result(function(*unwrap(args), **{name: unwrap(value) for name, value in kwargs.items()}), known)


# Parameters that are arrays, where CuPy refuses lists, and those that are not, where it refuses arrays of its own.
ARRAYS = {"a", "x", "arr", "array", "ary", "m", "v", "y"}
INTEGERS = {"shape", "axis", "axes", "s", "n", "repeats", "minlength", "dims", "N", "M", "k", "decimals"}


def check_parameters(where: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments the real function has not, or does not take."""
    parameters = API[where][name]
    kinds = {kind for _, kind in parameters}
    rest = next((parameter for parameter, kind in parameters if kind == "*"), None)
    positional = [parameter for parameter, kind in parameters if kind == "p"] if rest is None else []
    if rest is None and len(args) > len(positional):
        raise TypeError(f"{where}.{name}() takes {len(positional)} positional arguments, found {len(args)}")
    if "**" not in kinds:
        for keyword in kwargs:
            if keyword not in [parameter for parameter, kind in parameters if kind in "pk"]:
                raise TypeError(f"{where}.{name}() got an unexpected keyword argument {keyword!r}")
    is_ufunc = rest == "args" and "casting" in [parameter for parameter, _ in parameters]
    names = positional[: len(args)] + [rest] * (len(args) - len(positional))
    for parameter, value in [*zip(names, args, strict=True), *kwargs.items()]:
        if parameter in ARRAYS or (is_ufunc and parameter == rest):
            operand(value)
        if parameter in INTEGERS and any(True for _ in arrays_in([value])):
            raise TypeError(f"{where}.{name}(): {parameter} is to be integers: int() of a cupy array is one")


PREDICATES = {"allclose", "array_equal", "array_equiv"}  # bool in NumPy, 0-d array in CuPy


def forward(where: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The CuPy function of a name, computed by another one."""

    def forwarded(*args: Any, **kwargs: Any) -> Any:
        check_parameters(where, name, args, kwargs)
        if name in ("argsort", "sort"):  # CuPy's sorts are stable
            kwargs["kind"] = "stable"
        kwargs.pop("plan", None)
        found = call(function, args, kwargs)
        return wrap(np.bool_(found)) if name in PREDICATES else found

    forwarded.__name__ = name
    return forwarded


# ------------------------------------------------------------------------------------------------------- ndarray


class Flags(NamedTuple):
    """Of `ndarray.flags`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class Pointer(NamedTuple):
    """Of `ndarray.data`."""

    ptr: int


class ndarray:  # noqa: N801
    """An array of the device."""

    __slots__ = ("__weakref__", "_a")
    __module__ = "cupy"
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 100

    _a: np.ndarray

    def __init__(self, shape: Any, dtype: Any = float, *, order: str = "C") -> None:
        self._a = np.empty(shape, dtype, order)  # type: ignore[call-overload]
        poison(self._a.T if order == "F" else self._a)
        SESSION.track(self._a)

    # what NumPy may and may not do with it
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or ufunc.__name__ not in API["cupy"]:
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return forward("cupy", ufunc.__name__, ufunc)(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        home: Any = sys.modules["cupy"]
        for part in function.__module__.split(".")[1:]:
            home = getattr(home, part)
        return getattr(home, function.__name__)(*args, **kwargs)

    # memory
    @property
    def flags(self) -> Flags:
        flags = self._a.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    @property
    def data(self) -> Pointer:
        return Pointer(self._a.ctypes.data)

    @property
    def device(self) -> Device:
        return Device(SESSION.owners[id(owner(self._a))])

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        SESSION.to_host.add(self._a.nbytes)
        if out is None:
            return self._a.copy(order)  # type: ignore[arg-type]
        out[...] = self._a
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self._a.dtype or arr.shape != self._a.shape:
            raise ValueError(f"{arr.dtype} {arr.shape} array cannot be set to {self._a.dtype} {self._a.shape} array")
        SESSION.to_device.add(arr.nbytes)
        (stream or current_stream())._copy(arr, self._a)

    def _number(self) -> Any:
        """The one number in it (a transfer)."""
        SESSION.to_host.add(self._a.nbytes)
        return self._a.item()

    def item(self) -> Any:
        return self._number()

    def tolist(self) -> Any:
        SESSION.to_host.add(self._a.nbytes)
        return self._a.tolist()

    def __bool__(self) -> bool:
        return bool(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __complex__(self) -> complex:
        return complex(self._number())

    def __format__(self, form: str) -> str:
        return format(self._number() if self._a.ndim == 0 else self._a, form)

    def __repr__(self) -> str:
        return repr(self._a)

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self._a)))

    # elements
    def __getitem__(self, key: Any) -> ndarray:
        return wrap(self._a[index(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._a[index(key)] = operand(value)

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:
        return wrap(self._a.view() if dtype is None else self._a.view(dtype))


def index(key: Any) -> tuple[Any, ...]:
    """A key with an ellipsis, so that NumPy never hands out a scalar; no arrays of the host, no lists."""
    keys = key if isinstance(key, tuple) else (key,)
    for item in keys:
        if isinstance(item, list | np.ndarray):
            raise TypeError(f"Unsupported type {type(item)} as an index: pass cupy arrays")
    return unwrap(keys if any(item is Ellipsis for item in keys) else (*keys, Ellipsis))


def add_operators() -> None:
    """Operators, attributes and methods of `ndarray`, as far as CuPy and NumPy both have them."""

    def binary(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[ndarray, Any], Any]:
        def method(self: ndarray, other: Any) -> Any:
            other = operand(other)
            return result(function(other, self._a) if swapped else function(self._a, other), {})

        return method

    def in_place(function: Callable[[Any, Any], Any]) -> Callable[[ndarray, Any], ndarray]:
        def method(self: ndarray, other: Any) -> ndarray:
            function(self._a, operand(other))
            return self

        return method

    def unary(function: Callable[[Any], Any]) -> Callable[[ndarray], Any]:
        return lambda self: result(function(self._a), {})

    def attribute(name: str) -> property:
        return property(lambda self: result(getattr(self._a, name), {}))

    def method(name: str) -> Callable[..., Any]:
        def forwarded(self: ndarray, *args: Any, **kwargs: Any) -> Any:
            check_parameters("cupy.ndarray", name, args, kwargs)
            kwargs = {key: value for key, value in kwargs.items() if (key, value) != ("subok", None)}
            if name in ("argsort", "sort"):
                kwargs["kind"] = "stable"
            return call(getattr(self._a, name), args, kwargs, self)

        return forwarded

    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
    for name in names:
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", binary(function, swapped=False))
        setattr(ndarray, f"__r{name}__", binary(function, swapped=True))
        if name != "matmul":  # as in CuPy
            setattr(ndarray, f"__i{name}__", in_place(getattr(operator, f"__i{name}__")))
    for name in ("lt", "le", "eq", "ne", "gt", "ge"):
        setattr(ndarray, f"__{name}__", binary(getattr(operator, name), swapped=False))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(ndarray, f"__{name}__", unary(getattr(operator, name)))
    for name, parameters in API["cupy.ndarray"].items():
        if name.startswith("__") or name in vars(ndarray) or not hasattr(np.ndarray, name):
            continue
        setattr(ndarray, name, attribute(name) if parameters is None else method(name))


add_operators()

# ------------------------------------------------------------------------------------------------------- kernels


class RawKernel:
    """A kernel of a module; `attributes` and the like are what an undemanding kernel has."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name = kernel.name

    num_regs = 32
    local_size_bytes = 0

    @property
    def shared_size_bytes(self) -> int:
        return self._kernel.library.static_shared()

    @property
    def max_threads_per_block(self) -> int:
        return self._kernel.library.max_threads(self.name)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._kernel.dynamic_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if not 0 <= size <= MAX_DYNAMIC:
            raise LaunchError(f"CUDA_ERROR_INVALID_VALUE: {size} bytes of shared memory, {MAX_DYNAMIC} work")
        self._kernel.dynamic_limit = size

    @property
    def attributes(self) -> dict[str, int]:
        names = ("num_regs", "local_size_bytes", "shared_size_bytes", "max_threads_per_block")
        return {name: getattr(self, name) for name in (*names, "max_dynamic_shared_size_bytes")}

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        for what, value in (("grid", grid), ("block", block), ("args", args)):
            if not isinstance(value, tuple):
                raise TypeError(f"kernel {self.name}: {what} is to be a tuple, found {type(value).__name__}")
        for i, value in enumerate(args):
            if not isinstance(value, ndarray | np.generic):
                raise TypeError(f"kernel {self.name}, argument {i}: found {type(value)}, expected cupy or NumPy scalar")
        grid, block = tuple(map(operator.index, grid)), tuple(map(operator.index, block))
        self._kernel(grid, block, [unwrap(value) for value in args], shared_mem)
        SESSION.launches.append((self.name, grid, block, shared_mem))


class RawModule:
    """CUDA source text, compiled when a kernel is asked for."""

    def __init__(self, code: str, *, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        if not isinstance(options, tuple) or not all(isinstance(option, str) for option in options):
            raise TypeError(f"options are to be a tuple of strings, found {options!r}")
        if backend != "nvrtc":
            raise NotImplementedError(f"backend {backend!r}")
        self.code, self.options, self.backend = code, options, backend
        self._library: Library | None = None
        self._kernels: dict[str, Kernel] = {}  # one of a name, which counts its launches

    def get_function(self, name: str) -> RawKernel:
        if self._library is None:
            self._library = compile_kernels(self.code, self.options)
        if not self._library.exports(name):
            raise LaunchError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        if name not in self._kernels:
            self._kernels[name] = Kernel(self._library, name)
        return RawKernel(self._kernels[name])


# ------------------------------------------------------------------------------------------------------- device


class Device:
    """A device; the emulated one is of the oldest kind CUDA 13 has (Turing)."""

    compute_capability = "75"
    attributes = {  # noqa: RUF012
        "MaxSharedMemoryPerBlock": 48 << 10,
        "MaxSharedMemoryPerBlockOptin": MAX_DYNAMIC,
        "MaxThreadsPerBlock": 1024,
        "MultiProcessorCount": 2,
        "WarpSize": 32,
    }

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = SESSION.device if device is None else int(device)
        self.before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> None:
        if not 0 <= self.id < SESSION.devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        SESSION.device = self.id

    def __enter__(self) -> Device:
        self.before.append(SESSION.device)
        self.use()
        return self

    def __exit__(self, *error: object) -> None:
        SESSION.device = self.before.pop()

    def synchronize(self) -> None:
        pass

    @property
    def mem_info(self) -> tuple[int, int]:
        return SESSION.memory - SESSION.used, SESSION.memory


class Event:
    """What a stream had been given when it was recorded."""

    def __init__(self, copies: list[Callable[[], None]]) -> None:
        self.copies = copies

    def synchronize(self) -> None:
        for copy in self.copies:
            copy()


class Stream:
    """On the null stream all is done when a call returns; on others as late as it may be: when it is waited for."""

    null: Stream
    _current = threading.local()

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.copies: list[Callable[[], None]] | None = None if null else []
        self.before: list[Stream] = []
        self.waited: list[Event] = []

    def __enter__(self) -> Stream:
        self.before.append(current_stream())
        Stream._current.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        Stream._current.stream = self.before.pop()

    def record(self, event: Any = None) -> Event:
        return Event([*(self.copies or [])])

    def wait_event(self, event: Event) -> None:
        if not isinstance(event, Event):
            raise TypeError(f"expected an event, found {type(event)}")
        self.waited.append(event)
        event.synchronize()

    def synchronize(self) -> None:
        for copy in self.copies or []:
            copy()
        if self.copies:
            self.copies.clear()

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy from the host: what is freed before it is done is rubbish by then."""
        if self.copies is None:
            target[...] = source
            return
        alive, left = weakref.ref(source), [True]

        def later() -> None:
            found = alive()
            if not left:
                return
            left.clear()
            if found is None:
                poison(target)
            else:
                target[...] = found

        self.copies.append(later)


def current_stream(device_id: int = -1) -> Stream:
    """cupy.cuda.get_current_stream."""
    return getattr(Stream._current, "stream", Stream.null)


Stream.null = Stream(null=True)


class MemoryPool:
    """Gives freed memory back at once."""

    def free_all_blocks(self, stream: Any = None) -> None:
        SESSION.pool_freed += 1

    def used_bytes(self) -> int:
        return SESSION.used

    def total_bytes(self) -> int:
        return SESSION.used

    def free_bytes(self) -> int:
        return 0


class PinnedMemoryPool:
    """Pinned memory is not emulated: nothing is in the pool."""

    def free_all_blocks(self) -> None:
        pass

    def n_free_blocks(self) -> int:
        return 0


class PlanCache:
    """cuFFT's plan cache: only its limits."""

    def __init__(self) -> None:
        self._size, self._memsize = 16, -1

    def get_size(self) -> int:
        return self._size

    def set_size(self, size: int) -> None:
        self._size = size

    def get_memsize(self) -> int:
        return self._memsize

    def set_memsize(self, memsize: int) -> None:
        self._memsize = memsize

    def get_curr_size(self) -> int:
        return 0

    def clear(self) -> None:
        pass


def range_push(message: str, id_color: int = -1) -> None:
    """cupy.cuda.nvtx.RangePush."""
    SESSION.ranges.append(message)
    SESSION.open_ranges += 1


def range_pop() -> None:
    """cupy.cuda.nvtx.RangePop."""
    if not SESSION.open_ranges:
        raise RuntimeError("nvtx.RangePop without RangePush")
    SESSION.open_ranges -= 1


def properties(device: int) -> dict[str, Any]:
    """cupy.cuda.runtime.getDeviceProperties."""
    return {
        "name": b"CPU emulating CUDA",
        "totalGlobalMem": SESSION.memory,
        "major": 7,
        "minor": 5,
        "multiProcessorCount": 2,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "sharedMemPerBlock": 48 << 10,
        "sharedMemPerBlockOptin": MAX_DYNAMIC,
    }


# ------------------------------------------------------------------------------------------------------- functions


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", *, blocking: bool = False) -> ndarray:
    """cupy.array: from the host (a transfer) or from the device."""
    if isinstance(obj, ndarray):
        return wrap(np.array(obj._a, dtype, copy=True, order=order)) if copy else asarray(obj, dtype)  # type: ignore[call-overload]
    if isinstance(obj, list | tuple) and any(True for _ in arrays_in(obj)):
        return wrap(np.array(unwrap(obj), dtype))
    new = np.array(obj, dtype, copy=True, order=order)  # type: ignore[call-overload]
    if new.dtype.kind not in "biufc":
        raise ValueError(f"Unsupported dtype {new.dtype}")
    SESSION.to_device.add(new.nbytes)
    return wrap(new)


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False) -> ndarray:
    """cupy.asarray."""
    if (
        isinstance(a, ndarray)
        and not copy
        and (dtype is None or a._a.dtype == np.dtype(dtype))
        and order in (None, "K")
    ):
        return a
    return array(a, dtype, True, order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    """cupy.ascontiguousarray, which also takes arrays of the host."""
    if isinstance(a, ndarray) and a.flags.c_contiguous and (dtype is None or a._a.dtype == np.dtype(dtype)):
        return a
    return array(a, dtype, True, "C")


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    """cupy.asnumpy."""
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """cupy.empty: NaN, as memory nobody has written yet."""
    return ndarray(shape, dtype, order=order)


def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    """cupy.empty_like."""
    operand(prototype)
    return ndarray(prototype.shape if shape is None else shape, prototype.dtype if dtype is None else dtype)


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """cupyx.empty_pinned: an array of the host's."""
    return np.empty(shape, dtype, order)  # type: ignore[call-overload,no-any-return]


def get_array_module(*args: Any) -> Any:
    """cupy.get_array_module."""
    return sys.modules["cupy"] if any(isinstance(item, ndarray) for item in args) else np


OWN = {
    item.__name__: item for item in (ndarray, RawModule, array, asarray, ascontiguousarray, asnumpy, empty, empty_like)
} | {"get_array_module": get_array_module}


class Namespace(ModuleType):
    """A module whose functions are NumPy's or SciPy's of the same names, if CuPy has them."""

    def __init__(self, name: str, homes: tuple[Any, ...] = (), **members: Any) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__ = []
        self._homes = homes
        self.__dict__.update(members)

    def __getattr__(self, name: str) -> Any:
        where = self.__name__
        if name.startswith("_") or name not in API.get(where, {}):
            raise AttributeError(f"module {where!r} has no attribute {name!r}")
        home = next((home for home in self._homes if hasattr(home, name)), None)
        if home is None:
            raise NotImplementedError(f"{where}.{name}: CuPy has it, the emulator does not; see tests/emulator")
        found = getattr(home, name)
        value = found if API[where][name] is None else forward(where, name, found)
        setattr(self, name, value)
        return value


def modules() -> dict[str, ModuleType]:
    """New modules, by the names they are imported by."""
    plan_cache, pools = PlanCache(), (MemoryPool(), PinnedMemoryPool())
    runtime = Namespace(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: SESSION.devices,
        getDeviceProperties=properties,
        getDevice=lambda: SESSION.device,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        memGetInfo=lambda: Device().mem_info,
        deviceSynchronize=lambda: None,
        is_hip=False,
    )
    cuda_parts = {
        "runtime": runtime,
        "driver": Namespace("cupy.cuda.driver", CUDADriverError=LaunchError),
        "memory": Namespace("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, MemoryPool=MemoryPool),
        "nvrtc": Namespace("cupy.cuda.nvrtc", getVersion=lambda: (13, 0)),
        "compiler": Namespace("cupy.cuda.compiler", CompileException=CompileError),
        "nvtx": Namespace("cupy.cuda.nvtx", RangePush=range_push, RangePop=range_pop, available=True),
    }
    cuda = Namespace(
        "cupy.cuda",
        Device=Device,
        Stream=Stream,
        Event=Event,
        MemoryPool=MemoryPool,
        PinnedMemoryPool=PinnedMemoryPool,
        get_current_stream=current_stream,
        is_available=lambda: SESSION.devices > 0,
        **cuda_parts,
    )
    config = Namespace("cupy.fft.config", get_plan_cache=lambda: plan_cache)
    fft = Namespace("cupy.fft", (scipy.fft, np.fft), config=config)
    linalg = Namespace("cupy.linalg", (np.linalg,))
    cupy = Namespace(
        "cupy",
        (np,),
        __version__=API["version"],
        cuda=cuda,
        fft=fft,
        linalg=linalg,
        get_default_memory_pool=lambda: pools[0],
        get_default_pinned_memory_pool=lambda: pools[1],
        **OWN,
    )
    scipy_fft = Namespace("cupyx.scipy.fft", (scipy.fft,))
    scipy_ = Namespace("cupyx.scipy", fft=scipy_fft)
    cupyx = Namespace("cupyx", scipy=scipy_, empty_pinned=empty_pinned)
    all_modules = [cupy, cuda, *cuda_parts.values(), fft, config, linalg, cupyx, scipy_, scipy_fft]
    return {module.__name__: module for module in all_modules}


NOT_IMPORTABLE = {"cupy.cuda.driver", "cupy.cuda.nvrtc"}  # only attributes


@contextmanager
def installed(memory: int = MEMORY, devices: int = 1) -> Iterator[Session]:
    """Inside the block `import cupy` gives the stand-in, on a device of so many bytes; what was there comes back.

    Yields
    ------
    Session
        What happens on the device: transfers, launches, ranges, memory.
    """
    global SESSION
    ours = {name: module for name, module in modules().items() if name not in NOT_IMPORTABLE}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("cupy", "cupyx")}
    session_before, SESSION = SESSION, Session(memory, devices)
    for name in before:
        del sys.modules[name]
    sys.modules.update(ours)
    try:
        yield SESSION
    finally:
        SESSION = session_before
        for name in [name for name in sys.modules if name.split(".")[0] in ("cupy", "cupyx")]:
            del sys.modules[name]
        sys.modules.update(before)
