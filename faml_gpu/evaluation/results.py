"""What an evaluation finds: the names here are those of evaluation.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu import __version__

__all__ = [
    "ClassScore",
    "Classification",
    "Correlation",
    "Evaluation",
    "Hand",
    "MapScore",
    "PoseScore",
    "SnrScore",
    "SymmetryScore",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

FORMAT = 1  # of evaluation.json


@dataclass(frozen=True)
class ClassScore:
    """A true class: `number` and the found `label` matched to it (from 1; None: none), particles, and scores."""

    number: int
    label: int | None
    particles: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Classification:
    """Found classes against true ones.

    Attributes
    ----------
    confusion : rows are the found classes 1 .. K, columns the true classes 1 .. T; numbers of particles
    classes : per true class that has particles
    macro_f1, macro_precision, macro_recall : means over these
    accuracy : share of the particles in the found class matched to their true one
    """

    confusion: list[list[int]]
    classes: list[ClassScore]
    macro_f1: float
    macro_precision: float
    macro_recall: float
    accuracy: float


@dataclass(frozen=True)
class PoseScore:
    """Errors of the poses of one found class after their common gauge, modulo the point group; None: all classes.

    Attributes
    ----------
    label, truth : found and true class, from 1
    point_group : of the true structure
    particles : in this found class and of this true class: those compared
    angle : median, lower and upper quartile, degrees
    within_10, within_20 : share of them
    shift : median, lower and upper quartile, Angstrom
    gauge_rotation, gauge_shift : the pose of the average with respect to the truth that the poses say (Angstrom)
    rows, angles, shifts : which particles, from 0, and the error of each; not in the JSON
    """

    label: int | None
    truth: int | None
    point_group: str | None
    particles: int
    angle: tuple[float, float, float]
    within_10: float
    within_20: float
    shift: tuple[float, float, float]
    gauge_rotation: list[list[float]] | None
    gauge_shift: list[float] | None
    rows: Int64 = field(repr=False)
    angles: Float64 = field(repr=False)
    shifts: Float64 = field(repr=False)


@dataclass(frozen=True)
class Correlation:
    """Correlation inside the sphere, both maps low-passed to `lowpass` Angstrom (None: as they are).

    `r` is Pearson's, about the mean; `r_chimera` not about the mean.
    """

    lowpass: float | None
    r: float
    r_chimera: float


@dataclass(frozen=True)
class Hand:
    """A map of one hand after its best alignment: `volume` ≈ truth(R⁻¹(x − t)).

    `r` at `lowpass` Angstrom, where it was refined; `rotation` R, `angle` of R in degrees, `shift` t in Angstrom.
    """

    r: float
    lowpass: float
    rotation: list[list[float]]
    angle: float
    shift: list[float]
    correlations: list[Correlation]


@dataclass(frozen=True)
class MapScore:
    """An average against a truth map.

    Attributes
    ----------
    map, truth_map : files
    label, truth : found and true class, from 1
    matched : this pair is one of the one-to-one matching; False for an average in excess, compared with the truth map
        nearest to it
    radius, radius_from : of the sphere, Angstrom, and where it comes from
    as_is, mirrored : best alignment of the average, and of its mirror image
    hand : which fits better: "as is", "mirrored", or "undecided"
    frequency, fsc : of the curve with the truth, in 1/Angstrom, in a soft sphere
    resolution_05, resolution_0143 : Angstrom where it first falls below; None: below from the first shell on
    aligned : (N, N, N) the average moved onto the truth; not in the JSON
    """

    map: str
    truth_map: str
    label: int
    truth: int
    matched: bool
    radius: float
    radius_from: str
    as_is: Hand
    mirrored: Hand
    hand: str
    frequency: list[float]
    fsc: list[float]
    resolution_05: float | None
    resolution_0143: float | None
    aligned: Float32 = field(repr=False)


@dataclass(frozen=True)
class SnrScore:
    """Random pairs of the particles of a class in the found (or true) poses: see `metrics.pair_snr`.

    `snr` holds inside the largest sphere of the box (`radius`, Angstrom), up to `resolution` Angstrom, where both boxes
    were observed. `snr_box` is variance over variance in whole boxes, corners and all frequencies included, if the
    structure lies within the sphere and the band, and the noise is white. With a wedge both come out up to 15 % low:
    the lowest shells, which hold most of a protein's power, are mostly the wedge's edge. With "found" poses that were
    fitted to the noise they come out high; compare with "true".
    """

    poses: str  # "found" or "true"
    label: int
    radius: float
    resolution: float
    pairs: int
    particles: int
    correlation: float
    correlation_error: float
    snr: float
    snr_error: float
    snr_box: float


@dataclass(frozen=True)
class SymmetryScore:
    """Mean pairwise correlation over the `order` rotations about `axis`, and that of the truth map."""

    map: str
    label: int
    order: int
    axis: list[float]
    axis_from: str
    score: float
    truth_score: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; the JSON has the same names.

    `settings` are those used, resolved; `notes` what a reader should know, such as what could not be computed.
    """

    settings: dict[str, Any]
    classification: Classification | None
    poses: list[PoseScore]
    maps: list[MapScore]
    snr: list[SnrScore]
    symmetry: list[SymmetryScore]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: arrays left out, infinity and NaN as null."""
        return {"format": FORMAT, "faml_gpu": __version__, **_plain(self)}


def _plain(value: Any) -> Any:
    """JSON-ready; fields that hold arrays are left out."""
    if is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in fields(value)}
        return {name: _plain(item) for name, item in named.items() if not isinstance(item, np.ndarray)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
