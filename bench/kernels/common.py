"""What the benchmarks of the operations share: arguments, times, and what the machine itself does in the same run.

Each script first holds the operation against its definition, in float64 and by other means, then times it. Next to each
time stand the bytes that must move (inputs read once, outputs written once), the operations counted by hand, and which
part of the machine's own copy and matrix product that is. One that gathers stands next to a bare loop of gathers too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np
from scipy.ndimage import map_coordinates
from threadpoolctl import threadpool_limits

from faml_gpu import kernels
from faml_gpu.array_backend import namespace, synchronize, to_device, to_host, use_device
from faml_gpu.device_info import choose_device, cuda_info, machine
from faml_gpu.fourier import Support, make_support, support_rows
from faml_gpu.ops._trilinear import sample_complex
from faml_gpu.threads import cpu_threads

Array = Any
PADDING = 2
BLOCK_SIZES = (64, 128, 256)  # kernels.MAX_THREADS at most


@dataclass(frozen=True)
class Setting:
    """Where and how a benchmark runs."""

    device: str
    threads: int
    repeats: int
    quick: bool

    def put(self, array: Any) -> Array:
        return to_device(np.ascontiguousarray(array), self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median of several runs; the first, which compiles and warms up, does not count."""
        work()
        found = []
        for _ in range(self.repeats):
            synchronize(self.device)
            begin = time.perf_counter()
            work()
            synchronize(self.device)
            found.append(time.perf_counter() - begin)
        return float(np.median(found))

    def boxes(self, *sizes: int) -> Sequence[int]:
        return (16,) if self.quick else sizes

    def blocks(self, *names: str) -> Iterator[dict[str, int]]:
        """Each size of a thread block in turn, for the kernels named; on a CPU there is nothing to choose."""
        if self.device == "cpu":
            yield {}
            return
        before = {name: kernels.THREADS[name] for name in names}
        try:
            for size in BLOCK_SIZES[:1] if self.quick else BLOCK_SIZES:
                kernels.THREADS.update(dict.fromkeys(names, size))
                yield {"block": size}
        finally:
            kernels.THREADS.update(before)


@dataclass(frozen=True)
class Machine:
    """Bytes and operations a second that this machine reached in this run."""

    copy: float
    gemm: float

    @classmethod
    def measured(cls, setting: Setting) -> Machine:
        n = 1 << (16 if setting.quick else 26)
        source = setting.put(np.ones(n, np.float32))
        target = namespace(source).empty_like(source)
        copy = _copy if setting.device == "cpu" else np.copyto
        if setting.device != "cpu":
            import cupy

            copy = cupy.copyto
        seconds = setting.seconds(lambda: copy(target, source))
        size = 128 if setting.quick else 2048
        a = setting.put(np.ones((size, size), np.float32))
        with threadpool_limits(limits=numba.get_num_threads(), user_api="blas"):
            return cls(2 * source.nbytes / seconds, 2 * size**3 / setting.seconds(lambda: a @ a))


@numba.njit(parallel=True)
def _copy(target: Any, source: Any) -> None:
    for i in numba.prange(len(source)):
        target[i] = source[i]


@numba.njit(parallel=True, fastmath={"contract"})
def _gathers(grid: Any, rotations: Any, coords: Any, out: Any) -> None:
    c = grid.shape[2] - 1
    for i in numba.prange(len(rotations)):
        r = rotations[i]
        total_re, total_im = r[0, 0] * 0, r[0, 0] * 0
        for j in range(len(coords)):
            x, y, z = coords[j, 0], coords[j, 1], coords[j, 2]
            re, im = sample_complex(
                grid,
                c,
                r[0, 0] * x + r[1, 0] * y + r[2, 0] * z,
                r[0, 1] * x + r[1, 1] * y + r[2, 1] * z,
                r[0, 2] * x + r[1, 2] * y + r[2, 2] * z,
            )
            total_re += re
            total_im += im
        out[i, 0] = total_re
        out[i, 1] = total_im


def gather_seconds(
    setting: Setting, grid: Array, rotations: Array, support: Support, *, rows: bool = False
) -> float | None:
    """Of one complex trilinear gather and nothing else, in the order of the support or along rows; CPU only."""
    if setting.device != "cpu":
        return None
    real = grid.view(np.float32).reshape(*grid.shape, 2)
    coords = support.coords[support_rows(support)[0]] if rows else support.coords
    turned, coords = (rotations * PADDING).astype(np.float32), coords.astype(np.float32)
    out = np.empty((len(rotations), 2), np.float32)
    return setting.seconds(lambda: _gathers(real, turned, coords, out)) / (len(rotations) * len(support))


