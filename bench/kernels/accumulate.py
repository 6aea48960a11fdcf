"""Sums of the M-step, `ops.accumulate`: python bench/kernels/accumulate.py [--device cuda] [--quick]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import (
    PADDING,
    Setting,
    benchmark,
    gather_seconds,
    random_grid,
    support_on,
    trilinear,
    whole,
)

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.fourier import Support
from faml_gpu.geometry import random_rotations
from faml_gpu.ops.accumulate import FLOPS

POSES = 10  # that carry mass, of a particle


def weight_grid(support: Support) -> np.ndarray:
    """The wedge as a half grid (2d + 1, 2d + 1, d + 1) float32 that reaches beyond the support."""
    d = support.r_max + 2
    z, y, x = np.meshgrid(*2 * (np.arange(-d, d + 1),), np.arange(d + 1), indexing="ij")
    of_grid = abs(z) <= np.tan(np.deg2rad(60)) * abs(x) + 0 * y
    return np.ascontiguousarray(of_grid, np.float32)


def entries(rng: np.random.Generator, b: int, poses: int) -> tuple[np.ndarray, ...]:
    """particle, class, rotation, shift and probability of each of b * poses entries, one class."""
    n = b * poses
    return (
        np.repeat(np.arange(b), poses), np.zeros(n, np.int64), random_rotations(n, rng),
        rng.uniform(-2, 2, (n, 3)), rng.random(n) / poses,
    )  # fmt: skip


def validate(setting: Setting) -> float:
    rng = np.random.default_rng(1)
    support = support_on(setting, 16)
    grids, weights = np.stack([random_grid(rng, 7) for _ in range(2)]), weight_grid(support)
    particle, kind, rotations, shifts, p = entries(rng, 2, 3)
    given = map(setting.put, (grids, weights[None], np.zeros(2, np.int64), particle, kind, rotations, shifts, p))
    sums, weight_sums = map(to_host, ops.accumulate(*given, support, PADDING, 1))
    xi = to_host(support.coords).astype(float)
    expected, of_weights = np.zeros(len(xi), complex), np.zeros(len(xi))
    for e in range(len(p)):
        turned = xi @ rotations[e].T  # R xi
        value = trilinear(whole(grids[particle[e]]), PADDING * turned)
        expected += p[e] * value * np.exp(2j * np.pi / 16 * turned @ shifts[e])
        of_weights += p[e] * trilinear(whole(weights), turned)
    off = abs(sums[0] - expected).max() / abs(expected).max()
    return float(max(off, abs(weight_sums[0] - of_weights).max() / of_weights.max()))


def main() -> None:
    with benchmark("accumulate", __doc__, validate, 1e-5) as (setting, report):
        for box in setting.boxes(32, 64, 128):
            rng = np.random.default_rng(box)
            support = support_on(setting, box)
            b = max(1, 2 * 10**5 // (POSES * len(support))) * (1 if setting.device == "cpu" else 40)
            b = min(b, max(1, (1 << 31) // (8 * (4 * support.r_max + 3) ** 3 // 2)))
            grids = setting.put(np.stack([random_grid(rng, support.r_max)] * b))
            weights, index = setting.put(weight_grid(support)[None]), setting.put(np.zeros(b, np.int64))
            list_of = [setting.put(x) for x in entries(rng, b, POSES)]
            gather = gather_seconds(setting, grids[0], list_of[2].transpose(0, 2, 1).copy(), support)
            samples = b * POSES * len(support)
            if gather is not None:
                gather *= 1.5  # with each sample of X one of the weight, which is real
            for block in setting.blocks("accumulate"):
                seconds = setting.seconds(partial(ops.accumulate, grids, weights, index, *list_of, support, PADDING, 1))
                report.add(
                    seconds, moved=grids.nbytes + weights.nbytes + 24 * len(support), flops=FLOPS * samples,
                    gathers=None if gather is None else gather * samples, box=box, particles=b, poses=POSES, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
