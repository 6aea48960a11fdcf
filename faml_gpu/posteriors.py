"""Posteriors put together, taken apart and made by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faml_gpu.data import BestPoses, Posterior
from faml_gpu.expectation import BatchPosterior
from faml_gpu.symmetry import nearest_copies

__all__ = ["best_poses", "gathered", "in_frame", "join", "joined", "likeliest", "one_hot", "scattered", "unfolded"]

Int64 = NDArray[np.int64]

PAIRS_AT_ONCE = 1_000_000  # of poses, compared


def one_hot(
    classes: Int64, rotations: NDArray[np.float64], shifts: NDArray[np.float64], n_classes: int, *, known: bool
) -> Posterior:
    """A posterior with all mass of each particle on one class and pose.

    `known` says whether that pose is information, or only how the box lies: then it does not count as significant.
    """
    n = len(classes)
    return Posterior(
        particle=np.arange(n),
        class_index=classes.astype(np.int64),
        rotations=np.ascontiguousarray(rotations, np.float64),
        shifts=np.ascontiguousarray(shifts, np.float64),
        probability=np.ones(n),
        log_likelihood=np.zeros(n),
        n_significant=np.full(n, int(known), np.int64),
        class_probability=np.eye(n_classes)[classes],
    )


def joined(parts: list[BatchPosterior]) -> BatchPosterior:
    """The posterior of several batches, in order, as of one."""
    first = np.cumsum([0, *(len(p.log_likelihood) for p in parts)])
    named = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
    arrays: dict[str, NDArray[Any]] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in named}
    arrays["particle"] = np.concatenate([p.particle + f for p, f in zip(parts, first[:-1], strict=True)])
    return BatchPosterior(**arrays, candidates=sum(p.candidates for p in parts))


def join(parts: list[BatchPosterior]) -> Posterior:
    """The posterior of all particles from those of the batches, in order."""
    whole = joined(parts)
    n_significant = np.bincount(whole.particle, minlength=len(whole.log_likelihood)).astype(np.int64)
    shared = {f.name: getattr(whole, f.name) for f in fields(Posterior) if f.name != "n_significant"}
    return Posterior(**shared, n_significant=n_significant)


def likeliest(
    posterior: Posterior, k: int, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The n likeliest known poses of each particle in class k: rotations (B, n, 3, 3), shifts (B, n, 3), count (B,)."""
    known = posterior.n_significant[posterior.particle] > 0
    mine = np.nonzero((posterior.class_index == k) & known)[0]
    mine = mine[np.lexsort((-posterior.probability[mine], posterior.particle[mine]))]
    particle = posterior.particle[mine]
    rank = np.arange(len(mine)) - np.searchsorted(particle, particle)
    mine, particle, rank = mine[rank < n], particle[rank < n], rank[rank < n]
    size = len(posterior.log_likelihood)
    rotations, shifts = np.tile(np.eye(3), (size, n, 1, 1)), np.zeros((size, n, 3))
    rotations[particle, rank], shifts[particle, rank] = posterior.rotations[mine], posterior.shifts[mine]
    return rotations, shifts, np.bincount(particle, minlength=size)


def unfolded(posterior: BatchPosterior, group: NDArray[np.float64]) -> BatchPosterior:
    """Of the copies of each pose under a point group (g, 3, 3) that nearest to the most massive pose beside it.

    Poses come from one asymmetric unit. Those at its border lie on two sides of it, and would have their middle where
    none of them is.
    """
    if len(group) == 1:
        return posterior
    of = posterior.particle * posterior.class_probability.shape[1] + posterior.class_index
    order = np.lexsort((-posterior.probability, of))
    _, first, pair = np.unique(of[order], return_index=True, return_inverse=True)
    heaviest = np.empty(len(of), np.int64)
    heaviest[order] = order[first][pair]
    return replace(posterior, rotations=nearest_copies(posterior.rotations, posterior.rotations[heaviest], group))


