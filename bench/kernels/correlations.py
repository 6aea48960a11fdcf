"""Rotations compared at a lattice of shifts, `ops.correlations`: python bench/kernels/correlations.py [--device cuda].

At 7 x 7 x 7 shifts, as cells of the sampler `joint` are; the bare gathers next to it do nothing of the transform.
"""

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
from faml_gpu.ops.correlations import FLOPS

LINE = np.arange(-3.0, 4.0)  # shifts along an axis, voxels


def entries(rng: np.random.Generator, b: int, n: int, support: Support) -> tuple[np.ndarray, ...]:
    """Spectra, the weights of a wedge of +-60 degrees, and n rotations of each of b particles about a shift."""
    m = len(support)
    spectra = (rng.standard_normal((b, m)) + 1j * rng.standard_normal((b, m))).astype(np.complex64)
    particle = np.repeat(np.arange(b), n)
    centres = rng.uniform(-2, 2, (b * n, 3))
    return spectra, wedge(support)[None], np.zeros(b, np.int64), particle, random_rotations(b * n, rng), centres


def shift_waves(support: Support) -> np.ndarray:
    """Of seven shifts along an axis, a voxel apart."""
    k = np.arange(-support.r_max, support.r_max + 1)
    return np.exp(2j * np.pi / support.box * LINE[:, None] * k).astype(np.complex64)


def validate(setting: Setting) -> float:
    rng = np.random.default_rng(1)
    support, grid = support_on(setting, 16), random_grid(rng, 7)
    spectra, weights, _, particle, rotations, centres = given = entries(rng, 2, 3, support)
    waves = shift_waves(support)
    found, power = map(to_host, ops.correlations(*map(setting.put, (grid, *given[:6], waves)), support, PADDING))
    xi = to_host(support.coords)
    # Over all xi: [xi, t] along each axis.
    at_shifts = [np.exp(2j * np.pi / 16 * xi[:, axis, None] * LINE) for axis in range(3)]
    expected, expected_power = np.zeros(found.shape), np.zeros(len(power))
    for e, (b, r, c) in enumerate(zip(particle, rotations, centres, strict=True)):
        turned = trilinear(whole(grid), PADDING * xi.astype(float) @ r)
        moved = weights[0] * spectra[b] * turned.conj() * np.exp(2j * np.pi / 16 * xi @ c)
        expected[e] = 2 * np.einsum("m,mx,my,mz->xyz", moved, *at_shifts, optimize=True).real
        expected_power[e] = 2 * (weights[0] * abs(turned) ** 2).sum()
    off = abs(found - expected).max() / abs(expected).max(), abs(power / expected_power - 1).max()
    return float(max(off))


def main() -> None:
    with benchmark("correlations", __doc__, validate, 1e-5) as (setting, report):
        for box in setting.boxes(32, 64, 128):
            rng = np.random.default_rng(box)
            support = support_on(setting, box)
            m, n = len(support), 16
            b = max(1, 10**6 // (n * m)) * (1 if setting.device == "cpu" else 40)
            grid = setting.put(random_grid(rng, support.r_max))
            given = tuple(map(setting.put, entries(rng, b, n, support)))
            waves = setting.put(shift_waves(support))
            gather = gather_seconds(setting, grid, given[4], support, rows=True)
            seen = float(given[1].mean())  # voxels without weight are skipped
            samples, correlations = b * n * m * seen, 4 * b * n * len(LINE) ** 3
            for block in setting.blocks("cross"):
                work = partial(ops.correlations, grid, *given, waves, support, PADDING)
                report.add(
                    setting.seconds(work), moved=grid.nbytes + given[0].nbytes + given[1].nbytes + correlations,
                    flops=FLOPS * samples, gathers=None if gather is None else gather * samples,
                    box=box, entries=b * n, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
