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


@numba.njit(parallel=True, nogil=True, cache=True)
def _assign_loop(points: Any, units: Any, rotations: Any, shifts: Any, count: Any, weight: float, out: Any) -> None:
    for b in numba.prange(rotations.shape[0]):
        if count[b] == 0:
            continue
        low, span = np.empty(3), np.empty(3)
        for axis in range(3):
            low[axis] = shifts[b, : count[b], axis].min()
            span[axis] = shifts[b, : count[b], axis].max() - low[axis]
        for p in range(points.shape[0]):
            t = low + span * units[p]
            nearest, least = 0, np.inf
            for i in range(count[b]):
                trace = 0.0
                for j in range(9):
                    trace += points[p, j] * rotations[b, i, j]
                distance = -2 * trace
                for axis in range(3):
                    distance += weight * (t[axis] - shifts[b, i, axis]) ** 2
                if distance < least:
                    nearest, least = i, distance
            out[b, nearest] += 1
