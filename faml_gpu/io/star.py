"""STAR files: particles read with every value kept as text, and written back with only our columns changed.

gemmi parses (`gemmi.cif`), but its documents hold no comments and no layout. So writing edits the text of the input:
the places of the particle loop's tokens are found once, checked against what gemmi read, and only the tokens
of columns that change are replaced. All else (comments, blocks, spacing, quotes, digits) stays as it was, byte by byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gemmi import cif
from numpy.typing import NDArray

from faml_gpu.errors import InputError
from faml_gpu.io.atomic import atomic_path

__all__ = ["FreshTable", "ParticleTable", "StarTable", "read_particles_star", "write_particles_star", "write_star"]

# RELION 3.1 and later tell their own files from older ones by this line before each block.
_VERSION = "# version 30001"
# RELION reads no optics table without these two; particles that come without a STAR file have no values for them.
_PLACEHOLDERS = {"rlnVoltage": "300.000000", "rlnSphericalAberration": "2.700000", "rlnAmplitudeContrast": "0.100000"}
_PLACEHOLDER_NOTE = "not known to faml_gpu, RELION's usual values: correct before use"
# Pixels in STAR files of RELION 3.0, Angstrom since.
_PIXEL_COLUMNS = {f"rlnOrigin{x}{prior}": f"rlnOrigin{x}{prior}Angst" for x in "XYZ" for prior in ("", "Prior")}

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\r\n]*)
      | (?:^;.*?^;(?=\s|\Z))             # text field: from a line that starts with ; to the next such line
      | '(?:[^'\r\n]|'(?!\s|\Z))*'       # a quote inside a quoted value is one not followed by white space
      | "(?:[^"\r\n]|"(?!\s|\Z))*"
      | \S+""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\r\n]*)?")
_HEADING = re.compile(r"^[ \t]*(data_\S*)", re.MULTILINE | re.IGNORECASE)

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]


class ParticleTable(Protocol):
    """What particles are written back into."""

    @property
    def n_rows(self) -> int: ...

    @property
    def image_names(self) -> tuple[str, ...]:
        """rlnImageName of each particle, quotes removed."""

    def text(self, columns: Columns) -> str:
        """The STAR file's text with `columns` set: name without underscore -> one value per particle."""


def write_particles_star(path: str | os.PathLike[str], table: ParticleTable, columns: Columns) -> None:
    """Write particles with `columns` set (replaced, or added behind the others) and all else as it came; atomic.

    Parameters
    ----------
    path : file; replaced only once the new one is complete
    table : of the input
    columns : name without underscore (`rlnAngleRot`) -> one value per particle, in the input's order.
        Floats are written with 6 decimals.

    Raises
    ------
    ValueError
        A column's length is not that of the table.
    OSError
        It cannot be written; a file that was there is unchanged.
    """
    for name, values in columns.items():
        if len(values) != table.n_rows:
            raise ValueError(f"{path}: column {name} has {len(values)} values, expected {table.n_rows}")
    _write_text(path, table.text(columns))


