"""Views of a run in ChimeraX: a script that opens the averages, and the viewing directions as BILD objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faml_gpu.io.atomic import atomic_path
from faml_gpu.report.figures import COLOURS
from faml_gpu.report.summary import RunSummary

__all__ = ["contour_level", "write_chimerax"]

DIRECTIONS = 500  # bins of the sphere, some 10 degrees wide
FEW, MANY = np.array([0.23, 0.43, 0.65]), np.array([0.78, 0.33, 0.24])  # red, green, blue


def write_chimerax(run: RunSummary) -> list[Path]:
    """Write run.cxc (run_it007.cxc ...), and run_class001_angdist.bild ... of each class that has particles.

    Into the run's folder: the script's paths are relative, ChimeraX looks for them beside it.

    Raises
    ------
    OSError
    """
    folder, n_classes = run.files.folder, len(run.maps)
    script = folder / f"{run.files.stem}.cxc"
    lines = [f"# Made by faml-gpu: averages of this folder. Open with: chimerax {script.name}"]
    written = []
    for k, (volume, path) in enumerate(zip(run.maps, run.files.maps, strict=True)):
        level = contour_level(volume, run.options["mask_radius"] / run.voxel_size)
        lines.append(f"open {path.name} id {k + 1}")
        lines.append(f"volume #{k + 1} level {level:.6g} step 1 color {COLOURS[k % len(COLOURS)]}")
        if run.sizes[k]:
            bild = folder / f"{path.stem}_angdist.bild"
            with atomic_path(bild) as temporary:
                temporary.write_text(angular_distribution(run, k), encoding="utf-8")
            written.append(bild)
            lines.append(f"{'open' if n_classes == 1 else '# From where it was seen: open'} {bild.name} id {101 + k}")
    if n_classes == 1:
        lines += ["hide #101 models", "# From where it was seen: show #101 models"]
    else:
        lines.append(f"tile #1-{n_classes}")
    lines += ["view", ""]
    with atomic_path(script) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return [script, *written]


def contour_level(volume: NDArray[np.float32], radius: float) -> float:
    """Density that best parts the voxels within a sphere into two groups (N. Otsu, IEEE Trans. SMC 9, 1979, 62).

    volume (N, N, N); radius in voxels.
    """
    centre = len(volume) // 2
    distance2 = ((np.indices(volume.shape) - centre) ** 2).sum(axis=0)
    counts, edges = np.histogram(volume[distance2 <= radius**2], bins=256)
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sum_below = np.cumsum(counts * middle)[:-1]
    sum_above = (counts * middle).sum() - sum_below
    between = below * above * (sum_below / np.maximum(below, 1) - sum_above / np.maximum(above, 1)) ** 2
    return float(edges[1:-1][between.argmax()])


def angular_distribution(run: RunSummary, k: int) -> str:
    """Viewing directions of class k as cylinders around its map: the longer and redder, the more particles.

    In Angstrom, as ChimeraX places the map: voxel 0 at 0. A particle seen along a direction says as much of the
    opposite one, but for the side it is drawn on.
    """
    voxel = run.voxel_size
    centre = len(run.maps[k]) // 2 * voxel
    radius = 1.05 * run.options["mask_radius"]
    bins = sphere_points(DIRECTIONS)
    mine = run.directions[run.classes == k]
    counts = np.bincount((mine @ bins.T).argmax(axis=1), minlength=len(bins))
    thickness = 0.3 * radius * np.sqrt(4 * np.pi / len(bins))
    lines = [f".comment {len(mine)} particles; the longest cylinder is {counts.max()} of them"]
    for direction, count in zip(bins, counts, strict=True):
        if count:
            share = count / counts.max()
            colour = FEW + share * (MANY - FEW)
            inner, outer = centre + radius * direction, centre + radius * (1 + 0.3 * share) * direction
            lines.append(".color " + " ".join(f"{c:.3f}" for c in colour))
            lines.append(".cylinder " + " ".join(f"{x:.3f}" for x in (*inner, *outer, thickness)))
    return "\n".join([*lines, ""])


def sphere_points(n: int) -> NDArray[np.float64]:
    """Directions (n, 3) spread evenly over the sphere, along a spiral (A. Gonzalez, Math. Geosci. 42, 2010, 49)."""
    i = np.arange(n) + 0.5
    z, longitude = 1 - 2 * i / n, i * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - z**2)
    return np.stack([r * np.cos(longitude), r * np.sin(longitude), z], axis=1)
