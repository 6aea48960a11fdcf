"""Pictures of a case: slices and surfaces of the truth and the averages, FSC curves, convergence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from faml_gpu.fsc import lowpass
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.mrc import read_mrc

__all__ = ["SEED", "draw", "save", "surface"]

Float32 = NDArray[np.float32]

COLOURS = {
    "ceiling": "0.45", "default": "tab:blue", "paper": "tab:green", "fa": "tab:orange", "fa-plain": "tab:red",
    "matched-50": "tab:blue", "grid-1000": "tab:red", "grid-1000-shifts": "tab:orange",
}  # fmt: skip
NAMES = {
    "default": "FAML", "paper": "FAML, paper", "fa": "FA", "fa-plain": "FA, plain", "ceiling": "true poses",
    "matched-50": "50 matched", "grid-1000": "125 × 8 grid", "grid-1000-shifts": "1000 grid",
}  # fmt: skip
DRAWN_AT = 20.0  # Angstrom, of slices and surfaces
SEED = 1  # of the data set whose runs are drawn
DPI = 90


def draw(case: Case, results: Path, work: Path, folder: Path) -> list[Path]:
    """All pictures of a case that its maps and JSON files allow; a method that was not run is left out.

    FSC and convergence need the JSON files alone. Slices and surfaces need maps, which are of the machine that made
    them: a picture that has more of them than are at hand is left as it is.

    Returns
    -------
    what was drawn
    """
    runs: dict[str, dict[str, Any]] = {}
    maps: dict[str, list[Float32]] = {}
    for method in case.methods:
        path = results / case.name / f"{method}_snr1_seed{SEED}.json"
        if path.exists():
            runs[method] = json.loads(path.read_text(encoding="utf-8"))
    names = [s.name for s in case.specimens] or [case.name]
    for method in dict.fromkeys(("truth", "ceiling", "fa", "fa-plain", "paper", "default", *case.methods)):
        paths = [work / "maps" / case.name / f"{method}_snr1_seed{SEED}_{k + 1}.mrc" for k in range(len(names))]
        if all(path.exists() for path in paths):
            cut = max(DRAWN_AT, 2 * case.voxel_size)
            maps[method] = [lowpass(read_mrc(path)[0], cut, case.voxel_size) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for kind, picture in (("slices", _slices), ("surfaces", _surfaces)):
        path = folder / f"{case.name}_{kind}.png"
        if not maps:
            continue
        figure = picture(names, maps, _labels(case))
        if path.exists() and _width(path) > int(DPI * figure.get_figwidth()):
            print(f"{path}: left as it is, it shows more maps than the {len(maps)} that are at hand")
            continue
        save(figure, path)
        drawn.append(path)
    for kind, curves in (("fsc", _fsc), ("convergence", _convergence)):
        path = folder / f"{case.name}_{kind}.png"
        curve = curves(case, runs)
        if curve is not None:
            save(curve, path)
            drawn.append(path)
    return drawn


def _truth(case: Case) -> str:
    """What stands in the truth's place: of real data there is none, but a map from poses found elsewhere."""
    return "reference" if case.kind == "real" else "truth"


def _labels(case: Case) -> dict[str, str]:
    """Names of the maps and curves."""
    return NAMES | ({"truth": _truth(case), "ceiling": "poses refined elsewhere"} if case.kind == "real" else {})


def _width(path: Path) -> int:
    """Pixels: every map of a picture takes the same."""
    with Image.open(path) as picture:
        return picture.width


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colours, which is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as picture, atomic_path(path) as temporary:
        picture.convert("RGB").quantize(64).save(temporary, format="PNG", optimize=True)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _fsc(case: Case, runs: dict[str, dict[str, Any]]) -> Figure | None:
    """FSC with the truth, a panel per structure."""
    with_maps = {m: run["metrics"]["maps"] for m, run in runs.items() if run["metrics"].get("maps")}
    if not with_maps:
        return None
    first, labels = next(iter(with_maps.values())), _labels(case)
    figure = _figure(4.2 * len(first), 3.2)
    for c, axes in enumerate(figure.subplots(1, len(first), squeeze=False)[0]):
        for method, rows in with_maps.items():
            axes.plot(rows[c]["frequency"], rows[c]["fsc"], color=COLOURS.get(method), label=labels.get(method, method))
        axes.axhline(0.5, color="0.8", linewidth=0.8)
        axes.axhline(0.143, color="0.8", linewidth=0.8)
        axes.set(title=f"{case.name}: {first[c]['structure']}", xlabel="1 / Å", ylim=(-0.1, 1.02))
        axes.set_ylabel(f"FSC with the {_truth(case)}")
    axes.legend(fontsize=8)
    return figure


