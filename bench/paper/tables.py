"""RESULTS.md from the JSON files of bench/paper/results, and from nothing else: python bench/paper/tables.py

A figure is the mean over seeds, with the spread (standard deviation) where there are several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cases import CASES, Case

__all__ = ["PassLine", "Results", "load", "pass_lines", "render"]

HERE = Path(__file__).resolve().parent
NOT_RUN = "not run"
AT = "20"  # Angstrom, of the pass lines
FILTERS = ("unfiltered", "20", "30")
CEILING_SHARE = 0.9
COVERAGE_SHARE = 0.99  # of Fourier voxels: those at the rim come and go with a fraction of a degree
NAMES = {
    "ceiling": "ceiling (true poses)",
    "fa": "`fa`",
    "fa-plain": "`fa`, plain magnitudes",
    "paper": "`faml --preset paper`",
    "default": "`faml` (default)",
    "matched-50": "50 matched poses",
    "grid-1000": "grid, 125 rotations × 8 shifts",
    "grid-1000-shifts": "grid, 1000 rotations, best shift of each",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All runs, by (case, SNR factor, method): one per seed."""

    runs: dict[tuple[str, float, str], list[Json]]

    def of(self, case: str, method: str, factor: float = 1.0) -> list[Json]:
        return self.runs.get((case, factor, method), [])


@dataclass(frozen=True)
class PassLine:
    """A line of the issue: what is asked, what was found; `holds` is None where it was not run."""

    case: str
    what: str
    found: str
    holds: bool | None


