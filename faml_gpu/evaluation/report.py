"""An evaluation for people and programs: tables, evaluation.json, the FSC as a picture."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from faml_gpu.errors import InputError
from faml_gpu.evaluation.results import ClassScore, Evaluation, MapScore
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.mrc import write_mrc
from faml_gpu.run_folder import writing

__all__ = ["Table", "make_folder", "print_tables", "tables", "write_evaluation"]


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the folder for the files of an evaluation: better before the work than after it.

    Raises
    ------
    InputError
        It is a file.
    OutputError
        It cannot be made.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path}: found a file, expected a folder")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_evaluation(evaluation: Evaluation, folder: str | os.PathLike[str], *, save_maps: bool = False) -> list[Path]:
    """Write evaluation.json, evaluation_fsc.png where there are curves, and the aligned averages if asked for.

    Files of an earlier evaluation are replaced.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    InputError, OutputError
        The folder is a file, or cannot be written.
    """
    folder = make_folder(folder)
    written = [folder / "evaluation.json"]
    text = json.dumps(evaluation.to_json(), indent=1, allow_nan=False) + "\n"
    with writing(folder):
        with atomic_path(written[0]) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if evaluation.maps:
            written.append(folder / "evaluation_fsc.png")
            _draw_fsc(evaluation, written[-1])
        for score in evaluation.maps if save_maps else []:
            written.append(folder / f"evaluation_class{score.label:03d}_aligned.mrc")
            write_mrc(written[-1], score.aligned, evaluation.settings["voxel_size"])
    return written


def _draw_fsc(evaluation: Evaluation, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for level in (0.5, 0.143):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{level:g}",
            (1, level),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
            va="center",
        )
    axes.axhline(0, color="0.8", linewidth=0.8)
    last = 0.0
    for score in evaluation.maps:
        label = f"{_map_name(score, evaluation)} with {Path(score.truth_map).name}: {' and '.join(_resolutions(score))}"
        axes.plot(score.frequency[1:], score.fsc[1:], linewidth=1.6, label=label)
        last = max(last, score.frequency[-1])
    axes.set_xlim(0, last)
    ticks = [float(tick) for tick in axes.get_xticks() if 0 < tick <= last]
    axes.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    axes.set_ylim(-0.2, 1.03)
    axes.set_xlabel("resolution (Å)")
    axes.set_ylabel("Fourier shell correlation")
    axes.set_title("Averages against the truth", fontsize=11)
    axes.legend(fontsize=8, loc="lower left", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _map_name(score: MapScore, evaluation: Evaluation) -> str:
    return f"class {score.label}" if evaluation.settings["particles"] else Path(score.map).name


def _resolutions(score: MapScore) -> tuple[str, str]:
    """Where the curve falls below 0.5 and 0.143; ≤ where it has not by the last shell."""
    last = 1 / score.frequency[-1]

    def text(value: float | None) -> str:
        return "–" if value is None else f"{'≤ ' if value <= last + 1e-6 else ''}{value:.1f} Å"

    return text(score.resolution_05), text(score.resolution_0143)


@dataclass(frozen=True)
class Table:
    """A table to print: a title that says what it shows, the heads of its columns, and rows of text."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def tables(evaluation: Evaluation) -> list[Table]:
    """The evaluation as tables for people."""
    out = []
    c = evaluation.classification
    if c is not None:
        label_of = {score.number: score for score in c.classes}
        heads = ["found class", *(f"true {t + 1}" for t in range(len(c.confusion[0])))]
        out.append(
            Table(
                "Particles of each true class in each found class",
                heads,
                [[str(k + 1), *map(str, row)] for k, row in enumerate(c.confusion)],
            )
        )
        rows = [
            [str(s.number), "–" if s.label is None else str(s.label), str(s.particles), *map(_three, _prf(s))]
            for s in label_of.values()
        ]
        rows.append(["mean", "", "", *map(_three, (c.macro_precision, c.macro_recall, c.macro_f1))])
        title = f"Classes ({100 * c.accuracy:.1f} % of the particles in the right one)"
        out.append(Table(title, ["true class", "found as", "particles", "precision", "recall", "F1"], rows))
    if evaluation.poses:
        rows = [
            [
                "all" if s.label is None else f"{s.label} (true {s.truth})",
                s.point_group or "",
                str(s.particles),
                "{:.1f} ({:.1f} to {:.1f})".format(*s.angle),
                f"{100 * s.within_10:.0f} %",
                f"{100 * s.within_20:.0f} %",
                "{:.1f} ({:.1f} to {:.1f})".format(*s.shift),
            ]
            for s in evaluation.poses
        ]
        heads = ["class", "point group", "particles", "angle (°)", "≤ 10°", "≤ 20°", "shift (Å)"]
        out.append(Table("Pose errors, common rotation and shift taken out: median (quartiles)", heads, rows))
    if evaluation.maps:
        out += [_correlation_table(evaluation), _fsc_table(evaluation)]
    if evaluation.snr:
        rows = [
            [
                f"{s.label} ({s.poses} poses)",
                str(s.pairs),
                f"{s.correlation:.4f} ± {s.correlation_error:.4f}",
                f"{s.snr:.4f} ± {s.snr_error:.4f}",
                f"{s.resolution:.1f}",
                f"{s.snr_box:.4f}",
            ]
            for s in evaluation.snr
        ]
        heads = ["class", "pairs", "correlation c", "SNR c/(1−c)", "up to (Å)", "whole box"]
        out.append(Table("Signal-to-noise ratio from random pairs of aligned particles", heads, rows))
    if evaluation.symmetry:
        rows = [
            [
                str(s.label),
                str(s.order),
                s.axis_from,
                _three(s.score),
                "" if s.truth_score is None else _three(s.truth_score),
            ]
            for s in evaluation.symmetry
        ]
        out.append(Table("Symmetry score", ["class", "n", "axis", "score", "of the truth"], rows))
    return out


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Print the tables and notes: ruled on a terminal, aligned plain text in a file or pipe."""
    for table in tables(evaluation):
        console.print()
        if console.is_terminal:
            console.print(table.title, style="bold")
            ruled = RichTable()
            for number, head in enumerate(table.heads):
                ruled.add_column(head, justify="right" if number else "left")
            for row in table.rows:
                ruled.add_row(*row)
            console.print(ruled)
            continue
        widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
        print(table.title, file=console.file)
        for row in [table.heads, *table.rows]:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            print("  " + "  ".join(cells).rstrip(), file=console.file)
    console.print()
    for note in evaluation.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def _prf(score: ClassScore) -> tuple[float, float, float]:
    return score.precision, score.recall, score.f1


def _three(value: float) -> str:
    return f"{value:.3f}"


def _correlation_table(evaluation: Evaluation) -> Table:
    rows = []
    for s in evaluation.maps:
        for name, hand in (("as it is", s.as_is), ("mirrored", s.mirrored)):
            cells = [f"{x.r:.3f} ({x.r_chimera:.3f})" for x in hand.correlations]
            moved = f"{hand.angle:.1f}°, {math.hypot(*hand.shift):.1f} Å"
            rows.append([_map_name(s, evaluation), Path(s.truth_map).name, f"{s.radius:.0f}", name, *cells, moved])
    cuts = ["unfiltered" if x.lowpass is None else f"at {x.lowpass:g} Å" for x in evaluation.maps[0].as_is.correlations]
    return Table(
        "Correlation with the truth inside the sphere: about the mean (Chimera's, not about the mean)",
        ["map", "truth", "sphere (Å)", "hand", *cuts, "turned, moved by"],
        rows,
    )


def _fsc_table(evaluation: Evaluation) -> Table:
    rows = [
        [
            _map_name(s, evaluation),
            Path(s.truth_map).name,
            *_resolutions(s),
        ]
        for s in evaluation.maps
    ]
    return Table("Fourier shell correlation with the truth falls", ["map", "truth", "below 0.5", "below 0.143"], rows)
