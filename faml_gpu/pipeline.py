"""From files to class averages: checks everything first, runs FAML, keeps the run folder."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu import faml
from faml_gpu.config import config_text
from faml_gpu.data import Checkpoint, IterationRecord, ParticleSource, Progress, Result, frames_of
from faml_gpu.device_info import choose_device, machine, n_threads, versions
from faml_gpu.dry_run import Forecast, forecast
from faml_gpu.errors import InputError
from faml_gpu.fsc import check_b_factor
from faml_gpu.half_files import half_summary, read_mask, write_halves
from faml_gpu.halves import HalvesResult, common_lowpass, refine_halves, stated_halves, together_options
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import FileParticles, open_particles
from faml_gpu.io.positions import assumed_pixel_size, recentered
from faml_gpu.io.star import StarTable
from faml_gpu.noise import noise_groups
from faml_gpu.options import Options
from faml_gpu.plan import resolve, start_lowpass
from faml_gpu.run_folder import RunFolder
from faml_gpu.stopping import Stopping
from faml_gpu.uncertainty import angular_coverage, effective_particles, preferred_orientations, shifts_at_limit
from faml_gpu.unfinished import Unfinished

__all__ = ["Outlook", "average", "classify", "dry_run"]

LOOKED_INTO = 64  # boxes, of a dry run
VOXEL_TOLERANCE = 0.01  # relative; headers round, and a calibration off by more shows at 10 A in a large box

PathLike = str | os.PathLike[str]


def average(particles: PathLike | ParticleSource, output: PathLike | None = None, **options: Any) -> Result:
    """The average of subtomograms in unknown poses: `classify` with one class.

    Parameters
    ----------
    particles, output, options : see `classify`

    Returns
    -------
    Result

    Raises
    ------
    InputError, OutputError

    Examples
    --------
    >>> result = faml_gpu.average("particles.star", "average", resolution=30, iterations=10)  # doctest: +SKIP
    >>> result.maps[0]  # doctest: +SKIP
    """
    return classify(particles, 1, output, **options)


def classify(
    particles: PathLike | ParticleSource,
    n_classes: int,
    output: PathLike | None = None,
    *,
    tilt_range: tuple[float, float] | None = None,
    tilt_axis: str = "y",
    voxel_size: float | None = None,
    boxes: PathLike | None = None,
    use_poses: bool = False,
    reference: PathLike | NDArray[np.float32] | None = None,
    initial_lowpass: float | None = None,
    fsc_mask: PathLike | NDArray[np.float32] | None = None,
    recenter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_iteration: Callable[[IterationRecord], None] | None = None,
    stopping: Stopping | None = None,
    **options: Any,
) -> Result:
    """Sort subtomograms into classes and average each class.

    Parameters
    ----------
    particles : RELION STAR file, Dynamo table, folder of .mrc or .em boxes, glob pattern, stack of boxes in one file
        (.mrc, .mrcs, .npy), or a ParticleSource
    n_classes : K, from 1 to the number of particles
    output : folder for maps, STAR files, checkpoints and run.json; None writes nothing
    tilt_range : lowest and highest tilt in degrees, where the input has no 3-D weights (rlnCtfImage) of its own
    tilt_axis : "y" or "x"
    voxel_size : Angstrom, where the input does not say it
    boxes : folder of the boxes of a Dynamo table, where it is not the table's
    use_poses : start from the poses (and classes) of the STAR file
    reference : start from this map: a file, or an array `[z, y, x]`; same box and voxel size as the particles
    initial_lowpass : low-pass of the start, Angstrom (needs `reference`, `use_poses` or `halves`)
    fsc_mask : inside which `halves` are compared: a file, or an array `[z, y, x]`, 0 to 1; same box and voxel size as
        the particles, lying as the averages do. None is the sphere of mask_radius
    recenter : write run_data_recentered.star too, with each particle's coordinates moved onto it and its origin 0, to
        extract boxes from anew
    resume : go on with the run in `output`: same input and options, `iterations` may be more; `b_factor` and `fsc_mask`
        may be others: halves are kept, and what these two make is made anew
    overwrite : replace the run in `output`
    progress : called with (step name, done, total) within an iteration
    on_iteration : called with the record of each completed iteration, after its files are written
    stopping : `ask` of it ends the run after the batch it is at; with `output`, what the iteration has done by then is
        kept for `resume`
    options : fields of `Options` other than n_classes: iterations, seed, resolution, method, preset, halves ...

    Returns
    -------
    Result
        maps, best pose and class per particle, posteriors, history; a `halves.HalvesResult` with `halves`: all
        particles together first, with detail no finer than `initial_lowpass`, then two halves of each class from its
        average, each by itself.

    Raises
    ------
    InputError
        Before any heavy work and before anything in `output` is changed.
    OutputError
        `output` cannot be written; what was written before is whole.
    """
    folder = None if output is None else RunFolder(output, resume=resume, overwrite=overwrite)
    if output is None and (resume or overwrite or recenter):
        raise InputError("options resume, overwrite and recenter: need an output folder")
    chosen = Options(n_classes=n_classes, **options)
    if folder is not None:
        folder.check(chosen)  # before an hour of reading
    job = _prepare(
        particles,
        chosen,
        tilt_range=tilt_range,
        tilt_axis=tilt_axis,
        voxel_size=voxel_size,
        boxes=boxes,
        use_poses=use_poses,
        reference=reference,
        initial_lowpass=initial_lowpass,
        fsc_mask=fsc_mask,
        recenter=recenter,
        progress=progress,
    )
    source = job.data.source
    if folder is not None:
        folder.check(inputs=job.data.files(reference, fsc_mask))

    with ExitStack() as stack:
        checkpoint = None
        if folder is not None:
            stack.enter_context(folder)
            checkpoint = folder.begin(
                {
                    "command": sys.argv,
                    "versions": versions(),
                    "machine": machine(),
                    "device": job.device,
                    "device_reason": job.device_reason,
                    "threads": n_threads(chosen.threads),
                    "seed": chosen.seed,
                    "input": job.data.description(),
                    "start": {
                        "use_poses": use_poses,
                        "reference": None if job.map is None else hashlib.sha256(job.map.tobytes()).hexdigest(),
                        "initial_lowpass": initial_lowpass,
                    },
                    "fsc_mask": None if job.fsc_mask is None else hashlib.sha256(job.fsc_mask.tobytes()).hexdigest(),
                    "options": asdict(chosen),
                    "resolved": job.resolved,
                    "warnings": list(job.data.warnings),
                },
                job.data.config(
                    chosen,
                    job.resolved,
                    use_poses=use_poses,
                    reference=reference,
                    initial_lowpass=initial_lowpass,
                    fsc_mask=fsc_mask,
                    recenter=recenter,
                ),
            )

        keeper = _Keeper(folder, source, chosen, on_iteration, progress, stopping or Stopping())
        result = faml.run(
            source,
            job.together,
            reference=job.map,
            initial_lowpass=job.start_filter,
            use_poses=use_poses,
            checkpoint=checkpoint,
            on_iteration=keeper.after_iteration,
            on_begin=keeper.at_begin,
            progress=keeper.progress,
        )
        if chosen.halves:
            result = refine_halves(
                source,
                chosen,
                result,
                initial_lowpass=job.halves_lowpass,
                mask=job.fsc_mask,
                checkpoint=None if folder is None else folder.half_checkpoint,
                on_iteration=keeper.after_half_iteration,
                on_begin=keeper.at_begin_of_half,
                progress=keeper.progress,
            )
        remarks = _doubts(result, source)
        if folder is not None:
            _write_final(folder, result, source, [*job.data.warnings, *remarks], recenter, _named(fsc_mask))
            _write_pictures(folder.path)
    for text in remarks:
        warnings.warn(text, stacklevel=2)
    return result


@dataclass(frozen=True)
class _Job:
    """What is to be run, checked.

    options, resolved : as given, and with what they come to; `together` those of the run of all particles, which with
        `halves` goes to `halves_lowpass` only
    map, start_filter : of a start that knows something; `lowpass` what that filter comes to
    fsc_mask : of the halves; None is the sphere of the alignment
    """

    data: _Input
    options: Options
    together: Options
    resolved: dict[str, Any]
    device: str
    device_reason: str
    map: NDArray[np.float32] | None
    start_filter: float | None
    lowpass: float | None
    halves_lowpass: float
    fsc_mask: NDArray[np.float32] | None


def _prepare(
    particles: PathLike | ParticleSource,
    chosen: Options,
    *,
    tilt_range: tuple[float, float] | None,
    tilt_axis: str,
    voxel_size: float | None,
    boxes: PathLike | None,
    use_poses: bool,
    reference: PathLike | NDArray[np.float32] | None,
    initial_lowpass: float | None,
    fsc_mask: PathLike | NDArray[np.float32] | None,
    recenter: bool,
    progress: Progress | None,
    sample: int | None = None,
) -> _Job:
    """Open the input and check that the options fit it; `sample`: see `open_particles`."""
    device, reason = choose_device(chosen.device)
    if initial_lowpass is not None:
        if not initial_lowpass > 0:
            raise InputError(f"option initial_lowpass: found {initial_lowpass!r}, expected more than 0 A")
        if reference is None and not use_poses and not chosen.halves:
            raise InputError(
                "option initial_lowpass: found no map to filter; give reference or use_poses too, or halves"
            )
    if fsc_mask is not None and not chosen.halves:
        raise InputError("option fsc_mask: found no halves to compare inside it; give halves too")
    data = _Input.open(
        particles,
        tilt_range=tilt_range,
        tilt_axis=tilt_axis,
        voxel_size=voxel_size,
        boxes=boxes,
        use_poses=use_poses,
        progress=progress,
        sample=sample,
    )
    source = data.source
    if chosen.n_classes > data.listed:
        raise InputError(f"option n_classes: found {chosen.n_classes}, expected at most the {data.listed} particles")
    noise_groups(source, chosen)  # those asked for are there
    if recenter:
        table = getattr(source, "table", None)
        if not isinstance(table, StarTable):
            raise InputError(f"option recenter: found {data.path}, expected a STAR file with coordinates")
        recentered(table, np.zeros((table.n_rows, 3)))  # its coordinates can be moved
        assumed = assumed_pixel_size(table)
        if assumed is not None:
            warnings.warn(
                f"--recenter: {table.path} does not say the pixel size that rlnCoordinateX counts in; taken as that of "
                f"the boxes, {assumed:g} A. If the boxes were binned when they were cut, add a column "
                "rlnMicrographPixelSize with that of the tomogram",
                stacklevel=3,
            )
    if use_poses and source.poses is not None and source.poses.classes is not None and chosen.n_classes > 1:
        classes = np.unique(source.poses.classes) + 1
        if classes.tolist() != list(range(1, chosen.n_classes + 1)):
            some = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
            warnings.warn(
                f"the input has classes {some}, expected 1 to {chosen.n_classes}: particles begin in classes at random",
                stacklevel=3,
            )
    start_map = None if reference is None else _read_reference(reference, source)
    known = start_map is not None or use_poses
    start_filter = initial_lowpass if known else None
    lowpass = start_lowpass(start_filter, source.voxel_size, known=known)
    resolved = resolve(chosen, source.box, source.voxel_size, lowpass)
    together, shared, window = chosen, 0.0, None
    if chosen.halves:
        check_b_factor(chosen.b_factor or 0.0, source.voxel_size)
        if fsc_mask is not None:
            window = read_mask(fsc_mask, source.box, source.voxel_size, "the particles")
        stated_halves(source)  # what the input says of them can be used
        shared = common_lowpass(chosen, source.box, source.voxel_size, initial_lowpass)
        together = together_options(chosen, source.box, source.voxel_size, shared)
        resolved |= {"halves_lowpass": shared}
    return _Job(data, chosen, together, resolved, device, reason, start_map, start_filter, lowpass, shared, window)


@dataclass(frozen=True)
class Outlook:
    """What a dry run found: how many particles, the options with what they come to, and what the run will take."""

    particles: int
    looked_into: int
    box: int
    voxel_size: float
    resolved: dict[str, Any]
    forecast: Forecast


def dry_run(
    particles: PathLike | ParticleSource,
    n_classes: int,
    output: PathLike | None = None,
    *,
    tilt_range: tuple[float, float] | None = None,
    tilt_axis: str = "y",
    voxel_size: float | None = None,
    boxes: PathLike | None = None,
    use_poses: bool = False,
    reference: PathLike | NDArray[np.float32] | None = None,
    initial_lowpass: float | None = None,
    fsc_mask: PathLike | NDArray[np.float32] | None = None,
    recenter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outlook:
    """What `classify` would do and take, writing nothing: parameters and errors are the same.

    All headers are read, but only a few of the boxes and weights; these are timed through an iteration.
    """
    folder = None if output is None else RunFolder(output, resume=resume, overwrite=overwrite)
    chosen = Options(n_classes=n_classes, **options)
    if folder is not None:
        folder.check(chosen)
    job = _prepare(
        particles,
        chosen,
        tilt_range=tilt_range,
        tilt_axis=tilt_axis,
        voxel_size=voxel_size,
        boxes=boxes,
        use_poses=use_poses,
        reference=reference,
        initial_lowpass=initial_lowpass,
        fsc_mask=fsc_mask,
        recenter=recenter,
        progress=progress,
        sample=max(LOOKED_INTO, 4 * n_classes),
    )
    if folder is not None:
        folder.check(inputs=job.data.files(reference, fsc_mask))
    found = forecast(
        job.data.source,
        chosen,
        job.data.listed,
        device=job.device,
        reference=job.map,
        use_poses=use_poses,
        initial_lowpass=job.lowpass,
    )
    source = job.data.source
    return Outlook(job.data.listed, len(source), source.box, source.voxel_size, job.resolved, found)


@dataclass(frozen=True)
class _Keeper:
    """Keeps a run's folder as the run goes on, and stops it when asked to, where what it has done can be kept."""

    folder: RunFolder | None
    source: ParticleSource
    options: Options
    told: Callable[[IterationRecord], None] | None
    progress_told: Progress | None
    stopping: Stopping

    def progress(self, name: str, done: int, total: int) -> None:
        if self.progress_told is not None:
            self.progress_told(name, done, total)
        self.stopping.check()

    def at_begin(self, iteration: Unfinished) -> None:
        starts = iteration.starts
        if self.folder is not None and starts is not None and starts.best is not None and iteration.iteration == 1:
            self.folder.write_unfinished(iteration)  # the starts before it are not lost
        self._hold(iteration, lambda folder: folder.write_unfinished(iteration), "")

    def at_begin_of_half(self, k: int, half: int, iteration: Unfinished) -> None:
        self._hold(iteration, lambda folder: folder.write_unfinished(iteration, k, half), self._part(k, half))

    def after_iteration(self, done: Checkpoint) -> None:
        self.stopping.hold(lambda: "")  # while it is written; its sums are of no more use
        if self.folder is not None:
            self.folder.write_iteration(done, self.source)
        if self.told is not None:
            self.told(done.history[-1])
        self.stopping.release()

    def after_half_iteration(self, k: int, half: int, done: Checkpoint) -> None:
        self.stopping.hold(lambda: "")
        if self.folder is not None:
            self.folder.write_half_iteration(k, half, done, self.source.voxel_size)
        if self.told is not None:
            self.told(replace(done.history[-1], part=self._part(k, half)))
        self.stopping.release()

    def _part(self, k: int, half: int) -> str:
        return f"class {k + 1}, half {half}" if self.options.n_classes > 1 else f"half {half}"

    def _hold(self, iteration: Unfinished, write: Callable[[RunFolder], None], part: str) -> None:
        folder = self.folder
        if folder is None:
            return

        def keep() -> str:
            write(folder)
            particles = f"{iteration.done} of {len(iteration.posterior.log_likelihood)} particles"
            return f"kept: {particles} of iteration {iteration.iteration}{part and f' of {part}'}"

        self.stopping.hold(keep)


