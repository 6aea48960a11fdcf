"""What a run will take, found out by an iteration of a few of its particles: `--dry-run`."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faml_gpu import faml
from faml_gpu.array_backend import cpu_threads, use_device
from faml_gpu.data import ParticleSource
from faml_gpu.halves import Subset
from faml_gpu.options import Options
from faml_gpu.plan import Plan

__all__ = ["Forecast", "forecast"]

BUDGET = 1.5  # seconds an iteration of the particles measured may take
FIXED = ("references", "maximization")  # steps that are done once for each fold, however many particles there are
CHECKPOINTS = 2
STAR_ROW = 400  # bytes of a particle in an iteration's STAR file, paths of usual length
POSE = 100  # bytes of a candidate pose in a posterior


@dataclass(frozen=True)
class Forecast:
    """Seconds and bytes of a run.

    Attributes
    ----------
    measured : particles that were timed
    batch : particles worked on at a time
    first, full : seconds of an iteration at the coarsest and at all detail
    total : seconds of all iterations, if it does not converge before, nor evidence hold its band back
    host, device : most memory, bytes; device is None on the CPU
    disk : bytes in the output folder at the end
    """

    measured: int
    batch: int
    first: float
    full: float
    total: float
    host: int
    device: int | None
    disk: int


def forecast(
    particles: ParticleSource,
    options: Options,
    n: int,
    *,
    device: str,
    reference: NDArray[np.float32] | None = None,
    use_poses: bool = False,
    initial_lowpass: float | None = None,
) -> Forecast:
    """Time a few particles through an iteration at the coarsest and at all detail; the rest follows from their number.

    Parameters
    ----------
    particles : some of them, at least twice the number of classes
    options : of the run
    n : particles of the run
    device : "cpu" or "cuda:i"
    reference, use_poses, initial_lowpass : of its start, see `faml.run`

    Raises
    ------
    InputError
        Options that do not fit the particles.
    """
    with cpu_threads(options.threads), use_device(device):
        whole = Plan.make(particles, options, initial_lowpass, device)
        folds = min(options.choices.folds, n)
        # One part, and all detail at once: what is done for each fold is counted below.
        alone = replace(options, folds=1, band="full", reseed=False, halves=False, starts=1, iterations=20)

        def iteration(count: int, plan: Plan, repeats: int) -> Mapping[str, float]:
            chosen = Subset(particles, np.linspace(0, len(particles) - 1, count).astype(np.int64))
            checkpoint = faml.begin(plan, chosen, reference, use_poses)
            for _ in range(repeats):
                checkpoint = faml.iterate(plan, chosen, checkpoint)
            return checkpoint.history[-1].seconds

        few = min(len(particles), max(2, 2 * options.n_classes))
        full = Plan.make(particles, alone, initial_lowpass, device)
        coarse = replace(full, r_final=whole.r_start)
        iteration(few, full, 1)  # compiles, and fills the caches of tables
        peak = _peak_bytes()
        start = time.monotonic()
        iteration(few, full, 1)
        each = (time.monotonic() - start) / few
        batch = min(whole.batch.size, max(1, n // folds))
        count = int(np.clip(BUDGET / each, few, min(len(particles), max(few, batch))))
        at_full, at_coarse = iteration(count, full, 2), iteration(count, coarse, 2)
        slope = max(0.0, (_peak_bytes() - peak) / max(1, count - few))
        on_device = _device_bytes(device)

    def scaled(seconds: Mapping[str, float]) -> float:
        fixed = sum(seconds.get(name, 0.0) for name in FIXED)
        return fixed * folds + (sum(seconds.values()) - fixed) / count * n

    last, first = scaled(at_full), scaled(at_coarse)
    # Between the two a power of the band, as of the number of voxels and of harmonics.
    ratio = whole.r_final / whole.r_start
    power = np.log(last / first) / np.log(ratio) if ratio > 1 else 0.0
    bands = [whole.r_max(i) for i in range(1, options.iterations + 1)]
    total = sum(first * (r / whole.r_start) ** power for r in bands)
    of_start = sum(first * (r / whole.r_start) ** power for r in bands[: whole.tried])
    total += (options.starts - 1) * of_start
    total += (at_full["read"] + at_full["rotate back"]) / count * n  # of the final averages
    poses = options.candidates * POSE * n * options.n_classes
    maps = 4 * whole.box**3 * options.n_classes
    kept = maps * (1 + (folds if folds > 1 else 0))  # averages, and those without each fold
    sums = 24 * whole.box**3 // 4 * options.n_classes * folds
    disk = options.iterations * (maps + STAR_ROW * n) + CHECKPOINTS * (kept + poses) + maps
    more = max(0, batch - count)
    return Forecast(
        measured=count,
        batch=batch,
        first=first,
        full=last,
        total=total * (2 if options.halves else 1),
        host=int(_peak_bytes() + slope * more + 2 * poses + 2 * kept + sums),
        device=None if on_device is None else int(on_device * (1 + more / count)),
        disk=int(disk),
    )


def _peak_bytes() -> int:
    """The most memory this process has had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _device_bytes(device: str) -> int | None:
    if device == "cpu":
        return None
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def host_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free
