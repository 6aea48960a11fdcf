"""What is evaluated and what it is compared with, read and checked against each other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Poses
from faml_gpu.errors import InputError
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import star_poses
from faml_gpu.io.star import StarTable, read_particles_star
from faml_gpu.run_reader import open_run

__all__ = ["Found", "NamedMap", "PathLike", "Truth", "as_list", "read_inputs", "read_truth"]

PathLike = str | os.PathLike[str]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

VOXEL_TOLERANCE = 0.01  # relative, between maps


@dataclass(frozen=True)
class NamedMap:
    path: Path
    volume: Float32
    voxel_size: float | None


@dataclass(frozen=True)
class Found:
    """What is evaluated; `names`, `poses` and `labels` only for a run."""

    maps: list[NamedMap]
    voxel_size: float
    names: list[str]
    folder: Path  # that relative names start from
    poses: Poses | None
    labels: Int64
    about: dict[str, Any]  # run.json


@dataclass(frozen=True)
class Truth:
    labels: Int64  # in the run's order
    poses: Poses | None
    n_classes: int


def as_list(found: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [found] if isinstance(found, (str, os.PathLike)) else list(found)


def read_inputs(
    found: PathLike | Sequence[PathLike],
    truth_maps: Sequence[PathLike],
    iteration: int | None,
    voxel_size: float | None,
) -> tuple[Found, list[NamedMap]]:
    """What is evaluated and the truth maps: all of one box and voxel size."""
    paths = [Path(path) for path in as_list(found)]
    if not paths:
        raise InputError("evaluate: found nothing to evaluate, expected a run folder or maps")
    run = paths[0] if len(paths) == 1 and not paths[0].is_file() else None
    about: dict[str, Any] = {}
    table: StarTable | None = None
    if run is not None:
        if not run.is_dir():
            raise InputError(f"{run}: does not exist, expected a run folder or a map (.mrc)")
        files = open_run(run, iteration)
        about, paths, table = files.about, files.maps, files.particles
    elif iteration is not None:
        raise InputError("--iteration: belongs to a run folder, found maps")
    maps, references = [_read_map(path) for path in paths], [_read_map(Path(path)) for path in truth_maps]
    voxel = _common_grid([*maps, *references], voxel_size)
    for reference in references:
        if np.ptp(reference.volume) == 0:
            raise InputError(f"{reference.path}: found the same value in every voxel, expected a structure")
    if run is None or table is None:
        return Found(maps, voxel, [], Path(), None, np.zeros(0, np.int64), {}), references
    poses = star_poses(table, voxel)
    if poses.classes is None or poses.classes.max() >= len(maps):
        raise InputError(f"{table.path}: expected an rlnClassNumber from 1 to {len(maps)} for each particle")
    source = Path(str(about.get("input", {}).get("path", "")))
    folder = source.parent if source.suffix == ".star" else Path()
    return Found(maps, voxel, table.strings("rlnImageName"), folder, poses, poses.classes, about), references


def _read_map(path: Path) -> NamedMap:
    volume, voxel_size = read_mrc(path)
    if len(set(volume.shape)) != 1:
        raise InputError(f"{path}: {' x '.join(map(str, volume.shape[::-1]))} voxels, expected a cube")
    if not np.isfinite(volume).all():
        raise InputError(f"{path}: found NaN or Inf, expected numbers")
    return NamedMap(path, volume, voxel_size)


def _common_grid(maps: list[NamedMap], option: float | None) -> float:
    """The voxel size all maps agree on; their boxes must be equal too."""
    first = maps[0]
    stated = [("--voxel-size", option)] + [(str(m.path), m.voxel_size) for m in maps]
    sizes = [(name, size) for name, size in stated if size is not None]
    if not sizes:
        raise InputError(f"{first.path}: no voxel size in the header, expected one there or --voxel-size")
    name, voxel = sizes[0]
    if not (math.isfinite(voxel) and voxel > 0):
        raise InputError(f"{name}: found {voxel:g}, expected more than 0 A")
    for other, size in sizes[1:]:
        if not abs(size / voxel - 1) <= VOXEL_TOLERANCE:
            raise InputError(
                f"{other}: found a voxel size of {size:g} A, expected {voxel:g} A as {name}; resample the map first"
            )
    for m in maps[1:]:
        if m.volume.shape != first.volume.shape:
            raise InputError(
                f"{m.path}: found a box of {len(m.volume)} voxels, expected {len(first.volume)} as {first.path}; "
                "crop or pad the map first"
            )
    return voxel


def read_truth(path: PathLike, found: Found) -> Truth:
    if found.poses is None:
        raise InputError(f"{path}: true poses and classes need a run folder to compare with, found maps")
    table = read_particles_star(path)
    rows = _matching_rows(found, table)
    has_poses = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"} <= set(table.columns)
    poses = None
    if has_poses:
        given = star_poses(table, found.voxel_size)
        poses = Poses(given.rotations[rows], given.shifts[rows])
    labels = np.zeros(len(rows), np.int64)
    if "rlnClassNumber" in table.columns:
        numbers = table.floats("rlnClassNumber")[rows]
        if (numbers < 1).any() or (numbers != np.rint(numbers)).any():
            row = int(rows[np.argmax((numbers < 1) | (numbers != np.rint(numbers)))])
            raise InputError(f"{table.row_name(row)}: rlnClassNumber, expected whole numbers from 1")
        labels = numbers.astype(np.int64) - 1
    return Truth(labels, poses, int(labels.max()) + 1)


def _matching_rows(found: Found, table: StarTable) -> Int64:
    """The row of the truth for each particle of the run: by path as written, by absolute path, or by file name."""
    names = table.strings("rlnImageName")

    def parts(name: str) -> tuple[str, str]:
        number, _, path = name.rpartition("@")
        return number, path

    keys: list[tuple[Callable[[str], tuple[str, str]], Callable[[str], tuple[str, str]]]] = [
        (lambda name: (parts(name)[0], os.path.normpath(parts(name)[1])),) * 2,
        (
            lambda name: (parts(name)[0], os.path.abspath(found.folder / parts(name)[1])),
            lambda name: (parts(name)[0], os.path.abspath(table.path.parent / parts(name)[1])),
        ),
        (lambda name: (parts(name)[0], os.path.basename(parts(name)[1])),) * 2,
    ]
    missing: list[str] = []
    for run_key, truth_key in keys:
        row_of = {truth_key(name): row for row, name in enumerate(names)}
        wanted = [run_key(name) for name in found.names]
        missing = [name for name, key in zip(found.names, wanted, strict=True) if key not in row_of]
        # Equal names in different folders say nothing by themselves.
        if not missing and len(row_of) == len(names) and len(set(wanted)) == len(wanted):
            return np.array([row_of[key] for key in wanted], dtype=np.int64)
    reason = (
        f"{len(missing)} of the run's {len(found.names)} particles are not there ({', '.join(missing[:3])})"
        if missing
        else "file names alone are not unique, and the paths differ"
    )
    raise InputError(
        f"{table.path}: the rlnImageName do not match those of the run: {reason}; the truth begins with {names[0]}"
    )