def write_star(path: str | os.PathLike[str], blocks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a STAR file from scratch; atomic.

    Parameters
    ----------
    path : file; replaced only once the new one is complete
    blocks : name (`model_general`) -> items; an item is name without underscore -> value. Where the values are
        sequences (lists, tuples, arrays; all of one length) the block is a loop, else a list of pairs. Floats get
        10 digits.

    Raises
    ------
    ValueError
        A block mixes sequences and single values, or its sequences differ in length.
    """
    parts = []
    for name, items in blocks.items():
        looped = {isinstance(value, list | tuple | np.ndarray) for value in items.values()}
        if len(looped) > 1:
            raise ValueError(f"{path}: block {name} mixes lists and single values")
        if True in looped:
            body = _loop_text({key: _strings(value, ".10g") for key, value in items.items()})
        else:
            body = "".join(f"_{key} {_strings([value], '.10g')[0]}\n" for key, value in items.items())
        parts.append(f"\n{_VERSION}\n\ndata_{name}\n\n{body}\n")
    _write_text(path, "".join(parts))


@dataclass(frozen=True)
class FreshTable:
    """Particles that came without a STAR file.

    Attributes
    ----------
    image_names : rlnImageName, one per particle
    voxel_size : Angstrom
    box : voxels
    """

    image_names: tuple[str, ...]
    voxel_size: float
    box: int

    @property
    def n_rows(self) -> int:
        return len(self.image_names)

    def text(self, columns: Columns) -> str:
        """See `ParticleTable`."""
        particles = {
            "rlnImageName": [cif.quote(name) for name in self.image_names],
            "rlnOpticsGroup": ["1"] * self.n_rows,
        } | {name: _strings(values) for name, values in columns.items()}
        optics = _optics_text(["1"], {}, self.voxel_size, self.box, "\n")
        return f"\n{optics}\n\n{_VERSION}\n\ndata_particles\n\n{_loop_text(particles)}\n"


@dataclass(frozen=True)
class StarTable:
    """The particles of a STAR file, and its text.

    Attributes
    ----------
    path : of the file
    block : name of the block with the particles, without `data_`
    columns : names without underscore, in order
    values : (n, columns) nested tuples, each value as written (quotes included)
    lines : (n,) line number of each row
    optics : column -> values of `data_optics` (quotes removed), or None (RELION 3.0, one block)
    general : pairs of `data_general` (RELION 5), quotes removed
    voxel_size, box : Angstrom, voxels; needed for writing one-block input, which becomes two blocks of RELION 3.1
    """

    path: Path
    block: str
    columns: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    lines: NDArray[np.int64]
    optics: dict[str, list[str]] | None
    general: dict[str, str]
    source: str
    tag_spans: NDArray[np.int64]  # (columns, 2), offsets in `source`
    value_spans: NDArray[np.int64]  # (n, columns, 2)
    voxel_size: float | None = None
    box: int | None = None

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def image_names(self) -> tuple[str, ...]:
        """See `ParticleTable`."""
        return tuple(self.strings("rlnImageName"))

    def row_name(self, row: int) -> str:
        """For messages: where a row (from 0) is."""
        return f"{self.path}, line {self.lines[row]} (particle {row + 1})"

    def strings(self, name: str) -> list[str]:
        """A column as text, quotes removed: names like 0012 stay what they are.

        Raises
        ------
        InputError
            There is no such column.
        """
        if name not in self.columns:
            raise InputError(f"{self.path}: no column {name} in data_{self.block}, expected one")
        column = self.columns.index(name)
        return [cif.as_string(row[column]) for row in self.values]

    def floats(self, name: str) -> NDArray[np.float64]:
        """A column as numbers, (n,) float64.

        Raises
        ------
        InputError
            A value is not a finite number.
        """
        texts = self.strings(name)
        numbers = np.empty(len(texts))
        for row, text in enumerate(texts):
            try:
                numbers[row] = float(text)
            except ValueError:
                numbers[row] = np.nan
            if not np.isfinite(numbers[row]):
                raw = self.values[row][self.columns.index(name)]
                raise InputError(f"{self.row_name(row)}: {name} is {raw:.60}, expected a number")
        return numbers

    def optics_values(self, name: str) -> dict[str, str]:
        """A column of `data_optics` by optics group, for the groups that particles are in; empty where there is none.

        Raises
        ------
        InputError
            rlnOpticsGroup is missing, or names a group that is not there.
        """
        if self.optics is None or name not in self.optics:
            return {}
        if "rlnOpticsGroup" not in self.optics or "rlnOpticsGroup" not in self.columns:
            raise InputError(f"{self.path}: rlnOpticsGroup is missing, expected in data_optics and data_{self.block}")
        values = dict(zip(self.optics["rlnOpticsGroup"], self.optics[name], strict=True))
        groups = self.strings("rlnOpticsGroup")
        for row, group in enumerate(groups):
            if group not in values:
                raise InputError(
                    f"{self.row_name(row)}: rlnOpticsGroup {group} is not in data_optics (there: {', '.join(values)})"
                )
        return {group: values[group] for group in dict.fromkeys(groups)}

    def numbers(self, name: str) -> NDArray[np.float64] | None:
        """A number for each particle, (n,) float64: that of its optics group, or else of its own column, or None.

        RELION has moved columns from the particles to their optics groups; where both are, it reads the groups'.

        Raises
        ------
        InputError
            A value is not a finite number; see `optics_values`.
        """
        of_groups: dict[str, float] = {}
        for group, text in self.optics_values(name).items():
            try:
                of_groups[group] = float(text)
            except ValueError:
                of_groups[group] = np.nan
            if not np.isfinite(of_groups[group]):
                raise InputError(f"{self.path}: {name} is {text:.60} in optics group {group}, expected a number")
        if of_groups:
            return np.array([of_groups[group] for group in self.strings("rlnOpticsGroup")])
        return self.floats(name) if name in self.columns else None

    def place(self, row: int, name: str) -> str:
        """For messages: where `numbers` has the value of a row (from 0) from."""
        if self.optics is not None and name in self.optics:
            return f"optics group {self.strings('rlnOpticsGroup')[row]}"
        return self.row_name(row)

    def text(self, columns: Columns) -> str:
        """See `ParticleTable`. One-block input comes back in two blocks, with origins in Angstrom."""
        line_end = "\r\n" if "\r\n" in self.source else "\n"
        new = {name: _strings(values) for name, values in columns.items()}
        edits: list[tuple[int, int, str]] = []
        names = list(self.columns)
        for pixels, angstrom in _PIXEL_COLUMNS.items():
            if pixels in names and angstrom not in names and self.voxel_size is not None:
                column = names.index(pixels)
                names[column] = angstrom
                edits.append((*self.tag_spans[column], f"_{angstrom}"))
                new.setdefault(angstrom, _strings(self.floats(pixels) * self.voxel_size))
        if self.optics is None:
            edits.append(self._two_blocks(new, line_end))
        for column, name in enumerate(names):
            if name in new:
                spans = self.value_spans[:, column].tolist()
                edits += [(start, end, value) for (start, end), value in zip(spans, new[name], strict=True)]
        added = [name for name in new if name not in names]
        if added:
            edits.append(self._new_tags(added, line_end))
            rows = zip(*(new[name] for name in added), strict=True)
            row_ends = self.value_spans[:, -1, 1].tolist()
            edits += [(end, end, " " + " ".join(row)) for end, row in zip(row_ends, rows, strict=True)]
        return _edited(self.source, edits)

    def _new_tags(self, names: list[str], line_end: str) -> tuple[int, int, str]:
        """The edit that adds tags behind the last one and the comment beside it."""
        match = _REST_OF_LINE.match(self.source, int(self.tag_spans[-1, 1]))
        end = match.end() if match else int(self.tag_spans[-1, 1])
        first = len(self.columns) + 1
        lines = [f"_{name} #{number}" for number, name in enumerate(names, first)]
        tail = "" if self.source[end : end + 1] in ("\r", "\n") else line_end
        return end, end, line_end + line_end.join(lines) + tail

    def _two_blocks(self, new: dict[str, list[str]], line_end: str) -> tuple[int, int, str]:
        """The edit that puts `data_optics` and `data_particles` for the one heading; adds rlnOpticsGroup to `new`."""
        if self.voxel_size is None or self.box is None:
            raise ValueError(f"{self.path}: a one-block STAR needs voxel size and box to be written as RELION 3.1")
        keys: list[tuple[str, ...]]
        if "rlnOpticsGroup" in self.columns:
            keys = [(group,) for group in self.strings("rlnOpticsGroup")]
            groups = [key[0] for key in dict.fromkeys(keys)]
        else:
            shared = [self.strings(name) for name in _PLACEHOLDERS if name in self.columns]
            keys = [tuple(column[row] for column in shared) for row in range(self.n_rows)]
            numbers = {key: str(number) for number, key in enumerate(dict.fromkeys(keys), 1)}
            groups = list(numbers.values())
            new["rlnOpticsGroup"] = [numbers[key] for key in keys]
        first_rows = [keys.index(key) for key in dict.fromkeys(keys)]
        known = {
            name: [self.values[row][self.columns.index(name)] for row in first_rows]
            for name in _PLACEHOLDERS
            if name in self.columns
        }
        optics = _optics_text(groups, known, self.voxel_size, self.box, line_end)
        heading = list(_HEADING.finditer(self.source, 0, int(self.tag_spans[0, 0])))[-1]
        blank = line_end * 2
        return *heading.span(1), f"{optics}{blank}{_VERSION}{blank}data_particles"


def read_particles_star(path: str | os.PathLike[str]) -> StarTable:
    """Read a STAR file of particles: RELION 3.0 (one block) or 3.1, 4, 5 (`data_optics` and `data_particles`).

    The particles are the loop with `rlnImageName`.

    Raises
    ------
    InputError
        Missing, unreadable, empty or no STAR file; no such loop, several, or one without rows.
    """
    path = Path(path)
    try:
        source = path.read_bytes().decode("utf-8-sig")  # some editors put a mark of the encoding first
        if "\r" in source and "\n" not in source:
            raise InputError(f"{path}: line ends of an old Mac (CR), expected LF or CRLF")
        document = cif.read_string(source)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a STAR file of particles") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a STAR file (byte {error.start} is not text)") from None
    except (ValueError, RuntimeError) as error:
        hint = "" if source.isascii() else " (it has characters beyond ASCII, which STAR does not allow in values)"
        raise InputError(f"{path}: not a valid STAR file: {str(error).removeprefix('string:')}{hint}") from None
    if not len(document):
        raise InputError(f"{path}: empty, expected a STAR file of particles")
    found = [(block, item) for block in document for item in block if item.loop and "_rlnImageName" in item.loop.tags]
    blocks = ", ".join(f"data_{block.name.strip()}" for block in document)
    if not found:
        raise InputError(
            f"{path}: no loop with rlnImageName (blocks: {blocks}), expected particles that were extracted as "
            "3-D subtomograms"
        )
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} loops with rlnImageName (blocks: {blocks}), expected one")
    block, item = found[0]
    loop = item.loop
    if not loop.length():
        raise InputError(f"{path}: no particles in block data_{block.name.strip()}")
    tags, values = list(loop.tags), list(loop.values)
    spans = _token_spans(source, item.line_number, [*tags, *values], path)
    n_columns = len(tags)
    value_spans = spans[n_columns:].reshape(-1, n_columns, 2)
    breaks = np.array([match.start() for match in re.finditer("\n", source)], dtype=np.int64)
    return StarTable(
        path=path,
        block=block.name.strip(),
        columns=tuple(tag.removeprefix("_") for tag in tags),
        values=tuple(tuple(values[start : start + n_columns]) for start in range(0, len(values), n_columns)),
        lines=np.searchsorted(breaks, value_spans[:, 0, 0]) + 1,
        optics=_optics_columns(document, path),
        general=_pairs(document, "general"),
        source=source,
        tag_spans=spans[:n_columns],
        value_spans=value_spans,
    )


def _optics_columns(document: cif.Document, path: Path) -> dict[str, list[str]] | None:
    """`data_optics` as columns, whether it is a loop or pairs (one group); None where there is none."""
    block = next((block for block in document if block.name == "optics"), None)
    if block is None:
        return None
    columns = {name: [value] for name, value in _pairs(document, "optics").items()}
    for item in block:
        if item.loop:
            width, rows = len(item.loop.tags), item.loop.length()
            columns = {name: values * rows if len(values) == 1 else values for name, values in columns.items()}
            for column, tag in enumerate(item.loop.tags):
                columns[tag.removeprefix("_")] = [cif.as_string(v) for v in list(item.loop.values)[column::width]]
    if len({len(values) for values in columns.values()}) > 1:
        raise InputError(f"{path}: loops of different length in data_optics, expected one loop")
    return columns


def _pairs(document: cif.Document, name: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for block in document:
        for item in block:
            if block.name == name and isinstance(item.pair, list | tuple):
                tag, value = item.pair
                pairs[tag.removeprefix("_")] = cif.as_string(value)
    return pairs


def _token_spans(source: str, line: int, expected: list[str], path: Path) -> NDArray[np.int64]:
    """Offsets (start, end) of the tags and values of the loop that starts on a line, (tokens, 2)."""
    start = 0
    for _ in range(line - 1):
        start = source.index("\n", start) + 1
    tokens = (match for match in _TOKEN.finditer(source, start) if match["comment"] is None)
    for match in tokens:
        if match[0].lower() == "loop_":
            break
    spans = np.empty((len(expected), 2), dtype=np.int64)
    for index, text in enumerate(expected):
        token = next(tokens, None)
        # gemmi is the authority on what the tokens are; an edit at a wrong place would corrupt the file.
        if token is None or token[0] != text:
            raise InputError(f"{path}: cannot locate {text!r} in the text of the particle loop")
        spans[index] = token.span()
    return spans


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    parts, position = [], 0
    for start, end, replacement in sorted(edits, key=lambda edit: edit[:2]):
        parts += [text[position:start], replacement]
        position = end
    return "".join([*parts, text[position:]])


def _optics_text(groups: list[str], known: dict[str, list[str]], voxel_size: float, box: int, line_end: str) -> str:
    """The block `data_optics`, one row per group."""
    n = len(groups)
    missing = {name: [value] * n for name, value in _PLACEHOLDERS.items() if name not in known}
    columns = {
        "rlnOpticsGroup": groups,
        "rlnOpticsGroupName": [f"opticsGroup{group}" for group in groups],
        "rlnImagePixelSize": [f"{voxel_size:.6f}"] * n,
        "rlnImageSize": [str(box)] * n,
        "rlnImageDimensionality": ["3"] * n,
        **known,
        **missing,
    }
    note = f"# {', '.join(missing)}: {_PLACEHOLDER_NOTE}\n" if missing else ""
    return f"{_VERSION}\n\n{note}data_optics\n\n{_loop_text(columns)}".replace("\n", line_end)


def _loop_text(columns: Mapping[str, list[str]]) -> str:
    tags = "".join(f"_{name} #{number}\n" for number, name in enumerate(columns, 1))
    rows = "".join(" ".join(row) + "\n" for row in zip(*columns.values(), strict=True))
    return f"loop_\n{tags}{rows}"


def _strings(values: Sequence[Any] | NDArray[Any], digits: str = ".6f") -> list[str]:
    """Values as STAR text: strings quoted where they must be, floats with `digits`, whole numbers as they are."""
    texts = []
    for value in values:
        if isinstance(value, float | np.floating):
            text = format(float(value), digits)
            texts.append(text.lstrip("-") if float(text) == 0 else text)
        else:
            texts.append(cif.quote(str(int(value) if isinstance(value, bool | np.bool) else value)))
    return texts


def _write_text(path: str | os.PathLike[str], text: str) -> None:
    # As bytes: the line ends of the input stay what they are.
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())
