"""Masked residual sums of the E-step, `ops.residual`: python bench/kernels/residual.py [--device cuda] [--quick]."""

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
    wedge,
    whole,
)

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.fourier import Support
from faml_gpu.geometry import random_rotations
from faml_gpu.ops.residual import FLOPS

POSES = 50


def particles(rng: np.random.Generator, b: int, n: int, support: Support) -> tuple[np.ndarray, ...]:
    """Spectra, the weights of a wedge of +-60 degrees, and poses."""
    m = len(support)
    spectra = (rng.standard_normal((b, m)) + 1j * rng.standard_normal((b, m))).astype(np.complex64)
    weights = wedge(support)[None]
    rotations = random_rotations(b * n, rng).reshape(b, n, 3, 3)
    shifts = rng.uniform(-2, 2, (b, n, 3))
    return spectra, weights, np.zeros(b, np.int64), rotations, shifts, np.full(b, n)


def validate(setting: Setting) -> float:
    rng = np.random.default_rng(1)
    support, grid = support_on(setting, 16), random_grid(rng, 7)
    spectra, weights, index, rotations, shifts, count = particles(rng, 2, 3, support)
    given = map(setting.put, (grid, spectra, weights, index, rotations, shifts, count))
    found = to_host(ops.residual(*given, support, PADDING))
    xi, shell, cube = to_host(support.coords).astype(float), to_host(support.shell), whole(grid)
    expected = np.zeros_like(found)
    for b, i in np.ndindex(2, 3):
        shifted = trilinear(cube, PADDING * xi @ rotations[b, i]) * np.exp(-2j * np.pi / 16 * xi @ shifts[b, i])
        np.add.at(expected[b, i], shell, 2 * abs(weights[0] * (spectra[b] - shifted)) ** 2)
    return float(abs(found - expected).max() / expected.max())


def main() -> None:
    with benchmark("residual", __doc__, validate, 1e-5) as (setting, report):
        for box in setting.boxes(32, 64, 128):
            rng = np.random.default_rng(box)
            support = support_on(setting, box)
            m, b = len(support), max(1, 10**6 // (POSES * len(support))) * (1 if setting.device == "cpu" else 40)
            grid = setting.put(random_grid(rng, support.r_max))
            spectra, weights, index, rotations, shifts, count = map(setting.put, particles(rng, b, POSES, support))
            gather = gather_seconds(setting, grid, rotations.reshape(-1, 3, 3), support, rows=True)
            seen = float(weights.mean())  # voxels without weight are skipped
            samples = b * POSES * m * seen
            for block in setting.blocks("residual"):
                work = partial(ops.residual, grid, spectra, weights, index, rotations, shifts, count, support, PADDING)
                sums = 8 * b * POSES * (support.r_max + 1)
                report.add(
                    setting.seconds(work), moved=grid.nbytes + spectra.nbytes + weights.nbytes + sums,
                    flops=FLOPS * samples, gathers=None if gather is None else gather * samples,
                    box=box, particles=b, poses=POSES, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