def _write_final(
    folder: RunFolder,
    result: Result,
    source: ParticleSource,
    remarks: list[str],
    recenter: bool,
    mask_name: str | None,
) -> None:
    if not isinstance(result, HalvesResult):
        folder.write_final(result, source, remarks, recenter=recenter)
        return
    several = len(result.halves) > 1
    for k, found in enumerate(result.halves, start=1):
        if found is not None:
            root = f"postprocess_class{k:03d}" if several else "postprocess"
            write_halves(found, folder.path, class_number=k, root=root, mask_name=mask_name)
    facts = [None if found is None else half_summary(found) for found in result.halves]
    folder.write_final(
        result,
        source,
        remarks,
        columns={"rlnRandomSubset": result.half},
        facts={"halves": facts},
        recenter=recenter,
    )


def _write_pictures(folder: Path) -> None:
    """Report and views; the result is written by now and does not depend on them."""
    try:
        # Here and not at the top: it takes a while, which a --dry-run need not wait for.
        from faml_gpu.report import write_report, write_views

        write_report(folder)
        write_views(folder)
    except Exception as error:
        warnings.warn(
            f"no report or views were made ({type(error).__name__}: {error}); the result is whole. Try again with "
            f"faml-gpu report {folder} and faml-gpu view {folder}",
            stacklevel=3,
        )


