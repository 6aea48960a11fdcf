"""Step 2, Voronoi weights: how much of pose space each candidate stands for, by Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from faml_gpu import ops
from faml_gpu.array_backend import Array, namespace, to_device
from faml_gpu.geometry import random_euler, random_rotations

__all__ = ["ALPHA_TRD", "N_POINTS", "PosePoints", "draw_points", "log_volumes"]

N_POINTS = 10_000
ALPHA_TRD = 1.0  # weight of a squared voxel of shift against ||I - R1^T R2||_F^2


@dataclass(frozen=True)
class PosePoints:
    """Random poses: rotations (P, 3, 3) float64, units (P, 3) float64, places in the box around the shifts."""

    rotations: Array
    units: Array


def draw_points(n: int, measure: Literal["haar", "euler"], rng: np.random.Generator, device: str = "cpu") -> PosePoints:
    """n random poses; "haar" is the invariant measure of SO(3), "euler" draws each angle uniformly (the paper)."""
    rotations = random_rotations(n, rng) if measure == "haar" else random_euler(n, rng)
    return PosePoints(to_device(rotations, device), to_device(rng.random((n, 3)), device))


def log_volumes(points: PosePoints, rotations: Array, shifts: Array, count: Array) -> Array:
    """Log of each candidate's share of pose space, log v~.

    v~ = (points nearest to it + 1/2) / (points + n / 2): no candidate gets 0, and the shares of a particle's n
    candidates sum to 1.

    Parameters
    ----------
    points : PosePoints
    rotations : (B, n, 3, 3) float64
    shifts : (B, n, 3) float64, voxels
    count : (B,) int64

    Returns
    -------
    (B, n) float64
    """
    hits = ops.assign(points.rotations, points.units, rotations, shifts, count, ALPHA_TRD)
    return namespace(rotations).log((hits + 0.5) / (len(points.units) + 0.5 * count[:, None]))
