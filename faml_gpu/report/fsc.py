"""FSC curves for people and programs: RELION's postprocess.star, JSON, a picture, lines of text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from faml_gpu.fsc import FscCurves, crossings, resolution_at
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.star import write_star

__all__ = ["fsc_lines", "fsc_summary", "write_fsc"]

LEVELS = (0.5, 0.143)
NO_RESOLUTION = 999.0  # what RELION writes for an infinite one


def fsc_summary(curves: FscCurves, voxel_size: float) -> dict[str, Any]:
    """The curves and where they fall below 0.5 and 0.143, JSON-ready; None for what there is not.

    Per level: `resolution` Angstrom, from the first crossing of the corrected curve; `crossings` all of them, Angstrom;
    `reached` False if the curve is above the level up to the last shell, so that the resolution is a bound.
    """
    extent = curves.box * voxel_size
    levels = {}
    for level in LEVELS:
        found = resolution_at(curves.corrected, level, voxel_size, curves.box)
        levels[f"{level:g}"] = {
            "resolution": found if math.isfinite(found) else None,
            "crossings": [float(extent / shell) for shell in crossings(curves.corrected, level)],
            "reached": bool((curves.corrected[1:] < level).any()),
        }
    start = curves.randomised_from
    return {
        "box": curves.box,
        "voxel_size": voxel_size,
        "levels": levels,
        "randomised_from": None if start is None else extent / start,
        "shells": {
            "resolution": [None, *(extent / shell for shell in range(1, len(curves.corrected)))],
            "corrected": curves.corrected.tolist(),
            "unmasked": curves.unmasked.tolist(),
            "masked": None if curves.masked is None else curves.masked.tolist(),
            "randomised": None if curves.randomised is None else curves.randomised.tolist(),
            "observed": curves.observed.tolist(),
        },
    }


def fsc_lines(curves: FscCurves, voxel_size: float) -> list[str]:
    """The curves as a table of text, one line a shell, and below it the resolution at 0.5 and 0.143."""
    columns = {"corrected": curves.corrected, "unmasked": curves.unmasked}
    if curves.masked is not None:
        columns |= {"masked": curves.masked}
    if curves.randomised is not None:
        columns |= {"randomised": curves.randomised}
    if (curves.observed < 1).any():
        columns |= {"observed": curves.observed}
    lines = ["shell  resolution (Å)" + "".join(f"{name:>12}" for name in columns)]
    for shell in range(1, len(curves.corrected)):
        values = "".join(f"{column[shell]:12.3f}" for column in columns.values())
        lines.append(f"{shell:5d}{curves.box * voxel_size / shell:16.1f}{values}")
    for level, found in fsc_summary(curves, voxel_size)["levels"].items():
        lines.append(f"{_resolution(found)} at FSC = {level}{_others(found['crossings'])}")
    return lines


def _resolution(found: Mapping[str, Any]) -> str:
    if found["resolution"] is None:
        return "no resolution: below it from the first shell on"
    return f"{'' if found['reached'] else '≤ '}{found['resolution']:.1f} Å"


def _others(places: list[float]) -> str:
    if len(places) < 2:
        return ""
    return f" (the first of {len(places)} crossings; the others: {', '.join(f'{p:.1f}' for p in places[1:])} Å)"


def write_fsc(
    folder: str | os.PathLike[str],
    curves: FscCurves,
    voxel_size: float,
    names: Mapping[str, Any],
    *,
    root: str = "postprocess",
    facts: Mapping[str, Any] | None = None,
    start: float | None = None,
    verdict: str | None = None,
) -> list[Path]:
    """Write the curves under the names RELION's postprocessing uses: ROOT.star, ROOT_fsc.json and ROOT_fsc.png.

    Parameters
    ----------
    folder : exists
    curves, voxel_size : of the half maps
    names : further pairs of `data_general`, or others: rlnUnfilteredMapHalf1, rlnUnfilteredMapHalf2, rlnMaskName ...
    root : of the file names
    facts : what else the JSON says, JSON-ready
    start : Angstrom, low-pass of a start that the half maps share; shaded in the picture
    verdict : in the picture's legend in place of the crossings

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OSError
        A file cannot be written.
    """
    star, text, picture = (Path(folder) / f"{root}{end}" for end in (".star", "_fsc.json", "_fsc.png"))
    summary = fsc_summary(curves, voxel_size)
    extent, count = curves.box * voxel_size, len(curves.corrected)
    general: dict[str, Any] = {
        "rlnFinalResolution": summary["levels"]["0.143"]["resolution"] or NO_RESOLUTION,
        **names,
    }
    if curves.randomised_from is not None:
        general["rlnRandomiseFrom"] = extent / curves.randomised_from
    table: dict[str, Any] = {
        "rlnSpectralIndex": list(range(count)),
        "rlnResolution": [shell / extent for shell in range(count)],
        "rlnAngstromResolution": [NO_RESOLUTION, *(extent / shell for shell in range(1, count))],
        "rlnFourierShellCorrelationCorrected": curves.corrected,
        "rlnFourierShellCorrelationUnmaskedMaps": curves.unmasked,
    }
    if curves.masked is not None:
        table["rlnFourierShellCorrelationMaskedMaps"] = curves.masked
    if curves.randomised is not None:
        table["rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"] = curves.randomised
    write_star(star, {"general": general, "fsc": table})
    with atomic_path(text) as temporary:
        temporary.write_text(json.dumps({**summary, **(facts or {})}, indent=1, allow_nan=False) + "\n", "utf-8")
    _draw(curves, voxel_size, picture, start, verdict)
    return [star, text, picture]


def _draw(curves: FscCurves, voxel_size: float, path: Path, start: float | None, verdict: str | None) -> None:
    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for level in LEVELS:
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
    axes.axhline(0, color="0.8", linewidth=0.8)
    shells = range(1, len(curves.corrected))
    last = shells[-1] / (curves.box * voxel_size)
    frequency = [shell / (curves.box * voxel_size) for shell in shells]
    levels = fsc_summary(curves, voxel_size)["levels"]
    label = verdict or ", ".join(
        f"{level}: {_resolution(found)}" for level, found in levels.items() if found["resolution"]
    )
    name = "without mask" if curves.masked is None else "corrected for the mask"
    axes.plot(frequency, curves.corrected[1:], color="k", linewidth=1.8, label=f"{name} ({label or 'no resolution'})")
    for curve, colour, text in (
        (curves.masked, "tab:blue", "masked"),
        (curves.unmasked if curves.masked is not None else None, "tab:green", "unmasked"),
        (curves.randomised, "tab:red", "masked, phases random"),
    ):
        if curve is not None:
            axes.plot(frequency, curve[1:], color=colour, linewidth=1.0, label=text)
    if start is not None:
        axes.axvspan(0, 1 / start, color="0.93", linewidth=0, label=f"common start, to {start:.1f} Å")
    axes.set_xlim(0, last)
    ticks = [float(tick) for tick in axes.get_xticks() if 0 < tick <= last]
    axes.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    axes.set_ylim(-0.2, 1.03)
    axes.set_xlabel("resolution (Å)")
    axes.set_ylabel("Fourier shell correlation")
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
