"""The figures of a report, each of what a `RunSummary` holds, as a matplotlib figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from faml_gpu.maximization import COVERAGE_FLOOR
from faml_gpu.report.slices import PLANES, central_slices, scale_bar
from faml_gpu.report.summary import MISFIT, RunSummary

__all__ = [
    "class_averages",
    "class_sizes",
    "confidence",
    "convergence",
    "coverage",
    "directions",
    "fsc_curves",
    "halves",
    "likelihoods",
    "shifts",
    "step_seconds",
]

WIDTH = 9.0  # inches; a page holds it
IN_LEGEND = 10  # classes; the names of more would leave no room for the curves
COLOURS = ("#3b6ea5", "#c8553d", "#588157", "#e09f3e", "#6d597a", "#2a9d8f", "#8d6b4f", "#b5838d", "#495057", "#a3b18a")
GREY = "0.55"
GAP = "#d62828"


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def class_averages(run: RunSummary) -> Figure:
    """A row per average: its central slices xy, xz, yz and, of what is within the mask, projections along z, y, x."""
    cell, left = WIDTH / 7, WIDTH / 7
    height = cell * len(run.maps) + 0.45
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    for row, (volume, size) in enumerate(zip(run.maps, run.sizes, strict=True)):
        bottom = height - 0.42 - cell * (row + 1)
        name = f"class {row + 1}\n{size} particles"
        figure.text((left - 0.12) / WIDTH, (bottom + cell / 2) / height, name, ha="right", va="center", fontsize=9)
        distance = np.sqrt(((np.indices(volume.shape) - len(volume) // 2) ** 2).sum(axis=0)) * run.voxel_size
        inside = np.where(distance <= run.options["mask_radius"], volume, 0)
        slices, sums = central_slices(volume), [inside.sum(axis=axis) for axis in (0, 1, 2)]
        for column, image in enumerate([*slices, *sums]):
            group = slices if column < 3 else sums
            low, high = np.percentile(np.stack(group), [1.0, 99.8])
            x = left + cell * column + 0.02 * (column >= 3)
            ax = figure.add_axes(
                (x / WIDTH + 0.002, bottom / height + 0.004, cell / WIDTH - 0.004, cell / height - 0.008)
            )
            ax.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
            ax.set_axis_off()
            if row == 0:
                text = f"slice {PLANES[column]}" if column < 3 else f"projection along {'zyx'[column - 3]}"
                ax.set_title(text, fontsize=8, pad=3)
            if column == 0:
                scale_bar(ax, len(volume), run.voxel_size)
    return figure


def class_sizes(run: RunSummary) -> Figure:
    """Share of the particles whose best class each is, by iteration."""
    figure, ((ax,),) = _figure(2.8)
    sizes = np.array([record["class_sizes"] for record in run.history], dtype=float)
    for k, share in enumerate((100 * sizes / sizes.sum(axis=1, keepdims=True)).T):
        ax.plot(_iterations(run), share, "o-", color=_colour(k), markersize=3, label=f"class {k + 1}")
    for record in run.history:
        for k in record.get("reseeded") or []:
            ax.axvline(record["iteration"] + 0.5, color=_colour(k), linestyle=":", linewidth=1)
    ax.set(xlabel="iteration", ylabel="share of particles (%)", ylim=(0, None))
    if len(sizes.T) <= IN_LEGEND:
        ax.legend(fontsize=8, frameon=False, ncols=min(len(sizes.T), 5))
    _whole_numbers(ax)
    return figure


def convergence(run: RunSummary) -> Figure:
    """Likelihood, noise, band, spread of shifts, pose changes and Fourier coverage by iteration."""
    figure, axes = _figure(4.6, 2, 3)
    curves = (
        ("log-likelihood", [r["log_likelihood"] for r in run.history]),
        ("noise σ", [r["sigma"] for r in run.history]),
        ("finest detail used (Å)", [r["resolution"] for r in run.history]),
        ("spread of shifts ζ (Å)", [r["zeta"] * run.voxel_size for r in run.history]),
        ("pose change (°)", [r["pose_change"] for r in run.history]),
    )
    for ax, (name, values) in zip(axes.flat, curves, strict=False):
        ax.plot(_iterations(run), values, "o-", color=COLOURS[0], markersize=3)
        ax.set_title(name, fontsize=9)
    axes[1, 1].set_ylim(0, None)
    coverage = np.array([r["coverage"] for r in run.history])
    for k, values in enumerate(coverage.T):
        axes[1, 2].plot(_iterations(run), 100 * values, "o-", color=_colour(k), markersize=3, label=f"class {k + 1}")
    if 1 < coverage.shape[1] <= IN_LEGEND:
        axes[1, 2].legend(fontsize=7, frameon=False)
    axes[1, 2].set_title("Fourier coverage (%)", fontsize=9)
    axes[1, 2].set_ylim(None, 101)
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        _whole_numbers(ax)
    for ax in axes[1]:
        ax.set_xlabel("iteration", fontsize=8)
    return figure


def halves(run: RunSummary) -> Figure:
    """Likelihood, band and pose changes of each half by iteration: a colour per class, half 2 dashed.

    Likelihoods are those at the last band and count from the last: the jumps where the band grows, and halves of more
    particles, would leave no height to the others.
    """
    figure, axes = _figure(2.6, 1, 3)
    names = ("log-likelihood at the last resolution", "finest detail used (Å)", "pose change (°)")
    for part in run.halves:
        last = part.history[-1]
        finest = [r for r in part.history if r["r_max"] == last["r_max"]]
        likelihood = np.array([r["log_likelihood"] for r in finest], dtype=float)
        curves = (
            (finest, likelihood - likelihood[-1]),
            (part.history, [r["resolution"] for r in part.history]),
            (part.history, [r["pose_change"] for r in part.history]),
        )
        style = {"color": _colour(part.class_number - 1), "linestyle": "-" if part.half == 1 else "--"}
        for ax, (records, values) in zip(axes.flat, curves, strict=True):
            ax.plot([r["iteration"] for r in records], values, marker="o", markersize=3, label=part.name, **style)
    for ax, name in zip(axes.flat, names, strict=True):
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("iteration", fontsize=8)
        ax.tick_params(labelsize=8)
        _whole_numbers(ax)
    axes[0, 2].set_ylim(0, None)
    if len(run.halves) <= IN_LEGEND:
        axes[0, 2].legend(fontsize=7, frameon=False)
    return figure


def fsc_curves(run: RunSummary) -> Figure:
    """Fourier shell correlation of the half maps of each class that has them."""
    figure, ((ax,),) = _figure(3.4)
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    ax.axhline(0.143, color=GREY, linewidth=0.8, linestyle="--")
    ax.axhline(0, color="0.85", linewidth=0.8)
    last = 0.0
    for k, facts in run.fsc:
        extent = facts["box"] * facts["voxel_size"]
        values = facts["shells"]["corrected"]
        frequency = [shell / extent for shell in range(1, len(values))]
        last = max(last, frequency[-1])
        found = facts["levels"]["0.143"]["resolution"]
        name = f"class {k}" if len(run.fsc) > 1 else "corrected for the mask"
        text = f"{name}: {found:.1f} Å at 0.143" if found else f"{name}: no resolution"
        ax.plot(frequency, values[1:], color=_colour(k - 1), label=text)
    shared = run.options.get("halves_lowpass")
    if shared:
        ax.axvspan(0, 1 / shared, color="0.93", linewidth=0, label=f"common start, to {shared:.1f} Å")
    ax.set(xlim=(0, last), ylim=(-0.2, 1.03), xlabel="resolution (Å)", ylabel="Fourier shell correlation")
    ticks = [float(tick) for tick in ax.get_xticks() if 0 < tick <= last]
    ax.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def directions(run: RunSummary) -> Figure:
    """Where the beam came from in the frame of each average: two hemispheres a class, areas true."""
    shown = [k for k, size in enumerate(run.sizes) if size]
    figure = Figure(figsize=(WIDTH, 2.3 * math.ceil(len(shown) / 2) + 0.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(math.ceil(len(shown) / 2), 4, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, k in enumerate(shown):
        mine = run.directions[run.classes == k]
        for side, ax in zip((1, -1), axes[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2], strict=True):
            half = mine[side * mine[:, 2] >= 0]
            # Lambert's equal-area map: r^2 is proportional to the area of the cap.
            radius = np.sqrt(1 - abs(half[:, 2]))
            length = np.maximum(np.hypot(half[:, 0], half[:, 1]), 1e-12)
            x, y = radius * half[:, 0] / length, radius * half[:, 1] / length
            if len(mine) > 500:
                ax.hexbin(x, y, gridsize=24, extent=(-1, 1, -1, 1), cmap="viridis", mincnt=1)
            else:
                ax.plot(x, y, "o", color=_colour(k), markersize=3.5, alpha=0.6, markeredgewidth=0)
            for tilt in (30, 60, 90):
                ring = math.sqrt(1 - math.cos(math.radians(tilt)))
                ax.add_patch(Circle((0, 0), ring, fill=False, color="0.75" if tilt < 90 else "0.3", linewidth=0.7))
            ax.set(xlim=(-1.06, 1.06), ylim=(-1.06, 1.06), aspect="equal")
            ax.set_title(f"class {k + 1}, {'+z' if side > 0 else '−z'}", fontsize=8, pad=2)
    return figure


def coverage(run: RunSummary) -> Figure:
    """How much was measured in the central planes of Fourier space of each average: two classes a row, gaps in red."""
    assert run.planes is not None
    shown = [k for k, size in enumerate(run.sizes) if size]
    side_by_side = min(len(shown), 2)
    rows, cell = math.ceil(len(shown) / 2), 2.3 if side_by_side == 1 else 1.6
    figure = Figure(figsize=(WIDTH, cell * rows + 0.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3 * side_by_side, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, k in enumerate(shown):
        most = max(float(np.nanmax(run.planes[k])), np.finfo(np.float32).tiny)
        for plane, values, ax in zip(PLANES, run.planes[k], axes[i // 2, 3 * (i % 2) :], strict=False):
            measured = np.ma.masked_where(~(values >= COVERAGE_FLOOR), values)
            gap = np.where(values < COVERAGE_FLOOR, 1.0, np.nan)
            ax.imshow(measured, cmap="viridis", vmin=0, vmax=most, origin="lower", interpolation="nearest")
            ax.imshow(gap, cmap=ListedColormap([GAP]), origin="lower", interpolation="nearest")
            within = np.nonzero(~np.isnan(values).all(axis=0))[0]
            ax.set(xlim=(within[0] - 1, within[-1] + 1), ylim=(within[0] - 1, within[-1] + 1))
            ax.set_title(f"class {k + 1}, {plane}", fontsize=8, pad=2)
    return figure


def shifts(run: RunSummary) -> Figure:
    """How far the particles lie off the centre of their box."""
    figure, ((ax, axis),) = _figure(2.6, 1, 2)
    limit = run.options["max_shift"]
    bins = _bins(run)
    ax.hist(run.off_centre, bins=bins, range=(0, max(limit * 1.02, run.off_centre.max())), color=COLOURS[0])
    ax.axvline(limit, color=COLOURS[1], linewidth=1.2)
    ax.text(
        limit, 0.98, "--max-shift ", color=COLOURS[1], fontsize=8, ha="right", va="top",
        transform=ax.get_xaxis_transform(),
    )  # fmt: skip
    ax.set(xlabel="off the centre (Å)", ylabel="particles")
    values = run.poses.shifts * run.voxel_size
    for i, name in enumerate("xyz"):
        axis.hist(values[:, i], bins=bins, range=(-limit, limit), histtype="step", color=_colour(i), label=name)
    axis.set(xlabel="shift along each axis (Å)")
    axis.legend(fontsize=8, frameon=False)
    return figure


def confidence(run: RunSummary) -> Figure:
    """Posterior of each particle's best pose, and of its best class."""
    several = len(run.maps) > 1 and run.class_probability is not None
    figure, axes = _figure(2.6, 1, 2 if several else 1)
    axes[0, 0].hist(run.confidence, bins=40, range=(0, 1), color=COLOURS[0])
    axes[0, 0].set(xlabel="probability of the best pose", ylabel="particles")
    if several and run.class_probability is not None:
        axes[0, 1].hist(run.class_probability.max(axis=1), bins=40, range=(0, 1), color=COLOURS[2])
        axes[0, 1].set(xlabel="probability of the best class")
    return figure


