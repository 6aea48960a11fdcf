"""Particles of a STAR file, a folder, or arrays: checked once before any work, then read batch by batch.

All classes here are `faml_gpu.data.ParticleSource`s. Boxes stay on the disk; distinct Fourier weights are found by
content, so that thousands of particles of one tilt series share one.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray

from faml_gpu.data import Batch, Groups, Poses, Progress
from faml_gpu.errors import InputError
from faml_gpu.geometry import relion_to_matrix
from faml_gpu.io.dynamo import DynamoTable, read_dynamo_table
from faml_gpu.io.em import read_em_header
from faml_gpu.io.mrc import VolumeHeader, read_float16, read_header, read_volume
from faml_gpu.io.positions import box_frames
from faml_gpu.io.stacks import STACKS, stack_headers
from faml_gpu.io.star import FreshTable, ParticleTable, StarTable, read_particles_star
from faml_gpu.weights import (
    amplitudes,
    divisible,
    missing_wedge,
    read_layout,
    shell_means,
    tapered,
    wedge_consistency,
    wedge_warning,
)

__all__ = ["ArrayParticles", "FileParticles", "open_particles", "star_poses"]

Boxes = NDArray[np.float32] | NDArray[np.float16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Item = TypeVar("Item")
Out = TypeVar("Out")

SMALLEST_BOX = 10
VOXEL_TOLERANCE = 0.01  # relative, between STAR, headers and option
OPTICS_TOLERANCE = 0.001  # relative, between optics groups
# What says the pixel size of the boxes, the first that there is; the last two together (RELION 3.0; of rescaled boxes
# RELION scales the detector's).
PIXEL_SIZES = (("rlnImagePixelSize",), ("rlnPixelSize",), ("rlnDetectorPixelSize", "rlnMagnification"))
NAMED = 3  # examples given where many files are at fault
WEDGE_SAMPLE = 8  # boxes whose power is compared with their weights, at least; one for each weight
WEDGE_WEIGHTS = 256  # weights that are looked at: each costs about what checking its box did
WEIGHT_CACHE = 256 << 20  # bytes of weights kept in memory
READERS = 4
HEADERS = 64  # that one of them reads at a time


class FileParticles:
    """Subtomograms in files, checked; made by `open_particles`.

    Attributes
    ----------
    box : N, voxels
    voxel_size : Angstrom
    poses : those the STAR file gives, or None where they are not to be used
    table : what `write_particles_star` writes results into
    paths : the N-voxel boxes, in the input's order
    frames : (n, 3, 3) float64, A_sub of each box, see `io.positions.box_frames`; the identity without a STAR file
    groups : by optics group and by tomogram, as far as the STAR file tells
    weight_ids, weight_index : names of the distinct weights, and which of them each particle has
    warnings : what the user should be told (weights and boxes do not fit), usually empty
    listed : how many particles the input has: more than there are here, if only a sample was opened
    """

    def __init__(
        self,
        headers: Sequence[VolumeHeader],
        voxel_size: float,
        table: ParticleTable,
        weights: Sequence[VolumeHeader | Float32],
        weight_ids: Sequence[str],
        weight_index: Int64,
        poses: Poses | None,
        groups: Mapping[str, Groups],
        frames: Float64,
        means: Float64 | None,
    ) -> None:
        self._headers = headers
        self._weights = weights
        self._means = means
        self.groups = groups
        self.frames = frames
        self.voxel_size = voxel_size
        self.table = table
        self.weight_ids = tuple(weight_ids)
        self.weight_index = weight_index
        self.poses = poses
        self.box = headers[0].shape[0]
        self.paths = [header.path for header in headers]
        self.warnings: tuple[str, ...] = ()
        self.listed = len(headers)
        weight_bytes = 4 * self.box**2 * (self.box // 2 + 1)
        self._weight = lru_cache(maxsize=max(1, WEIGHT_CACHE // weight_bytes))(self._read_weight)

    def __len__(self) -> int:
        return len(self._headers)

    def files(self) -> list[Path]:
        """What `read` reads."""
        return self.paths + [weight.path for weight in self._weights if isinstance(weight, VolumeHeader)]

    def read(self, indices: Int64) -> Batch:
        """Read boxes from the disk, with the distinct weights they need.

        Those stored as float16 stay so, and go to a GPU as half the bytes.

        Parameters
        ----------
        indices : (B,) particles, from 0

        Raises
        ------
        InputError
            A file changed or vanished since it was checked.
        """
        headers = [self._headers[i] for i in indices]
        half = all(header.float16 for header in headers)
        boxes = np.empty((len(indices), self.box, self.box, self.box), np.float16 if half else np.float32)
        for row, volume in enumerate(_in_threads(read_float16 if half else read_volume, headers)):
            boxes[row] = volume
        return _batch(boxes, self.weight_index[indices], self.weight_ids, self._weight, self._means)

    def _read_weight(self, which: int) -> Float32:
        weight = self._weights[which]
        if not isinstance(weight, VolumeHeader):
            return weight
        return _load_weight(weight, self.box, premultiplied=self._means is not None)


class ArrayParticles:
    """Subtomograms held in memory.

    Parameters
    ----------
    boxes : (n, N, N, N) array, `[z, y, x]`
    voxel_size : Angstrom
    weights : None (all of Fourier space observed), one (N, N, N//2 + 1) array, or a sequence of distinct ones,
        rfftn layout
    weight_index : (n,) row of `weights` of each particle; needed where there are several
    poses : a start, or None
    names : of the particles, for STAR files
    groups : kind ("optics", "tomogram") -> `Groups`
    premultiplied : the transforms of the boxes are multiplied by `weights`, sums of CTF^2: 0 or more

    Raises
    ------
    InputError
        Boxes not cubic, not finite or constant; weights of another shape or outside [0, 1]; lengths that do not match.
    """

    def __init__(
        self,
        boxes: ArrayLike,
        voxel_size: float,
        weights: ArrayLike | Sequence[ArrayLike] | None = None,
        weight_index: ArrayLike | None = None,
        poses: Poses | None = None,
        names: Sequence[str] | None = None,
        groups: Mapping[str, Groups] | None = None,
        premultiplied: bool = False,
    ) -> None:
        self._boxes = np.asarray(boxes, dtype=np.float32)
        shape = self._boxes.shape
        if len(shape) != 4 or not shape[0] or len(set(shape[1:])) != 1 or shape[1] < SMALLEST_BOX:
            raise InputError(f"boxes: shape {shape}, expected (n, N, N, N) with n >= 1 and N >= {SMALLEST_BOX}")
        n, self.box = shape[:2]
        faults = [(f"box {i}", fault) for i, box in enumerate(self._boxes) if (fault := _fault(box))]
        _refuse(faults, n, "boxes", "finite values that vary")
        if not (np.isfinite(voxel_size) and voxel_size > 0):
            raise InputError(f"voxel_size: found {voxel_size}, expected more than 0 A")
        half = (self.box, self.box, self.box // 2 + 1)
        stack = np.ones(half, np.float32) if weights is None else np.asarray(weights, dtype=np.float32)
        stack = stack[None] if stack.ndim == 3 else stack
        if stack.shape[1:] != half:
            raise InputError(f"weights: shape {stack.shape}, expected {half} or (W, *{half})")
        read = [read_layout(w, self.box, f"weights[{i}]", premultiplied=premultiplied) for i, w in enumerate(stack)]
        self._weights = [divisible(weight) for weight in read] if premultiplied else read
        self._means = np.mean([shell_means(weight) for weight in self._weights], axis=0) if premultiplied else None
        if weight_index is None and len(stack) > 1:
            raise InputError(f"weight_index: missing, expected {n} rows of the {len(stack)} weights")
        index = np.zeros(n, np.int64) if weight_index is None else np.asarray(weight_index, dtype=np.int64)
        if index.shape != (n,) or index.min() < 0 or index.max() >= len(stack):
            raise InputError(f"weight_index: expected {n} numbers from 0 to {len(stack) - 1}")
        if poses is not None and (poses.rotations.shape != (n, 3, 3) or poses.shifts.shape != (n, 3)):
            raise InputError(f"poses: expected {n} rotations (3, 3) and shifts (3,)")
        for kind, g in (groups or {}).items():
            if g.index.shape != (n,) or g.index.min() < 0 or g.index.max() >= len(g.names):
                raise InputError(f"groups[{kind!r}]: expected {n} numbers from 0 to {len(g.names) - 1}")
        if premultiplied and weights is None:
            raise InputError("premultiplied: found boxes without weights, expected those they are multiplied by")
        if names is not None and len(names) != n:
            raise InputError(f"names: found {len(names)}, expected {n}")
        self.voxel_size = float(voxel_size)
        self.poses = poses
        self.groups: Mapping[str, Groups] = dict(groups or {})
        self.weight_index = index
        self.weight_ids = tuple(_content_id(weight) for weight in self._weights)
        self.table = FreshTable(
            tuple(names) if names is not None else tuple(f"particle{i:06d}.mrc" for i in range(1, n + 1)),
            self.voxel_size,
            self.box,
        )

    def __len__(self) -> int:
        return len(self._boxes)

    def read(self, indices: Int64) -> Batch:
        """See `faml_gpu.data.ParticleSource`."""
        weight = self._weights.__getitem__
        return _batch(self._boxes[indices], self.weight_index[indices], self.weight_ids, weight, self._means)


def open_particles(
    source: str | os.PathLike[str],
    *,
    tilt_range: tuple[float, float] | None = None,
    tilt_axis: str = "y",
    voxel_size: float | None = None,
    use_poses: bool = False,
    boxes: str | os.PathLike[str] | None = None,
    sample: int | None = None,
    progress: Progress | None = None,
) -> FileParticles:
    """Open subtomograms and check all of them: headers first, then each file is read once.

    Parameters
    ----------
    source : a RELION STAR file (3.0, 3.1, 4, 5) of 3-D subtomograms; a Dynamo table (`.tbl`); a folder of `.mrc` or
        `.em` boxes, or a glob of boxes; or a stack of boxes in one file (`.mrc`, `.mrcs`, `.npy`). Paths in a STAR
        file are relative to it, or else to the working directory.
    tilt_range, tilt_axis : of all particles, degrees; needed unless the STAR file has `rlnCtfImage` or the Dynamo table
        has tilt ranges
    voxel_size : Angstrom; needed where neither table nor headers have it. A header's 0 or exactly 1 A counts as
        unset; a weight's header is never asked.
    use_poses : take angles, origins and classes of the STAR file as `poses`. A box cut by RELION 4 or 5 has the pose
        rlnAngle* alone in its own frame; rlnTomoSubtomogram* is not composed. Or those of the Dynamo table.
    boxes : folder of the boxes of a Dynamo table, if it is not the table's
    sample : of all boxes read the headers only, and look into so many of them, spread over the input; what comes back
        are these. For a quick look: values of the others are not checked.
    progress : called with (step, done, total)

    Raises
    ------
    InputError
        Anything that could not be averaged: see the message.
    """
    path = Path(source)
    if voxel_size is not None and not (np.isfinite(voxel_size) and voxel_size > 0):
        raise InputError(f"--voxel-size: found {voxel_size}, expected more than 0 A")
    suffix = path.suffix.lower() if path.is_file() else ""
    if boxes is not None and suffix != ".tbl":
        raise InputError(f"--boxes: belongs to a Dynamo table, found {source}")
    table: StarTable | None = None
    dynamo: DynamoTable | None = None
    premultiplied, groups = False, {}
    weight_names: list[str] | None = None
    headers: list[VolumeHeader] | None = None
    names: Sequence[str]
    if suffix == ".star":
        table = read_particles_star(path)
        _check_three_dimensional(table)
        premultiplied, groups = _premultiplied(table), _groups(table)
        names = table.strings("rlnImageName")
        weight_names = table.strings("rlnCtfImage") if "rlnCtfImage" in table.columns else None
        if weight_names is None:
            _check_common_frame(table, tilt_range)
    elif suffix == ".tbl":
        dynamo = read_dynamo_table(path)
        names = [str(name) for name in dynamo.find_boxes(path.parent if boxes is None else Path(boxes))]
        groups = dynamo.tomograms()
    else:
        names = _list_boxes(source)
        if suffix in STACKS:
            headers = stack_headers(path)
            names = names if len(headers) == 1 else [f"{i:06d}@{path}" for i in range(1, len(headers) + 1)]
        if use_poses:
            raise InputError(f"--use-poses: {source} is no STAR file or Dynamo table and has no poses")
    if weight_names is not None and tilt_range is not None:
        raise InputError(f"--tilt-range: {path} has a weight per particle (rlnCtfImage); give only one of the two")
    if weight_names is None and tilt_range is None and dynamo is None:
        lacks = "has no rlnCtfImage" if table else "has no weights"
        raise InputError(f"{source} {lacks}: the tilt range is needed (--tilt-range LO HI, degrees)")

    if tilt_axis != "y" and tilt_range is None:
        raise InputError(f"--tilt-axis: goes with --tilt-range; {source} says what was seen by itself")
    folder = path.parent if table else Path()
    weight_paths = _existing(weight_names, folder, table, "rlnCtfImage") if weight_names is not None and table else []
    if headers is None:
        paths = _existing(names, folder, table, "rlnImageName")
        headers = _read_headers(paths, progress)
    box = _common_box(headers)
    if table is not None:
        _check_image_size(table, box)
    voxel = _agreed_voxel_size(headers, table or dynamo, voxel_size, source)
    poses = None
    if use_poses:
        poses = dynamo.poses() if dynamo is not None else star_poses(table, voxel) if table is not None else None
    listed = len(headers)
    frames = np.tile(np.eye(3), (listed, 1, 1)) if table is None else box_frames(table)
    rows = np.arange(listed) if sample is None else np.unique(np.linspace(0, listed - 1, sample).astype(np.int64))

    weights: list[VolumeHeader | Float32]
    means: Float64 | None = None
    if weight_names is not None:
        mine = [weight_paths[i] for i in rows]
        files, ids, index, means = _distinct_weights(mine, box, progress, premultiplied=premultiplied)
        weights, weight_labels = list(files), [str(header.path) for header in files]
    else:
        stated = [(tilt_axis, *tilt_range)] * listed if tilt_range is not None else dynamo.tilting() if dynamo else []
        series = list(dict.fromkeys(stated[i] for i in rows))
        weights = [missing_wedge(box, (low, high), axis) if axis else _all_seen(box) for axis, low, high in series]
        weight_labels = [f"tilt range {low:g} {high:g} about {axis or 'none'}" for axis, low, high in series]
        ids = [_content_id(np.asarray(weight)) for weight in weights]
        index = np.array([series.index(stated[i]) for i in rows], dtype=np.int64)
    if sample is not None:
        headers = [headers[i] for i in rows]
        groups = {kind: Groups(g.names, g.index[rows]) for kind, g in groups.items()}
        poses = None if poses is None else poses.take(rows)
        frames = frames[rows]
    written: ParticleTable = FreshTable(tuple(names), voxel, box)
    if table is not None:
        written = replace(table, voxel_size=voxel, box=box)
    elif dynamo is not None:
        written = replace(dynamo, image_names=tuple(names), voxel_size=voxel, box=box)
    result = FileParticles(
        headers,
        voxel,
        written,
        weights,
        ids,
        index,
        poses,
        groups,
        frames,
        means,
    )
    result.listed = listed
    _check_boxes(headers, rows, progress)
    result.warnings = _wedge_warnings(result, weight_labels, progress)
    return result


def _in_threads(
    function: Callable[[Item], Out], items: Sequence[Item], progress: Progress | None = None, step: str = ""
) -> Iterator[Out]:
    """Results in the order of `items`; reading waits for the disk and releases the interpreter meanwhile."""
    pool = ThreadPoolExecutor(READERS)
    try:
        for done, out in enumerate(pool.map(function, items), 1):
            if progress is not None:
                progress(step, done, len(items))
            yield out
    finally:
        # After an error or Ctrl-C: do not read the remaining files first.
        pool.shutdown(cancel_futures=True)


def _read_header(path: Path) -> VolumeHeader:
    return read_em_header(path) if path.suffix.lower() == ".em" else read_header(path)


def _read_headers(paths: Sequence[Path], progress: Progress | None) -> list[VolumeHeader]:
    """Of each file once, many at a time: to hand one to a thread takes as long as to read it."""
    files = list(dict.fromkeys(paths))
    parts = [files[first : first + HEADERS] for first in range(0, len(files), HEADERS)]

    def tell(step: str, done: int, total: int) -> None:
        if progress is not None:
            progress(step, min(len(files), HEADERS * done), len(files))

    def read(part: Sequence[Path]) -> list[VolumeHeader]:
        return [_read_header(path) for path in part]

    of_parts = _in_threads(read, parts, tell, "reading headers")
    found = dict(zip(files, (header for part in of_parts for header in part), strict=True))
    return [found[path] for path in paths]


def _all_seen(box: int) -> Float32:
    return np.ones((box, box, box // 2 + 1), np.float32)


def _batch(
    boxes: Boxes, index: Int64, ids: Sequence[str], weight: Callable[[int], Float32], means: Float64 | None
) -> Batch:
    """`means`, of premultiplied boxes: what is common to their weights, see `weights.amplitudes`."""
    distinct, inverse = np.unique(index, return_inverse=True)
    rows = [int(which) for which in distinct]
    read = np.stack([weight(row) for row in rows])
    return Batch(
        boxes=boxes,
        weights=read if means is None else np.stack([amplitudes(w, means) for w in read]),
        weight_index=inverse.astype(np.int64),
        weight_ids=tuple(ids[row] for row in rows),
        multiplied=None if means is None else read,
    )


def _content_id(weight: Float32) -> str:
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()


def _load_weight(header: VolumeHeader, box: int, *, premultiplied: bool) -> Float32:
    weight = read_layout(read_volume(header), box, str(header.path), premultiplied=premultiplied)
    return divisible(weight) if premultiplied else weight


def _distinct_weights(
    paths: Sequence[Path], box: int, progress: Progress | None, *, premultiplied: bool
) -> tuple[list[VolumeHeader], list[str], Int64, Float64 | None]:
    """One file for each distinct content, its name, which of them each particle has, and means of premultiplied ones.

    The means are those over the shells of all distinct weights.
    """
    files = list(dict.fromkeys(paths))
    headers = list(_in_threads(read_header, files))

    def content(header: VolumeHeader) -> tuple[str, Float64 | None]:
        weight = _load_weight(header, box, premultiplied=premultiplied)
        return _content_id(weight), shell_means(weight) if premultiplied else None

    contents = list(_in_threads(content, headers, progress, "checking weights"))
    ids = [name for name, _ in contents]
    distinct = {name: row for row, name in enumerate(dict.fromkeys(ids))}
    of_file = {file: distinct[name] for file, name in zip(files, ids, strict=True)}
    first = [headers[ids.index(name)] for name in distinct]
    curves = [curve for curve in dict(contents).values() if curve is not None]
    means = np.mean(curves, axis=0) if premultiplied else None
    return first, list(distinct), np.array([of_file[path] for path in paths], dtype=np.int64), means


def _list_boxes(source: str | os.PathLike[str]) -> list[str]:
    path = Path(source)
    if path.is_dir():
        files = [name for name in path.iterdir() if name.is_file()]
        kinds = {kind: [str(f) for f in files if f.suffix.lower() == kind] for kind in (".mrc", ".em")}
        if all(kinds.values()):
            counts = " and ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
            raise InputError(f"{source}: found {counts} files, expected boxes of one kind; give a pattern ('*.em')")
        names, expected = kinds[".mrc"] or kinds[".em"], ".mrc or .em files"
    elif path.is_file():
        names, expected = [str(path)], ""
    elif glob.has_magic(os.fspath(source)):
        names = [name for name in glob.glob(os.fspath(source)) if Path(name).is_file()]
        expected = "files that match"
    else:
        raise InputError(f"{source}: does not exist, expected a STAR file, a folder of .mrc boxes, or a glob of boxes")
    if not names:
        raise InputError(f"{source}: no {expected}, expected subtomograms")
    unfit = [name for name in names if not _fits_in_star(name)]
    if unfit:
        raise InputError(
            f"{source}: {len(unfit)} of {len(names)} names cannot stand in a STAR file: "
            f"{_listed(map(repr, unfit), len(unfit))}; expected UTF-8 without line ends, and one kind of quotes at most"
        )
    return sorted(names)


def _fits_in_star(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return False
    return not ("\n" in name or "\r" in name or ("'" in name and '"' in name))


def _existing(names: Sequence[str], folder: Path, table: StarTable | None, column: str) -> list[Path]:
    """Paths relative to the STAR file, or else to the working directory; all that are nowhere are counted."""
    known: dict[str, Path | None] = {}
    for name in names:
        if name not in known:
            candidates = (folder / name, Path(name))
            known[name] = next((path for path in candidates if _is_file(path)), None)
    paths = [known[name] for name in names]
    found = [path for path in paths if path is not None]
    if len(found) < len(paths):
        rows = [row for row, path in enumerate(paths) if path is None]
        examples = [
            f"{names[row]} ({f'line {table.lines[row]}' if table else f'particle {row + 1}'})" for row in rows[:NAMED]
        ]
        raise InputError(
            f"{table.path if table else folder}: {column} of {len(rows)} of {len(paths)} particles does not exist: "
            f"{_listed(examples, len(rows))}; expected relative to {folder} or to the working directory {Path.cwd()}"
        )
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission, or no name that a file can have
        return False


def _listed(examples: Iterable[str], total: int) -> str:
    shown = list(examples)[:NAMED]
    return ", ".join(shown) + (", ..." if total > len(shown) else "")


def _refuse(faults: Sequence[tuple[str, str]], total: int, what: str, expected: str) -> None:
    if faults:
        examples = _listed((f"{name} ({fault})" for name, fault in faults), len(faults))
        raise InputError(f"{len(faults)} of {total} {what} cannot be used: {examples}; expected {expected}")


def _check_three_dimensional(table: StarTable) -> None:
    """Refuse 2-D stacks, which the columns tell of before any file is opened."""
    hint = "expected one 3-D subtomogram (.mrc) per particle; RELION 5: extract without 2-D stacks"
    if table.general.get("rlnTomoSubTomosAre2DStacks", "0") not in ("0", "0.0"):
        raise InputError(f"{table.path}: rlnTomoSubTomosAre2DStacks is 1 (2-D stacks), {hint}")
    for group, value in table.optics_values("rlnImageDimensionality").items():
        if _as_number(value) != 3:
            raise InputError(f"{table.path}: rlnImageDimensionality is {value:.60} in optics group {group}, {hint}")
    for column in ("rlnImageName", "rlnCtfImage"):
        if column in table.columns:
            for row, name in enumerate(table.strings(column)):
                if "@" in name or name.lower().endswith((".mrcs", ".st")):
                    raise InputError(f"{table.row_name(row)}: {column} {name} is a 2-D image or stack, {hint}")


def _premultiplied(table: StarTable) -> bool:
    """Whether the boxes are multiplied by their CTF (RELION 4 and later: CTF times CTF, summed over the tilts)."""
    column = "rlnCtfDataAreCtfPremultiplied"
    values = table.optics_values(column)
    for group, value in values.items():
        if _as_number(value) not in (0, 1):
            raise InputError(f"{table.path}: {column} is {value:.60} in optics group {group}, expected 0 or 1")
    if len({_as_number(value) for value in values.values()}) > 1:
        listed = ", ".join(f"{value:.60} in {group}" for group, value in values.items())
        raise InputError(f"{table.path}: {column} differs between optics groups ({listed}), expected the same in all")
    premultiplied = any(_as_number(value) == 1 for value in values.values())
    if premultiplied and "rlnCtfImage" not in table.columns:
        raise InputError(
            f"{table.path}: {column} is 1, but there is no rlnCtfImage, expected the sum of CTF^2 that each box is "
            "multiplied by"
        )
    return premultiplied


def _groups(table: StarTable) -> dict[str, Groups]:
    """By optics group and by tomogram, as far as there are columns; named as there."""
    found = {}
    for kind, column in (
        ("optics", "rlnOpticsGroup"),
        ("tomogram", "rlnTomoName"),
        ("tomogram", "rlnMicrographName"),
    ):
        if column in table.columns and kind not in found:
            names, index = np.unique(np.array(table.strings(column)), return_inverse=True)
            found[kind] = Groups(tuple(str(name) for name in names), index.astype(np.int64))
    return found


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _check_common_frame(table: StarTable, tilt_range: tuple[float, float] | None) -> None:
    """One wedge for all needs boxes cut in the tomogram's own frame."""
    if tilt_range is None:
        return
    turned = np.abs(box_frames(table) - np.eye(3)).max(axis=(1, 2)) > 1e-4
    if turned.any():
        raise InputError(
            f"{table.row_name(int(np.argmax(turned)))}: the boxes of {int(turned.sum())} of {table.n_rows} particles "
            "are turned against the tomogram (rlnTomoSubtomogramRot/Tilt/Psi), so that one --tilt-range does not hold "
            "for all; expected a weight per particle (rlnCtfImage)"
        )


def _common_box(headers: Sequence[VolumeHeader]) -> int:
    first = headers[0]
    if len(set(first.shape)) != 1:
        size = " x ".join(map(str, first.shape[::-1]))
        stack = " (a stack of 2-D images?)" if first.shape[1] == first.shape[2] else ""
        raise InputError(f"{first.path}: {size} voxels{stack}, expected a cubic 3-D subtomogram")
    other = [header for header in headers if header.shape != first.shape]
    box = first.shape[0]
    faults = [(str(header.path), " x ".join(map(str, header.shape[::-1]))) for header in other]
    _refuse(faults, len(headers), "boxes", f"{box} x {box} x {box} voxels as {first.path}")
    if box < SMALLEST_BOX:
        raise InputError(f"{first.path}: box of {box} voxels, expected at least {SMALLEST_BOX}")
    return box


def _check_image_size(table: StarTable, box: int) -> None:
    for group, value in table.optics_values("rlnImageSize").items():
        if _as_number(value) != box:
            raise InputError(
                f"{table.path}: rlnImageSize is {value:.60} in optics group {group}, but the boxes have {box} voxels"
            )


def _star_voxel_size(table: StarTable) -> float | None:
    """Angstrom, as optics groups or the particles' own columns say it, see `PIXEL_SIZES`; None where they do not."""
    for names in PIXEL_SIZES:
        found = [table.numbers(name) for name in names]
        whole = [column for column in found if column is not None]
        if len(whole) == len(names):
            break
    else:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = whole[0] if len(whole) == 1 else 1e4 * whole[0] / whole[1]  # micrometre to Angstrom
    for row in np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))[:1]:
        place = table.place(int(row), names[0])
        raise InputError(f"{table.path}: pixel size is {sizes[row]:g} in {place}, expected more than 0 A")
    low, high = int(sizes.argmin()), int(sizes.argmax())
    if sizes[high] > sizes[low] * (1 + OPTICS_TOLERANCE):
        raise InputError(
            f"{table.path}: pixel sizes differ: {sizes[low]:g} A in {table.place(low, names[0])}, {sizes[high]:g} A in "
            f"{table.place(high, names[0])}; expected the same for all particles"
        )
    return float(sizes[low])