def load(folder: Path) -> Results:
    runs: dict[tuple[str, float, str], list[Json]] = {}
    for path in sorted(folder.rglob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault((run["case"], float(run["snr_factor"]), run["method"]), []).append(run)
    for same in runs.values():
        same.sort(key=lambda run: run["seed"])
    return Results(runs)


# --- figures of runs --------------------------------------------------------------------------------------------


def r_of(run: Json, structure: int, at: str = AT, kind: str = "r") -> float:
    return float(run["metrics"]["maps"][structure][kind][at])


def seeds_of(runs: Iterable[Json]) -> dict[int, Json]:
    return {run["seed"]: run for run in runs}


def spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return NOT_RUN
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


# --- pass lines ---------------------------------------------------------------------------------------------------


def pass_lines(results: Results, cases: Iterable[Case] = tuple(CASES.values())) -> list[PassLine]:
    """The lines of "Must show", means over the seeds that both sides were run with."""
    lines = []
    for case in cases:
        if not case.passes:
            continue
        ours = seeds_of(results.of(case.name, "default"))
        for c, specimen in enumerate(case.specimens):
            for method, factor, words in (
                ("ceiling", CEILING_SHARE, f"at least {CEILING_SHARE:g} of the ceiling"),
                ("fa", 1.0, "above `fa`"),
            ):
                theirs = seeds_of(results.of(case.name, method))
                common = sorted(set(ours) & set(theirs))
                what = f"{specimen.name}: r of `faml` at {AT} Å {words}"
                if not common:
                    lines.append(PassLine(case.name, what, NOT_RUN, None))
                    continue
                mine = mean(r_of(ours[s], c) for s in common)
                other = mean(r_of(theirs[s], c) for s in common)
                holds = mine >= factor * other if method == "ceiling" else mine > other
                sign = f"{mine / other:.3f} of {other:.3f}" if method == "ceiling" else f"against {other:.4f}"
                found = f"{mine:.4f}, {sign} ({len(common)} seed{'s' * (len(common) > 1)})"
                lines.append(PassLine(case.name, what, found, holds))
        if case.about_axis:
            lines.append(coverage_line(case, ours, seeds_of(results.of(case.name, "ceiling"))))
        if case.paper.f1_faml is not None:
            what = f"F1 of `faml` at least the paper's {case.paper.f1_faml:.3f}"
            if not ours:
                lines.append(PassLine(case.name, what, NOT_RUN, None))
                continue
            f1 = mean(run["metrics"]["f1"] for run in ours.values())
            lines.append(
                PassLine(case.name, what, f"{f1:.4f} ({len(ours)} seed{'s' * (len(ours) > 1)})",
                         f1 >= case.paper.f1_faml - 1e-9)
            )  # fmt: skip
    return lines


def coverage_line(case: Case, ours: dict[int, Json], ceiling: dict[int, Json]) -> PassLine:
    """No region of Fourier space is missing in the average beyond what the true poses leave."""
    what = f"Fourier coverage of the average of `faml` at least {COVERAGE_SHARE:g} of what the true poses leave"
    common = sorted(set(ours) & set(ceiling))
    if not common:
        return PassLine(case.name, what, NOT_RUN, None)
    mine, most = (mean(runs[s]["metrics"]["coverage"][0] for s in common) for runs in (ours, ceiling))
    return PassLine(case.name, what, f"{mine:.4f} against {most:.4f}", mine >= COVERAGE_SHARE * most)


# --- Markdown -----------------------------------------------------------------------------------------------------


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def paper_figures(case: Case) -> str:
    """What the paper says, in words."""
    paper, parts = case.paper, []
    if paper.f1_faml is not None:
        parts.append(f"F1 {paper.f1_faml:g} (FAML), {paper.f1_fa:g} (FA)")
    if paper.r_faml:
        faml, fa = (" and ".join(f"{r:.2f}" for r in values) for values in (paper.r_faml, paper.r_fa))
        parts.append(f"r {faml} (FAML), {fa} (FA)")
    if paper.symmetry_faml is not None:
        parts.append(f"symmetry {paper.symmetry_faml:g} (FAML), {paper.symmetry_fa:g} (FA)")
    return "; ".join([*parts, *([paper.note] if paper.note else [])])


def overview(results: Results) -> list[str]:
    """A row per figure that the paper has: its own beside ours, r at 20 Angstrom."""
    columns = ("fa", "fa-plain", "paper", "default", "ceiling")
    rows = []

    def add(case: Case, what: str, paper: list[str], value: Callable[[Json], float]) -> None:
        name = f"{case.name} (simulated stand-in)" if case.stand_in and case.kind == "simulated" else case.name
        ours = [spread([value(run) for run in results.of(case.name, m)]) if m in case.methods else "—" for m in columns]
        rows.append([name, what, *paper, *ours])

    for case in CASES.values():
        paper = case.paper
        if case.kind not in ("simulated", "real"):
            continue
        if case.symmetry_order is not None:
            theirs = [_number(paper.symmetry_fa), _number(paper.symmetry_faml)]
            add(case, f"{case.symmetry_order}-fold symmetry", theirs, lambda run: float(run["metrics"]["symmetry"][0]))
            continue
        structures = [s.name for s in case.specimens] or [case.name]
        if len(structures) > 1:
            theirs = [_number(paper.f1_fa, 3), _number(paper.f1_faml, 3)]
            add(case, "F1", theirs, lambda run: float(run["metrics"]["f1"]))
        for c, structure in enumerate(structures):
            theirs = [_number(r[c] if r else None) for r in (paper.r_fa, paper.r_faml)]
            add(case, f"r {structure}", theirs, partial(r_of, structure=c))
    heads = ["case", "figure", "paper FA", "paper FAML", "`fa`", "`fa`, plain", "`--preset paper`", "`faml`", "ceiling"]
    return table(heads, rows)


def _number(value: float | None, digits: int = 2) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def case_section(case: Case, results: Results) -> list[str]:
    lines = [f"### {case.name}", ""]
    about = [case.what]
    if case.kind in ("simulated", "timing", "sampling"):
        about.append(f"SNR {case.snr:g} ({case.snr_reason})")
    if case.kind == "simulated" and case.stand_in:
        about.append(f"**simulated stand-in** for {case.stand_in_for}")
    elif case.stand_in:
        about.append(f"stands beside {case.stand_in_for}")
    lines += [". ".join(about) + ".", "", f"Paper: {paper_figures(case) or '—'}.", ""]
    if case.kind == "picture":
        return [*lines, f"![{case.what}](figures/{case.name}.png)", ""]
    factors = sorted({factor for name, factor, _ in results.runs if name == case.name} | {1.0})
    for factor in factors:
        if factor != 1.0:
            lines += [f"SNR × {factor:g}:", ""]
        lines += profile_table(case, results) if case.kind == "profile" else method_table(case, results, factor)
    if any(results.of(case.name, m) for m in case.methods):
        lines += facts(case, results)
    pictures = [f"{case.name}_{kind}.png" for kind in ("slices", "surfaces", "fsc", "convergence")]
    present = [name for name in pictures if (HERE / "figures" / name).exists()]
    return lines + [line for name in present for line in (f"![{case.name}](figures/{name})", "")]


def method_table(case: Case, results: Results, factor: float) -> list[str]:
    """A row per method: figures, iterations, seconds, device."""
    structures = [s.name for s in case.specimens] or [case.name]
    heads = ["method", "seeds"]
    if len(structures) > 1:
        heads.append("F1")
    if case.symmetry_order is not None:
        heads.append(f"{case.symmetry_order}-fold symmetry")
    if has_truth(case):
        for name in structures:
            heads += [f"r {name}: unfiltered", "20 Å", "30 Å", "Chimera's: unfiltered / 20 / 30 Å", "FSC 0.5 at, Å"]
    if case.about_axis:
        heads.append("Fourier coverage")
    heads += ["iterations", "s an iteration", "s in all", "device"]
    rows = []
    for method in case.methods:
        runs = results.of(case.name, method, factor)
        cells = method_row(case, runs) if runs else [NOT_RUN, *["—"] * (len(heads) - 2)]
        rows.append([NAMES[method], *cells])
    return table(heads, rows)


def has_truth(case: Case) -> bool:
    return case.kind != "real" or case.symmetry_order is None


def method_row(case: Case, runs: list[Json]) -> list[str]:
    """The cells of `method_table` after the method's name, for a method that was run."""
    cells = [", ".join(str(run["seed"]) for run in runs)]
    if len(case.specimens) > 1:
        cells.append(spread([run["metrics"]["f1"] for run in runs]))
    if case.symmetry_order is not None:
        cells.append(spread([run["metrics"]["symmetry"][0] for run in runs]))
    if has_truth(case):
        for c in range(max(1, len(case.specimens))):
            cells += [spread([r_of(run, c, at) for run in runs]) for at in FILTERS]
            chimera = [spread([r_of(run, c, at, "chimera") for run in runs], 2) for at in FILTERS]
            halves = [run["metrics"]["maps"][c]["resolution_05"] for run in runs]
            cells += [" / ".join(chimera), spread([x for x in halves if x is not None], 1) if any(halves) else "—"]
    if case.about_axis:
        cells.append(spread([run["metrics"]["coverage"][0] for run in runs]))
    timed = [run for run in runs if run["seconds_per_iteration"] is not None]
    return [
        *cells,
        " ".join(f"{run['iterations']}{'*' * (not run['converged'])}" for run in timed) or "—",
        spread([run["seconds_per_iteration"] for run in timed], 2) if timed else "—",
        spread([run["seconds_total"] for run in runs], 0),
        ", ".join(sorted({run["device"] for run in runs})),
    ]


def profile_table(case: Case, results: Results) -> list[str]:
    rows = []
    for method in case.methods:
        runs = results.of(case.name, method)
        if not runs:
            rows.append([NAMES[method], NOT_RUN, NOT_RUN])
        for run in runs:
            share = sorted(run["metrics"]["share"].items(), key=lambda item: -item[1])
            steps = ", ".join(f"{name} {100 * s:.0f} %" for name, s in share if s >= 0.005)
            rows.append([NAMES[method], f"{run['seconds_per_iteration']:.1f}", steps])
    return table(["method", "s an iteration", "share of each step"], rows)


def facts(case: Case, results: Results) -> list[str]:
    """What was run, where, in one line per method; measured SNR."""
    lines, machines = [], set()
    for method in case.methods:
        runs = results.of(case.name, method)
        if not runs:
            continue
        run = runs[-1]
        machines.add(f"{run['machine']['cpu']}, {run['options'].get('threads', '?')} threads")
        if run["L"] is not None:
            text = f"- {NAMES[method]}: L {run['L']}, r_max {run['r_max']}, padding {run['padding']}"
            lines.append(f"{text}, {run['candidates']:g} candidates a particle and class in the last iteration")
    some = next(run for method in case.methods for run in results.of(case.name, method))
    snr = some.get("sample", {}).get("snr_measured")
    if snr:
        lines.append(f"- SNR measured on the boxes: {', '.join(f'{value:.5f}' for value in snr)}")
    loads = [run["machine"]["load_at_start"] for m in case.methods for run in results.of(case.name, m)]
    lines.append(
        f"- {'; '.join(sorted(machines))}; load at the start of the runs {min(loads):.1f} to {max(loads):.1f}; "
        f"`{some['command']}`"
    )
    return [*lines, ""]


def render(results: Results) -> str:
    lines = [
        "# The paper's tests, run again",
        "",
        "Made by `python bench/paper/tables.py` from the JSON files in `results/`; edit nothing here. `python "
        "bench/paper/run.py` makes those, and goes on where it stopped.",
        "",
        "**Definitions**, fixed before any run. r: Pearson correlation about the mean with the true map in a sphere "
        "of the structure's radius, after the best global alignment; in the overview at 20 Å (where voxels are larger "
        "than 10 Å, 20 Å is the same as unfiltered). Chimera's: the same not about the mean. Ceiling: the average made "
        "with the true poses and classes. F1: macro mean over the classes. SNR: variance of the volume reconstructed "
        "from noise-free tilts over that of the volume from noise-only tilts, whole box, same pipeline. Means "
        "over seeds ± their standard deviation; a seed is another data set and another random start. An asterisk "
        "at a number of iterations: not converged by the stopping rule, ended by the limit.",
        "",
        "The paper's r has no stated filter or mask: its figures stand beside ours as context.",
        "",
        "**FA** here is the same code with hard assignment: magnitude matching, best single pose and class, "
        "wedge-weighted averaging; same mask, iterations and schedule of the band as `faml`. `fa` subtracts the shell "
        "means from the magnitudes as `faml` does, `fa`, plain magnitudes, does not. The published FA and its "
        "predecessors classify by clustering features; that is not here.",
        "",
        "## Overview",
        "",
        *overview(results),
        "## Pass lines",
        "",
    ]
    verdicts = {None: NOT_RUN, True: "holds", False: "**falls short**"}
    lines += table(
        ["case", "asked", "found", ""],
        [[p.case, p.what, p.found, verdicts[p.holds]] for p in pass_lines(results)],
    )
    lines += ["## Case by case", ""]
    for case in CASES.values():
        lines += case_section(case, results)
    notes = HERE / "notes.md"
    if notes.exists():
        lines += ["## Notes", "", notes.read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args(words)
    args.output.write_text(render(load(args.results)), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    main()
