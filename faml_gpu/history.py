"""The record of an iteration, and the stopping rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faml_gpu import maximization
from faml_gpu.data import BestPoses, Checkpoint, IterationRecord, Posterior, State
from faml_gpu.geometry import rotation_angle
from faml_gpu.plan import Band, Clock, Plan
from faml_gpu.posteriors import best_poses
from faml_gpu.symmetry import point_group

__all__ = ["converged", "record"]

Float32 = NDArray[np.float32]

CONVERGED_CHANGES = 0.01  # share of particles that change class
CONVERGED_CORRELATION = 0.999  # of each average with its predecessor
CONVERGED_LIKELIHOOD = 0.1  # nats per particle, gained at most


def record(
    plan: Plan,
    band: Band,
    before: Checkpoint,
    new: State,
    posterior: Posterior,
    total: maximization.Accumulators,
    likelihood: float,
    clock: Clock,
) -> IterationRecord:
    """The record of an iteration, and whether the stopping rule holds."""
    now = best_poses(posterior)
    bandwidth = plan.bandwidth(band.r_max)
    changed = float((before.posterior.class_probability.argmax(axis=1) != now.classes).mean())
    pose_change = float(np.median(_pose_change(before.posterior, now, point_group(band.symmetry))))
    correlation = [_correlation(a, b, plan.mask) for a, b in zip(before.state.maps, new.maps, strict=True)]
    # The grid step is that of alpha and gamma, 180 / L degrees.
    # The last change was not one of the band: this iteration and the one before both had all of it. No change of how
    # averages are made, nor of their symmetry, is still to come. Poses and averages may stand nearly still while a weak
    # feature grows, so the likelihood is asked as well.
    settled = (
        bool(before.history)
        and before.history[-1].r_max == band.r_max
        and plan.settled(new, band.r_max)
        and plan.caution(before.state.iteration) == 1
        and plan.symmetry(new.iteration) == plan.options.symmetry
        and likelihood - before.history[-1].log_likelihood < CONVERGED_LIKELIHOOD * total.n
        and changed < CONVERGED_CHANGES
        and pose_change < 0.25 * 180 / bandwidth
        and min(correlation) >= CONVERGED_CORRELATION
    )
    seen = total.observed.sum(axis=0)
    return IterationRecord(
        iteration=new.iteration,
        log_likelihood=likelihood,
        sigma=float(np.sqrt((seen * new.sigma2[: len(seen)]).sum() / max(seen.sum(), 1.0))),
        zeta=new.zeta,
        alpha=[float(a) for a in new.alpha],
        class_sizes=np.bincount(now.classes, minlength=len(new.maps)).tolist(),
        r_max=band.r_max,
        resolution=plan.box * plan.voxel_size / band.r_max,
        bandwidth=bandwidth,
        candidates=total.candidates / (total.n * len(new.maps)),
        changed_class=changed,
        pose_change=pose_change,
        map_correlation=correlation,
        near_identity=float((rotation_angle(now.rotations, np.eye(3)) < 10).mean()),
        coverage=[float(c) for c in maximization.covered(total.weights, total.mass)],
        converged=bool(settled),
        seconds={name: round(s, 4) for name, s in clock.seconds.items()},
    )


def _pose_change(before: Posterior, now: BestPoses, group: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angle (N,) of each best pose to the nearest the particle had before, degrees; 180 in another class.

    Not to the best it had: a symmetric particle has several as good as that, and changes between them for ever. Copies
    under the group that is imposed are the same.
    """
    copies = before.rotations[:, None] @ group
    angles = rotation_angle(copies, now.rotations[before.particle][:, None]).min(axis=1)
    angles = np.where(before.class_index == now.classes[before.particle], angles, 180.0)
    nearest = np.full(len(now.classes), 180.0)
    np.minimum.at(nearest, before.particle, angles)
    return nearest


def converged(history: list[IterationRecord]) -> bool:
    return bool(history) and history[-1].converged


def _correlation(a: Float32, b: Float32, mask: Float32) -> float:
    x, y = (a * mask).ravel().astype(np.float64), (b * mask).ravel().astype(np.float64)
    if not x.any() and not y.any():
        return 1.0  # nothing stands out from the noise, as before
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(np.sqrt((x @ x) * (y @ y)), np.finfo(np.float64).tiny))
