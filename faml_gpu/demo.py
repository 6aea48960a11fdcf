"""A run from files to class averages on simulated particles, with the truth to compare: what `faml-gpu demo` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from faml_gpu import metrics
from faml_gpu.data import IterationRecord, Result
from faml_gpu.device_info import choose_device, n_threads
from faml_gpu.errors import InputError
from faml_gpu.geometry import matrix_to_relion
from faml_gpu.io.mrc import write_mrc
from faml_gpu.io.star import FreshTable, write_particles_star
from faml_gpu.pipeline import classify
from faml_gpu.report.slices import montage
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles

__all__ = ["DEMO", "DemoSettings", "Score", "run_demo", "score"]

METHODS: tuple[Literal["faml", "fa"], ...] = ("faml", "fa")


@dataclass(frozen=True)
class DemoSettings:
    """What is simulated, and how long it is worked on; lengths in Angstrom, angles in degrees."""

    box: int = 32
    voxel_size: float = 12.0
    particles: int = 35  # of each structure
    snr: float = 0.05  # variance of the signal over that of the white noise in a box, before the wedge
    tilt_range: tuple[float, float] = (-60.0, 60.0)
    max_shift: float = 2.0  # voxels
    iterations: int = 12
    resolution: float = 30.0  # of the alignment, and at which averages are compared with the truth


DEMO = DemoSettings()


@dataclass(frozen=True)
class Score:
    """How a result compares with the truth: `f1` of the classes (macro mean), `r` and the map per structure.

    `r` is Pearson about the mean in a sphere of the structure's radius, at the settings' resolution, after the average
    was moved onto the truth; `aligned` are the averages so moved, `[z, y, x]`.
    """

    f1: float
    r: tuple[float, ...]
    aligned: tuple[NDArray[np.float32], ...]


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    settings: DemoSettings = DEMO,
    say: Callable[[str], None] = print,
    on_iteration: Callable[[IterationRecord], None] | None = None,
) -> dict[str, Score]:
    """Simulate two structures, classify and average them with both methods, compare with the truth.

    Leaves in `output`: particles/ and particles.star, truth_NAME.mrc, a run folder for each method,
    and slices.png.

    Parameters
    ----------
    output : folder
    seed : of the data and of the random start
    device : "auto", "cpu" or "cuda[:i]"
    threads : CPU threads
    overwrite : replace an earlier demo
    settings : size of the demo
    say : takes each line of the report
    on_iteration : gets the record of each iteration

    Returns
    -------
    dict of method name to Score

    Raises
    ------
    InputError
        The folder is not empty and `overwrite` is not set, or the device cannot be had.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output}: found a file, expected a folder")
    if not overwrite and output.exists() and any(output.iterdir()):
        raise InputError(f"output {output}: found files in it, expected an empty folder; give --overwrite to replace")
    started = time.monotonic()
    chosen, reason = choose_device(device)
    size, voxel = settings.box, settings.voxel_size
    structures = (groel(), ribosome())
    say(
        f"simulating {settings.particles} boxes each of {' and '.join(s.name for s in structures)}: {size}³ voxels of "
        f"{voxel:g} Å, SNR {settings.snr:g}, tilts {settings.tilt_range[0]:g} to {settings.tilt_range[1]:g} degrees"
    )
    simulation = simulate_particles(
        structures,
        [settings.particles] * len(structures),
        box=size,
        voxel_size=voxel,
        snr=settings.snr,
        tilt_range=settings.tilt_range,
        max_shift=settings.max_shift,
        seed=seed,
    )
    star = write_simulation(output, simulation)
    scores: dict[str, Score] = {}
    for method in METHODS:
        say(f"{method}: {settings.iterations} iterations at most, {chosen} ({reason}), {n_threads(threads)} threads")
        result = classify(
            star,
            len(structures),
            output / method,
            method=method,
            tilt_range=settings.tilt_range,
            iterations=settings.iterations,
            resolution=settings.resolution,
            seed=seed,
            device=chosen,
            threads=threads,
            overwrite=overwrite,
            on_iteration=on_iteration,
        )
        scores[method] = score(result, simulation, settings.resolution)

    names = [s.name for s in structures]
    rows: dict[str, Any] = {}
    for k, name in enumerate(names):
        rows[f"{name} truth"] = simulation.truth[k]
        rows |= {f"{name} {method}": scores[method].aligned[k] for method in METHODS}
    picture = montage(rows, output / "slices.png", voxel_size=voxel, title="Central slices: truth and class averages")
    say("")
    say(f"{'method':<8}{'F1':>8}" + "".join(f"{'r ' + name:>14}" for name in names))
    for label, found in scores.items():
        say(f"{label:<8}{found.f1:>8.3f}" + "".join(f"{r:>14.3f}" for r in found.r))
    say(f"r: correlation with the truth at {settings.resolution:g} Å; F1: 1 is a perfect classification")
    say(f"maps in {output / 'faml'} and {output / 'fa'}, picture in {picture}; {time.monotonic() - started:.0f} s")
    return scores


def write_simulation(folder: Path, simulation: Simulation) -> Path:
    """Boxes, true maps and a STAR file with the true poses; returns the STAR file's path.

    The STAR file carries the truth so that it can be compared; a run without --use-poses does not look at it.
    """
    (folder / "particles").mkdir(parents=True, exist_ok=True)
    names = []
    for i, volume in enumerate(simulation.boxes, start=1):
        names.append(f"particles/{i:06d}.mrc")
        write_mrc(folder / names[-1], volume, simulation.voxel_size)
    for phantom, volume in zip(simulation.phantoms, simulation.truth, strict=True):
        write_mrc(folder / f"truth_{phantom.name}.mrc", volume, simulation.voxel_size)
    angles = matrix_to_relion(simulation.rotations)
    origins = -simulation.shifts * simulation.voxel_size
    table = FreshTable(tuple(names), simulation.voxel_size, simulation.boxes.shape[-1])
    columns = dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True))
    columns |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"), origins.T, strict=True))
    write_particles_star(folder / "particles.star", table, columns | {"rlnClassNumber": simulation.classes + 1})
    return folder / "particles.star"


def score(result: Result, simulation: Simulation, resolution: float) -> Score:
    """Compare classes and averages with the truth; classes get the names that fit best."""
    labels = metrics.best_labels(result.best.classes, simulation.classes)
    r, aligned = [], []
    for k, phantom in enumerate(simulation.phantoms):
        of_k = result.best.classes[labels == k]
        if len(of_k) == 0:
            r.append(0.0)
            aligned.append(np.zeros_like(simulation.truth[k]))
            continue
        _, _, correlation, volume = metrics.align_map(
            result.maps[of_k[0]],
            simulation.truth[k],
            voxel_size=simulation.voxel_size,
            mask_radius=phantom.radius,
            resolution=resolution,
        )
        r.append(correlation)
        aligned.append(volume)
    return Score(float(metrics.f1_score(labels, simulation.classes).mean()), tuple(r), tuple(aligned))
