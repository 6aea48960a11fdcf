"""The folder of a run: what is written after each iteration, and what a later process goes on from.

Every file appears at once (written beside its place under another name, then renamed), so that a run that is
killed, or a disk that is full, leaves only whole files. One process at a time holds the folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Checkpoint, IterationRecord, ParticleSource, Poses, Posterior, Result, State, frames_of
from faml_gpu.errors import InputError
from faml_gpu.expectation import BatchPosterior
from faml_gpu.geometry import matrix_to_relion
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.dynamo import DynamoTable
from faml_gpu.io.mrc import write_mrc
from faml_gpu.io.positions import recentered
from faml_gpu.io.star import FreshTable, ParticleTable, StarTable, write_particles_star, write_star
from faml_gpu.maximization import Accumulators
from faml_gpu.options import Options
from faml_gpu.posteriors import best_poses, joined
from faml_gpu.uncertainty import angular_coverage, effective_particles, pose_entropy
from faml_gpu.unfinished import Starts, Unfinished

__all__ = ["FORMAT", "OutputError", "RunFolder", "finite", "read_checkpoint", "write_checkpoint", "writing"]

FORMAT = 3  # of run.json and of the checkpoints
CHECKPOINTS_KEPT = 2
LOCK = ".run.lock"

# All that a run writes, and so all that --overwrite may remove.
_OURS = re.compile(
    r"run(_it\d{3,}(_class\d{3,}\.mrc|_data\.(star|tbl)|_model\.star|_coverage\.npz|_checkpoint\.(npz|json))"
    r"|_class\d{3,}\.mrc|_data\.(star|tbl)|_data_recentered\.star|_class_posteriors\.star|_coverage\.npz|\.json"
    r"|\.toml|_unfinished\.(npz|json))"
    r"|run(_it\d{3,})?(_classes\.png|\.cxc|_class\d{3,}_angdist\.bild)|(run_it\d{3,}_)?report\.html"
)
_OF_HALVES = re.compile(
    r"run(_it\d{3,}_half[12]_class\d{3,}(\.mrc|_checkpoint\.(npz|json))"
    r"|_half[12]_class\d{3,}_(unfil\.mrc|unfinished\.(npz|json)))"
    r"|postprocess(_class\d{3,})?(\.mrc|\.star|_fsc\.json|_fsc\.png)"
)
_LEFTOVER = re.compile(
    r"\.(run|postprocess|report)\w*\.\d+-[0-9a-f]+\.tmp\.\w+"
)  # of `atomic_path` in a process that was killed

# Options that a resumed run may change: `iterations` only upwards, those of `_FREE` with a note. On those of
# `_AFTERWARDS` nothing depends that is kept: what they make is made last, and anew.
_FREE = ("device", "threads")
_AFTERWARDS = ("b_factor",)


class OutputError(RuntimeError):
    """The output folder cannot be written (disk full, no permission): names the file and the reason."""


class RunFolder:
    """The output folder of one run; a context manager that holds its lock.

    Parameters
    ----------
    path : the folder; made if missing
    resume : go on with the run that is there
    overwrite : remove the files of the run that is there (never any other file)

    Raises
    ------
    InputError
        On entering: the folder holds a run and neither `resume` nor `overwrite` is set, `resume` is set and there is
        no run, another process holds it, or it is not a folder. Nothing has been changed then.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise InputError("options resume and overwrite: found both, expected at most one")
        self.path = Path(path)
        self._resume = resume
        self._overwrite = overwrite
        self._lock: int | None = None
        self._facts: dict[str, Any] = {}
        self._history: list[IterationRecord] = []
        self._of_halves: dict[tuple[int, int], list[IterationRecord]] = {}
        self._clock, self._began = time.monotonic(), _now()
        self._sessions: list[dict[str, Any]] = []  # of earlier processes

    def check(self, options: Options | None = None, inputs: Iterable[Path] = ()) -> None:
        """Raise what a run in this folder would, as far as can be told without making or locking anything.

        Parameters
        ----------
        options : of the run; one that is gone on with must have had the same
        inputs : files that the run reads
        """
        try:
            there, found = self.path.is_dir(), []
            parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if there:
                found = self._our_files()
        except OSError as error:
            raise InputError(f"output {self.path}: {error.strerror}, expected a folder to write into") from None
        if not parent.is_dir():
            raise InputError(
                f"output {self.path}: {'found' if parent == self.path else f'{parent} is'} a file, expected a folder"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"output {self.path}: no permission to write into {parent}")
        run = there and (self.path / "run.json").is_file()
        if self._resume and not run:
            raise InputError(f"output {self.path}: found no run to go on with (no run.json); leave --resume out")
        if found and not run:
            names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
            raise InputError(
                f"output {self.path}: found {len(found)} files named like a run's ({names}), but no run.json: "
                "another program's. Expected another folder"
            )
        if found and not (self._resume or self._overwrite):
            raise InputError(
                f"output {self.path}: found another run ({len(found)} files), expected a folder "
                "without one; give --resume to go on with it, --overwrite to replace it, or another folder"
            )
        if there:
            here = self.path.resolve()
            mine = {path.name for path in found}
            for path in inputs:
                if path.name in mine and path.parent.resolve() == here:
                    raise InputError(
                        f"output {self.path}: the run would replace its input {path.name}; expected another folder"
                    )
        if self._resume and options is not None:
            _check_options(self._read_run_json(), as_written(asdict(options)))

    def __enter__(self) -> Self:
        self.check()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _acquire(self.path / LOCK)
        try:
            self.check()  # another process may have been faster
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)  # while still locked: nobody else holds this file
            os.close(self._lock)
            self._lock = None

    def begin(self, facts: Mapping[str, Any], config: str = "") -> Checkpoint | None:
        """Start or go on: checks `facts` against the run that is there and writes run.json and run.toml.

        Parameters
        ----------
        facts : JSON-ready
            At least `options` (those of `Options`), `input` with `fingerprint`, `start`, and `versions`; `warnings`
            that the user was given so far. When it began and ended, and the wall seconds, counted from when this object
            was made, are added.
        config : what run.toml holds, see `config.config_text`

        Returns
        -------
        What the run is to go on with: an iteration that was stopped, or its last whole checkpoint; None to start from
        the beginning.

        Raises
        ------
        InputError
            The run that is there had other options or other input, or all its checkpoints are damaged.
        """
        checkpoint = None
        self._facts = {"format": FORMAT, **facts}
        if self._resume:
            before = self._read_run_json()
            _check_agreement(before, facts)
            self._sessions = _sessions(before)
            checkpoint = self._newest_checkpoint()
        with writing(self.path):
            if self._overwrite:
                # What makes the others a run's goes last: stopped in between, they can still be overwritten.
                for path in sorted(self._our_files(), key=lambda path: path.name == "run.json"):
                    path.unlink()
            for path in self.path.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink()
        self._history = checkpoint.history if checkpoint else []
        self._write_run_json("running")
        if config:
            _replace(self.path / "run.toml", config.encode(errors="backslashreplace"))
        return checkpoint

    def write_iteration(self, checkpoint: Checkpoint, source: ParticleSource) -> None:
        """Maps, STAR files and then the checkpoint of a completed iteration.

        Raises
        ------
        OutputError
            Nothing written earlier is lost.
        """
        stem = f"run_it{checkpoint.state.iteration:03d}"
        with writing(self.path):
            for path in self.path.iterdir():
                if _OF_HALVES.fullmatch(path.name):  # of the averages as they were, when the run had fewer iterations
                    path.unlink()
        self._write_maps(stem, checkpoint.state.maps, source.voxel_size)
        self._write_data(stem, checkpoint.posterior, source)
        self._write_coverage(stem, checkpoint.state)
        with writing(self.path / f"{stem}_model.star"):
            _write_model(self.path / f"{stem}_model.star", stem, checkpoint, source)
        write_checkpoint(self.path / f"{stem}_checkpoint", checkpoint)
        self._history = checkpoint.history
        self._write_run_json("running")
        self._forget_unfinished()
        self._forget_old_checkpoints()

    def write_half_iteration(self, k: int, half: int, checkpoint: Checkpoint, voxel_size: float) -> None:
        """Map and then the checkpoint of a completed iteration of a half (1 or 2) of class k (from 0).

        Raises
        ------
        OutputError
            Nothing written earlier is lost.
        """
        path = self.path / f"run_it{checkpoint.state.iteration:03d}{_half_name(k, half)}.mrc"
        with writing(path):
            write_mrc(path, checkpoint.state.maps[0], voxel_size)
        write_checkpoint(path.with_name(f"{path.stem}_checkpoint"), checkpoint)
        self._of_halves[k, half] = checkpoint.history
        self._write_run_json("running")
        self._forget_unfinished(_half_name(k, half))
        self._forget_old_checkpoints(_half_name(k, half))

    def half_checkpoint(self, k: int, half: int) -> Checkpoint | None:
        """What a half (1 or 2) of class k (from 0) is to go on with, as `begin` says; None where it begins."""
        found = self._last(_half_name(k, half))
        if found is not None:
            self._of_halves[k, half] = found.history
        return found

    def write_unfinished(self, iteration: Unfinished, k: int | None = None, half: int = 0) -> None:
        """An iteration that has begun, of the run or of a half (1 or 2) of class k (from 0).

        Raises
        ------
        OutputError
            Nothing written earlier is lost, but the same iteration less far.
        """
        stem = self._unfinished("" if k is None else _half_name(k, half))
        _write_arrays(stem, _unfinished_arrays(iteration), {"iteration": iteration.iteration, "of": self._run_of()})

    def write_final(
        self,
        result: Result,
        source: ParticleSource,
        remarks: Sequence[str] = (),
        *,
        columns: Mapping[str, NDArray[Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
        recenter: bool = False,
    ) -> None:
        """The final maps and STAR files.

        Parameters
        ----------
        result : Result
        source : ParticleSource
        remarks : what the user was warned of, for run.json
        columns : what else run_data.star says of each particle
        facts : what else run.json says, JSON-ready
        recenter : also run_data_recentered.star, see `io.positions.recentered`

        Raises
        ------
        OutputError
            Nothing written earlier is lost.
        """
        self._write_maps("run", result.maps, result.voxel_size)
        self._write_coverage("run", result.state)
        self._write_data("run", result.posterior, source, columns)
        table = _table(source)
        if recenter and isinstance(table, StarTable):
            path = self.path / "run_data_recentered.star"
            with writing(path):
                found = particle_columns(result.posterior, result.voxel_size) | dict(columns or {})
                moved = recentered(table, result.best.shifts * result.voxel_size)
                write_particles_star(path, table, found | moved)
        self._facts |= facts or {}
        path = self.path / "run_class_posteriors.star"
        with writing(path):
            write_star(path, {"class_posteriors": posterior_columns(result.posterior, table.image_names)})
        self._facts["warnings"] = list(remarks)
        self._facts["converged_at"] = result.converged_at
        self._history = result.history
        self._write_run_json("finished")

    def has_checkpoint(self) -> bool:
        """Whether a later process has something to go on from."""
        return bool(self._checkpoints())

    def _our_files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _is_ours(path.name))

    def _checkpoints(self, part: str = "") -> list[int]:
        """Iterations with a checkpoint of the run or of a part of it, the last one first."""
        pattern = re.compile(rf"run_it(\d{{3,}}){part}_checkpoint\.json")
        found = (pattern.fullmatch(path.name) for path in self.path.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _forget_old_checkpoints(self, part: str = "") -> None:
        for iteration in self._checkpoints(part)[CHECKPOINTS_KEPT:]:
            for suffix in (".json", ".npz"):  # the JSON first: without it the npz is no checkpoint
                (self.path / f"run_it{iteration:03d}{part}_checkpoint{suffix}").unlink(missing_ok=True)

    def _last_whole(self, part: str = "") -> Checkpoint | None:
        self._forget_old_checkpoints(part)  # a process that was killed may have left one more
        for iteration in self._checkpoints(part):
            stem = self.path / f"run_it{iteration:03d}{part}_checkpoint"
            try:
                return read_checkpoint(stem)
            except (ValueError, KeyError, TypeError, OSError) as error:
                warnings.warn(f"checkpoint {stem}.json is damaged and left out: {error}", stacklevel=5)
        return None

    def _last(self, part: str = "") -> Checkpoint | None:
        """The iteration of the run or of a part of it that was stopped, or else the last whole checkpoint."""
        whole, stem = self._last_whole(part), self._unfinished(part)
        if not stem.with_suffix(".json").exists():
            return whole
        try:
            stopped = _read_unfinished(stem, self._run_of())
        except (ValueError, KeyError, TypeError, OSError) as error:
            warnings.warn(f"{stem}.json is left out, its iteration begins anew: {error}", stacklevel=5)
            return whole
        if whole is None or stopped.iteration > whole.state.iteration:
            return stopped
        self._forget_unfinished(part)  # a process that was killed may have left it
        return whole

    def _unfinished(self, part: str) -> Path:
        return self.path / f"run{part}_unfinished"

    def _forget_unfinished(self, part: str = "") -> None:
        for suffix in (".json", ".npz"):
            self._unfinished(part).with_suffix(suffix).unlink(missing_ok=True)

    def _run_of(self) -> Any:
        """What must be the same for an iteration to be gone on with: half of it by other options makes no sense."""
        options = {
            name: value for name, value in self._facts.get("options", {}).items() if name not in (*_FREE, *_AFTERWARDS)
        }
        return as_written({"options": options, "version": self._facts.get("versions", {}).get("faml_gpu")})

    def _newest_checkpoint(self) -> Checkpoint | None:
        found = self._last()
        if found is not None:
            return found
        if damaged := self._checkpoints():
            raise InputError(
                f"output {self.path}: all {len(damaged)} checkpoints are damaged; start again with --overwrite"
            )
        warnings.warn(f"{self.path} holds no checkpoint yet: starting from the beginning", stacklevel=4)
        return None

    def _read_run_json(self) -> dict[str, Any]:
        path = self.path / "run.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); start again with --overwrite") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path}: found format {found!r}, expected {FORMAT}; start again with --overwrite")
        return content

    def _write_run_json(self, status: str) -> None:
        now = _now()
        mine = {"started": self._began, "ended": now, "seconds": round(time.monotonic() - self._clock, 2)}
        sessions = [*self._sessions, mine]
        content = {
            **self._facts,
            "started": sessions[0]["started"],
            "ended": now if status == "finished" else None,
            "wall_seconds": round(sum(session["seconds"] for session in sessions), 2),
            "sessions": sessions,
            "status": status,
            "iterations": [asdict(record) for record in self._history],
        }
        if self._of_halves:
            content["iterations_of_halves"] = [
                {"class": k + 1, "half": half, "iterations": [asdict(record) for record in history]}
                for (k, half), history in sorted(self._of_halves.items())
            ]
        text = json.dumps(finite(content), indent=1, allow_nan=False)
        _replace(self.path / "run.json", text.encode() + b"\n")

    def _write_maps(self, stem: str, maps: NDArray[np.float32], voxel_size: float) -> None:
        for k, volume in enumerate(maps, start=1):
            path = self.path / f"{stem}_class{k:03d}.mrc"
            with writing(path):
                write_mrc(path, volume, voxel_size)

    def _write_coverage(self, stem: str, state: State) -> None:
        """What was measured of the averages: an array `planes`, see `maximization.coverage_planes`."""
        path = self.path / f"{stem}_coverage.npz"
        if state.seen is None:
            path.unlink(missing_ok=True)  # that of the run when it had fewer iterations
            return
        buffer = BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, planes=state.seen)
        _replace(path, buffer.getvalue())

    def _write_data(
        self,
        stem: str,
        posterior: Posterior,
        source: ParticleSource,
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        path = self.path / f"{stem}_data.star"
        with writing(path):
            table = _table(source)
            found = particle_columns(posterior, source.voxel_size)
            write_particles_star(path, table, {**found, **(columns or {})})
            if isinstance(table, DynamoTable):
                best = best_poses(posterior)
                text = table.table_text(Poses(best.rotations, best.shifts, best.classes))
                _replace(path.with_suffix(".tbl"), text.encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sessions(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Begin, end and wall seconds of the processes that a run took so far, as run.json has them."""
    found = about.get("sessions")
    whole = isinstance(found, list) and all(
        isinstance(s, dict) and isinstance(s.get("started"), str) and isinstance(s.get("seconds"), (int, float))
        for s in found
    )
    return list(found) if whole and isinstance(found, list) else []


def _is_ours(name: str) -> bool:
    return bool(_OURS.fullmatch(name) or _OF_HALVES.fullmatch(name))


def _half_name(k: int, half: int) -> str:
    """As RELION has it in its file names."""
    return f"_half{half}_class{k + 1:03d}"


def _table(source: ParticleSource) -> ParticleTable:
    """The table the particles came with; one with made-up names for a source that has none."""
    table: ParticleTable | None = getattr(source, "table", None)
    if table is None:
        names = tuple(f"{i:06d}@particles" for i in range(1, len(source) + 1))
        table = FreshTable(names, source.voxel_size, source.box)
    return table


def particle_columns(posterior: Posterior, voxel_size: float) -> dict[str, NDArray[Any]]:
    """RELION's columns of each particle's best class and pose; angles in degrees, origins in Angstrom."""
    best = best_poses(posterior)
    angles = matrix_to_relion(best.rotations)
    origins = -best.shifts * voxel_size
    return {
        "rlnAngleRot": angles[:, 0],
        "rlnAngleTilt": angles[:, 1],
        "rlnAnglePsi": angles[:, 2],
        "rlnOriginXAngst": origins[:, 0],
        "rlnOriginYAngst": origins[:, 1],
        "rlnOriginZAngst": origins[:, 2],
        "rlnClassNumber": best.classes + 1,
        "rlnMaxValueProbDistribution": best.probability,
        "rlnNrOfSignificantSamples": posterior.n_significant,
        "rlnLogLikeliContribution": posterior.log_likelihood,
    }


def posterior_columns(posterior: Posterior, image_names: Sequence[str]) -> dict[str, Any]:
    """Columns of the side table: what is known of each particle beside its best class and pose."""
    classes = enumerate(posterior.class_probability.T, start=1)
    return {
        "rlnImageName": list(image_names),
        **{f"famlClassProbability{k:03d}": column for k, column in classes},
        "famlPoseEntropy": pose_entropy(posterior),
        "rlnNrOfSignificantSamples": posterior.n_significant,
        "rlnLogLikeliContribution": posterior.log_likelihood,
    }


def write_checkpoint(stem: Path, checkpoint: Checkpoint) -> None:
    """`stem`.npz with all numbers and `stem`.json with its checksum; the JSON last, it makes the checkpoint valid.

    Raises
    ------
    OutputError
    """
    _write_arrays(stem, _checkpoint_arrays(checkpoint), {"iteration": checkpoint.state.iteration})


def read_checkpoint(stem: Path) -> Checkpoint:
    """What `write_checkpoint` wrote, bit for bit.

    Raises
    ------
    ValueError, KeyError, TypeError, OSError
        A file is missing or not what was written.
    """
    return _checkpoint_of(_read_arrays(stem, _read_description(stem)))


def _checkpoint_arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    arrays = _named("state", checkpoint.state) | _named("posterior", checkpoint.posterior)
    return arrays | {"history": np.array(json.dumps([asdict(record) for record in checkpoint.history]))}


def _checkpoint_of(arrays: Mapping[str, Any]) -> Checkpoint:
    state, posterior = State(**_of_name("state", arrays)), Posterior(**_of_name("posterior", arrays))
    return Checkpoint(state, posterior, [IterationRecord(**record) for record in json.loads(arrays["history"])])


def _unfinished_arrays(iteration: Unfinished) -> dict[str, Any]:
    arrays = _checkpoint_arrays(iteration)
    arrays |= _named("total", iteration.total) | _named("running", iteration.of_part.on_host())
    arrays |= {"part": iteration.part, "seconds": np.array(json.dumps(iteration.seconds))}
    if iteration.posteriors:
        arrays |= _named("batches", joined(iteration.posteriors))
    if iteration.starts is not None:
        arrays["likelihoods"] = np.array(iteration.starts.likelihoods, np.float64)
        if iteration.starts.best is not None:
            arrays |= {f"best_{name}": array for name, array in _checkpoint_arrays(iteration.starts.best).items()}
    return arrays


def _unfinished_of(arrays: Mapping[str, Any]) -> Unfinished:
    before, batches, starts = _checkpoint_of(arrays), _of_name("batches", arrays), None
    if "likelihoods" in arrays:
        best = _of_name("best", arrays)
        starts = Starts(arrays["likelihoods"].tolist(), _checkpoint_of(best) if best else None)
    return Unfinished(
        before.state,
        before.posterior,
        before.history,
        Accumulators(**_of_name("total", arrays)),
        Accumulators(**_of_name("running", arrays)),
        arrays["part"],
        [BatchPosterior(**batches)] if batches else [],
        json.loads(arrays["seconds"]),
        starts,
    )


def _read_unfinished(stem: Path, run_of: Any) -> Unfinished:
    """What `RunFolder.write_unfinished` wrote; a ValueError also where it belongs to another run than `run_of`."""
    description = _read_description(stem)
    if description["of"] != run_of:
        raise ValueError("it was begun with other options, or another version")
    return _unfinished_of(_read_arrays(stem, description))


def _named(name: str, values: Any) -> dict[str, Any]:
    """The fields of a dataclass under names of their own; without those that are None."""
    found = {f"{name}_{field.name}": getattr(values, field.name) for field in fields(values)}
    return {key: value for key, value in found.items() if value is not None}


def _of_name(name: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{name}_"): value for key, value in arrays.items() if key.startswith(f"{name}_")}


def _write_arrays(stem: Path, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    content = buffer.getvalue()
    description = {
        "format": FORMAT,
        **about,
        "file": f"{stem.name}.npz",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    _replace(stem.with_name(f"{stem.name}.npz"), content)
    _replace(stem.with_name(f"{stem.name}.json"), json.dumps(description, indent=1).encode() + b"\n")


def _read_description(stem: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
    if description["format"] != FORMAT:
        raise ValueError(f"format {description['format']!r}, expected {FORMAT}")
    return description


def _read_arrays(stem: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    content = stem.with_name(f"{stem.name}.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise ValueError(f"the checksum of {stem.name}.npz is not the one in the JSON")
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        return {name: _plain(arrays[name]) for name in arrays}


def _plain(array: NDArray[Any]) -> Any:
    """Scalars were Python numbers before they were saved."""
    return array.item() if array.ndim == 0 else array


def _check_agreement(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other options or other data."""
    now = as_written(now)
    _check_options(before, now["options"], tell=True)
    for name, value in now["start"].items():
        found = before.get("start", {}).get(name)
        if found != value:
            raise InputError(f"start ({name}): found {value!r}, expected {found!r} as in the run resumed")
    if before.get("input", {}).get("fingerprint") != now["input"]["fingerprint"]:
        raise InputError(
            f"input {now['input']['path']}: not the data of the run resumed "
            f"({before.get('input', {}).get('path')}): other particles, weights or voxel size"
        )
    for name, value in now["versions"].items():
        found = before.get("versions", {}).get(name)
        if found != value:
            warnings.warn(f"the run resumed was made with {name} {found}, this is {value}", stacklevel=4)


def _check_options(before: Mapping[str, Any], new: Mapping[str, Any], *, tell: bool = False) -> None:
    """Refuse to go on with other options, as written; `tell`: of those that may differ."""
    old = before.get("options")
    if not isinstance(old, dict):
        raise InputError(
            f"run.json: found {old!r} for options, expected what a run writes; start again with --overwrite"
        )
    defaults = as_written(asdict(Options()))  # of options that were not there when the run began
    for name, value in new.items():
        found = old.get(name, defaults.get(name))
        if name == "iterations":
            if found is not None and value < found:
                raise InputError(f"option iterations: found {value}, expected at least the {found} of the run resumed")
        elif name in _AFTERWARDS:
            continue
        elif name in _FREE:
            if found != value and tell:
                warnings.warn(
                    f"the run resumed had {name} {found!r}, now {value!r}: figures may differ in the last digits",
                    stacklevel=5,
                )
        elif found != value:
            raise InputError(f"option {name}: found {value!r}, expected {found!r} as in the run resumed")


def as_written(content: Any) -> Any:
    """As it comes back from run.json: tuples as lists."""
    return json.loads(json.dumps(finite(content), allow_nan=False))


def _write_model(path: Path, stem: str, checkpoint: Checkpoint, source: ParticleSource) -> None:
    """The parameters of the model: RELION's names where it has them, faml... otherwise."""
    state, record = checkpoint.state, checkpoint.history[-1]
    n_classes, box = len(state.maps), source.box
    shells = np.arange(len(state.sigma2))
    blocks: dict[str, dict[str, Any]] = {
        "model_general": {
            "rlnReferenceDimensionality": 3,
            "rlnOriginalImageSize": box,
            "rlnPixelSize": source.voxel_size,
            "rlnNrClasses": n_classes,
            "rlnCurrentIteration": state.iteration,
            "rlnCurrentResolution": record.resolution,
            "rlnSigmaOffsetsAngst": state.zeta * source.voxel_size,
            "rlnLogLikelihood": record.log_likelihood,
            "famlSigma": record.sigma,
            "famlRMax": record.r_max,
            "famlBandwidth": record.bandwidth,
            "famlCandidates": record.candidates,
            "famlChangedClass": record.changed_class,
            "famlPoseChange": record.pose_change,
            "famlNearIdentity": record.near_identity,
            "famlConverged": int(record.converged),
        },
        "model_classes": {
            "rlnReferenceImage": [f"{stem}_class{k:03d}.mrc" for k in range(1, n_classes + 1)],
            "rlnClassDistribution": state.alpha,
            "famlClassSize": record.class_sizes,
            "famlFourierCoverage": record.coverage,
            "famlAngularCoverage": angular_coverage(checkpoint.posterior, frames_of(source)),
            "famlEffectiveParticles": effective_particles(checkpoint.posterior.class_probability),
            "famlMapCorrelation": record.map_correlation,
        },
        "model_noise": {
            "rlnSpectralIndex": shells,
            "rlnResolution": shells / (box * source.voxel_size),
            "rlnSigma2Noise": state.sigma2,
        },
        "model_seconds": {
            "famlStep": list(record.seconds),
            "famlSeconds": list(record.seconds.values()),
        },
    }
    if state.noise_groups is not None:
        blocks["model_noise_groups"] = {
            "famlNoiseGroup": np.repeat(state.noise_groups, len(shells)),
            "rlnSpectralIndex": np.tile(shells, len(state.noise_groups)),
            "rlnSigma2Noise": state.group_sigma2.ravel(),
        }
    if state.scale is not None:
        blocks["model_scale"] = {"famlParticle": np.arange(1, len(state.scale) + 1), "famlScale": state.scale}
    write_star(path, {name: items for name, items in blocks.items() if name != "model_seconds" or record.seconds})


def finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _acquire(path: Path) -> int:
    """An exclusive lock, which the system releases when the process ends, however it ends.

    A lock file of a process that was killed is taken over; the loop is for one removed between open and lock.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            raise InputError(f"output {path.parent}: found it in use by {holder or 'another process'}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(lock)
                raise
            # Some cluster file systems are mounted without locks: better to run than to refuse.
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): run only one process in it", stacklevel=3
            )
            return lock
        try:
            same = os.path.samestat(os.fstat(lock), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return lock
        os.close(lock)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses to write there becomes an `OutputError` with the reason."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}. What was written before is kept.") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is seen whole or not at all, even if power fails."""
    with writing(path):
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)
