"""RESULTS.md from the JSON files of bench/paper/results, and from nothing else: python bench/paper/tables.py

A figure is the mean over seeds, with the spread (standard deviation) where there are several.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cases import CASES, Case, full

__all__ = ["PassLine", "Results", "load", "pass_lines", "render", "write"]

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

# Steps of an iteration that are the paper's maximum-likelihood update; "fast alignment" is its FA.
ML_UPDATE = ("expectation", "rotate back", "maximization")
CAPTIONS = {
    "slices": "slices through the centre",
    "surfaces": "surfaces of equal volume",
    "fsc": "FSC of the final averages",
    "convergence": "r by iteration (seed 1), of the averages in the loop, low-passed: not of the final ones above",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All runs, by (case, SNR factor, method): one per seed."""

    runs: dict[tuple[str, float, str], list[Json]]

    def of(self, case: str, method: str, factor: float = 1.0) -> list[Json]:
        return self.runs.get((case, factor, method), [])

    def row(self, case: Case) -> list[Json]:
        """All runs of a case, those of its sweep too."""
        return [run for (name, _, _), runs in self.runs.items() if name == case.name for run in runs]

    def factors(self, case: Case) -> list[float]:
        """1, and those of the sweep that were run."""
        swept = {factor for name, factor, _ in self.runs if name == case.name} - {1.0}
        return [1.0, *sorted(swept)]

    def cases(self) -> list[Case]:
        """All cases; those with the paper's number of particles (`--full`) where they were run."""
        both = ((case, full(case)) for case in CASES.values())
        return [c for pair in both for c in pair if c is not None and (c.name in CASES or self.row(c))]


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


def seconds(runs: list[Json], digits: int = 2) -> str:
    """Of an iteration: the median over a run, and the last one (the band has grown by then)."""
    timed = [run for run in runs if run["iteration_seconds"]]
    if not timed:
        return NOT_RUN if not runs else "—"
    last = [run["iteration_seconds"][-1] for run in timed]
    return f"{spread([run['seconds_per_iteration'] for run in timed], digits)} / {spread(last, digits)}"


def symmetry_name(case: Case, results: Results) -> str:
    """The score's name, and what the truth itself has."""
    runs = [run for run in results.row(case) if run["metrics"].get("symmetry_of_truth")]
    truth = {f"{run['metrics']['symmetry_of_truth'][0]:.3f}" for run in runs}
    return f"{case.symmetry_order}-fold symmetry" + (f" (truth's own: {', '.join(sorted(truth))})" if truth else "")


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
    if paper.seconds_faml is not None:
        parts.append(
            f"{paper.seconds_faml:g} s (FAML), {paper.seconds_fa:g} s (FA), {paper.seconds_relion:g} s (RELION) "
            "an iteration, on 12 processes"
        )
    return "; ".join([*parts, *(text for text in (paper.claim, paper.note) if text)])


def overview(results: Results) -> list[str]:
    """A row per figure that the paper has: its own beside ours, r at 20 Angstrom."""
    columns = ("fa", "fa-plain", "paper", "default", "ceiling")
    rows = []

    def add(case: Case, what: str, paper: list[str], value: Callable[[Json], float]) -> None:
        name = f"{case.name} (simulated stand-in)" if case.stand_in and case.kind == "simulated" else case.name
        ours = [spread([value(run) for run in results.of(case.name, m)]) if m in case.methods else "—" for m in columns]
        rows.append([name, what, *paper, *ours])

    for case in results.cases():
        paper = case.paper
        if case.kind not in ("simulated", "real"):
            continue
        if case.symmetry_order is not None:
            theirs = [_number(paper.symmetry_fa), _number(paper.symmetry_faml)]
            add(case, symmetry_name(case, results), theirs, lambda run: float(run["metrics"]["symmetry"][0]))
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


