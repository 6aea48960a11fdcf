"""Candidates moved to the likelihood's own maxima, and last iteration's poses kept among them.

Beyond the paper (preset `default`). At low SNR the maxima of c~ lie some grid steps off those of the likelihood, and
in some iterations the right pose is not among the best 50 at all. Both cost the posterior more than they need to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faml_gpu import ops
from faml_gpu.array_backend import Array, namespace, step, to_host
from faml_gpu.fast_alignment.align import Candidates, Observation, Reference, margin

__all__ = ["carry_over", "refine"]

ROUNDS = 2
REACH = 1.5  # half steps of the rotational grid, and eighths of the finest wave: the longest step along an axis
DAMPING = 0.01  # of the curvature


def carry_over(
    candidates: Candidates, rotations: NDArray[np.float64], shifts: NDArray[np.float64], count: NDArray[np.int64]
) -> Candidates:
    """Put the given poses, (B, c, 3, 3), (B, c, 3), count (B,), in the place of each particle's last candidates.

    They take at most half of the places: the search goes on.
    """
    xp = namespace(candidates.rotations)
    n = candidates.rotations.shape[1]
    # On the host: a few small copies per particle, that would be a launch each.
    new_rotations, new_shifts = to_host(candidates.rotations).copy(), to_host(candidates.shifts).copy()
    correlation, total = to_host(candidates.correlation).copy(), to_host(candidates.count).copy()
    gain = to_host(candidates.known_gain())
    for b, c in enumerate(count):
        c = min(int(c), n // 2)
        end = min(int(total[b]) + c, n)
        new_rotations[b, end - c : end] = rotations[b, :c]
        new_shifts[b, end - c : end] = shifts[b, :c]
        correlation[b, end - c : end], gain[b, end - c : end] = 0.0, np.inf
        total[b] = end
    new_rotations, new_shifts, correlation, total, gain = (
        xp.asarray(a) for a in (new_rotations, new_shifts, correlation, total, gain)
    )
    return Candidates(new_rotations, new_shifts, correlation, total, gain)


def refine(
    observation: Observation,
    reference: Reference,
    candidates: Candidates,
    precision: Array,
    n_refined: int,
    max_shift: float,
) -> Candidates:
    """Move the `n_refined` likeliest candidates of each particle downhill in the weighted residual.

    Which these are is looked at among twice as many, the first by `gain`, and those whose gain is not known. Of them,
    those too far behind the best stay as they are.

    Each round is a step of Gauss and Newton in the three rotations and three shifts at once, no longer than about a
    step of the rotational grid and a fifth of the finest wave, then half of that. Of the poses it goes through each
    candidate takes that of the least residual, less what is expected of the unseen.

    Parameters
    ----------
    observation, reference, candidates
    precision : (M,) float32
        1 / sigma^2 of each voxel's shell.
    n_refined : int
    max_shift : float, voxels
        No refined shift is longer.
    """
    xp = namespace(observation.spectra)
    support = observation.support
    by_shell = xp.zeros(support.r_max + 1)
    by_shell[1:] = precision[xp.asarray(support.shell_start[1:-1])]

    amplitudes = observation.weights * xp.sqrt(precision)

    def score(rotations: Array, shifts: Array, count: Array) -> Array:
        at = xp.ascontiguousarray(rotations), xp.ascontiguousarray(shifts), count, support, reference.padding
        particles = observation.spectra, observation.weights, observation.weight_index
        shells = ops.residual(reference.grid, *particles, *at)
        return shells @ by_shell - 2 * observation.expected_gain(rotations)

    def equations(rotations: Array, shifts: Array, count: Array) -> Array:
        at = xp.ascontiguousarray(rotations), xp.ascontiguousarray(shifts), count, support, reference.padding
        particles = observation.spectra, amplitudes, observation.weight_index
        return ops.normal_equations(reference.grid, *particles, *at)

    with step("refine"):
        b, n = candidates.rotations.shape[:2]
        m = min(n_refined, n)
        rows, gain = xp.arange(b)[:, None], candidates.known_gain() + observation.expected_gain(candidates.rotations)
        n_first = min(n, 2 * m + (int((gain == np.inf).sum(axis=1).max()) if b else 0))
        first = xp.argsort(-gain, axis=1)[:, :n_first]
        count = (gain[rows, first] > -np.inf).sum(axis=1)
        scores = score(candidates.rotations[rows, first], candidates.shifts[rows, first], count)
        scores[xp.arange(n_first) >= count[:, None]] = np.inf
        nothing = _without_reference(observation, precision)[:, None]
        gain[rows, first] = 0.5 * (nothing - scores)
        best = xp.sort(scores, axis=1)[:, :m]
        top = first[rows, xp.argsort(scores, axis=1)[:, :m]]
        rotations, shifts = candidates.rotations[rows, top], candidates.shifts[rows, top]
        highest = gain[rows, top[:, :1]]
        moved = (gain[rows, top] >= highest - margin(highest)) & (xp.arange(m) < count[:, None])
        count = moved.sum(axis=1)  # those that are moved come first
        tried, values = [(rotations, shifts)], [best]
        angle, length = np.deg2rad(90 / reference.bandwidth), support.box / (8 * support.r_max)
        for i in range(ROUNDS):
            sums = equations(*tried[-1], count)
            if i:
                values.append(sums[..., 6, 6] - 2 * observation.expected_gain(tried[-1][0]))
            sums[..., :3, 6] += _slope_of_gain(observation, tried[-1][0], angle)
            turn, move = _newton(sums, REACH * angle / 2**i, REACH * length / 2**i)
            rotations, shifts = _product(_exponential(turn), tried[-1][0]), tried[-1][1] + move
            norm = xp.sqrt((shifts**2).sum(axis=-1, keepdims=True))
            shifts = xp.where(norm > max_shift, shifts * (max_shift / xp.where(norm > 0, norm, 1)), shifts)
            tried.append((rotations, shifts))
        values.append(score(*tried[-1], count))
        residuals = xp.stack(values)
        known = xp.where(xp.isnan(residuals), np.inf, residuals)
        least = xp.where(moved, known.argmin(axis=0), 0), rows, xp.arange(m)
        rotations, shifts = (xp.stack(poses)[least] for poses in zip(*tried, strict=True))
        best = residuals[least]
        moved_r, moved_t = candidates.rotations.copy(), candidates.shifts.copy()
        moved_r[rows, top], moved_t[rows, top] = rotations, shifts
        gain[rows, top] = 0.5 * (nothing - best)
        gain -= observation.expected_gain(moved_r)
        return Candidates(moved_r, moved_t, candidates.correlation, candidates.count, gain)


def _without_reference(observation: Observation, precision: Array) -> Array:
    """The residual (B,) of no reference at all: sum of w^2 |X|^2 / sigma^2."""
    weight = observation.weights[observation.weight_index] ** 2 * precision
    return 2 * (weight * abs(observation.spectra) ** 2).sum(axis=1, dtype=np.float64)


def _slope_of_gain(observation: Observation, rotations: Array, angle: float) -> Array:
    """Of what is unseen, (b, m, 3), along rotation vectors: from a step back and one forth."""
    b, m = rotations.shape[:2]
    back_and_forth = np.repeat(np.eye(3), 2, axis=0) * np.tile([[-angle], [angle]], (3, 1))
    turns = namespace(rotations).asarray(_exponential(back_and_forth))
    turned = _product(turns, rotations[:, :, None]).reshape(b, m * 6, 3, 3)
    gain = observation.expected_gain(turned).reshape(b, m, 3, 2)
    return (gain[..., 1] - gain[..., 0]) / (2 * angle)


def _newton(equations: Array, angle: float, length: float) -> tuple[Array, Array]:
    """Rotation vectors and shifts (..., 3) that solve `ops.normal_equations`, shortened to at most these along an axis.

    With a hundredth of each diagonal entry added to it (Levenberg and Marquardt): a structure that looks the same from
    all sides has no curvature to tell rotations by.
    """
    xp = namespace(equations)
    i = xp.arange(6)
    curvature = equations[..., :6, :6].copy()
    diagonal = curvature[..., i, i]
    curvature[..., i, i] = xp.where(diagonal > 0, (1 + DAMPING) * diagonal, 1)
    step = xp.linalg.solve(curvature, equations[..., :6, 6:])[..., 0]
    longest = xp.asarray(np.repeat([angle, length], 3))
    step *= 1 / xp.maximum((abs(step) / longest).max(axis=-1, keepdims=True), 1)
    return step[..., :3], step[..., 3:]


def _product(a: Array, b: Array) -> Array:
    """Matrix products of stacks (..., 3, 3). A batched GEMM of such small matrices would be mostly overhead."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)


def _exponential(vectors: Array) -> Array:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), by Rodrigues' formula."""
    xp = namespace(vectors)
    angle = xp.sqrt((vectors**2).sum(axis=-1))[..., None, None]
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    zero = 0 * x
    k = xp.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*vectors.shape[:-1], 3, 3)
    return xp.eye(3) + xp.sinc(angle / np.pi) * k + 0.5 * xp.sinc(angle / (2 * np.pi)) ** 2 * _product(k, k)
