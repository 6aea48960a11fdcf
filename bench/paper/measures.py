"""What is measured on a run's averages, classes and poses: the definitions of `faml-gpu evaluate`, on arrays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from particles import Sample

from faml_gpu import metrics
from faml_gpu.array_backend import Array, to_host
from faml_gpu.data import Batch, ParticleSource, Poses, Posterior
from faml_gpu.evaluation.classes import Partner, by_particles, classification
from faml_gpu.evaluation.inputs import Found, NamedMap, Truth
from faml_gpu.evaluation.maps import Comparison
from faml_gpu.fourier import full_band, make_support
from faml_gpu.maximization import covered
from faml_gpu.plan import Clock, Plan
from faml_gpu.posteriors import best_poses, gathered
from faml_gpu.reading import Ahead

__all__ = ["FILTERS", "convergence", "coverage", "measure"]

Float32 = NDArray[np.float32]

FILTERS = (20.0, 30.0)  # Angstrom
CONVERGENCE_AT = 40.0  # Angstrom, of r by iteration
LOOKED_AT = (1, 2, 4, 7, 11, 16)  # iterations, beside the last


def measure(sample: Sample, maps: Float32, posterior: Posterior) -> tuple[dict[str, Any], list[Float32]]:
    """JSON-ready figures, and the averages moved onto the truth, in the order of the true classes."""
    figures: dict[str, Any] = {}
    aligned: list[Float32] = list(maps)
    best = best_poses(posterior)
    if sample.truth:
        found = Found(
            [NamedMap(Path(f"class{k + 1}"), volume, sample.voxel_size) for k, volume in enumerate(maps)],
            sample.voxel_size,
            [],
            Path(),
            Poses(best.rotations, best.shifts),
            best.classes,
            {},
        )
        truth = Truth(sample.classes, None, len(sample.truth))
        partners = by_particles(found, truth)
        if len(sample.truth) > 1:
            scores = classification(found, truth, partners)
            figures["f1"] = scores.macro_f1
            figures["classification"] = asdict(scores)
        of_truth = _all_matched(partners, len(sample.truth))
        compare = Comparison(sample.voxel_size, list(FILTERS), lambda _: None)
        rows, aligned = [], []
        for c, k in enumerate(of_truth):
            score = compare.score(
                found.maps[k],
                k,
                NamedMap(Path(sample.names[c]), sample.truth[c], sample.voxel_size),
                Partner(c, True),
                (sample.radii[c], "structure"),
            )
            names = ["unfiltered", *(f"{cut:g}" for cut in FILTERS)]
            rows.append(
                {
                    "structure": sample.names[c],
                    "class": k + 1,
                    "particles": int((best.classes == k).sum()),
                    "radius": sample.radii[c],
                    "r": {n: x.r for n, x in zip(names, score.as_is.correlations, strict=True)},
                    "chimera": {n: x.r_chimera for n, x in zip(names, score.as_is.correlations, strict=True)},
                    "r_mirrored": {n: x.r for n, x in zip(names, score.mirrored.correlations, strict=True)},
                    "hand": score.hand,
                    "rotation": score.as_is.rotation,
                    "shift": score.as_is.shift,
                    "fsc": score.fsc,
                    "frequency": score.frequency,
                    "resolution_05": score.resolution_05,
                    "resolution_0143": score.resolution_0143,
                    "poses": _pose_figures(sample, posterior, c, k),
                }
            )
            aligned.append(score.aligned)
        figures["maps"] = rows
    if sample.symmetry_order is not None:
        figures["symmetry"] = [_symmetry(sample, volume) for volume in aligned]
        figures["symmetry_of_truth"] = [_symmetry(sample, volume) for volume in sample.truth]
    return figures, aligned


def _all_matched(partners: list[Partner | None], n_true: int) -> list[int]:
    """The found class of each true one; what shares no particles is paired in order."""
    of_truth = {p.truth: k for k, p in enumerate(partners) if p is not None and p.matched}
    free = [k for k in range(len(partners)) if k not in of_truth.values()]
    return [of_truth[c] if c in of_truth else free.pop(0) for c in range(n_true)]


def _pose_figures(sample: Sample, posterior: Posterior, c: int, k: int) -> dict[str, Any] | None:
    """Pose errors of a class after the best common gauge, modulo the structure's point group where it is known."""
    group, best = sample.groups[c], best_poses(posterior)
    rows = np.flatnonzero((best.classes == k) & (sample.classes == c))
    if group is None or len(rows) < 4:
        return None
    angles, distances = metrics.pose_errors(
        best.rotations[rows], best.shifts[rows], sample.rotations[rows], sample.shifts[rows], group
    )
    return {
        "median_angle": float(np.median(angles)),
        "within_10": float(np.mean(angles < 10)),
        "within_20": float(np.mean(angles < 20)),
        "median_shift": float(np.median(distances) * sample.voxel_size),
    }


def _symmetry(sample: Sample, volume: Float32) -> float:
    """Symmetry score about the filament's axis: that of the truth, or of the average where there is no truth."""
    assert sample.symmetry_order is not None
    axis, centre = metrics.principal_axis(sample.truth[0] if sample.truth else volume, sample.voxel_size)
    radius = sample.mask_radius / sample.voxel_size
    return metrics.symmetry_score(volume, sample.symmetry_order, axis, mask_radius=radius, centre=centre)


def convergence(sample: Sample, by_iteration: list[Float32], of_truth: list[int]) -> dict[str, Any]:
    """r with the truth at 40 Angstrom per true class, after some of the iterations (a global alignment takes long)."""
    cut = max(CONVERGENCE_AT, 2 * sample.voxel_size)
    chosen = sorted({i for i in LOOKED_AT if i < len(by_iteration)} | {len(by_iteration)})
    r = [
        [
            metrics.align_map(
                by_iteration[i - 1][k],
                sample.truth[c],
                voxel_size=sample.voxel_size,
                mask_radius=sample.radii[c],
                resolution=cut,
            )[2]
            for c, k in enumerate(of_truth)
        ]
        for i in chosen
    ]
    return {"iteration": chosen, "r": r, "lowpass": cut}


def coverage(plan: Plan, particles: ParticleSource, posterior: Posterior) -> list[float]:
    """Share of each class's Fourier voxels, to the full band, that the poses let be observed at least once."""
    support = make_support(plan.box, full_band(plan.box)).to(plan.device)
    n_classes = posterior.class_probability.shape[1]
    weights = np.zeros((n_classes, len(support)))

    def back(_: int, batch: Batch, spectra: Array, numbers: np.ndarray) -> Array:
        return plan.rotate_back(gathered(posterior, numbers), batch, spectra, support, n_classes)[1]

    with Ahead(particles, plan.device) as ahead:
        for part in plan.over_batches(ahead, back, Clock(plan.device), None, "coverage"):
            weights += to_host(part)
    mass = np.bincount(posterior.class_index, posterior.probability, minlength=n_classes).astype(np.float64)
    return [float(share) for share in covered(weights, mass)]
