"""What a run will take, found out by an iteration of a few of its particles: `--dry-run`."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faml_gpu import faml
from faml_gpu.array_backend import use_device
from faml_gpu.data import Checkpoint, ParticleSource, Posterior, State
from faml_gpu.halves import Subset
from faml_gpu.options import Options
from faml_gpu.plan import BatchSize, Plan
from faml_gpu.posteriors import one_hot
from faml_gpu.starting import final_averages
from faml_gpu.threads import cpu_threads

__all__ = ["Forecast", "forecast"]

BUDGET = 1.0  # seconds after which no part of the particles is timed that need not be, at each of two bands
PART = 0.3  # seconds that a part should take
LEAST, PARTS = 3, 5  # so many are timed, and at most so many; what counts is their median
MAKERS = 24  # particles whose averages the others are compared with: noise and all, as in a run, they are not sharper
FIXED = ("references", "maximization")  # steps that are done once for each fold, however many particles there are
BESIDE = 5.0  # seconds of any run besides: the program's start, report and pictures
LAST = 20  # iterations of the plan that is timed
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
    total : seconds of start, all iterations, if it does not converge before nor evidence hold its band back, final
        averages and report
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

    They are compared with averages of other particles, as in the folds of a run: those they had part in would fit them
    so well that hardly any pose is looked at twice. Timed are several parts, each at another moment, and the median
    counts.

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
    with cpu_threads(options.threads) as threads, use_device(device):
        whole = Plan.make(particles, options, initial_lowpass, device)
        folds = min(options.choices.folds, n)
        # One part, and all detail at once: what is done for each fold is counted below. A part has too few particles
        # for groups.
        alone = replace(
            options, folds=1, band="full", reseed=False, halves=False, starts=1, iterations=LAST, noise_groups="none"
        )
        full = Plan.make(particles, alone, initial_lowpass, device)
        coarse = replace(full, r_final=whole.r_start)
        batch = min(whole.batch.size, max(1, n // folds))
        beside = min(whole.at_once, threads)  # batches, in the run as here
        widest = min(beside * whole.batch.size, n)  # of the final averages, which have no folds
        made_of, timed = _apart(len(particles), max(options.n_classes, min(MAKERS, widest)))
        # As many at a time as there are threads to share them, but no more than in batches of the run.
        most, taken = min(len(timed), beside * batch), 0
        few = min(most, threads)
        faml.begin(full, Subset(particles, made_of[:few]), reference, use_poses)  # compiles
        before, start = _peak_bytes(), time.perf_counter()
        state = faml.begin(full, Subset(particles, made_of), reference, use_poses).state
        of_start = (time.perf_counter() - start) / len(made_of)
        slope = (_peak_bytes() - before) / max(1, len(made_of) - few)  # a batch, read and turned back

        def part(count: int, plan: Plan, state: State) -> dict[str, float]:
            """Seconds per step of an iteration of the next few particles."""
            nonlocal taken
            chosen = timed[(taken + np.arange(count)) % len(timed)]
            taken += count
            before = Checkpoint(state, _as_they_lie(count, options.n_classes), [])
            plan = replace(plan, batch=BatchSize(-(-count // beside)))
            return dict(faml.iterate(plan, Subset(particles, np.sort(chosen)), before).history[-1].seconds)

        def measured(plan: Plan, state: State) -> tuple[float, float, float]:
            """Seconds of what is done once for each fold, of each particle, and what final averages take of these."""
            part(few, plan, state)  # compiles, and fills the caches of tables
            found: list[tuple[float, float, float]] = []
            begin, count = time.perf_counter(), few
            while len(found) < LEAST or (len(found) < PARTS and time.perf_counter() - begin < BUDGET):
                seconds = part(count, plan, state)
                fixed = sum(seconds.get(name, 0.0) for name in FIXED)
                averages = seconds["read"] + seconds["rotate back"]
                found.append((fixed, (sum(seconds.values()) - fixed) / count, averages / count))
                count = few * int(np.clip(round(PART / (few * found[0][1] + 1e-9)), 1, max(1, most // few)))
            of_fold, each, of_averages = np.median(found, axis=0)
            return float(of_fold), float(each), float(of_averages)

        # What a run does only once it has found something, as to impose a symmetry, is of the iterations at all detail.
        at_full, at_coarse = measured(full, replace(state, iteration=LAST - 1)), measured(coarse, state)
        # The most memory is that of the final averages: all shells of a whole batch, and the tables still there.
        final_averages(full, Subset(particles, made_of), _as_they_lie(len(made_of), options.n_classes))
        peak, on_device = _peak_bytes(), _device_bytes(device)

    def scaled(found: tuple[float, float, float]) -> float:
        return found[0] * folds + found[1] * n

    last, first = scaled(at_full), scaled(at_coarse)
    # Between the two a power of the band, as of the number of voxels and of harmonics.
    ratio = whole.r_final / whole.r_start
    power = np.log(last / first) / np.log(ratio) if ratio > 1 else 0.0
    bands = [whole.r_max(i) for i in range(1, options.iterations + 1)]
    total = sum(first * (r / whole.r_start) ** power for r in bands)
    of_starts = sum(first * (r / whole.r_start) ** power for r in bands[: whole.tried])
    total += (options.starts - 1) * of_starts
    total += (options.starts * of_start + at_full[2]) * n
    total *= 2 if options.halves else 1
    poses = options.candidates * POSE * n * options.n_classes
    maps = 4 * whole.box**3 * options.n_classes
    kept = maps * (1 + (folds if folds > 1 else 0))  # averages, and those without each fold
    sums = 24 * whole.box**3 // 4 * options.n_classes * folds
    disk = options.iterations * (maps + STAR_ROW * n) + CHECKPOINTS * (kept + poses) + maps
    more = max(0, widest - len(made_of))
    return Forecast(
        measured=min(taken, len(timed)),
        batch=batch,
        first=first,
        full=last,
        total=total + BESIDE,
        host=int(peak + more * slope + 2 * poses + 2 * kept + sums),
        device=None if on_device is None else int(on_device * (1 + more / len(made_of))),
        disk=int(disk),
    )


def _apart(n: int, makers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """So many of n particles, half at most, to make averages of, and the others; spread over the input. One is both."""
    made_of = np.unique(np.linspace(0, n - 1, min(makers, max(1, n // 2))).astype(np.int64))
    others = np.setdiff1d(np.arange(n), made_of)
    # Timed in any order: they may lie in the file by class, or by tomogram.
    return made_of, np.random.default_rng(0).permutation(others) if len(others) else made_of


def _as_they_lie(n: int, n_classes: int) -> Posterior:
    """A posterior of particles that nothing is known of."""
    rotations = np.tile(np.eye(3), (n, 1, 1))
    return one_hot(np.arange(n) % n_classes, rotations, np.zeros((n, 3)), n_classes, known=False)


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