class Report:
    """Rows of a benchmark, on the screen as they come and as JSON at the end."""

    def __init__(self, name: str, setting: Setting, limits: Machine) -> None:
        self.name, self.setting, self.limits, self.rows = name, setting, limits, []  # type: ignore[var-annotated]
        print(f"{name} on {setting.device}: copy {limits.copy / 1e9:.1f} GB/s, GEMM {limits.gemm / 1e9:.0f} GFLOP/s, "
              f"load {os.getloadavg()[0]:.1f}")  # fmt: skip

    def add(self, seconds: float, *, moved: float, flops: float, gathers: float | None = None, **size: Any) -> None:
        """moved: bytes; flops: operations; gathers: seconds that the bare gathers would take."""
        row = size | {
            "seconds": seconds,
            "gb_s": moved / seconds / 1e9,
            "gflop_s": flops / seconds / 1e9,
            "of_copy": moved / seconds / self.limits.copy,
            "of_gemm": flops / seconds / self.limits.gemm,
        }
        if gathers is not None:
            row["times_gathers"] = seconds / gathers
        self.rows.append(row)
        words = [f"{key} {value}" for key, value in size.items()]
        words += [f"{1e3 * seconds:.3f} ms", f"{row['gb_s']:.2f} GB/s ({100 * row['of_copy']:.0f} % of copy)",
                  f"{row['gflop_s']:.2f} GFLOP/s ({100 * row['of_gemm']:.0f} % of GEMM)"]  # fmt: skip
        if gathers is not None:
            words.append(f"{row['times_gathers']:.2f} times the bare gathers")
        print("  " + ", ".join(words), flush=True)

    def content(self) -> dict[str, Any]:
        about = {key: value for key, value in machine().items() if key != "executable"}
        if self.setting.device != "cpu":
            about |= cuda_info()
        return {
            "benchmark": self.name,
            "device": self.setting.device,
            "threads": self.setting.threads,
            "repeats": self.setting.repeats,
            "quick": self.setting.quick,
            "copy_gb_s": self.limits.copy / 1e9,
            "gemm_gflop_s": self.limits.gemm / 1e9,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": about | {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
            "rows": self.rows,
        }


@contextmanager
def benchmark(name: str, description: str | None, validate: Callable[[Setting], float], within: float) -> Iterator[Any]:
    """Arguments, the check against the definition, the machine's limits; then (setting, report) for the sweep."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    device, reason = choose_device(args.device)
    print(f"device {device}: {reason}")
    with ExitStack() as stack:
        threads = stack.enter_context(cpu_threads(args.threads))
        stack.enter_context(use_device(device))
        setting = Setting(device, threads, args.repeats, args.quick)
        off = validate(setting)
        print(f"{name}: off its definition by {off:.1e}, at most {within:.0e} allowed")
        if not off <= within:
            raise SystemExit(f"{name}: wrong, not timed")
        report = Report(name, setting, Machine.measured(setting))
        try:
            yield setting, report
        finally:  # what was measured before an error is kept
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report.content(), indent=1) + "\n", encoding="utf-8")


def random_grid(rng: np.random.Generator, r_max: int) -> np.ndarray[Any, Any]:
    """A half grid (2c + 1, 2c + 1, c + 1) complex64 of a Hermitian function, as `fourier.interpolation_grid` has it."""
    c = PADDING * r_max + 1
    cube = rng.standard_normal((2, *(2 * c + 1,) * 3)).astype(np.float32)
    half = cube[0] + 1j * cube[1]
    return np.ascontiguousarray((half + half[::-1, ::-1, ::-1].conj())[:, :, c:])


def whole(half: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The centred cube of a half grid, double precision."""
    c = half.shape[-1] - 1
    out = np.empty((2 * c + 1,) * 3, np.result_type(half, np.float64))
    out[:, :, c:] = half
    out[:, :, :c] = np.conj(half[::-1, ::-1, :0:-1])
    return out


def trilinear(cube: np.ndarray[Any, Any], points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Samples of a centred cube at points (n, 3) = (x, y, z), by SciPy."""
    where = (points + cube.shape[0] // 2).T[::-1]
    values = map_coordinates(cube.real, where, order=1)
    if np.iscomplexobj(cube):
        values = values + 1j * map_coordinates(cube.imag, where, order=1)
    return np.asarray(values)


def support_on(setting: Setting, box: int) -> Support:
    """All shells of a box but the last, on the device."""
    return make_support(box, box // 2 - 1).to(setting.device)


def wedge(support: Support) -> np.ndarray[Any, Any]:
    """(M,) float32: 1 at the voxels seen between -60 and 60 degrees of tilt about y."""
    x, _, z = to_host(support.coords).astype(np.float64).T
    return (abs(z) <= np.tan(np.deg2rad(60)) * abs(x)).astype(np.float32)
