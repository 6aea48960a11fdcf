"""The evaluation as a whole: files in, `Evaluation` out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

from faml_gpu import metrics
from faml_gpu.errors import InputError
from faml_gpu.evaluation.classes import Partner, by_particles, classification, pose_scores
from faml_gpu.evaluation.inputs import PathLike, as_list, read_inputs, read_truth
from faml_gpu.evaluation.maps import EDGE, Axis, Comparison, by_correlation, map_notes, symmetry_scores
from faml_gpu.evaluation.results import Classification, Evaluation, PoseScore, SnrScore, SymmetryScore
from faml_gpu.evaluation.snr import snr_scores

__all__ = ["evaluate"]

FILTERS = (20.0, 30.0)  # Angstrom


def evaluate(
    found: PathLike | Sequence[PathLike],
    *,
    truth: PathLike | None = None,
    truth_maps: Sequence[PathLike] = (),
    radius: float | None = None,
    filters: Sequence[float] = FILTERS,
    point_group: Sequence[str] = ("C1",),
    symmetry_order: int | None = None,
    symmetry_axis: Axis = "principal",
    pairs: int = 1000,
    seed: int = 0,
    iteration: int | None = None,
    voxel_size: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Compare a finished run, or maps, with the truth or with reference maps.

    Parameters
    ----------
    found : run folder, or one or more maps (.mrc)
    truth : STAR file with the true rlnAngle*, rlnOrigin* and rlnClassNumber of the run's particles, as far as known;
        rows are matched by rlnImageName (path, or file name). More particles than the run has are no error.
    truth_maps : true map of class 1, 2 ..., or reference maps; box and voxel size of the averages
    radius : of the structure, Angstrom; None: determined from each truth map
    filters : low-passes at which maps are correlated, Angstrom, beside unfiltered
    point_group : of the true structures (`metrics.point_group`): one for all, or one per true class
    symmetry_order : n of the symmetry score, or None
    symmetry_axis : its axis in the frame of the truth map, or of the map itself where there is no truth map
    pairs : random pairs per class for the signal-to-noise ratio; 0: none
    seed : of the pairs
    iteration : of the run to evaluate; None: its final result
    voxel_size : Angstrom, where no map says it
    progress : called with what is being done

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        Files that are missing or do not fit each other, particles that do not match, unknown point group.

    Examples
    --------
    >>> evaluate("run", truth="truth.star", truth_maps=["truth_class001.mrc"]).maps[0].as_is.r  # doctest: +SKIP
    """
    say = progress or (lambda _: None)
    _check_options(radius, filters, pairs, symmetry_order, symmetry_axis)
    groups = {name: metrics.point_group(name) for name in point_group}
    result, references = read_inputs(found, truth_maps, iteration, voxel_size)
    known = read_truth(truth, result) if truth is not None else None
    if known is not None and references and known.n_classes > len(references):
        raise InputError(
            f"{truth}: class numbers up to {known.n_classes}, but {len(references)} truth map(s) were given; "
            "expected the map of each class, in order"
        )
    if known is None and not references and symmetry_order is None and (pairs == 0 or result.poses is None):
        raise InputError("nothing to evaluate: give a truth STAR file, a truth map, or a symmetry order")
    n_truths = max(known.n_classes if known else 0, len(references))
    if len(point_group) not in (1, max(n_truths, 1)):
        raise InputError(f"point group: found {len(point_group)}, expected one, or one for each of {n_truths} classes")
    point_groups = list(point_group) * (n_truths if len(point_group) == 1 else 1)
    notes = [
        f"{cut:g} Å is finer than two voxels ({2 * result.voxel_size:g} Å): the same as unfiltered, corners aside"
        for cut in filters
        if references and cut < 2 * result.voxel_size
    ]

    partners: list[Partner | None] = [None] * len(result.maps)
    scores: Classification | None = None
    if known is not None:
        partners = by_particles(result, known)
        scores = classification(result, known, partners)
        notes += [f"class {k + 1} has no particles" for k, partner in enumerate(partners) if partner is None]
    radii = [(radius, "given")] * len(references) if radius is not None else []
    if radius is None:
        radii = [(metrics.structure_radius(m.volume, result.voxel_size), f"from {m.path.name}") for m in references]
    compare = Comparison(result.voxel_size, list(filters), say)
    if references and known is None:
        partners = by_correlation(result, references, radii, compare)
    maps = [
        compare.score(result.maps[k], k, references[p.truth], p, radii[p.truth])
        for k, p in enumerate(partners)
        if p is not None and references
    ]
    notes += [note for score in maps for note in map_notes(score, result)]

    poses: list[PoseScore] = []
    if known is not None and known.poses is not None and result.poses is not None:
        poses = pose_scores(result, known, partners, point_groups, groups, notes)
    elif known is not None:
        notes.append(f"{truth}: no rlnAngleRot, rlnAngleTilt and rlnAnglePsi, so no pose errors")

    snr: list[SnrScore] = []
    if pairs and result.poses is not None:
        snr = snr_scores(result, known, pairs, seed, say, notes)
    symmetry: list[SymmetryScore] = []
    if symmetry_order is not None:
        say(f"symmetry score, {symmetry_order}-fold")
        symmetry = symmetry_scores(result, maps, references, radius, symmetry_order, symmetry_axis)
    settings = {
        "found": [os.fspath(f) for f in as_list(found)],
        "truth": None if truth is None else os.fspath(truth),
        "truth_maps": [os.fspath(m) for m in truth_maps],
        "particles": len(result.names),
        "box": len(result.maps[0].volume),
        "voxel_size": result.voxel_size,
        "iteration": iteration,
        "filters": list(filters),
        "point_group": point_groups or list(point_group),
        "fsc_mask_edge": EDGE * result.voxel_size,
        "pairs": pairs,
        "seed": seed,
    }
    return Evaluation(settings, scores, poses, maps, snr, symmetry, notes)


def _check_options(
    radius: float | None, filters: Sequence[float], pairs: int, symmetry_order: int | None, symmetry_axis: str
) -> None:
    for name, values in (("radius", [] if radius is None else [radius]), ("lowpass", filters)):
        for value in values:
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name}: found {value:g}, expected more than 0 A")
    if pairs < 0:
        raise InputError(f"--pairs: found {pairs}, expected 0 or more")
    if symmetry_order is not None and symmetry_order < 2:
        raise InputError(f"--symmetry-order: found {symmetry_order}, expected 2 or more")
    if symmetry_axis not in ("x", "y", "z", "principal"):
        raise InputError(f"--symmetry-axis: found {symmetry_axis!r}, expected x, y, z or principal")
