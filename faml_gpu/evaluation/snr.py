"""Signal-to-noise ratio of the particles of a run, from random pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from faml_gpu import metrics
from faml_gpu.data import ParticleSource, Poses
from faml_gpu.errors import InputError
from faml_gpu.evaluation.inputs import Found, Truth
from faml_gpu.evaluation.results import SnrScore
from faml_gpu.fourier import full_band, make_support
from faml_gpu.io.particles import open_particles
from faml_gpu.masks import soft_sphere

__all__ = ["snr_scores"]

Int64 = NDArray[np.int64]

EDGE = 3.0  # voxels, of the soft mask
PAIR_PARTICLES = 200  # whose pairs are drawn: 19,900 different ones
PAIR_BYTES = 1 << 30
READ_BATCH = 16


def snr_scores(
    found: Found,
    truth: Truth | None,
    pairs: int,
    seed: int,
    say: Callable[[str], None],
    notes: list[str],
) -> list[SnrScore]:
    try:
        source = open_run_particles(found)
    except InputError as error:
        notes.append(f"no signal-to-noise ratio, the particles cannot be read: {error}")
        return []
    if source.read(np.zeros(1, np.int64)).multiplied is not None:
        notes.append("no signal-to-noise ratio: the particles are multiplied by their CTF")
        return []
    sets = [("found", found.labels, found.poses)]
    if truth is not None and truth.poses is not None:
        sets.append(("true", truth.labels, truth.poses))
    scores = []
    for which, labels, poses in sets:
        assert poses is not None
        for k in range(int(labels.max()) + 1):
            members = np.flatnonzero(labels == k)
            if len(members) < 3:
                notes.append(f"{which} class {k + 1}: no signal-to-noise ratio of {len(members)} particles")
                continue
            say(f"signal-to-noise ratio, {which} poses, class {k + 1}")
            scores.append(_snr_score(source, which, k, members, poses, pairs, seed))
    return scores


def open_run_particles(found: Found) -> ParticleSource:
    """The particles of a run, from where run.json says they are."""
    about = found.about.get("input", {})
    path, reading = about.get("path"), about.get("reading")
    if not isinstance(path, str) or not isinstance(reading, dict) or not reading:
        raise InputError("run.json does not say from which files they came")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has told
        source = open_particles(
            path,
            tilt_range=None if reading.get("tilt_range") is None else tuple(reading["tilt_range"]),
            tilt_axis=reading.get("tilt_axis", "y"),
            voxel_size=reading.get("voxel_size"),
        )
    if source.table.n_rows != len(found.names) or source.box != len(found.maps[0].volume):
        raise InputError(
            f"{path}: {source.table.n_rows} particles of {source.box} voxels, expected {len(found.names)} of "
            f"{len(found.maps[0].volume)} as in the run"
        )
    return source


def _snr_score(
    source: ParticleSource,
    which: str,
    k: int,
    members: Int64,
    poses: Poses,
    pairs: int,
    seed: int,
) -> SnrScore:
    box, voxel = source.box, source.voxel_size
    support = make_support(box, full_band(box))
    # The largest sphere of the box: it holds the same part of a particle in whatever pose.
    radius = box / 2 - EDGE
    mask = soft_sphere(box, radius, EDGE)
    rng = np.random.default_rng([seed, k])
    most = max(3, min(PAIR_PARTICLES, PAIR_BYTES // (9 * len(support))))
    chosen = np.sort(rng.choice(members, size=min(most, len(members)), replace=False))
    spectra = np.empty((len(chosen), len(support)), dtype=np.complex64)
    observed = np.empty(spectra.shape, dtype=bool)
    for start in range(0, len(chosen), READ_BATCH):
        rows = chosen[start : start + READ_BATCH]
        batch = source.read(rows)
        for i, row in enumerate(rows):
            spectra[start + i], observed[start + i] = metrics.aligned_spectrum(
                batch.boxes[i].astype(np.float32, copy=False),
                batch.weights[batch.weight_index[i]],
                poses.rotations[row],
                poses.shifts[row],
                mask,
                support,
            )
    result = metrics.pair_snr(spectra, observed, metrics.random_pairs(len(chosen), pairs, rng))
    inside = float(np.sum(mask.astype(np.float64) ** 2)) / box**3
    band = 2 * len(support) / (box**3 - 1)
    return SnrScore(
        which,
        k + 1,
        radius * voxel,
        box * voxel / support.r_max,
        result.pairs,
        result.particles,
        result.correlation,
        result.correlation_error,
        result.snr,
        result.snr_error,
        result.snr * inside * band,
    )
