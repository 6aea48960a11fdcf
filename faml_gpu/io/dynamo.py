"""Dynamo tables: poses, tilt ranges and tomograms of boxes named by their tags, and the table written back.

Columns, from 1: 1 tag, 2 aligned, 4-6 dx dy dz, 7-9 tdrot tilt narot, 13 kind of tilting, 14-15 its range about y,
16-17 about x, 20 tomogram, 22 class, 34 reference, 36 voxel size. Source: the Dynamo wiki, "Table".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Groups, Poses
from faml_gpu.errors import InputError
from faml_gpu.geometry import dynamo_to_matrix, matrix_to_dynamo
from faml_gpu.io.star import Columns, FreshTable

__all__ = ["DynamoTable", "read_dynamo_table"]

Float64 = NDArray[np.float64]

TAG, ALIGNED, SHIFT, ANGLES = 0, 1, slice(3, 6), slice(6, 9)
TILTING, ABOUT_Y, ABOUT_X = 12, slice(13, 15), slice(15, 17)
TOMOGRAM, CLASS, REFERENCE, VOXEL_SIZE = 19, 21, 33, 35
WHOLE, LARGEST = (TAG, TILTING, TOMOGRAM, CLASS), 2**53  # as float64 numbers them
FEWEST = 9  # columns: tag to narot
SAME_SIZE = 0.001  # relative
NAMED = 3  # examples given where many rows are at fault


@dataclass(frozen=True)
class DynamoTable:
    """A Dynamo table, a `ParticleTable`: as a STAR file its particles are named by their files.

    Attributes
    ----------
    path : of the table
    tokens : rows of values as written
    values : (n, columns) float64
    image_names : of each row's box
    box, voxel_size : voxels, Angstrom; for writing a STAR file
    """

    path: Path
    tokens: tuple[tuple[str, ...], ...]
    values: Float64
    image_names: tuple[str, ...] = ()
    box: int = 0
    voxel_size: float = 0.0

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    def text(self, columns: Columns) -> str:
        """See `ParticleTable`."""
        return FreshTable(self.image_names, self.voxel_size, self.box).text(columns)

    def table_text(self, poses: Poses) -> str:
        """The table with new poses and classes, all else as it came."""
        rows = [list(row) for row in self.tokens]
        angles = matrix_to_dynamo(poses.rotations)
        for i, row in enumerate(rows):
            row[ALIGNED] = "1"
            row[SHIFT] = [f"{x:.5g}" for x in poses.shifts[i]]
            row[ANGLES] = [f"{x:.5f}" for x in angles[i]]
            for column in (CLASS, REFERENCE):
                if poses.classes is not None and column < len(row):
                    row[column] = str(poses.classes[i] + 1)
        return "".join(" ".join(row) + "\n" for row in rows)

    def find_boxes(self, folder: Path) -> list[Path]:
        """The box of each tag in a folder: particle_00012.em or .mrc, with any number of zeros.

        Raises
        ------
        InputError
            Boxes are missing, or there are two of one tag.
        """
        found: dict[int, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            match = re.fullmatch(r"particle_(\d+)\.(em|mrc)", path.name)
            if match and int(match[1]) in found:
                raise InputError(f"{path}: found {found[int(match[1])].name} too, expected one box of a tag")
            if match:
                found[int(match[1])] = path
        tags = self.values[:, TAG].astype(np.int64).tolist()
        if missing := [tag for tag in tags if tag not in found]:
            some = ", ".join(str(tag) for tag in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            raise InputError(
                f"{self.path}: {len(missing)} of {len(tags)} boxes are not in {folder} (tags {some}), expected "
                "particle_000001.em or .mrc ...; give their folder with --boxes"
            )
        return [found[tag] for tag in tags]

    def poses(self) -> Poses:
        """Angles and shifts of the rows, and classes where they are numbered from 1."""
        classes = None
        if self.values.shape[1] > CLASS and (self.values[:, CLASS] >= 1).all():
            classes = self.values[:, CLASS].astype(np.int64) - 1
        return Poses(dynamo_to_matrix(self.values[:, ANGLES]), self.values[:, SHIFT].copy(), classes)

    def tomograms(self) -> dict[str, Groups]:
        """Particles by tomogram, where the table tells."""
        if self.values.shape[1] <= TOMOGRAM or not self.values[:, TOMOGRAM].any():
            return {}
        numbers, index = np.unique(self.values[:, TOMOGRAM].astype(np.int64), return_inverse=True)
        return {"tomogram": Groups(tuple(str(number) for number in numbers), index.astype(np.int64))}

    def stated_voxel_size(self) -> float | None:
        """Angstrom, where the rows say it; 0 and NaN say nothing.

        Raises
        ------
        InputError
            Rows differ.
        """
        if self.values.shape[1] <= VOXEL_SIZE:
            return None
        sizes = self.values[:, VOXEL_SIZE]
        rows = np.flatnonzero(np.isfinite(sizes) & (sizes > 0))
        if not len(rows):
            return None
        low, high = rows[sizes[rows].argmin()], rows[sizes[rows].argmax()]
        if sizes[high] > sizes[low] * (1 + SAME_SIZE):
            raise InputError(
                f"{self.path}: voxel sizes (column 36) differ: {sizes[low]:g} A in row {low + 1}, {sizes[high]:g} A in "
                f"row {high + 1}; expected the same for all particles"
            )
        return float(sizes[low])

    def tilting(self) -> list[tuple[str, float, float]]:
        """Axis ("x", "y", or "" where all was seen) and range of each row's tilt series, degrees.

        Raises
        ------
        InputError
            The table says nothing of it, or of another kind of tilting.
        """
        if self.values.shape[1] <= ABOUT_X.stop - 1:
            raise InputError(
                f"{self.path} has {self.values.shape[1]} columns, none of the tilt range (13 to 17): "
                "it is needed (--tilt-range LO HI, degrees)"
            )
        found = []
        for number, row in enumerate(self.values, 1):
            kind = int(row[TILTING])
            if kind not in (0, 1, 2):
                raise InputError(
                    f"{self.path}, row {number}: kind of tilting (column 13) is {kind}, expected 0 (all seen), 1 "
                    "(about y) or 2 (about x); or give --tilt-range LO HI"
                )
            low, high = row[ABOUT_X if kind == 2 else ABOUT_Y]
            if kind and not -90 <= low < high <= 90:
                raise InputError(
                    f"{self.path}, row {number}: tilt range from {low:g} to {high:g} degrees, expected the lower angle "
                    "first, within -90 to 90; or give --tilt-range LO HI"
                )
            found.append((" yx"[kind].strip(), float(low), float(high)) if kind else ("", 0.0, 0.0))
        return found


def read_dynamo_table(path: str | os.PathLike[str]) -> DynamoTable:
    """Read a table in text form.

    Raises
    ------
    InputError
        Missing, empty or no text; rows of different length, or too short; a value that is no number; a tag twice.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("ascii").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a Dynamo table") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a Dynamo table in text form (byte {error.start})") from None
    tokens = tuple(tuple(line.split()) for line in lines if line.strip())
    if not tokens:
        raise InputError(f"{path}: empty, expected a Dynamo table")
    width = len(tokens[0])
    values = np.empty((len(tokens), width))
    for number, row in enumerate(tokens, 1):
        if len(row) != width or width < FEWEST:
            wanted = f"{width} as in the first" if width >= FEWEST else f"at least {FEWEST}"
            raise InputError(f"{path}, row {number}: {len(row)} columns, expected {wanted}")
        for column, text in enumerate(row):
            try:
                values[number - 1, column] = float(text)
            except ValueError:
                values[number - 1, column] = np.nan
        needed = values[number - 1, : min(width, CLASS + 1)]
        wrong = np.flatnonzero(~np.isfinite(needed))
        if len(wrong):
            raise InputError(f"{path}, row {number}: column {wrong[0] + 1} is {row[wrong[0]]:.60}, expected a number")
        if needed[TAG] != np.rint(needed[TAG]) or needed[TAG] < 0:
            raise InputError(f"{path}, row {number}: tag is {row[TAG]:.60}, expected a whole number")
        large = [column for column in WHOLE if column < len(needed) and abs(needed[column]) > LARGEST]
        if large:
            raise InputError(f"{path}, row {number}: column {large[0] + 1} is {row[large[0]]:.60}, expected a number")
    tags, counts = np.unique(values[:, TAG], return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: tag {tags[counts > 1][0]:g} stands in {counts.max()} rows, expected one")
    return DynamoTable(path, tokens, values)