def table_1(results: Results) -> list[str]:
    """The paper's Table 1 beside ours."""
    cases, columns = [case for case in results.cases() if case.kind == "timing"], ("fa", "paper", "default")
    runs = [run for case in cases for m in columns for run in results.of(case.name, m)]
    where = " or ".join(sorted({f"{_threads(run)} ({run['device']})" for run in runs})) or NOT_RUN
    rows = [
        [
            f"{case.box}³",
            *(_number(x, 0) for x in (case.paper.seconds_fa, case.paper.seconds_faml, case.paper.seconds_relion)),
            *(seconds(results.of(case.name, m)) for m in columns),
        ]
        for case in cases
    ]
    text = (
        "Table 1 of the paper, seconds an iteration (ribosome, N 20): the paper's on 12 processes; ours on "
        f"{where}, median / last iteration. The band of `fa` and `faml` grows, the last iteration has it whole; that "
        "of `--preset paper` is whole from the start."
    )
    heads = ["box", "paper FA", "paper FAML", "paper RELION", "`fa`", "`--preset paper`", "`faml`"]
    return [text, "", *table(heads, rows)]


def _threads(run: Json) -> str:
    threads = run["options"].get("threads", "?")
    return f"{threads} thread{'s' * (threads != 1)}"


def claims(results: Results) -> list[str]:
    """What the paper says in words, beside what was measured."""
    ours = {"sampling": sampling_found, "profile": profile_found}
    rows = [
        [case.name, case.paper.claim, ours[case.kind](case, results)] for case in results.cases() if case.paper.claim
    ]
    return table(["case", "paper", "ours"], rows)


def sampling_found(case: Case, results: Results) -> str:
    """r of each way to propose poses, and what it costs beside the first."""
    parts, unit = [], None
    for method in case.methods:
        runs = [run for run in results.of(case.name, method) if run["seconds_per_iteration"]]
        if not runs:
            continue
        cost = mean(run["seconds_per_iteration"] for run in runs)
        unit = unit or cost
        times = f", {cost / unit:.1f} times the seconds" if parts else f", {cost:.2f} s an iteration"
        parts.append(f"{NAMES[method]}: r {spread([r_of(run, 0) for run in runs])}{times}")
    return "; ".join(parts) or NOT_RUN


def profile_found(case: Case, results: Results) -> str:
    runs = [(method, run) for method in case.methods for run in results.of(case.name, method)]
    return "; ".join(f"{NAMES[method]}: {_percent(ml_update(run))}" for method, run in runs) or NOT_RUN


def ml_update(run: Json) -> float:
    """Share of the steps that are the paper's maximum-likelihood update."""
    return sum(float(run["metrics"]["share"].get(step, 0.0)) for step in ML_UPDATE)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def case_section(case: Case, results: Results, figures: Path, link: str) -> list[str]:
    lines = [f"### {case.name}", ""]
    about = [case.what]
    if case.kind in ("simulated", "timing", "sampling"):
        about.append(f"SNR {case.snr:g} ({case.snr_reason})")
    if case.kind == "simulated" and case.stand_in:
        about.append(f"**simulated stand-in** for {case.stand_in_for}")
    elif case.stand_in:
        about.append(f"stands beside {case.stand_in_for}")
    if (whole := full(case)) is not None:
        counts = " and ".join(str(s.count) for s in whole.specimens)
        about.append(f"The paper's N is {counts} (`--full`), here less for the CPU")
    lines += [". ".join(about) + ".", "", f"Paper: {paper_figures(case) or '—'}.", ""]
    if case.kind == "picture":
        return [*lines, f"![{case.what}]({link}/{case.name}.png)", ""]
    factors = results.factors(case)
    for factor in factors:
        if len(factors) > 1:
            lines += [f"SNR × {factor:g}:", ""]
        lines += profile_table(case, results) if case.kind == "profile" else method_table(case, results, factor)
    if results.row(case):
        lines += facts(case, results)
    for kind, caption in CAPTIONS.items():
        if (figures / f"{case.name}_{kind}.png").exists():
            lines += [f"![{case.name}: {caption}]({link}/{case.name}_{kind}.png)", ""]
            if kind == "convergence":
                lines += [f"*{caption}*", ""]
    return lines


