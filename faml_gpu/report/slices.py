"""Central slices of maps as one PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from faml_gpu.errors import InputError
from faml_gpu.io.atomic import atomic_path

__all__ = ["PLANES", "central_slices", "montage", "scale_bar"]

PLANES = ("xy", "xz", "yz")


def montage(
    maps: Mapping[str, ArrayLike],
    path: str | os.PathLike[str],
    *,
    voxel_size: float,
    truth: Mapping[str, ArrayLike] | None = None,
    title: str | None = None,
) -> Path:
    """Writes the central slices of maps to a PNG: a row per map; columns xy, xz and yz (through voxel N // 2).

    Each map has its own grey scale (the 1st to 99.8th percentile of its three slices), bright is high density,
    the second letter of the plane points up; smoothed between
    voxels. The bar is a round length of at most 30 % of the box.

    Parameters
    ----------
    maps : label of each row, and an (N, N, N) array, `[z, y, x]`
    path : the PNG; it appears complete or not at all
    voxel_size : Angstrom
    truth : for some or all of the labels, the map to show beside it in three more columns
    title : line above the rows

    Returns
    -------
    Path
        Of the PNG.

    Raises
    ------
    InputError
        If there is nothing to show, or a map is no cube.
    """
    if not maps:
        raise InputError("montage: found no maps, expected at least one")
    truth = truth or {}
    blocks = [maps, truth] if truth else [maps]
    cell, label_width, header = 1.9, 1.9, 0.62 if title else 0.34
    width = label_width + cell * 3 * len(blocks) + (0.25 if truth else 0.05)
    height = header + cell * len(maps) + 0.05
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=12, fontweight="bold")
    for row, label in enumerate(maps):
        bottom = height - header - cell * (row + 1)
        figure.text(
            (label_width - 0.12) / width, (bottom + cell / 2) / height, label, ha="right", va="center", fontsize=11
        )
        for block, volumes in enumerate(blocks):
            if label not in volumes:
                continue
            volume = _cube(volumes[label], label)
            slices = central_slices(volume)
            low, high = np.percentile(np.stack(slices), [1.0, 99.8])
            for column, (plane, image) in enumerate(zip(PLANES, slices, strict=True)):
                left = label_width + cell * (3 * block + column) + 0.2 * block
                axes = figure.add_axes(
                    ((left + 0.03) / width, (bottom + 0.03) / height, (cell - 0.06) / width, (cell - 0.06) / height)
                )
                axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
                axes.set_axis_off()
                if row == 0:
                    name = f"truth {plane}" if block else plane
                    axes.set_title(name, fontsize=11, pad=4)
                if column == 0 and block == 0:
                    scale_bar(axes, volume.shape[0], voxel_size)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return Path(path)


def _cube(volume: ArrayLike, label: str) -> NDArray[np.float32]:
    values = np.asarray(volume, dtype=np.float32)
    if values.ndim != 3 or len(set(values.shape)) != 1:
        raise InputError(f"montage: map {label!r} has shape {values.shape}, expected a cube (N, N, N)")
    return values


def central_slices(volume: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The planes xy, xz, yz through the centre voxel; the second axis named is the row."""
    centre = volume.shape[0] // 2
    return [volume[centre], volume[:, centre], volume[:, :, centre]]


def scale_bar(axes: Axes, box: int, voxel_size: float) -> None:
    """A white bar of 1, 2 or 5 times a power of ten Angstrom, the longest within 30 % of the box."""
    most = 0.3 * box * voxel_size
    decade = 10.0 ** np.floor(np.log10(most))
    length = next(step * decade for step in (5, 2, 1) if step * decade <= most)
    start, level = 0.06 * box, 0.07 * box
    end = start + length / voxel_size
    # A dark line under the white one: readable on any background.
    for colour, thickness in (("black", 5.0), ("white", 2.5)):
        axes.plot([start, end], [level, level], color=colour, linewidth=thickness, solid_capstyle="butt")
    text = f"{length:g} Å ({voxel_size:g} Å/voxel)"
    axes.text(
        start,
        level + 0.035 * box,
        text,
        color="white",
        fontsize=7,
        va="bottom",
        bbox={"facecolor": "black", "alpha": 0.5, "pad": 1.0, "linewidth": 0},
    )