def _agreed_voxel_size(
    headers: Sequence[VolumeHeader],
    table: StarTable | DynamoTable | None,
    option: float | None,
    source: str | os.PathLike[str],
) -> float:
    """The one voxel size that table, headers and option agree on."""
    stated: list[tuple[str, float]] = []
    if table is not None:
        size = table.stated_voxel_size() if isinstance(table, DynamoTable) else _star_voxel_size(table)
        if size is not None:
            stated.append((str(table.path), size))
    if option is not None:
        stated.append(("--voxel-size", option))
    for header in headers:
        size = header.voxel_size
        # 1 A is what many programs write when they do not know; headers count in float32.
        if size is not None and abs(size - 1.0) > 1e-6:
            stated.append((str(header.path), size))
    if not stated:
        raise InputError(
            f"{source}: no voxel size in {'the table or ' if table else ''}the headers of the boxes "
            "(0 and exactly 1 A count as unset); give --voxel-size (Angstrom)"
        )
    name, voxel = stated[0]
    for other, size in stated[1:]:
        if abs(size - voxel) > VOXEL_TOLERANCE * voxel:
            raise InputError(f"{other}: voxel size {size:g} A, but {voxel:g} A in {name}; expected the same")
    return voxel


def star_poses(table: StarTable, voxel_size: float) -> Poses:
    angle_columns = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    if missing := [column for column in angle_columns if column not in table.columns]:
        raise InputError(f"--use-poses: {table.path} has no {', '.join(missing)}")
    angles = np.stack([table.floats(column) for column in angle_columns], axis=-1)
    shifts = np.zeros((table.n_rows, 3))
    for axis, letter in enumerate("XYZ"):
        if f"rlnOrigin{letter}Angst" in table.columns:
            shifts[:, axis] = -table.floats(f"rlnOrigin{letter}Angst") / voxel_size
        elif f"rlnOrigin{letter}" in table.columns:
            shifts[:, axis] = -table.floats(f"rlnOrigin{letter}")
    classes = None
    if "rlnClassNumber" in table.columns:
        numbers = table.floats("rlnClassNumber")
        # 0 is what RELION writes before any classification.
        classes = numbers.astype(np.int64) - 1 if (numbers >= 1).all() else None
    return Poses(relion_to_matrix(angles), shifts, classes)