def likelihoods(run: RunSummary) -> Figure:
    """Log-likelihood of each particle, and the limit below which it fits nowhere."""
    figure, ((ax,),) = _figure(2.6)
    shown = np.clip(-run.misfit, -4 * MISFIT, 2 * MISFIT)
    ax.hist(shown, bins=_bins(run), color=COLOURS[0])
    ax.axvline(-MISFIT, color=COLOURS[1], linewidth=1.2)
    ax.set(xlabel="log-likelihood, deviations from the median", ylabel="particles")
    return figure


def step_seconds(run: RunSummary) -> Figure:
    """Seconds of each step, all iterations together."""
    total: dict[str, float] = {}
    for record in [*run.history, *(record for part in run.halves for record in part.history)]:
        for name, seconds in record["seconds"].items():
            total[name] = total.get(name, 0.0) + seconds
    total = total or {"not known": 0.0}
    figure, ((ax,),) = _figure(0.9 + 0.22 * len(total))
    names = sorted(total, key=lambda name: total[name])
    ax.barh(names, [total[name] for name in names], color=COLOURS[0])
    ax.set_xlabel("seconds, all iterations")
    ax.tick_params(labelsize=8)
    return figure


def _bins(run: RunSummary) -> int:
    return int(np.clip(2 * math.sqrt(len(run.classes)), 10, 60))


def _iterations(run: RunSummary) -> list[int]:
    return [record["iteration"] for record in run.history]


def _whole_numbers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
