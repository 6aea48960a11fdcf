"""Classes that no particle needs, begun anew from the particles that are explained worst.

From random starts one class may take all particles, or two classes the same structure, of which the larger then takes
the particles of the other: its average has less noise. The empty one is of no more use, though another class may hold
two structures. A class of one structure explains its particles unevenly only by their noise; where they differ by more,
the worst explained of them are likely to be those of the other structure.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import ParticleSource, Posterior, Progress, State
from faml_gpu.plan import Plan
from faml_gpu.starting import fold_averages

__all__ = ["idle_classes", "reseed", "split"]

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

NEEDED = 2.0  # nats: what a class must add for each of its particles; a copy of another class adds less than 1.4
SMALL = 0.25  # of an equal share of the particles
WORST = 0.25  # of the particles of a class make a new one
FEWEST = 8  # particles of a class that is split


def idle_classes(class_probability: Float64) -> Int64:
    """Classes with few particles, without which the likelihood would be about the same.

    Without class k the likelihood of particle i is 1 - p_ik of what it is. So -sum_i log(1 - p_ik) nats would be lost,
    for sum_i p_ik particles: 1 for each where all p are small, log(2) / .5 = 1.4 where two equal classes share them.

    Parameters
    ----------
    class_probability : (N, K)

    Returns
    -------
    (n,) int64
    """
    n, n_classes = class_probability.shape
    mass = class_probability.sum(axis=0)
    lost = -np.log(np.maximum(1 - class_probability, np.finfo(np.float64).tiny)).sum(axis=0)
    return np.flatnonzero((mass < SMALL * n / n_classes) & (lost <= NEEDED * mass))


def split(classes: Int64, gain: Float64, idle: Int64) -> Int64:
    """New classes (N,) of the particles: each idle one gets the worst explained quarter of another.

    Of that whose particles' gains scatter most beside what noise alone makes them scatter: gain = c0 - c1^2 / 2 with c0
    of mean and variance c1^2 has the variance 2 mean(gain).

    Parameters
    ----------
    classes : (N,) int64, none of them idle
    gain : (N,) nats by which each particle is likelier in its best pose and class than without a signal
    idle : classes to be filled
    """
    new = classes.copy()
    made: list[int] = []
    for k in idle:
        scatter = {
            int(c): float(gain[new == c].var() / max(2 * gain[new == c].mean(), 1.0))
            for c in np.unique(new)
            if c not in made and (new == c).sum() >= FEWEST
        }
        if not scatter:
            break
        members = np.flatnonzero(new == max(scatter, key=lambda c: scatter[c]))
        worst = members[np.argsort(gain[members], kind="stable")]
        new[worst[: int(WORST * len(members))]] = k
        made.append(int(k))
    return new


def reseed(
    plan: Plan,
    particles: ParticleSource,
    state: State,
    posterior: Posterior,
    gain: Float64,
    progress: Progress | None = None,
) -> tuple[State, list[int]]:
    """Idle classes and those they were taken from, averaged anew over their particles in the poses these have.

    Parameters
    ----------
    plan, particles
    state : State
        After an iteration.
    posterior : Posterior
        Of that iteration.
    gain : (N,), see `split`

    Returns
    -------
    State
        As it was where no class is idle.
    list of int
        Classes that were idle.
    """
    idle = idle_classes(posterior.class_probability)
    busy = posterior.class_probability.copy()
    busy[:, idle] = -1
    classes = busy.argmax(axis=1)
    new = split(classes, gain, idle)
    filled = [int(k) for k in idle if (new == k).any()]
    if not filled:
        return state, []
    changed = np.unique(np.concatenate([filled, classes[new != classes]]))
    rows = posterior.class_index == classes[posterior.particle]
    moved = replace(
        posterior,
        particle=posterior.particle[rows],
        class_index=new[posterior.particle[rows]],
        rotations=posterior.rotations[rows],
        shifts=posterior.shifts[rows],
        probability=posterior.probability[rows],
    )
    averages, without = fold_averages(
        plan.with_symmetry(plan.symmetry(state.iteration)), particles, moved, progress, state,
        r_max=plan.band(state).r_max, members=np.flatnonzero(np.isin(new, changed)),
    )  # fmt: skip
    maps, apart = state.maps.copy(), None if state.apart is None else state.apart.copy()
    maps[changed] = averages[changed]
    if apart is not None and without is not None:
        apart[:, changed] = without[:, changed]
    alpha = np.maximum(np.bincount(new, minlength=len(maps)), 0.5)
    return replace(state, maps=maps, apart=apart, alpha=alpha / alpha.sum()), filled