def method_table(case: Case, results: Results, factor: float) -> list[str]:
    """A row per method: figures, iterations, seconds, device. Of a sweep, the methods that it was made with."""
    structures = [s.name for s in case.specimens] or [case.name]
    heads = ["method", "seeds"]
    if len(structures) > 1:
        heads.append("F1")
    if case.symmetry_order is not None:
        heads.append(symmetry_name(case, results))
    if has_truth(case):
        for name in structures:
            heads += [f"r {name}: unfiltered", "20 Å", "30 Å", "Chimera's: unfiltered / 20 / 30 Å", "FSC 0.5 at, Å"]
    if case.about_axis:
        heads.append("Fourier coverage")
    heads += ["iterations", "s an iteration: median / last", "s in all", "device"]
    rows = []
    for method in case.methods:
        runs = results.of(case.name, method, factor)
        if runs or factor == 1.0:
            cells = method_row(case, runs) if runs else [NOT_RUN, *["—"] * (len(heads) - 2)]
            rows.append([named(method, case), *cells])
    return table(heads, rows)


def named(method: str, case: Case) -> str:
    return "ceiling (poses refined elsewhere)" if (method, case.kind) == ("ceiling", "real") else NAMES[method]


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
        seconds(runs),
        spread([run["seconds_total"] for run in runs], 0),
        ", ".join(sorted({run["device"] for run in runs})),
    ]


def profile_table(case: Case, results: Results) -> list[str]:
    rows = []
    for method in case.methods:
        runs = results.of(case.name, method)
        if not runs:
            rows.append([NAMES[method], NOT_RUN, NOT_RUN, NOT_RUN])
        for run in runs:
            share = sorted(run["metrics"]["share"].items(), key=lambda item: -item[1])
            steps = ", ".join(f"{name} {_percent(s)}" for name, s in share if s >= 0.005)
            rows.append([NAMES[method], seconds([run], 1), steps, _percent(ml_update(run))])
    return table(["method", "s an iteration: median / last", "share of each step, last iteration", "ML update"], rows)


def facts(case: Case, results: Results) -> list[str]:
    """What was run, where and when, over all runs of the row; a line per method; measured SNR."""
    lines, row = [], results.row(case)
    for method in case.methods:
        runs = results.of(case.name, method)
        if runs and (run := runs[-1])["L"] is not None:
            text = f"- {NAMES[method]}: L {run['L']}, r_max {run['r_max']}, padding {run['padding']}"
            lines.append(f"{text}, {run['candidates']:g} candidates a particle and class in the last iteration")
    measured = [
        run["sample"]["snr_measured"] for run in row if run["snr_factor"] == 1 and "snr_measured" in run["sample"]
    ]
    if measured:
        lines.append(f"- SNR measured on the boxes: {', '.join(f'{value:.5f}' for value in measured[0])}")
    lines.append("- " + "; ".join(commands(case, results)))
    machines = sorted({run["machine"]["cpu"] for run in row})
    threads = Counter(_threads(run) for run in row).most_common()
    said = threads[0][0] if len(threads) == 1 else ", ".join(f"{text} × {n}" for text, n in threads)
    loads = [run["machine"]["load_at_start"] for run in row]
    dates = sorted({run["date"][:10] for run in row})
    lines.append(
        f"- {', '.join(machines)}, {said}; load at the start of the runs {min(loads):.1f} to {max(loads):.1f}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; code {', '.join(versions_of(row))}"
    )
    return [*lines, ""]


def commands(case: Case, results: Results) -> list[str]:
    """What makes the row, and what its sweep, whatever commands they were made with piece by piece."""

    def command(runs: list[Json], more: str) -> str:
        seeds = max(run["seed"] for run in runs)
        threads, device = (Counter(values).most_common(1)[0][0] for values in (
            [run["options"].get("threads") for run in runs], [run["device"] for run in runs]
        ))  # fmt: skip
        name = case.name if case.name in CASES else f"{case.name.removesuffix('-full')} --full"
        return f"`python bench/paper/run.py {name} --seeds {seeds} --threads {threads} --device {device}{more}`"

    row = results.row(case)
    swept = [run for run in row if run["snr_factor"] != 1]
    made = [command([run for run in row if run["snr_factor"] == 1] or row, "")]
    if swept:
        methods = " ".join(m for m in case.methods if any(run["method"] == m for run in swept))
        made.append(f"sweep: {command(swept, f' --sweep --methods {methods}')}")
    return made


