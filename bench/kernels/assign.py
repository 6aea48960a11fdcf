"""Nearest-neighbour (Voronoi) assignment, `ops.assign`: python bench/kernels/assign.py [--device cuda] [--quick]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import Setting, benchmark

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.geometry import random_rotations
from faml_gpu.ops.assign import FLOPS

WEIGHT = 0.1
CANDIDATES = 50


def poses(rng: np.random.Generator, points: int, b: int, n: int) -> tuple[np.ndarray, ...]:
    return (
        random_rotations(points, rng), rng.random((points, 3)), random_rotations(b * n, rng).reshape(b, n, 3, 3),
        rng.uniform(-3, 3, (b, n, 3)), np.full(b, n),
    )  # fmt: skip


def validate(setting: Setting) -> float:
    """Share of points counted elsewhere than by tau^2 = |I - R1^T R2|_F^2 + a |t1 - t2|^2 as it is written."""
    rotations, units, of_candidates, shifts, count = poses(np.random.default_rng(1), 2000, 2, 9)
    given = map(setting.put, (rotations, units, of_candidates, shifts, count))
    found = to_host(ops.assign(*given, WEIGHT))
    expected = np.zeros_like(found)
    for b in range(2):
        t = shifts[b].min(axis=0) + np.ptp(shifts[b], axis=0) * units
        relative = np.einsum("pji,njk->pnik", rotations, of_candidates[b])
        tau2 = ((np.eye(3) - relative) ** 2).sum(axis=(2, 3)) + WEIGHT * ((t[:, None] - shifts[b]) ** 2).sum(axis=2)
        np.add.at(expected[b], tau2.argmin(axis=1), 1)
    return float(abs(found - expected).sum() / expected.sum())


def main() -> None:
    with benchmark("assign", __doc__, validate, 0.0) as (setting, report):
        for points in (1000,) if setting.quick else (1000, 10_000):
            b = 10 if setting.device == "cpu" else 1000
            given = [setting.put(x) for x in poses(np.random.default_rng(points), points, b, CANDIDATES)]
            for block in setting.blocks("assign"):
                seconds = setting.seconds(partial(ops.assign, *given, WEIGHT))
                report.add(
                    seconds, moved=sum(x.nbytes for x in given) + 8 * b * CANDIDATES,
                    flops=FLOPS * points * b * CANDIDATES, points=points, particles=b, candidates=CANDIDATES, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
