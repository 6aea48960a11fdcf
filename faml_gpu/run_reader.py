"""A run's folder, read: for `evaluate`, `report` and `view`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faml_gpu.errors import InputError
from faml_gpu.io.star import StarTable, read_particles_star

__all__ = ["RunFiles", "open_run"]


@dataclass(frozen=True)
class RunFiles:
    """What a run left, or one of its iterations.

    Attributes
    ----------
    folder : of the run
    stem : of the files' names: run, or run_it007
    about : run.json
    maps : run_class001.mrc ..., one per class
    particles : run_data.star
    """

    folder: Path
    stem: str
    about: dict[str, Any]
    maps: list[Path]
    particles: StarTable


def open_run(folder: str | os.PathLike[str], iteration: int | None = None, *, unfinished: bool = False) -> RunFiles:
    """The final result of a run, or an iteration of it.

    Parameters
    ----------
    folder : of the run
    iteration : from 1; None is the final result
    unfinished : where the run has not ended, take its last iteration; a final result that is there is an earlier one's

    Raises
    ------
    InputError
        The folder is none of a run, or has no such result.
    """
    folder = Path(folder)
    about = _read_json(folder)
    stem = "run" if iteration is None else f"run_it{iteration:03d}"
    done = _done(about)
    if iteration is None and unfinished and about.get("status") != "finished" and done:
        stem = f"run_it{done:03d}"
    maps = sorted(path for path in folder.iterdir() if re.fullmatch(rf"{stem}_class\d{{3,}}\.mrc", path.name))
    if not maps or not (folder / f"{stem}_data.star").is_file():
        raise InputError(
            f"{folder}: no {stem}_class001.mrc and {stem}_data.star; the run is {about.get('status', 'unfinished')} "
            f"with {done} iterations done (see one of them with --iteration 1 ... {done})"
        )
    return RunFiles(folder, stem, about, maps, read_particles_star(folder / f"{stem}_data.star"))


def _done(about: dict[str, Any]) -> int:
    """Iterations that have ended."""
    records = about.get("iterations")
    return len(records) if isinstance(records, list) else 0


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: does not exist, expected the folder of a run")
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(f"{folder}: no run.json, expected the folder of a faml-gpu run")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(about, dict):
        raise InputError(f"{path}: found {type(about).__name__}, expected what a run writes there")
    return about
