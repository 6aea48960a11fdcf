"""Local maxima on the SO(3) grid, `ops.peaks`: python bench/kernels/peaks.py [--device cuda] [--quick]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import Setting, benchmark
from scipy.spatial.transform import Rotation

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.fast_alignment.so3 import grid_angles

BANDWIDTH, CANDIDATES = 36, 50


def bumps(bandwidth: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A sum of bumps exp(k (trace - 3)) about n rotations, of heights 1, 1/2, 1/4 ...; and the rotations."""
    beta, alpha = grid_angles(bandwidth)
    b, g, a = np.meshgrid(beta, alpha, alpha, indexing="ij")
    grid = Rotation.from_euler("ZYZ", np.stack([a, b, g], axis=-1).reshape(-1, 3)).as_matrix()
    centres = Rotation.random(n, random_state=int(rng.integers(1 << 31))).as_matrix()
    trace = np.einsum("nij,pij->np", centres, grid)
    scores = (0.5 ** np.arange(n)[:, None] * np.exp(20 * (trace - 3))).sum(axis=0)
    return scores.reshape(b.shape).astype(np.float32), centres


def validate(setting: Setting) -> float:
    """Largest angle, in radians, between a bump's centre and the maximum found there; bumps are 20 degrees wide."""
    scores, centres = bumps(32, 3, np.random.default_rng(2))
    angles, _, count = map(to_host, ops.peaks(setting.put(scores[None]), 3, 10.0))
    if count[0] != 3:
        return float("inf")
    found = Rotation.from_euler("ZYZ", angles[0]).as_matrix()
    cosine = (np.einsum("nij,nij->n", found, centres) - 1) / 2
    return float(np.arccos(np.clip(cosine, -1, 1)).max())


def main() -> None:
    with benchmark("peaks", __doc__, validate, 0.02) as (setting, report):
        for bandwidth in (8,) if setting.quick else (24, BANDWIDTH):
            rng = np.random.default_rng(bandwidth)
            b = 4 if setting.device == "cpu" else 64
            shape = (b, 2 * bandwidth, 2 * bandwidth, 2 * bandwidth)
            noise = rng.standard_normal(shape).astype(np.float32)
            for axis in (1, 2, 3):  # as smooth as a function of that bandwidth
                noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
            scores = setting.put(noise)
            for block in setting.blocks("so3_maxima", "so3_select"):
                seconds = setting.seconds(partial(ops.peaks, scores, CANDIDATES, 10.0))
                report.add(
                    seconds, moved=scores.nbytes, flops=26 * scores.size, functions=b, bandwidth=bandwidth,
                    candidates=CANDIDATES, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