def versions_of(runs: list[Json]) -> list[str]:
    """Commits in the order of the runs, each once; + where files differed from it in one of them."""
    dirty: dict[str, bool] = {}
    for run in sorted(runs, key=lambda run: str(run["date"])):
        commit, _, state = run["commit"].partition("-")
        dirty[commit] = dirty.get(commit, False) or bool(state)
    return [commit + "+" * changed for commit, changed in dirty.items()]


# --- head and notes -------------------------------------------------------------------------------------------------


def seeds_said(results: Results) -> str:
    """How many seeds a row should have, and which have fewer."""
    cases = [case for case in results.cases() if case.kind != "picture"]
    once = [case.name for case in cases if case.seeds == 1]
    text = "**Seeds**: three where a single run takes under 20 minutes"
    text += f", else one ({', '.join(once)})." if once else "."
    fewer = []
    for case in cases:
        lacking: dict[int, list[str]] = {}
        for method in case.methods:
            if (n := len(results.of(case.name, method))) < case.seeds:
                lacking.setdefault(n, []).append(NAMES[method])
        for n, methods in sorted(lacking.items()):
            which = "" if len(methods) == len(case.methods) else f" ({'; '.join(methods)})"
            fewer.append(f"{case.name} {n} of {case.seeds}{which}")
    return text + (f" Fewer so far: {', '.join(fewer)}." if fewer else "")


def devices_said(results: Results) -> str:
    """Which rows have seen a GPU."""
    on_gpu = sorted({name for (name, _, _), runs in results.runs.items() for run in runs if run["device"] != "cpu"})
    if not on_gpu:
        return "**Device**: the CPU for all runs; no row was run on a GPU so far."
    return f"**Device**: rows with runs on a GPU: {', '.join(on_gpu)}; all other runs on the CPU."


def shifts_said() -> str:
    """By how much the particles of each case are shifted."""
    by_shift: dict[float, list[str]] = {}
    for case in CASES.values():
        if case.kind not in ("real", "picture"):
            by_shift.setdefault(case.max_shift, []).append(case.name)
    return "; ".join(f"±{shift:g} ({', '.join(names)})" for shift, names in sorted(by_shift.items()))


def bands_said() -> str:
    """Which cases are aligned to less than what their voxels hold."""
    by_cut: dict[float, list[str]] = {}
    for case in CASES.values():
        if case.resolution is not None:
            by_cut.setdefault(case.resolution, []).append(case.name)
    return "; ".join(f"{', '.join(names)} to {cut:g} Å" for cut, names in sorted(by_cut.items()))


def _loop(run: Json, structure: int, which: Callable[[list[float]], float]) -> float:
    return which([r[structure] for r in run["metrics"]["r_by_iteration"]["r"]])


# What a field of notes.md may ask of a run, with digits: {case method figure [structure]}, the mean over seeds, or with
# * after the figure each seed's.
FIGURES: dict[str, tuple[Callable[[Json, int], float], int]] = {
    "r": (r_of, 3),
    "mirrored": (lambda run, c: run["metrics"]["maps"][c]["r_mirrored"][AT], 3),
    "within-20": (lambda run, c: 100 * run["metrics"]["maps"][c]["poses"]["within_20"], 0),
    "angle": (lambda run, c: run["metrics"]["maps"][c]["poses"]["median_angle"], 0),
    "symmetry": (lambda run, c: run["metrics"]["symmetry"][c], 3),
    "symmetry-of-truth": (lambda run, c: run["metrics"]["symmetry_of_truth"][c], 3),
    "coverage": (lambda run, c: 100 * run["history"][-1]["coverage"][c], 0),
    "unturned": (lambda run, c: 100 * run["history"][0]["near_identity"], 0),
    "moved": (lambda run, c: run["history"][-1]["pose_change"], 0),
    "loop-first": (lambda run, c: _loop(run, c, lambda r: r[0]), 2),
    "loop-best": (lambda run, c: _loop(run, c, max), 2),
    "loop-last": (lambda run, c: _loop(run, c, lambda r: r[-1]), 2),
    "alignment": (lambda run, c: 100 * run["metrics"]["share"]["fast alignment"], 0),
    "integral": (lambda run, c: 100 * run["metrics"]["share"]["pose integral"], 0),
    "update": (lambda run, c: 100 * ml_update(run), 0),
}


