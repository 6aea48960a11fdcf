"""Normal equations of refinement, `ops.normal_equations`: python bench/kernels/normal_equations.py [--device cuda]."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import PADDING, Setting, benchmark, random_grid, support_on, trilinear, whole
from residual import particles

from faml_gpu import ops
from faml_gpu.array_backend import to_host
from faml_gpu.ops.normal_equations import FLOPS

POSES = 12


def slopes(cube: np.ndarray, points: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Derivatives (n, 3) of the trilinear interpolant within its cells."""
    inside = np.clip(points, np.floor(points) + 2 * step, np.floor(points) + 1 - 2 * step)
    sides = step * np.eye(3)
    return np.stack([(trilinear(cube, inside + e) - trilinear(cube, inside - e)) / (2 * step) for e in sides], axis=-1)


def validate(setting: Setting) -> float:
    rng = np.random.default_rng(1)
    support, grid = support_on(setting, 16), random_grid(rng, 7)
    spectra, weights, index, rotations, shifts, count = particles(rng, 2, 3, support)
    given = map(setting.put, (grid, spectra, weights, index, rotations, shifts, count))
    found = to_host(ops.normal_equations(*given, support, PADDING))
    xi, cube = to_host(support.coords).astype(float), whole(grid)
    expected = np.zeros_like(found)
    for b, i in np.ndindex(2, 3):
        points, phase = PADDING * xi @ rotations[b, i], np.exp(-2j * np.pi / 16 * xi @ shifts[b, i])
        model, slope = trilinear(cube, points) * phase, slopes(cube, points) * phase[:, None]
        turned = [(slope * (PADDING * np.cross(xi, axis) @ rotations[b, i])).sum(axis=1) for axis in np.eye(3)]
        moved = [-2j * np.pi / 16 * xi[:, axis] * model for axis in range(3)]
        g = weights[0] * np.stack([*turned, *moved, spectra[b] - model])
        expected[b, i] = 2 * (g.conj() @ g.T).real
    return float(abs(found - expected).max() / expected.max())


def main() -> None:
    with benchmark("normal_equations", __doc__, validate, 1e-4) as (setting, report):
        for box in setting.boxes(32, 64, 128):
            rng = np.random.default_rng(box)
            support = support_on(setting, box)
            m, b = len(support), max(1, 10**6 // (POSES * len(support))) * (1 if setting.device == "cpu" else 40)
            grid = setting.put(random_grid(rng, support.r_max))
            spectra, weights, index, rotations, shifts, count = map(setting.put, particles(rng, b, POSES, support))
            samples = b * POSES * m * float(weights.mean())  # voxels without weight are skipped
            for block in setting.blocks("normal_equations"):
                given = grid, spectra, weights, index, rotations, shifts, count, support, PADDING
                report.add(
                    setting.seconds(partial(ops.normal_equations, *given)),
                    moved=grid.nbytes + spectra.nbytes + weights.nbytes + 8 * 49 * b * POSES,
                    flops=FLOPS * samples, box=box, particles=b, poses=POSES, **block,
                )  # fmt: skip


if __name__ == "__main__":
    main()
