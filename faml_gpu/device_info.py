"""What this machine offers, and which device a run uses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

from faml_gpu.errors import InputError

__all__ = ["choose_device", "cuda_state", "machine", "n_threads", "versions"]

_LIBRARIES = ("numpy", "scipy", "numba", "mrcfile", "gemmi", "pyshtools", "matplotlib", "threadpoolctl")


def choose_device(device: str) -> tuple[str, str]:
    """The device a run uses for `--device` auto, cpu, cuda or cuda:i, and why.

    Parameters
    ----------
    device : str
        What was asked for.

    Returns
    -------
    (name, reason) : name is "cpu" at present

    Raises
    ------
    InputError
        For cuda, which this release cannot do, and for an unknown name.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdecimal() or device == "cuda"):
        raise InputError(f"option device: found {device!r}; this release computes on the CPU only (auto or cpu)")
    if device == "cpu":
        return "cpu", "as asked"
    if device == "auto":
        return "cpu", "this release has no CUDA kernels yet"
    raise InputError(f"option device: found {device!r}, expected auto, cpu, cuda or cuda:0, cuda:1 ...")


def n_threads(threads: int | None = None) -> int:
    """CPU threads a run uses: `threads`, else all cores this process may run on."""
    return threads if threads is not None else len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Versions of faml_gpu, Python and the libraries computed with."""
    from faml_gpu import __version__

    found = {"faml_gpu": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
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


def cuda_state() -> str:
    """One line: whether CuPy is there and sees a device, or why not. Never raises."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (extras cuda12, cuda13)"
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        names = [cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count)]
    except Exception as error:  # a broken driver or CuPy fails in its own ways; `info` reports them all
        return f"CuPy does not work here: {type(error).__name__}: {error}"
    return f"CuPy {cupy.__version__} sees {', '.join(names) or 'no device'}; not used by this release"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