def filled(text: str, results: Results) -> str:
    """notes.md with its fields filled from the results."""

    def value(match: re.Match[str]) -> str:
        words = match[1].split()
        if words == ["shifts"]:
            return shifts_said()
        if words == ["bands"]:
            return bands_said()
        (name, method, figure), structure = words[:3], int(words[3]) if len(words) > 3 else 0
        if method not in CASES[name].methods:
            raise KeyError(f"notes.md: {name} has no method {method}")
        get, digits = FIGURES[figure.removesuffix("*")]
        runs = results.of(name, method)
        if figure.startswith("loop"):
            runs = [run for run in runs if "r_by_iteration" in run["metrics"]]
        if figure.startswith(("within", "angle")):  # of a class with a handful of its particles there is none
            runs = [run for run in runs if run["metrics"]["maps"][structure]["poses"] is not None]
        values = [get(run, structure) for run in runs]
        if not values:
            return NOT_RUN
        return ", ".join(f"{x:.{digits}f}" for x in (values if figure.endswith("*") else [mean(values)]))

    return re.sub(r"\{([^{}]+)\}", value, text)


def render(results: Results, figures: Path = HERE / "figures", link: str = "figures") -> str:
    """RESULTS.md; `link` is where it finds the folder of figures."""
    lines = [
        "# The paper's tests, run again",
        "",
        "Made by `python bench/paper/tables.py` from the JSON files in `results/`; edit nothing here. `python "
        "bench/paper/run.py` makes those, and goes on where it stopped. The command of a row makes all of it; what is "
        "here was made piece by piece. Code: commits in the order of the runs, + where a run's files differed from it.",
        "",
        "**Definitions**, fixed before any run. r: Pearson correlation about the mean with the true map in a sphere "
        "of the structure's radius, after the best global alignment; in the overview at 20 Å (where voxels are larger "
        "than 10 Å, 20 Å is the same as unfiltered). Chimera's: the same not about the mean. Ceiling: the average made "
        "with the true poses and classes. F1: macro mean over the classes. SNR: variance of the volume reconstructed "
        "from noise-free tilts over that of the volume from noise-only tilts, whole box, same pipeline. Means "
        "over seeds ± their standard deviation; a seed is another data set and another random start (of real data "
        "another start alone). An asterisk "
        "at a number of iterations: not converged by the stopping rule, ended by the limit.",
        "",
        "The paper's r has no stated filter or mask: its figures stand beside ours as context.",
        "",
        seeds_said(results),
        "",
        devices_said(results),
        "",
        "**FA** here is the same code with hard assignment: magnitude matching, best single pose and class, "
        "wedge-weighted averaging; same mask, iterations and schedule of the band as `faml`. `fa` subtracts the shell "
        "means from the magnitudes as `faml` does, `fa`, plain magnitudes, does not. The published FA and its "
        "predecessors classify by clustering features; that is not here.",
        "",
        "## Overview",
        "",
        *overview(results),
        *table_1(results),
        *claims(results),
        "## Pass lines",
        "",
    ]
    verdicts = {None: NOT_RUN, True: "holds", False: "**falls short**"}
    lines += table(
        ["case", "asked", "found", ""],
        [[p.case, p.what, p.found, verdicts[p.holds]] for p in pass_lines(results)],
    )
    lines += ["## Case by case", ""]
    for case in results.cases():
        lines += case_section(case, results, figures, link)
    notes = HERE / "notes.md"
    if notes.exists():
        lines += ["## Notes", "", filled(notes.read_text(encoding="utf-8"), results).strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Path, page: Path, figures: Path) -> Path:
    """RESULTS.md of a folder of results."""
    link = Path(os.path.relpath(figures, page.parent)).as_posix()
    page.write_text(render(load(results), figures, link), encoding="utf-8")
    return page


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    args = parser.parse_args(words)
    print(write(args.results, args.output, args.figures))


if __name__ == "__main__":
    main()
