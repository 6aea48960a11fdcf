"""Rotated references, `ops.rotate`: python bench/kernels/rotate.py [--device cuda] [--quick]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import PADDING, Setting, benchmark, gather_seconds, random_grid, support_on, trilinear, whole

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.geometry import random_rotations
from faml_gpu.ops._trilinear import GATHER_FLOPS


def validate(setting: Setting) -> float:
    rng = np.random.default_rng(1)
    support, grid, rotations = support_on(setting, 16), random_grid(rng, 7), random_rotations(4, rng)
    found = to_host(ops.rotate(setting.put(grid), setting.put(rotations), support.coords, PADDING))
    xi = to_host(support.coords).astype(float)
    expected = np.stack([trilinear(whole(grid), PADDING * xi @ r) for r in rotations])  # rows (R^T xi)^T = xi^T R
    return float(abs(found - expected).max() / abs(expected).max())


def main() -> None:
    with benchmark("rotate", __doc__, validate, 1e-5) as (setting, report):
        for box in setting.boxes(32, 64, 128):
            rng = np.random.default_rng(box)
            support = support_on(setting, box)
            n = 10**6 // len(support) * (4 if setting.device == "cpu" else 100) + 1
            grid, rotations = setting.put(random_grid(rng, support.r_max)), setting.put(random_rotations(n, rng))
            gather = gather_seconds(setting, grid, rotations, support)
            samples = n * len(support)
            for block in setting.blocks("rotate"):
                seconds = setting.seconds(partial(ops.rotate, grid, rotations, support.coords, PADDING))
                report.add(
                    seconds, moved=grid.nbytes + 8 * samples, flops=GATHER_FLOPS * samples,
                    gathers=None if gather is None else gather * samples, box=box, rotations=n, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
