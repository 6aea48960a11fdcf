"""What this machine offers, and which device a run uses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from faml_gpu.errors import InputError

__all__ = ["choose_device", "cuda_info", "machine", "n_threads", "versions"]

_LIBRARIES = ("numpy", "scipy", "numba", "mrcfile", "gemmi", "pyshtools", "matplotlib", "threadpoolctl")


def choose_device(device: str) -> tuple[str, str]:
    """The device a run uses for `--device` auto, cpu, cuda or cuda:i, and why.

    A GPU counts as working once a kernel was compiled and run on it, and CuPy, cuBLAS and cuFFT have computed with it.

    Parameters
    ----------
    device : str
        What was asked for. "auto" takes the first GPU that works, else the CPU; "cuda" the first GPU that works.

    Returns
    -------
    (name, reason) : name is "cpu" or "cuda:i"

    Raises
    ------
    InputError
        For an unknown name, and for a GPU that was asked for and cannot be used: why, and what to do.
    """
    if device == "cpu":
        return "cpu", "as asked"
    kind, colon, index = device.partition(":")
    if device != "auto" and (kind != "cuda" or bool(colon) != index.isdecimal()):
        raise InputError(f"option device: found {device!r}, expected auto, cpu, cuda or cuda:0, cuda:1 ...")
    try:
        cupy = _import_cupy()
        count = _device_count(cupy)
        return _check(cupy, int(index), count) if index else _first_working(cupy, count)
    except _UnusableError as unusable:
        if device == "auto":
            return "cpu", unusable.reason
        raise InputError(
            f"option device: found {device!r}, but {unusable.reason}; {unusable.remedy}, or use the CPU"
        ) from None


def n_threads(threads: int | None = None) -> int:
    """CPU threads a run uses: `threads`, else all cores this process may run on."""
    return threads if threads is not None else len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Versions of faml_gpu, Python and the libraries computed with; of CuPy where it is in use."""
    from faml_gpu import __version__

    found = {"faml_gpu": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if "cupy" in sys.modules:
        found["cupy"] = sys.modules["cupy"].__version__
    return found


def machine() -> dict[str, str]:
    """The machine, in words: system, processor, threads, memory."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": f"{n_threads()} of {os.cpu_count() or 1}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "executable": sys.executable,
    }


def cuda_info() -> dict[str, str]:
    """CuPy, driver, libraries and devices, or in their place why they cannot be used. Never raises."""
    try:
        cupy = _import_cupy()
    except _UnusableError as unusable:
        return {"cuda": unusable.reason}
    runtime = cupy.cuda.runtime
    found = {
        "cupy": str(cupy.__version__),
        "cuda runtime": _or_why_not(lambda: _cuda_version(runtime.runtimeGetVersion())),
        "nvrtc": _or_why_not(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion()))),
        "driver": _or_why_not(lambda: _driver(cupy)),
    }
    try:
        count = _device_count(cupy)
    except _UnusableError as unusable:
        return found | {"cuda": unusable.reason}
    return found | {f"cuda:{i}": _or_why_not(partial(_describe, cupy, i)) for i in range(count)}


class _UnusableError(Exception):
    """Why a GPU cannot be used, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def _import_cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise _UnusableError(
                "CuPy is not installed (extras cuda13, cuda12)",
                "install faml_gpu with the extra cuda13 (NVIDIA driver 580 or newer) or cuda12 (525 or newer)",
            ) from None
        raise _broken(error) from None
    except Exception as error:  # a broken installation fails in its own ways, such as OSError for a missing library
        raise _broken(error) from None
    return cupy


def _broken(error: Exception) -> _UnusableError:
    # CuPy frames its ImportError in lines of "="; what went wrong is its cause.
    cause = error.__cause__
    return _UnusableError(
        f"CuPy cannot be imported: {_words(cause if isinstance(cause, Exception) else error)}",
        "install one of cupy-cuda13x and cupy-cuda12x anew (extras cuda13, cuda12)",
    )


def _device_count(cupy: Any) -> int:
    """Number of CUDA devices, at least 1."""
    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
        trouble = "" if count else "cudaErrorNoDevice"
    except Exception as error:
        count, trouble = 0, _words(error)
    if count:
        return count
    if "cudaErrorInsufficientDriver" in trouble:
        version = _or_why_not(lambda: _cuda_version(runtime.driverGetVersion()))
        if version == "0.0":
            raise _UnusableError("there is no NVIDIA driver", "install one (nvidia-smi shows it)")
        raise _UnusableError(
            f"the NVIDIA driver is too old: it supports CUDA {version}, CuPy needs "
            f"{_or_why_not(lambda: _cuda_version(runtime.runtimeGetVersion()))}",
            "update it (580 or newer for the extra cuda13, 525 or newer for cuda12)",
        )
    if "cudaErrorNoDevice" in trouble:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise _UnusableError(f"the NVIDIA driver sees no device{hidden}", "see what nvidia-smi shows")
    raise _UnusableError(f"CUDA does not work: {trouble}", "see what nvidia-smi shows")


def _first_working(cupy: Any, count: int) -> tuple[str, str]:
    failures = []
    for i in range(count):
        try:
            return _check(cupy, i, count)
        except _UnusableError as unusable:
            failures.append(unusable)
    raise _UnusableError("; ".join(failure.reason for failure in failures), failures[0].remedy)


def _check(cupy: Any, index: int, count: int) -> tuple[str, str]:
    """Name and description of a device that works; each of what a run needs is tried once, a few numbers each."""
    if index >= count:
        devices = ", ".join(f"cuda:{i} {_or_why_not(partial(_card, cupy, i))}" for i in range(count))
        raise _UnusableError(
            f"there {'is' if count == 1 else 'are'} only {devices}", f"use cuda:0{' ...' * (count > 1)}"
        )
    card = f"cuda:{index} {_or_why_not(partial(_card, cupy, index))}"
    stage = "CUDA"
    try:
        cuda = int(cupy.cuda.runtime.runtimeGetVersion()) // 1000
        lowest = (6, 0) if cuda <= 12 else (7, 5)
        capability = _capability(cupy, index)
        if capability < lowest:
            raise _UnusableError(
                f"{card} is too old: compute capability {_dotted(capability)}, "
                f"CUDA {cuda} needs {_dotted(lowest)} or more",
                "use the extra cuda12 in place of cuda13" if capability >= (6, 0) else "use a newer card",
            )
        with cupy.cuda.Device(index):
            for name, work in _TRIALS.items():
                stage = name
                work(cupy)
            return f"cuda:{index}", _describe(cupy, index)
    except _UnusableError:
        raise
    except Exception as error:
        from faml_gpu.array_backend import out_of_memory  # here: it imports more than a choice of the CPU needs

        words = _words(error)
        if out_of_memory(error):
            raise _UnusableError(
                f"{card} has no memory left", "end what else runs there (nvidia-smi shows it)"
            ) from None
        raise _UnusableError(
            f"{stage} does not work on {card}: {words}",
            "install faml_gpu anew with the extra cuda13 or cuda12, which bring the CUDA libraries",
        ) from None


_PROBE = 'extern "C" __global__ void probe(float* out) { out[threadIdx.x] = threadIdx.x; }'


def _try_nvrtc(cupy: Any) -> None:
    out = cupy.zeros(32, dtype="f4")
    cupy.RawModule(code=_PROBE, options=("--std=c++17",), backend="nvrtc").get_function("probe")((1,), (32,), (out,))
    if float(out[31]) != 31:
        raise ArithmeticError(f"a kernel gave {float(out[31])}, expected 31")


# CuPy compiles its own kernels against CUDA's headers, which its wheels without [ctk] do not bring, nor cuBLAS, cuFFT.
_TRIALS: dict[str, Callable[[Any], object]] = {
    "NVRTC, which compiles the kernels,": _try_nvrtc,
    "CuPy": lambda cupy: float((cupy.ones(8, dtype="f4") * 2).sum()),
    "cuBLAS": lambda cupy: float((cupy.ones((8, 8), dtype="f4") @ cupy.ones((8, 8), dtype="f4"))[0, 0]),
    "cuFFT": lambda cupy: complex(cupy.fft.fft(cupy.ones(8, dtype="c8"))[0]),
}


def _card(cupy: Any, index: int) -> str:
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def _capability(cupy: Any, index: int) -> tuple[int, int]:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return int(properties["major"]), int(properties["minor"])


def _describe(cupy: Any, index: int) -> str:
    with cupy.cuda.Device(index):
        free, total = cupy.cuda.runtime.memGetInfo()
    return (
        f"{_card(cupy, index)}, compute capability {_dotted(_capability(cupy, index))}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )


def _driver(cupy: Any) -> str:
    version = int(cupy.cuda.runtime.driverGetVersion())
    if version == 0:
        return "none"
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as text:
            number = re.search(r"\d+\.\d+(\.\d+)?", text.readline())
    except OSError:
        number = None
    return f"{number[0] if number else 'unknown version'}, for CUDA up to {_cuda_version(version)}"


def _cuda_version(number: int) -> str:
    """12090 is 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def _or_why_not(call: Callable[[], str]) -> str:
    """What a call returns, or what went wrong."""
    try:
        return call()
    except Exception as error:  # CuPy's, CUDA's, the loader's: whatever it is, it is what the user needs to know
        return _words(error)


def _words(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    return f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
