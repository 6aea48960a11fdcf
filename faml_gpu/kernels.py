"""Finds, compiles and launches the CUDA kernels of `kernels/*.cu`; the only place that calls a kernel."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "MAX_ROWS",
    "MAX_THREADS",
    "SHARED_BYTES",
    "THREADS",
    "compile_all",
    "files",
    "folder",
    "launch",
    "options",
    "parameters",
    "source",
]

MAX_THREADS = 256  # of a block: that of common.cuh, for which the compiler leaves registers
# Threads of a block of each kernel, at most MAX_THREADS; a multiple of 32, of so3_select a power of 2.
THREADS = {
    "rotate": 256,
    "residual": 256,
    "normal_equations": 256,
    "accumulate": 128,
    "assign": 256,
    "cross": 256,
    "harmonics": 128,
    "so3_maxima": 256,
    "so3_select": 256,
}
SHARED_BYTES = 48 << 10  # of a block, that every card has
MAX_ROWS = 65535  # of a grid's y axis

_TYPES = {"float": np.float32, "double": np.float64, "int": np.int32, "long long": np.int64,
          "unsigned long long": np.uint64, "cplx_double": np.complex128}  # fmt: skip
_OF_REAL = {"float": {"real": np.float32, "cplx": np.complex64}, "double": {"real": np.float64, "cplx": np.complex128}}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its name, NumPy dtype, and whether it is an array."""

    name: str
    dtype: np.dtype[Any]
    array: bool


@lru_cache(maxsize=1)
def folder() -> Path:
    """Where the `.cu` files are: in the installed package, or beside it in a checkout.

    Raises
    ------
    FileNotFoundError
    """
    here = Path(__file__).resolve().parent
    for place in (here / "_kernels", here.parent / "kernels"):
        if (place / "common.cuh").is_file():
            return place
    raise FileNotFoundError(
        f"no CUDA sources in {here / '_kernels'} or {here.parent / 'kernels'}: install faml_gpu anew"
    )


def files() -> list[str]:
    """Names of the kernel families, the stems of the `.cu` files."""
    return sorted(path.stem for path in folder().glob("*.cu"))


def source(file: str) -> str:
    """Text of a kernel family; the compiler's messages and the profiler name the real file."""
    path = folder() / f"{file}.cu"
    return f'#line 1 "{path}"\n{path.read_text(encoding="utf-8")}'


def options(real: str) -> tuple[str, ...]:
    """Compiler options for REAL = "float" or "double".

    The hash of the included header is among them: CuPy's cache of compiled kernels does not look into headers.
    """
    header = hashlib.sha256((folder() / "common.cuh").read_bytes()).hexdigest()[:8]
    return ("--std=c++17", f"-I{folder()}", f"-DREAL={real}", f"-DCOMMON=0x{header}", "-lineinfo")


@lru_cache(maxsize=16)
def parameters(file: str, real: str) -> dict[str, tuple[Parameter, ...]]:
    """The `extern "C" __global__` functions of a family, with their parameters as the source declares them."""
    text = re.sub(r"//[^\n]*", "", source(file))
    types = _TYPES | _OF_REAL[real]
    found = {}
    for name, inside in re.findall(
        r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)', text
    ):
        row = []
        for declared in inside.split(","):
            words = declared.replace("*", " * ").split()
            kind = " ".join(w for w in words[:-1] if w not in ("const", "*", "__restrict__"))
            row.append(Parameter(words[-1], np.dtype(types[kind]), "*" in words))
        found[name] = tuple(row)
    return found


@lru_cache(maxsize=32)
def _module(cupy: Any, file: str, real: str) -> Any:
    return cupy.RawModule(code=source(file), options=options(real), backend="nvrtc")


def launch(
    kernel: str, real: Any, blocks: int | tuple[int, int], arguments: Sequence[Any], *, file: str = "", shared: int = 0
) -> None:
    """Run a kernel on the current device and stream.

    Parameters
    ----------
    kernel : name of an `extern "C" __global__` function
    real : dtype float32 or float64, what REAL is
    blocks : blocks of the grid, (x,) or (x, y); of `THREADS[kernel]` threads each
    arguments : arrays of CuPy's and numbers, in the kernel's order
    file : its `.cu` file, if that has another name
    shared : bytes of dynamic shared memory

    Raises
    ------
    TypeError, ValueError, OverflowError
        CuPy hands on whatever it is given: an argument of another type, or an array of another dtype, not
        C-contiguous or on another device, would be read as rubbish. All are refused here, by name.
    """
    import cupy

    file, name = file or kernel, np.dtype(real).name
    type_name = {"float32": "float", "float64": "double"}[name]
    expected = parameters(file, type_name)[kernel]
    if len(arguments) != len(expected):
        raise TypeError(f"kernel {kernel}: found {len(arguments)} arguments, expected {len(expected)}")
    if shared > SHARED_BYTES:
        raise ValueError(f"kernel {kernel}: found {shared} bytes of shared memory, expected at most {SHARED_BYTES}")
    if THREADS[kernel] > MAX_THREADS:
        raise ValueError(f"kernel {kernel}: found {THREADS[kernel]} threads a block, expected at most {MAX_THREADS}")
    device = cupy.cuda.Device().id
    passed = []
    for value, p in zip(arguments, expected, strict=True):
        if not p.array:
            number = p.dtype.type(value)
            if number != value and p.dtype.kind != "f":
                raise OverflowError(f"kernel {kernel}, {p.name}: found {value!r}, which is no {p.dtype}")
            passed.append(number)
            continue
        if not isinstance(value, cupy.ndarray):
            raise TypeError(f"kernel {kernel}, {p.name}: found {type(value).__name__}, expected a cupy.ndarray")
        if value.dtype != p.dtype or not value.flags.c_contiguous:
            raise TypeError(
                f"kernel {kernel}, {p.name}: expected a C-contiguous array of {p.dtype}, found {value.dtype}"
            )
        if value.device.id != device:
            raise ValueError(f"kernel {kernel}, {p.name}: found on device {value.device.id}, expected {device}")
        passed.append(value)
    grid = blocks if isinstance(blocks, tuple) else (blocks,)
    if 0 in grid:
        return
    function = _module(cupy, file, type_name).get_function(kernel)
    function(grid, (THREADS[kernel],), tuple(passed), shared_mem=shared)


def compile_all() -> list[dict[str, Any]]:
    """Compile every kernel for the current device, in both precisions; what each takes of it.

    Returns
    -------
    list of dict
        kernel, real, registers, local_bytes (of a thread: spilled registers and arrays), shared_bytes (static).
    """
    import cupy

    found = []
    for file in files():
        for real in _OF_REAL:
            for kernel in parameters(file, real):
                function = _module(cupy, file, real).get_function(kernel)
                found.append(
                    {
                        "kernel": kernel,
                        "real": real,
                        "registers": function.num_regs,
                        "local_bytes": function.local_size_bytes,
                        "shared_bytes": function.shared_size_bytes,
                    }
                )
    return found
