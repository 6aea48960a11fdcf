"""The methods that are compared, and a run of one of them on a sample."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from cases import Case
from numpy.typing import NDArray
from particles import Sample

from faml_gpu import faml, ops
from faml_gpu.array_backend import use_device
from faml_gpu.data import Checkpoint, IterationRecord, Posterior, State
from faml_gpu.device_info import choose_device
from faml_gpu.fast_alignment import Candidates, Observation, Reference
from faml_gpu.history import converged
from faml_gpu.metrics import _rotation_grid  # the same spiral of rotations, of whatever number
from faml_gpu.options import Options, Preset
from faml_gpu.plan import Band, Plan, resolve
from faml_gpu.posteriors import one_hot
from faml_gpu.starting import final_averages
from faml_gpu.threads import cpu_threads

__all__ = ["Run", "method_options", "run_method"]

Float32 = NDArray[np.float32]

GRID_POSES = 1000  # of the uniform grids of `sampling`


@dataclass(frozen=True)
class PlainMagnitudes(Options):
    """`default`, but for the shell means, which are left in the magnitudes."""

    @property
    def choices(self) -> Preset:
        return replace(super().choices, magnitudes="plain")


@dataclass(frozen=True)
class Unrefined(Options):
    """Matched candidates, which stay as they were proposed, and plain averages: to compare proposals."""

    @property
    def choices(self) -> Preset:
        return replace(super().choices, poses="grid", sampler="magnitude", update="ratio")


def method_options(method: str, case: Case, sample: Sample, seed: int, device: str, threads: int | None) -> Options:
    """Options of a method: mask, iterations, shifts and (presets apart) schedule of the band are the same for all."""
    kind: type[Options] = {"fa-plain": PlainMagnitudes}.get(method, Options)
    if case.kind == "sampling" and method != "ceiling":
        kind = Unrefined
    return kind(
        n_classes=max(1, len(sample.truth)),
        method="fa" if method.startswith("fa") else "faml",
        preset="paper" if method == "paper" else "default",
        sampler="magnitude" if method.startswith("magnitude") else None,
        update="ratio" if method.endswith("ratio") else None,
        iterations=case.iterations,
        seed=seed,
        device="cpu" if case.kind == "sampling" else device,  # the grids are NumPy's
        threads=threads,
        mask_radius=sample.mask_radius,
        resolution=case.resolution,
    )


@dataclass
class Run:
    """What a method made of a sample; `by_iteration` are the averages the E-step of each iteration left."""

    maps: Float32
    posterior: Posterior
    plan: Plan
    resolved: dict[str, Any]
    device: str
    seconds: float
    history: list[IterationRecord] = field(default_factory=list)
    iteration_seconds: list[float] = field(default_factory=list)
    by_iteration: list[Float32] = field(default_factory=list)


def run_method(method: str, case: Case, sample: Sample, options: Options) -> Run:
    """Run to the end, or to the stopping rule, from a random start; `ceiling` takes the true poses and classes."""
    device, _ = choose_device(options.device)
    resolved = resolve(options, sample.particles.box, sample.voxel_size)
    grids = {"grid-1000": GridPlan, "grid-1000-shifts": GridShiftPlan}
    with cpu_threads(options.threads) as threads, use_device(device):
        resolved |= {"threads": threads, "method_of_bench": method}
        plan = grids.get(method, Plan).make(sample.particles, options, None, device)
        begin = time.perf_counter()
        if method == "ceiling":
            posterior = one_hot(sample.classes, sample.rotations, sample.shifts, options.n_classes, known=True)
            maps = final_averages(plan, sample.particles, posterior)
            return Run(maps, posterior, plan, resolved, device, time.perf_counter() - begin)
        checkpoint = faml.begin(plan, sample.particles, None, False)
        run = Run(checkpoint.state.maps, checkpoint.posterior, plan, resolved, device, 0.0)
        while checkpoint.state.iteration < options.iterations and not converged(checkpoint.history):
            before = time.perf_counter()
            checkpoint = faml.iterate(plan, sample.particles, checkpoint)
            run.iteration_seconds.append(time.perf_counter() - before)
            run.by_iteration.append(checkpoint.state.maps)
            _say(method, case, checkpoint, run.iteration_seconds[-1])
        run.maps = final_averages(plan, sample.particles, checkpoint.posterior)
        empty = np.bincount(checkpoint.posterior.class_index, minlength=options.n_classes) == 0
        run.maps[empty] = checkpoint.state.maps[empty]
        run.posterior, run.history = checkpoint.posterior, checkpoint.history
        run.seconds = time.perf_counter() - begin
    return run


def _say(method: str, case: Case, checkpoint: Checkpoint, seconds: float) -> None:
    row = checkpoint.history[-1]
    print(
        f"  {case.name} {method} iteration {row.iteration}: {seconds:.1f} s, {row.resolution:.0f} Å, "
        f"classes {row.class_sizes}, pose change {row.pose_change:.1f}°, L {row.log_likelihood:.6g}",
        flush=True,
    )


# --- uniform grids of poses, in the place of the matched candidates -------------------------------------------


@dataclass(frozen=True)
class GridPlan(Plan):
    """A plan whose candidates are the same uniform grid over rotations and shifts for every particle."""

    def band(self, state: State) -> Band:
        band = Plan.band(self, state)
        return GridBand(self, state, band.r_max, band.r_output)


@dataclass(frozen=True)
class GridShiftPlan(Plan):
    """A plan whose candidates are a uniform grid over rotations, each with the shift that correlates best."""

    def band(self, state: State) -> Band:
        band = Plan.band(self, state)
        return GridShiftBand(self, state, band.r_max, band.r_output)


def _rotations(n: int) -> NDArray[np.float64]:
    """n near-uniform rotations."""
    step = float(np.rad2deg((8 * np.pi**2 / n) ** (1 / 3))) * (1 + 1e-9)
    return _rotation_grid(step)[:n]


class GridBand(Band):
    """8 shifts, the corners of a cube of half the largest shift, for each of 125 rotations."""

    def align(self, observation: Observation, reference: Reference, kept: dict[str, Any]) -> Candidates:
        b = len(observation.spectra)
        corners = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3)
        shifts = 0.5 * self.plan.max_shift / np.sqrt(3) * corners
        rotations = np.repeat(_rotations(GRID_POSES // 8), 8, axis=0)
        all_shifts = np.tile(shifts, (GRID_POSES // 8, 1))
        return Candidates(
            np.tile(rotations, (b, 1, 1, 1)), np.tile(all_shifts, (b, 1, 1)), np.zeros((b, GRID_POSES)),
            np.full(b, GRID_POSES),
        )  # fmt: skip


class GridShiftBand(Band):
    """1000 rotations, each with its best shift: more than 1000 poses' worth of work, in the grid's favour."""

    def align(self, observation: Observation, reference: Reference, kept: dict[str, Any]) -> Candidates:
        b, rotations = len(observation.spectra), _rotations(GRID_POSES)
        weights, origin = observation.weights**2 * self.precision, np.zeros((b, 3))
        shifts = np.zeros((b, GRID_POSES, 3))
        for i, rotation in enumerate(rotations):
            correlations, _ = ops.correlations(
                reference.grid, observation.spectra, weights, observation.weight_index, np.arange(b),
                np.tile(rotation, (b, 1, 1)), origin, self.window.waves, observation.support, reference.padding,
            )  # fmt: skip
            shifts[:, i], _ = self.window.best(correlations)
        return Candidates(np.tile(rotations, (b, 1, 1, 1)), shifts, np.zeros((b, GRID_POSES)), np.full(b, GRID_POSES))


def options_json(options: Options, run: Run) -> dict[str, Any]:
    """Every option as it was used."""
    return run.resolved | {f.name: getattr(options, f.name) for f in fields(options) if f.name not in run.resolved} | {
        "choices": asdict(options.choices)
    }  # fmt: skip
