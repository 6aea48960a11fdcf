"""Nearest-neighbour (Voronoi) assignment of pose points to candidate poses."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faml_gpu import kernels
from faml_gpu.array_backend import Array, namespace, twin
from faml_gpu.ops._check import require
from faml_gpu.profile import tally

__all__ = ["assign"]

FLOPS = 28  # of a point and a candidate: trace 18, distance of the shifts 9, comparison 1


def assign(
    point_rotations: Array,
    point_units: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    translation_weight: float,
) -> Array:
    """How many pose points have each candidate as their nearest, under the metric

    tau^2 = ||I - R1^T R2||_F^2 + a ||t1 - t2||^2 = 6 - 2 tr(R1^T R2) + a ||t1 - t2||^2.

    The points' translations are spread over the bounding box of each particle's candidates.

    Parameters
    ----------
    point_rotations : (P, 3, 3) float64
    point_units : (P, 3) float64 in [0, 1)
        Place of each point inside the bounding box of the shifts.
    rotations : (B, n, 3, 3) float64
    shifts : (B, n, 3) float64, voxels
    count : (B,) int64
        Particle b has the candidates [: count[b]].
    translation_weight : float
        a, per squared voxel (the paper's alpha_trd).

    Returns
    -------
    (B, n) int64
        Counts; each row with a candidate sums to P. Ties go to the first candidate.
    """
    p = len(point_rotations)
    b, n = rotations.shape[:2]
    require(point_rotations, "point_rotations", np.float64, (p, 3, 3))
    require(point_units, "point_units", np.float64, (p, 3))
    require(rotations, "rotations", np.float64, (b, n, 3, 3))
    require(shifts, "shifts", np.float64, (b, n, 3))
    require(count, "count", np.int64, (b,))
    out = twin(_assign_cpu, _assign_cuda, rotations)(
        point_rotations, point_units, rotations, shifts, count, translation_weight
    )
    tally(point_rotations, point_units, rotations, shifts, out, flops=FLOPS * p * b * n)
    return out


def _assign_cpu(
    point_rotations: Array,
    point_units: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    translation_weight: float,
) -> Array:
    out = np.zeros(rotations.shape[:2], np.int64)
    _assign_loop(
        point_rotations.reshape(-1, 9),
        point_units,
        rotations.reshape(*rotations.shape[:2], 9),
        shifts,
        count,
        float(translation_weight),
        out,
    )
    return out


def _assign_cuda(
    point_rotations: Array,
    point_units: Array,
    rotations: Array,
    shifts: Array,
    count: Array,
    translation_weight: float,
) -> Array:
    xp = namespace(rotations)
    p = len(point_rotations)
    b, n = rotations.shape[:2]
    out = xp.zeros((b, n), np.int64)
    chunks = -(-p // kernels.THREADS["assign"])
    kernels.launch(
        "assign",
        np.float64,
        b * chunks,
        (
            point_rotations,
            point_units,
            rotations,
            shifts,
            count,
            translation_weight,
            p,
            n,
            chunks,
            out.view(np.uint64),  # what CUDA's 64-bit atomic addition takes
        ),
        shared=n * np.dtype(np.int32).itemsize,
    )
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "nnan", "nsz"})
def _assign_loop(points: Any, units: Any, rotations: Any, shifts: Any, count: Any, weight: float, out: Any) -> None:
    for b in numba.prange(rotations.shape[0]):
        n = count[b]
        if n == 0:
            continue
        low, span = np.empty(3), np.empty(3)
        # Less what is the same for all candidates, the distance is a product of twelve numbers and a constant.
        # Candidates one after the other in memory, in a loop without branches: it is vectorised.
        theirs = np.zeros((13, n))
        for axis in range(3):
            low[axis] = shifts[b, :n, axis].min()
            span[axis] = shifts[b, :n, axis].max() - low[axis]
        for i in range(n):
            for j in range(9):
                theirs[j, i] = -2 * rotations[b, i, j]
            for axis in range(3):
                shift = shifts[b, i, axis] - low[axis]
                theirs[9 + axis, i] = -2 * weight * shift
                theirs[12, i] += weight * shift**2
        v0, v1, v2, v3, v4, v5, v6 = theirs[0], theirs[1], theirs[2], theirs[3], theirs[4], theirs[5], theirs[6]
        v7, v8, v9, v10, v11, v12 = theirs[7], theirs[8], theirs[9], theirs[10], theirs[11], theirs[12]
        distance = np.empty(n)
        for p in range(points.shape[0]):
            r0, r1, r2, r3, r4, r5, r6, r7, r8 = (
                points[p, 0], points[p, 1], points[p, 2], points[p, 3], points[p, 4], points[p, 5], points[p, 6],
                points[p, 7], points[p, 8],
            )  # fmt: skip
            t0, t1, t2 = span[0] * units[p, 0], span[1] * units[p, 1], span[2] * units[p, 2]
            for i in range(n):
                turn = r0 * v0[i] + r1 * v1[i] + r2 * v2[i] + r3 * v3[i] + r4 * v4[i] + r5 * v5[i]
                turn += r6 * v6[i] + r7 * v7[i] + r8 * v8[i]
                distance[i] = turn + t0 * v9[i] + t1 * v10[i] + t2 * v11[i] + v12[i]
            least = distance[0]
            for i in range(n):
                least = min(least, distance[i])
            nearest = 0
            while distance[nearest] > least:
                nearest += 1
            out[b, nearest] += 1