def _fault(volume: Float32) -> str | None:
    low, high = float(volume.min()), float(volume.max())  # NaN if any voxel is
    if not (np.isfinite(low) and np.isfinite(high)):
        return "NaN or Inf"
    return f"constant, {low:g}" if low == high else None


def _check_boxes(headers: Sequence[VolumeHeader], rows: Int64, progress: Progress | None) -> None:
    """`rows` of the input, from 0, that they are."""
    in_stack = len({header.path for header in headers}) < len(headers)

    def check(header: VolumeHeader) -> str | None:
        return _fault(read_volume(header))

    found = _in_threads(check, headers, progress, "checking boxes")
    faults = [
        (f"{row + 1:06d}@{header.path}" if in_stack else str(header.path), fault)
        for row, header, fault in zip(rows, headers, found, strict=True)
        if fault
    ]
    _refuse(faults, len(headers), "boxes", "finite values that vary")


def _wedge_warnings(particles: FileParticles, names: Sequence[str], progress: Progress | None) -> tuple[str, ...]:
    """Compare each distinct weight (called `names`) with a few of its boxes.

    Of very many weights, a sample spread over the input.
    """
    n_weights = len(particles.weight_ids)
    chosen = np.unique(np.linspace(0, n_weights - 1, WEDGE_WEIGHTS).astype(np.int64))
    each = -(-WEDGE_SAMPLE // len(chosen))

    def compare(which: int) -> str | None:
        members = np.flatnonzero(particles.weight_index == which)
        batch = particles.read(members[np.unique(np.linspace(0, len(members) - 1, each).astype(np.int64))])
        spectrum: NDArray[Any] = scipy.fft.rfftn(tapered(batch.boxes.astype(np.float32, copy=False)), axes=(1, 2, 3))
        text = wedge_warning(wedge_consistency(spectrum.real**2 + spectrum.imag**2, batch.weights[0]))
        count = f"{len(spectrum)} boxes" if len(spectrum) > 1 else "1 box"
        return f"{names[which]} ({count}): {text}" if text else None

    found = [text for text in _in_threads(compare, chosen.tolist(), progress, "checking wedges") if text]
    if not found:
        return ()
    of_all = f"{len(chosen)} looked at" if len(chosen) < n_weights else f"{n_weights}"
    told = "; ".join(found[:NAMED]) + ("; ..." if len(found) > NAMED else "")
    return (f"weights and boxes do not fit, {len(found)} of {of_all}: {told}",)
