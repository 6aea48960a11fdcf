"""Classes and poses of a run against the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from faml_gpu import metrics
from faml_gpu.evaluation.inputs import Found, Truth
from faml_gpu.evaluation.results import Classification, ClassScore, PoseScore

__all__ = ["Partner", "by_particles", "classification", "pose_scores"]

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

FEWEST_POSES = 4  # a gauge has six parameters: fewer poses than this say nothing after it is taken out


@dataclass(frozen=True)
class Partner:
    """The truth of a found class, from 0; `matched` if the pair is one of the one-to-one matching."""

    truth: int
    matched: bool


def by_particles(found: Found, truth: Truth) -> list[Partner | None]:
    """The true class of each found one by shared particles; one in excess gets that of most of its particles."""
    counts = metrics.confusion_matrix(found.labels, truth.labels, (len(found.maps), truth.n_classes))
    rows, columns = optimize.linear_sum_assignment(counts, maximize=True)
    matched = {int(k): int(c) for k, c in zip(rows, columns, strict=True) if counts[k, c] > 0}
    return [
        None if counts[k].sum() == 0 else Partner(matched.get(k, int(np.argmax(counts[k]))), k in matched)
        for k in range(len(found.maps))
    ]


def classification(found: Found, truth: Truth, partners: list[Partner | None]) -> Classification:
    counts = metrics.confusion_matrix(found.labels, truth.labels, (len(found.maps), truth.n_classes))
    label_of = {p.truth: k for k, p in enumerate(partners) if p is not None and p.matched}
    # Found classes that are matched to none count as labels beyond the true ones.
    names = np.array([p.truth if p is not None and p.matched else truth.n_classes for p in partners], dtype=np.int64)
    named = names[found.labels]
    precision, recall, f1 = (
        score(named, truth.labels) for score in (metrics.precision, metrics.recall, metrics.f1_score)
    )
    present = np.flatnonzero(counts.sum(axis=0))
    classes = [
        ClassScore(
            int(c) + 1,
            label_of[int(c)] + 1 if int(c) in label_of else None,
            int(counts[:, c].sum()),
            float(precision[c]),
            float(recall[c]),
            float(f1[c]),
        )
        for c in present
    ]
    return Classification(
        counts.tolist(),
        classes,
        macro_f1=float(f1[present].mean()),
        macro_precision=float(precision[present].mean()),
        macro_recall=float(recall[present].mean()),
        accuracy=float(np.mean(named == truth.labels)),
    )


def pose_scores(
    found: Found,
    truth: Truth,
    partners: list[Partner | None],
    point_groups: list[str],
    groups: dict[str, Float64],
    notes: list[str],
) -> list[PoseScore]:
    """Per found class, as each average has a pose of its own, and over all."""
    assert found.poses is not None
    assert truth.poses is not None
    scores = []
    for k, partner in enumerate(partners):
        if partner is None:
            continue
        rows = np.flatnonzero((found.labels == k) & (truth.labels == partner.truth))
        if len(rows) < FEWEST_POSES:
            notes.append(f"class {k + 1}: no pose errors, only {len(rows)} particles of true class {partner.truth + 1}")
            continue
        name = point_groups[partner.truth]
        poses = (
            found.poses.rotations[rows],
            found.poses.shifts[rows],
            truth.poses.rotations[rows],
            truth.poses.shifts[rows],
            groups[name],
        )
        gauge, offset = metrics.common_gauge(*poses)
        angles, distances = metrics.pose_errors(*poses)
        scores.append(
            _pose_score(
                (k + 1, partner.truth + 1, name),
                rows,
                angles,
                distances * found.voxel_size,
                gauge.tolist(),
                (offset * found.voxel_size).tolist(),
            )
        )
    if len(scores) > 1:
        rows, angles, shifts = (
            np.concatenate([getattr(s, name) for s in scores]) for name in ("rows", "angles", "shifts")
        )
        scores.append(_pose_score((None, None, None), rows, angles, shifts, None, None))
    return scores


def _pose_score(
    what: tuple[int | None, int | None, str | None],
    rows: Int64,
    angles: Float64,
    shifts: Float64,
    gauge_rotation: list[list[float]] | None,
    gauge_shift: list[float] | None,
) -> PoseScore:
    return PoseScore(
        *what,
        len(rows),
        _median_and_quartiles(angles),
        float(np.mean(angles <= 10)),
        float(np.mean(angles <= 20)),
        _median_and_quartiles(shifts),
        gauge_rotation,
        gauge_shift,
        rows,
        angles,
        shifts,
    )


def _median_and_quartiles(values: Float64) -> tuple[float, float, float]:
    low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
    return middle, low, high
