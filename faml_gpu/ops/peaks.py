"""Local maxima of a function on the SO(3) grid, refined off the grid, the best n of each row."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.profile import tally

__all__ = ["peaks"]


def peaks(scores: Array, n: int, merge_angle: float) -> tuple[Array, Array, Array]:
    """The best n local maxima of each of B functions on the Euler grid of `fast_alignment.so3`.

    A grid point is a local maximum among its 26 neighbours; alpha and gamma wrap around, and across a pole the
    neighbour of (alpha, beta, gamma) is (alpha + pi, -beta, gamma + pi). Each is moved to the vertex of the
    quadratic through its neighbourhood. Maxima closer than `merge_angle` to a better one are dropped: near a
    pole only alpha +- gamma counts, so one rotation shows as many grid points.

    Parameters
    ----------
    scores : (B, n_beta, n_gamma, n_alpha) float32 or float64
        At beta_j = pi (j + 1/2) / n_beta, alpha and gamma = 2 pi k / n_alpha; n_alpha = n_gamma even.
    n : int
    merge_angle : float, degrees

    Returns
    -------
    angles : (B, n, 3) float64
        alpha, beta, gamma in radians, best first.
    values : (B, n) float64
    count : (B,) int64
        How many there are, at least 1; the rest of a row is 0.
    """
    if scores.ndim != 4 or scores.shape[2] != scores.shape[3] or scores.shape[3] % 2:
        raise ValueError(f"scores: found shape {scores.shape}, expected (B, n_beta, n_alpha, n_alpha), n_alpha even")
    if scores.dtype not in (np.float32, np.float64) or not scores.flags.c_contiguous:
        raise TypeError(f"scores: expected C-contiguous float32 or float64, found {scores.dtype}")
    tally(scores)  # what little is computed depends on the scores
    return twin(_peaks_cpu, _peaks_cuda, scores)(scores, n, merge_angle)


def _peaks_cpu(scores: Array, n: int, merge_angle: float) -> tuple[Array, Array, Array]:
    b = len(scores)
    angles, values, count = np.zeros((b, n, 3)), np.zeros((b, n)), np.zeros(b, np.int64)
    _peaks_loop(scores, _merge_trace(merge_angle), angles, values, count)
    return angles, values, count


def _peaks_cuda(scores: Array, n: int, merge_angle: float) -> tuple[Array, Array, Array]:
    xp = namespace(scores)
    b, n_beta, _, n_alpha = scores.shape
    angles, values, count = xp.zeros((b, n, 3)), xp.zeros((b, n)), xp.zeros(b, np.int64)
    # No two local maxima are neighbours, so no cell of 2 x 2 x 2 points holds two.
    capacity = (n_beta + 1) // 2 * (n_alpha // 2) ** 2
    found, n_found = xp.empty((b, capacity), np.int32), xp.zeros(b, np.int32)
    chunks = -(-n_beta * n_alpha**2 // kernels.THREADS["so3_maxima"])
    kernels.launch(
        "so3_maxima",
        scores.dtype,
        b * chunks,
        (scores, n_beta, n_alpha, chunks, capacity, found, n_found),
        file="peaks",
    )
    kept = xp.empty((b, n, 13))
    kernels.launch(
        "so3_select",
        scores.dtype,
        b,
        (scores, n_beta, n_alpha, capacity, found, n_found, n, _merge_trace(merge_angle), kept, angles, values, count),
        file="peaks",
        shared=kernels.THREADS["so3_select"] * (scores.dtype.itemsize + np.dtype(np.int32).itemsize),
    )
    return angles, values, count


def _merge_trace(merge_angle: float) -> float:
    """Two rotations at least this alike (trace of R1^T R2) are the same candidate."""
    return float(1 + 2 * np.cos(np.deg2rad(merge_angle)))


@numba.njit(cache=True)
def _at(score: Any, j: int, g: int, a: int) -> Any:
    nb, na = score.shape[0], score.shape[2]
    if j < 0 or j >= nb:
        j = -1 - j if j < 0 else 2 * nb - 1 - j
        g += na // 2
        a += na // 2
    return score[j, g % na, a % na]


@numba.njit(cache=True)
def _with_rim(score: Any, j: int, plane: Any) -> None:
    """Points (gamma, alpha) at one beta, or a step beyond a pole, with those that follow at either end by wrapping."""
    nb, na = score.shape[0], score.shape[2]
    half = 0
    if j < 0 or j >= nb:
        j = -1 - j if j < 0 else 2 * nb - 1 - j
        half = na // 2
    for g in range(na + 2):
        row, line = score[j, (g - 1 + half) % na], plane[g]
        for a in range(na - half):
            line[1 + a] = row[half + a]
        for a in range(half):
            line[1 + na - half + a] = row[a]
        line[0], line[na + 1] = line[na], line[1]


@numba.njit(cache=True)
def _above_nearest(before: Any, here: Any, after: Any, width: int, maybe: Any) -> None:
    """Of a plane, its rim apart: whether a point is above its six nearest neighbours (of a plateau the first counts).

    Without branches, so it is vectorised. What it says of the rim between two rows counts for nothing.
    """
    first, n = width + 1, len(here) - 2 * (width + 1)
    centre, below, above = here[first:], before[first:], after[first:]
    left, right, behind, ahead = here[first - 1 :], here[first + 1 :], here[1:], here[first + width :]
    for i in range(n):
        value = centre[i]
        maybe[i] = (
            (below[i] < value)
            & (above[i] <= value)
            & (behind[i] < value)
            & (ahead[i] <= value)
            & (left[i] < value)
            & (right[i] <= value)
        )


@numba.njit(cache=True)
def _is_peak(before: Any, here: Any, after: Any, g: int, a: int) -> bool:
    """Whether a point of a plane with its rim is above all its 26 neighbours."""
    value = here[g, a]
    for dg in range(-1, 2):
        for da in range(-1, 2):
            if before[g + dg, a + da] >= value or after[g + dg, a + da] > value:
                return False
            if dg < 0 or (dg == 0 and da < 0):  # of a plateau the first point counts
                if here[g + dg, a + da] >= value:
                    return False
            elif here[g + dg, a + da] > value:
                return False
    return True


@numba.njit(cache=True)
def _find_peaks(score: Any, found: Any, heights: Any) -> None:
    """Append all local maxima."""
    nb, na = score.shape[0], score.shape[2]
    width = na + 2
    planes = np.empty((3, width, width), score.dtype)
    maybe = np.empty(width * width - 2 * (width + 1), np.uint8)
    _with_rim(score, -1, planes[0])
    _with_rim(score, 0, planes[1])
    for j in range(nb):
        before, here, after = planes[j % 3], planes[(j + 1) % 3], planes[(j + 2) % 3]
        _with_rim(score, j + 1, after)
        _above_nearest(before.reshape(-1), here.reshape(-1), after.reshape(-1), width, maybe)
        for g in range(na):
            for a in range(na):
                if maybe[g * width + a] and _is_peak(before, here, after, g + 1, a + 1):
                    found.append((j, g, a))
                    heights.append(-here[g + 1, a + 1])


@numba.njit(cache=True)
def _vertex(score: Any, j: int, g: int, a: int, offset: Any) -> float:
    """Vertex of the quadratic through the neighbourhood: fills offset (beta, gamma, alpha steps), gives its height."""
    v = np.empty((3, 3, 3))
    for dj in range(3):
        for dg in range(3):
            for da in range(3):
                v[dj, dg, da] = _at(score, j + dj - 1, g + dg - 1, a + da - 1)
    centre = v[1, 1, 1]
    gradient, hessian = np.empty(3), np.empty((3, 3))
    gradient[0] = (v[2, 1, 1] - v[0, 1, 1]) / 2
    gradient[1] = (v[1, 2, 1] - v[1, 0, 1]) / 2
    gradient[2] = (v[1, 1, 2] - v[1, 1, 0]) / 2
    hessian[0, 0] = v[2, 1, 1] + v[0, 1, 1] - 2 * centre
    hessian[1, 1] = v[1, 2, 1] + v[1, 0, 1] - 2 * centre
    hessian[2, 2] = v[1, 1, 2] + v[1, 1, 0] - 2 * centre
    hessian[0, 1] = (v[2, 2, 1] - v[2, 0, 1] - v[0, 2, 1] + v[0, 0, 1]) / 4
    hessian[0, 2] = (v[2, 1, 2] - v[2, 1, 0] - v[0, 1, 2] + v[0, 1, 0]) / 4
    hessian[1, 2] = (v[1, 2, 2] - v[1, 2, 0] - v[1, 0, 2] + v[1, 0, 0]) / 4
    hessian[1, 0], hessian[2, 0], hessian[2, 1] = hessian[0, 1], hessian[0, 2], hessian[1, 2]
    minor = hessian[0, 0] * hessian[1, 1] - hessian[0, 1] ** 2
    det = np.linalg.det(hessian)
    offset[:] = 0.0
    concave = hessian[0, 0] < 0 and minor > 0 and det < 0
    if concave and det < 1e-6 * hessian[0, 0] * hessian[1, 1] * hessian[2, 2]:
        offset[:] = -np.linalg.solve(hessian, gradient)
    if not concave or np.abs(offset).max() > 1.0:
        # A ridge (as at the poles) or a saddle: one axis at a time.
        for axis in range(3):
            offset[axis] = 0.0
            if hessian[axis, axis] < 0:
                offset[axis] = min(0.5, max(-0.5, -gradient[axis] / hessian[axis, axis]))
        return float(centre)
    return float(centre + 0.5 * (gradient * offset).sum())


@numba.njit(cache=True)
def _rotation(alpha: float, beta: float, gamma: float, out: Any) -> None:
    ca, sa, cb, sb, cc, sc = np.cos(alpha), np.sin(alpha), np.cos(beta), np.sin(beta), np.cos(gamma), np.sin(gamma)
    out[0], out[1], out[2] = ca * cb * cc - sa * sc, -ca * cb * sc - sa * cc, ca * sb
    out[3], out[4], out[5] = sa * cb * cc + ca * sc, -sa * cb * sc + ca * cc, sa * sb
    out[6], out[7], out[8] = -sb * cc, sb * sc, cb


@numba.njit(parallel=True, nogil=True, cache=True)
def _peaks_loop(scores: Any, merge_trace: float, angles: Any, values: Any, count: Any) -> None:
    nb, na = scores.shape[1], scores.shape[3]
    n = angles.shape[1]
    for b in numba.prange(scores.shape[0]):
        score = scores[b]
        found = [(0, 0, 0) for _ in range(0)]
        heights = [score[0, 0, 0] for _ in range(0)]
        _find_peaks(score, found, heights)
        if len(found) == 0:  # constant all over, or a closed ridge of ties: any of the highest points is as good
            top = score.argmax()
            found.append((top // (na * na), top // na % na, top % na))
            heights.append(-score.max())
        order = np.argsort(np.array(heights), kind="mergesort")
        kept = np.empty((n, 9))
        matrix, offset = np.empty(9), np.empty(3)
        for candidate in order:
            j, g, a = found[candidate]
            height = _vertex(score, j, g, a, offset)
            alpha = 2 * np.pi * (a + offset[2]) / na
            beta = np.pi * (j + 0.5 + offset[0]) / nb
            gamma = 2 * np.pi * (g + offset[1]) / na
            _rotation(alpha, beta, gamma, matrix)
            new = True
            for i in range(count[b]):
                if (kept[i] * matrix).sum() > merge_trace:
                    new = False
                    break
            if new:
                i = count[b]
                kept[i] = matrix
                angles[b, i, 0], angles[b, i, 1], angles[b, i, 2] = alpha, beta, gamma
                values[b, i] = height
                count[b] += 1
                if count[b] == n:
                    break
        # The refined heights may order them otherwise than the grid's values did.
        best = np.argsort(-values[b, : count[b]], kind="mergesort")
        values[b, : count[b]] = values[b, best]
        angles[b, : count[b]] = angles[b, best]