def _doubts(result: Result, source: ParticleSource) -> list[str]:
    """What the user should know of the result before using it."""
    remarks = preferred_orientations(
        angular_coverage(result.posterior, frames_of(source)),
        result.history[-1].coverage,
        effective_particles(result.posterior.class_probability),
    )
    remarks += shifts_at_limit(result.best.shifts, result.options["max_shift"], result.voxel_size)
    if isinstance(result, HalvesResult):
        sizes = np.bincount(result.best.classes, minlength=len(result.halves))
        remarks += [
            f"class {k + 1}: found {sizes[k]} particles, too few for halves (at least one in each): it has none"
            for k, found in enumerate(result.halves)
            if found is None
        ]
    return remarks


@dataclass(frozen=True)
class _Input:
    """The particles, opened and checked, and where they came from."""

    source: ParticleSource
    path: str
    reading: dict[str, Any]
    listed: int  # particles of the input; `source` may be a sample of them
    warnings: tuple[str, ...] = ()  # that were told when it was opened

    @classmethod
    def open(
        cls,
        particles: PathLike | ParticleSource,
        *,
        tilt_range: tuple[float, float] | None,
        tilt_axis: str,
        voxel_size: float | None,
        boxes: PathLike | None,
        use_poses: bool,
        progress: Progress | None,
        sample: int | None,
    ) -> _Input:
        """Open a path or glob; a ParticleSource is taken as it is."""
        if not isinstance(particles, (str, os.PathLike)):
            if tilt_range is not None or voxel_size is not None or boxes is not None:
                raise InputError("options tilt_range, voxel_size and boxes: belong to files, not to a ParticleSource")
            if use_poses and particles.poses is None:
                raise InputError("option use_poses: the particles have no poses")
            return cls(particles, type(particles).__name__, {}, len(particles))
        try:
            os.path.abspath(particles).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{os.fspath(particles)!r}: the path is not UTF-8, expected one that files can name"
            ) from None
        source = open_particles(
            particles,
            tilt_range=tilt_range,
            tilt_axis=tilt_axis,
            voxel_size=voxel_size,
            use_poses=use_poses,
            boxes=boxes,
            sample=sample,
            progress=progress,
        )
        for text in source.warnings:
            warnings.warn(text, stacklevel=4)
        reading = {
            "tilt_range": None if tilt_range is None else list(tilt_range),
            "tilt_axis": tilt_axis,
            "voxel_size": voxel_size,
            "boxes": None if boxes is None else os.path.abspath(boxes),
        }
        return cls(source, os.path.abspath(particles), reading, source.listed, source.warnings)

    def files(self, *maps: PathLike | NDArray[np.float32] | None) -> list[Path]:
        """All that is read: the particles', and those of `maps` that are files."""
        named = [Path(self.path)] if self.reading else []
        named += [Path(name) for name in map(_named, maps) if name is not None]
        return named + (self.source.files() if isinstance(self.source, FileParticles) else [])

    def description(self) -> dict[str, Any]:
        """JSON-ready; `fingerprint` tells whether a resumed run still sees the same data."""
        n = len(self.source)
        return {
            "path": self.path,
            "reading": self.reading,
            "particles": n,
            "box": self.source.box,
            "voxel_size": self.source.voxel_size,
            "fingerprint": self._fingerprint(),
        }

    def config(
        self,
        options: Options,
        resolved: dict[str, Any],
        *,
        use_poses: bool,
        reference: PathLike | NDArray[np.float32] | None,
        initial_lowpass: float | None,
        fsc_mask: PathLike | NDArray[np.float32] | None,
        recenter: bool,
    ) -> str:
        """Every option by the name it has on the command line, for run.toml; what is in memory has none there."""
        start: dict[str, Any] = {"use_poses": use_poses, "initial_lowpass": initial_lowpass, "recenter": recenter}
        for option, given in (("reference", reference), ("fsc_mask", fsc_mask)):
            if (name := _named(given)) is not None:
                start[option] = name
        method = asdict(options)
        n_classes = method.pop("n_classes")
        classes, command = ({"classes": n_classes}, "classify") if n_classes > 1 else ({}, "average")
        particles = {"particles": self.path} if self.reading else {}
        return config_text(
            particles | classes | self.reading | start | method,
            resolved["choices"] | {name: value for name, value in resolved.items() if value is not None},
            f"To run it again: faml-gpu {command} --config run.toml -o ANOTHER_FOLDER",
        )

    def _fingerprint(self) -> str:
        """Of number, size, poses, and three of the boxes with their weights: reading all could take an hour."""
        n = len(self.source)
        digest = hashlib.sha256(repr((n, self.source.box, float(self.source.voxel_size))).encode())
        batch = self.source.read(np.unique(np.array([0, n // 2, n - 1], dtype=np.int64)))
        arrays: list[NDArray[Any]] = [batch.boxes.astype(np.float32, copy=False), batch.weights[batch.weight_index]]
        poses = self.source.poses
        if poses is not None:
            arrays += [poses.rotations, poses.shifts]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _named(given: PathLike | NDArray[np.float32] | None) -> str | None:
    """The path of what is a file."""
    return os.path.abspath(given) if isinstance(given, (str, os.PathLike)) else None


def _read_reference(reference: PathLike | NDArray[np.float32], source: ParticleSource) -> NDArray[np.float32]:
    """The starting map, if it fits the particles' box and voxel size."""
    if isinstance(reference, (str, os.PathLike)):
        name = f"reference {Path(reference)}"
        volume, voxel = read_mrc(reference)
        if voxel is None:
            warnings.warn(f"{name} says no voxel size: taken as {source.voxel_size:g} A", stacklevel=3)
        elif not abs(voxel / source.voxel_size - 1) <= VOXEL_TOLERANCE:
            raise InputError(
                f"{name}: found a voxel size of {voxel:g} A, expected {source.voxel_size:g} A as in the particles; "
                "resample the map first"
            )
    else:
        name, volume = "reference", np.asarray(reference)
    expected = (source.box,) * 3
    if volume.shape != expected:
        raise InputError(
            f"{name}: found a box of {volume.shape} voxels, expected {expected} as in the particles; "
            "crop or pad the map first"
        )
    volume = np.ascontiguousarray(volume, dtype=np.float32)
    if not np.isfinite(volume).all():
        raise InputError(f"{name}: found NaN or Inf, expected numbers")
    if np.ptp(volume) == 0:
        raise InputError(f"{name}: found the same value in every voxel, expected a structure")
    return volume
