"""Averages against truth maps: alignment, correlation, FSC, hand, symmetry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from faml_gpu import metrics
from faml_gpu.evaluation.classes import Partner
from faml_gpu.evaluation.inputs import Found, NamedMap
from faml_gpu.evaluation.results import Correlation, Hand, MapScore, SymmetryScore
from faml_gpu.fsc import fsc, lowpass, resolution_at
from faml_gpu.geometry import rotation_angle
from faml_gpu.masks import soft_sphere

__all__ = ["EDGE", "Axis", "Comparison", "by_correlation", "map_notes", "symmetry_scores"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Axis = Literal["x", "y", "z", "principal"]

EDGE = 4.0  # voxels, of the soft mask of the FSC
HAND_MARGIN = 0.01  # of r: closer than this, the hand is not told


@dataclass(frozen=True)
class Comparison:
    """How maps are compared."""

    voxel_size: float
    filters: list[float]
    say: Callable[[str], None]
    done: dict[tuple[Path, Path], tuple[Hand, Float32]] = field(default_factory=dict)  # of `as_is`

    def finest(self) -> float:
        """Low-pass of the alignment, Angstrom: the finest asked for, as far as the voxels go."""
        return max(min(self.filters, default=30.0), 2 * self.voxel_size)

    def hand(self, average: Float32, truth: Float32, radius: float) -> tuple[Hand, Float32]:
        """Best alignment of a map, its correlations then, and the map so moved."""
        rotation, shift, r, aligned = metrics.align_map(
            average, truth, voxel_size=self.voxel_size, mask_radius=radius, resolution=self.finest()
        )
        inside = soft_sphere(len(truth), radius / self.voxel_size, 0)
        correlations = []
        for cut in (None, *self.filters):
            first, second = aligned, truth
            if cut is not None:
                first, second = (lowpass(volume, cut, self.voxel_size) for volume in (aligned, truth))
            pearson, plain = (metrics.correlation(first, second, inside, about_mean=mean) for mean in (True, False))
            correlations.append(Correlation(cut, pearson, plain))
        hand = Hand(
            r,
            self.finest(),
            rotation.tolist(),
            float(rotation_angle(rotation, np.eye(3))),
            (shift * self.voxel_size).tolist(),
            correlations,
        )
        return hand, aligned

    def as_is(self, average: NamedMap, truth: NamedMap, radius: float) -> tuple[Hand, Float32]:
        """`hand` of two maps, worked out once."""
        pair = average.path, truth.path
        if pair not in self.done:
            self.say(f"aligning {average.path.name} with {truth.path.name}")
            self.done[pair] = self.hand(average.volume, truth.volume, radius)
        return self.done[pair]

    def score(
        self, average: NamedMap, k: int, truth: NamedMap, partner: Partner, radius: tuple[float, str]
    ) -> MapScore:
        """An average against its truth map, both hands."""
        as_is, aligned = self.as_is(average, truth, radius[0])
        self.say(f"aligning {average.path.name}, mirrored, with {truth.path.name}")
        mirror, _ = self.hand(metrics.mirrored(average.volume), truth.volume, radius[0])
        verdict = "undecided"
        if abs(as_is.r - mirror.r) > HAND_MARGIN:
            verdict = "as is" if as_is.r > mirror.r else "mirrored"
        box = len(truth.volume)
        window = soft_sphere(box, radius[0] / self.voxel_size, EDGE)
        curve = fsc(_on_background(aligned, window), _on_background(truth.volume, window), window)
        crossed = (resolution_at(curve, level, self.voxel_size, box) for level in (0.5, 0.143))
        crossings = [x if math.isfinite(x) else None for x in crossed]
        return MapScore(
            os.fspath(average.path),
            os.fspath(truth.path),
            k + 1,
            partner.truth + 1,
            partner.matched,
            radius[0],
            radius[1],
            as_is,
            mirror,
            verdict,
            (np.arange(len(curve)) / (box * self.voxel_size)).tolist(),
            curve.tolist(),
            crossings[0],
            crossings[1],
            aligned,
        )


def _on_background(volume: Float32, window: Float32) -> Float32:
    """A map less its mean outside the mask, which would show as the mask's own shape at low frequencies."""
    outside = window == 0
    return volume - np.float32(volume[outside].mean(dtype=np.float64)) if outside.any() else volume


def by_correlation(
    found: Found, references: list[NamedMap], radii: list[tuple[float, str]], compare: Comparison
) -> list[Partner | None]:
    """The reference map of each average: one to one as far as it goes, so that the correlations are highest."""
    if len(found.maps) == len(references) == 1:
        return [Partner(0, True)]
    r = np.zeros((len(found.maps), len(references)))
    for k, average in enumerate(found.maps):
        for c, reference in enumerate(references):
            r[k, c] = compare.as_is(average, reference, radii[c][0])[0].r
    rows, columns = optimize.linear_sum_assignment(r, maximize=True)
    matched = {int(k): int(c) for k, c in zip(rows, columns, strict=True)}
    return [Partner(matched.get(k, int(np.argmax(r[k]))), k in matched) for k in range(len(found.maps))]


def map_notes(score: MapScore, found: Found) -> list[str]:
    """What the figures of a map do not say by themselves."""
    name = f"class {score.label}" if found.names else Path(score.map).name
    notes = []
    if score.hand == "mirrored":
        notes.append(
            f"{name}: the MIRROR IMAGE fits {Path(score.truth_map).name} better (r {score.mirrored.r:.3f} against "
            f"{score.as_is.r:.3f} as it is, at {score.as_is.lowpass:g} Å): the hand is flipped. Look at the sign of "
            "the tilt angles, and at the hand of the truth map"
        )
    if not score.matched:
        notes.append(
            f"{name}: no truth is left for it; compared with truth {score.truth}, which another map fits better"
        )
    if score.radius > (len(score.aligned) // 2 - 1) * found.voxel_size - 1e-6:
        notes.append(
            f"{name}: the sphere of {score.radius:.0f} Å fills the box; give --radius if the structure is less"
        )
    return notes


def _own_radius(found: Found, k: int) -> float:
    """Radius where there is no truth map: the run's mask, or the map's own, Angstrom."""
    of_run = found.about.get("resolved", {}).get("mask_radius")
    if isinstance(of_run, (int, float)):
        return float(of_run)
    return metrics.structure_radius(found.maps[k].volume, found.voxel_size)


def symmetry_scores(
    found: Found, scores: list[MapScore], references: list[NamedMap], radius: float | None, order: int, axis: Axis
) -> list[SymmetryScore]:
    out = []
    of_class = {score.label - 1: score for score in scores}
    for k, average in enumerate(found.maps):
        score = of_class.get(k)
        volume = average.volume if score is None else score.aligned
        model = volume if score is None else references[score.truth - 1].volume
        direction, centre = np.eye(3)["xyz".find(axis)], np.zeros(3)
        if axis == "principal":
            direction, centre = metrics.principal_axis(model, found.voxel_size)
        size = radius or (score.radius if score else _own_radius(found, k))
        voxels = min(size / found.voxel_size, len(volume) // 2 - 1.0)

        def of(
            values: Float32, direction: Float64 = direction, centre: Float64 = centre, voxels: float = voxels
        ) -> float:
            return metrics.symmetry_score(values, order, direction, mask_radius=voxels, centre=centre)

        source = Path(score.truth_map if score else average.path).name
        out.append(
            SymmetryScore(
                os.fspath(average.path),
                k + 1,
                order,
                direction.tolist(),
                f"{axis} of {source}",
                of(volume),
                None if score is None else of(model),
            )
        )
    return out
