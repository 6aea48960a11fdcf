"""How sure a result is: poses of a particle, particles of a class, and the directions it was seen from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import Posterior
from faml_gpu.geometry import beam_directions

__all__ = [
    "angular_coverage",
    "effective_particles",
    "evenness",
    "pose_entropy",
    "preferred_orientations",
    "shifts_at_limit",
]

Float64 = NDArray[np.float64]

FEWEST = 10  # effective particles; the main axis of fewer random directions is often near 1 by chance
UNEVEN = 0.5  # angular coverage below which one direction prevails; a great circle has 0.75
LIMIT = 0.9  # of the largest shift; of shifts that fill the sphere evenly 27 % are beyond that
PILED_UP = 0.4  # of the particles
UNSEEN = 0.95  # Fourier coverage below which that leaves a gap worth a word


def pose_entropy(posterior: Posterior) -> Float64:
    """Entropy -sum p log p over the kept (class, pose) candidates of each particle, (N,) float64, nats.

    It is that of the discrete posterior over candidates: 0 for one pose, log n for n equal ones. It grows with the
    number of candidates in a peak, so it compares particles of one run, not runs of different grids. A symmetric
    particle has equivalent poses, and each found copy counts (D7: up to log 14 more).
    """
    n, p = len(posterior.log_likelihood), posterior.probability
    total = np.bincount(posterior.particle, p, minlength=n)
    p = p / total[posterior.particle]
    terms = -p * np.log(np.maximum(p, np.finfo(np.float64).tiny))
    return np.maximum(np.bincount(posterior.particle, terms, minlength=n), 0.0)


def effective_particles(class_probability: Float64) -> Float64:
    """Effective number of particles of each class, (sum P)^2 / sum P^2 over the particles, (K,) float64.

    class_probability (N, K). n particles of equal probability count n, however small it is; an empty class has 0.
    Source: L. Kish, Survey Sampling, Wiley 1965 (effective size of a weighted sample).
    """
    squares = (class_probability**2).sum(axis=0)
    return np.asarray(
        np.divide(class_probability.sum(axis=0) ** 2, squares, out=np.zeros_like(squares), where=squares > 0)
    )


def evenness(directions: Float64, weights: Float64) -> float:
    """1.5 (1 - l), l the largest eigenvalue of the weighted scatter matrix of unit vectors, without regard to sign.

    directions (n, 3), weights (n,) >= 0. Uniform directions have 1, a great circle 0.75, a single axis 0; so do no
    directions. It is 1.5 times the mean squared sine of the angle to the main axis. Being of second moments it sees
    whether one axis prevails, not finer gaps (three perpendicular axes have 1 too).
    """
    total = float(weights.sum())
    if total <= 0:
        return 0.0
    scatter = (directions * weights[:, None]).T @ directions / total
    return float(np.clip(1.5 * (1 - np.linalg.eigvalsh(scatter)[-1]), 0.0, 1.0))


def angular_coverage(posterior: Posterior, frames: Float64) -> Float64:
    """`evenness` of the beam's directions in the frame of each class average, (K,) float64, over its posterior.

    frames (N, 3, 3): A_sub of each particle's box, see `data.frames_of`. The beam lies along z of the tomogram, see
    `geometry.beam_directions`. The missing wedge lies around it, so particles that differ only by a turn about the beam
    share a missing cone (0), while turns about the tilt axis (0.75) can fill all of it: read it beside the Fourier
    coverage, which knows the wedge.
    """
    beam = beam_directions(posterior.rotations, frames[posterior.particle])
    classes = range(posterior.class_probability.shape[1])
    mine = [posterior.class_index == k for k in classes]
    return np.array([evenness(beam[m], posterior.probability[m]) for m in mine])


def preferred_orientations(
    angular: Sequence[float] | Float64, fourier: Sequence[float] | Float64, effective: Sequence[float] | Float64
) -> list[str]:
    """A warning for each class whose views are uneven and leave Fourier space empty; arguments (K,) each.

    Both must hold: uneven views without a gap do no harm, and a gap with even views is one of too few particles.
    Classes of less than `FEWEST` effective particles tell nothing.
    """
    return [
        f"class {k} has a preferred orientation: angular coverage {a:.2f} (even: 1, one direction: 0), "
        f"{100 * (1 - f):.0f} % of its Fourier space was never observed ({e:.0f} effective particles). "
        "Its average is smeared along the direction not seen; add particles or tomograms with other views, "
        "or try other seeds in case the orientations are locked to the missing wedge"
        for k, (a, f, e) in enumerate(zip(angular, fourier, effective, strict=True), start=1)
        if e >= FEWEST and a < UNEVEN and f < UNSEEN
    ]


def shifts_at_limit(shifts: Float64, max_shift: float, voxel_size: float) -> list[str]:
    """A warning if the best shifts pile up at the largest that is looked at: those beyond it were never found.

    shifts (N, 3) voxels; max_shift Angstrom; voxel_size Angstrom. Fewer than `FEWEST` particles tell nothing.
    """
    share = float((np.linalg.norm(shifts, axis=1) * voxel_size >= LIMIT * max_shift).mean())
    if len(shifts) < FEWEST or share <= PILED_UP:
        return []
    return [
        f"{100 * share:.0f} % of the particles were found as far off the centre of their box as was looked at "
        f"({max_shift:.0f} A): more may lie farther off, and are misaligned; raise --max-shift, or centre them better"
    ]