def best_poses(posterior: Posterior) -> BestPoses:
    """The most probable class of each particle, and in it the pose with the least expected angle to the true one.

    Of the poses that carry mass it is the one in the middle of where most of it lies. The one with the most mass would
    do where each stands for as much of the space of poses as any other; here one may stand for many that are unlike it
    (`fast_alignment.thinning`), or for a large cell of a Voronoi tessellation.
    """
    n = len(posterior.class_probability)
    classes = np.argmax(posterior.class_probability, axis=1).astype(np.int64)
    inside = posterior.class_index == classes[posterior.particle]
    order = np.lexsort((-posterior.probability, ~inside, posterior.particle))
    first = np.searchsorted(posterior.particle[order], np.arange(n))
    best = order[first]  # of each particle the one with the most mass, so far
    count = np.bincount(posterior.particle[inside], minlength=n)
    most = int(count.max(initial=1))
    at_once = max(1, PAIRS_AT_ONCE // most**2)
    for some in np.array_split(np.flatnonzero(count > 2), 1 + n // at_once):  # of two it is that with more mass
        place = np.arange(most)
        rows = order[first[some, None] + np.minimum(place, count[some, None] - 1)]
        mass = np.where(place < count[some, None], posterior.probability[rows], 0)
        flat = posterior.rotations[rows].reshape(len(some), most, 9)
        angle = np.arccos(np.clip((flat @ flat.transpose(0, 2, 1) - 1) / 2, -1, 1))
        expected = (angle * mass[:, None, :]).sum(axis=2)  # beyond the count: that of the last, again
        best[some] = rows[np.arange(len(some)), expected.argmin(axis=1)]
    return BestPoses(
        classes,
        posterior.rotations[best],
        posterior.shifts[best],
        np.minimum(posterior.probability[order[first]], 1.0),
    )


def in_frame(
    posterior: Posterior, rotation: NDArray[np.float64], shift: NDArray[np.float64], k: int | None = None
) -> Posterior:
    """Poses, of class k or of all, with respect to the map of which the average they belong to is a copy in (R, t)."""
    moved = np.full(len(posterior.particle), True) if k is None else posterior.class_index == k
    return replace(
        posterior,
        rotations=np.where(moved[:, None, None], posterior.rotations @ rotation, posterior.rotations),
        shifts=np.where(moved[:, None], posterior.shifts + posterior.rotations @ shift, posterior.shifts),
    )


def gathered(posterior: Posterior, members: Int64) -> Posterior:
    """The part of a posterior that belongs to some of its particles, numbered from 0 in the order of `members`."""
    first, last = (np.searchsorted(posterior.particle, members, side=side) for side in ("left", "right"))
    particle = np.repeat(np.arange(len(members)), last - first)
    rows = np.arange(len(particle)) + (last - np.cumsum(last - first))[particle]
    return Posterior(
        particle=particle,
        class_index=posterior.class_index[rows],
        rotations=posterior.rotations[rows],
        shifts=posterior.shifts[rows],
        probability=posterior.probability[rows],
        log_likelihood=posterior.log_likelihood[members],
        n_significant=posterior.n_significant[members],
        class_probability=posterior.class_probability[members],
    )


def scattered(parts: list[tuple[Int64, Posterior]]) -> Posterior:
    """The posterior of all particles from those of sets of them, each with its members: every particle in one set."""
    members = np.concatenate([m for m, _ in parts])
    particle = np.concatenate([m[p.particle] for m, p in parts])
    order, place = np.argsort(particle, kind="stable"), np.argsort(members)

    def rows(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(p, name) for _, p in parts])[order]

    def particles(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(p, name) for _, p in parts])[place]

    return Posterior(
        particle=particle[order],
        class_index=rows("class_index"),
        rotations=rows("rotations"),
        shifts=rows("shifts"),
        probability=rows("probability"),
        log_likelihood=particles("log_likelihood"),
        n_significant=particles("n_significant"),
        class_probability=particles("class_probability"),
    )
