"""Tables of spherical harmonics, `ops.harmonics`: python bench/kernels/harmonics.py [--device cuda] [--quick]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import Setting, benchmark
from scipy.special import sph_harm_y

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.ops.harmonics import FLOPS


def validate(setting: Setting) -> float:
    points, bandwidth = np.random.default_rng(1).standard_normal((50, 3)), 12
    found = to_host(ops.harmonics(setting.put(points), bandwidth, even=False))
    theta, phi = np.arccos(points[:, 2] / np.linalg.norm(points, axis=1)), np.arctan2(points[:, 1], points[:, 0])
    m, l = np.nonzero(np.arange(bandwidth)[:, None] <= np.arange(bandwidth))
    expected = sph_harm_y(l, m, theta[:, None], phi[:, None]).conj()
    return float(abs(found[:, 0, m, l] + 1j * found[:, 1, m, l] - expected).max())


def main() -> None:
    with benchmark("harmonics", __doc__, validate, 1e-5) as (setting, report):
        for bandwidth in (8,) if setting.quick else (12, 24, 36):
            n = 10_000 if setting.device == "cpu" else 1_000_000 // bandwidth
            points = setting.put(np.random.default_rng(bandwidth).standard_normal((n, 3)))
            for block in setting.blocks("harmonics"):
                seconds = setting.seconds(partial(ops.harmonics, points, bandwidth))
                table = 4 * n * 2 * bandwidth * -(-bandwidth // 2)
                report.add(
                    seconds, moved=points.nbytes + table, flops=FLOPS * n * bandwidth * (bandwidth + 1) // 2,
                    points=n, bandwidth=bandwidth, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