def _convergence(case: Case, runs: dict[str, dict[str, Any]]) -> Figure | None:
    """r of the averages in the loop by iteration, a panel per structure."""
    traced = {m: run["metrics"]["r_by_iteration"] for m, run in runs.items() if "r_by_iteration" in run["metrics"]}
    if not traced:
        return None
    method, first = next(iter(traced.items()))
    structures = [row["structure"] for row in runs[method]["metrics"]["maps"]]
    figure = _figure(4.2 * len(structures), 3.2)
    for c, axes in enumerate(figure.subplots(1, len(structures), squeeze=False)[0]):
        for method, rows in traced.items():
            axes.plot(
                rows["iteration"], [row[c] for row in rows["r"]], marker=".", color=COLOURS.get(method),
                label=NAMES.get(method, method),
            )  # fmt: skip
        axes.set(title=f"{case.name}: {structures[c]}", xlabel="iteration")
        axes.set_ylabel(f"r with the {_truth(case)} at {first['lowpass']:g} Å,\naverages in the loop")
    axes.legend(fontsize=8)
    return figure


def _slices(names: list[str], maps: dict[str, list[Float32]], titles: dict[str, str]) -> Figure:
    """Two rows per structure, the planes xy and xz through the centre; each map has its own grey scale."""
    figure = _figure(1.6 * len(maps), 3.3 * len(names) + 0.2)
    grid = figure.subplots(2 * len(names), len(maps), squeeze=False)
    for k, name in enumerate(names):
        for column, (method, volumes) in enumerate(maps.items()):
            volume = volumes[k]
            centre = len(volume) // 2
            planes = {"xy": volume[centre], "xz": volume[:, centre]}
            low, high = np.percentile(np.stack(list(planes.values())), [1.0, 99.8])
            for row, (plane, image) in enumerate(planes.items()):
                axes = grid[2 * k + row, column]
                axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
                axes.set_xticks([])
                axes.set_yticks([])
                if k == row == 0:
                    axes.set_title(titles.get(method, method), fontsize=10)
                if column == 0:
                    axes.set_ylabel(f"{name}, {plane}", fontsize=8)
    return figure


def _surfaces(names: list[str], maps: dict[str, list[Float32]], titles: dict[str, str]) -> Figure:
    """A row per structure: surfaces of equal volume, seen along y (x to the right, z up)."""
    figure = _figure(1.75 * len(maps), 1.85 * len(names) + 0.2)
    grid = figure.subplots(len(names), len(maps), squeeze=False)
    for k, row in enumerate(grid):
        reference = next(iter(maps.values()))[k]
        share = float((reference > 0.25 * np.percentile(reference, 99.9)).mean())
        for axes, (method, volumes) in zip(row, maps.items(), strict=True):
            level = float(np.quantile(volumes[k], 1 - share))
            axes.imshow(surface(volumes[k], level), cmap="gray", vmin=0, vmax=1, origin="lower")
            axes.set_axis_off()
            if k == 0:
                axes.set_title(titles.get(method, method), fontsize=10)
    return figure


def surface(volume: Float32, level: float, zoom: int = 3) -> Float32:
    """The isosurface at a level, seen along y from its low end and lit from the viewer's upper left; background 1.

    Parameters
    ----------
    volume : (N, N, N), `[z, y, x]`
    level : of the surface
    zoom : pixels per voxel

    Returns
    -------
    (zoom N, zoom N) float32 in 0 .. 1, rows z, columns x
    """
    fine = ndimage.zoom(volume, zoom, order=1)
    above = fine > level
    hit = above.any(axis=1)
    first = above.argmax(axis=1)  # [z, x]
    depth = first.astype(np.float32)
    # Between the voxel before the surface and the one at it.
    z, x = np.nonzero(hit & (first > 0))
    y = first[z, x]
    inner, outer = fine[z, y, x], fine[z, y - 1, x]
    depth[z, x] -= (inner - level) / np.maximum(inner - outer, 1e-12)
    depth[~hit] = fine.shape[1]
    smooth = ndimage.gaussian_filter(depth, 1.0)
    slope_z, slope_x = np.gradient(smooth)
    normal = np.stack([slope_x, -np.ones_like(slope_x), slope_z])
    normal /= np.linalg.norm(normal, axis=0)
    light = np.array([-0.45, -0.75, 0.5]) / np.linalg.norm([0.45, 0.75, 0.5])
    shade = 0.15 + 0.75 * np.clip(np.tensordot(light, normal, axes=1), 0, 1)
    shade *= 1 - 0.35 * depth / fine.shape[1]
    return np.where(hit, shade, 1.0).astype(np.float32)
