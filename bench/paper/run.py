"""Run the paper's tests: python bench/paper/run.py [CASE ...] [--seeds 3] [--sweep] [--quick] ...

One JSON file per case, SNR, method and seed under bench/paper/results/, written as each run ends. What is there is not
run again (--again does), so an interrupted command goes on where it was. At the end RESULTS.md is written from all
JSON files there are (bench/paper/tables.py does that alone), beside the folder bench/paper/results, or inside the one
that --results names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import figures
import numpy as np
import tables
from cases import CASES, DATA, Case, full, quick
from measures import convergence, coverage, measure
from methods import Run, method_options, options_json, run_method
from particles import Sample, make_sample
from pictures import figure_2

from faml_gpu import faml
from faml_gpu.array_backend import use_device
from faml_gpu.device_info import choose_device, machine, versions
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.mrc import write_mrc
from faml_gpu.plan import Plan
from faml_gpu.threads import cpu_threads

HERE = Path(__file__).resolve().parent


def result_path(results: Path, case: Case, factor: float, method: str, seed: int) -> Path:
    return results / case.name / f"{method}_snr{factor:g}_seed{seed}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def without_folders(words: list[str]) -> list[str]:
    """A command as others would repeat it: where it wrote to is of this machine alone."""
    folders = {"--results", "--figures", "--work"}
    return [w for i, w in enumerate(words) if w not in folders and (i == 0 or words[i - 1] not in folders)]


def circumstances(case: Case, factor: float, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What, where and when."""
    about = {key: value for key, value in machine().items() if key != "executable"}
    return {
        "format": 1,
        "case": case.name,
        "what": case.what,
        "stand_in": case.stand_in,
        "quick": args.quick,
        "snr": None if case.kind == "real" else case.snr * factor,
        "snr_factor": factor,
        "snr_reason": case.snr_reason,
        "seed": seed,
        "method": method,
        "command": " ".join(["python", "bench/paper/run.py", *without_folders(args.words)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": about | {"cores": os.cpu_count(), "load_at_start": round(os.getloadavg()[0], 2)},
        "python": platform.python_version(),
    }


def finish(content: dict[str, Any], options: Any, run: Run, sample: Sample) -> None:
    """What a run was and how long it took."""
    last = run.history[-1] if run.history else None
    content |= {
        "device": run.device,
        "sample": sample.about,
        "options": options_json(options, run),
        "L": last.bandwidth if last else None,
        "r_max": last.r_max if last else run.plan.r_final,
        "padding": run.plan.options.padding,
        "candidates": round(last.candidates, 1) if last else None,
        "iterations": len(run.history),
        "converged": bool(last and last.converged),
        "seconds_total": round(run.seconds, 2),
        "seconds_per_iteration": round(float(np.median(run.iteration_seconds)), 3) if run.iteration_seconds else None,
        "iteration_seconds": [round(s, 3) for s in run.iteration_seconds],
        "steps_of_last_iteration": last.seconds if last else None,
        "history": [
            {
                key: getattr(row, key)
                for key in (
                    "iteration", "log_likelihood", "sigma", "zeta", "class_sizes", "r_max", "resolution", "bandwidth",
                    "candidates", "changed_class", "pose_change", "map_correlation", "near_identity", "coverage",
                )
            }
            for row in run.history
        ],
    }  # fmt: skip


def one(
    case: Case, factor: float, method: str, seed: int, sample: Sample, args: argparse.Namespace
) -> tuple[dict[str, Any], Run]:
    """Run a method on a sample, measure it, keep maps for the figures."""
    content = circumstances(case, factor, method, seed, args)
    options = method_options(method, case, sample, seed, args.device, args.threads)
    run = run_method(method, case, sample, options)
    finish(content, options, run, sample)
    measured, aligned = measure(sample, run.maps, run.posterior)
    content["metrics"] = measured
    if case.about_axis is not None:
        content["metrics"]["coverage"] = coverage(run.plan, sample.particles, run.posterior)
    if sample.truth and run.by_iteration and seed == figures.SEED and factor == 1 and not args.quick:
        of_truth = [row["class"] - 1 for row in measured["maps"]]
        content["metrics"]["r_by_iteration"] = convergence(sample, run.by_iteration, of_truth)
    for k, volume in enumerate(aligned):
        path = map_path(args.work, case, factor, method, seed, k)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mrc(path, volume, sample.voxel_size)
    return content, run


def map_path(work: Path, case: Case, factor: float, method: str, seed: int, k: int) -> Path:
    return work / "maps" / case.name / f"{method}_snr{factor:g}_seed{seed}_{k + 1}.mrc"


def profile(case: Case, method: str, seed: int, sample: Sample, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step of the last iteration, at the whole band: the first compiles and fills tables."""
    content = circumstances(case, 1.0, method, seed, args)
    options = method_options(method, case, sample, seed, args.device, args.threads)
    device, _ = choose_device(options.device)
    with cpu_threads(options.threads), use_device(device):
        plan = Plan.make(sample.particles, options, None, device)
        plan = replace(plan, r_start=plan.r_final)
        checkpoint = faml.begin(plan, sample.particles, None, False)
        seconds = []
        for _ in range(case.iterations):
            before = time.perf_counter()
            checkpoint = faml.iterate(plan, sample.particles, checkpoint)
            seconds.append(time.perf_counter() - before)
            print(f"  {case.name} {method}: {seconds[-1]:.1f} s", flush=True)
    run = Run(checkpoint.state.maps, checkpoint.posterior, plan, {}, device, sum(seconds), checkpoint.history, seconds)
    finish(content, options, run, sample)
    steps = checkpoint.history[-1].seconds
    content["metrics"] = {"share": {name: s / sum(steps.values()) for name, s in steps.items()}}
    return content


def warm_up(args: argparse.Namespace) -> None:
    """Compile what is compiled at first use, so that it is in no run's time: once, before the first run that is due."""
    if args.warm or args.quick:
        return
    args.warm = True
    case = quick(CASES["groel-lowsnr"])
    sample = make_sample(case, 1.0, 1, args.work)
    for method in ("default", "paper", "fa"):
        if args.methods is not None and method not in args.methods:
            continue
        options = method_options(method, case, sample, 1, args.device, args.threads)
        run_method(method, case, sample, options)


def run_case(case: Case, args: argparse.Namespace) -> None:
    missing = case.missing()
    if missing and not args.quick:
        print(f"{case.name}: skipped, no {', '.join(missing)} in {DATA}", flush=True)
        return
    if case.kind == "picture":
        figure_2(case, args.figures, args.work)
        return
    if args.quick:
        if case.kind == "real":
            print(f"{case.name}: skipped, real data have no quick form", flush=True)
            return
        case = quick(case)
    seeds = args.seeds if args.seeds is not None else case.seeds
    factors = [1.0, 0.5, 2.0] if args.sweep and case.kind == "simulated" else [1.0]
    methods = [m for m in case.methods if args.methods is None or m in args.methods]
    for factor in factors:
        for seed in range(args.first_seed, args.first_seed + seeds):
            due = [m for m in methods if args.again or not result_path(args.results, case, factor, m, seed).exists()]
            if not due:
                continue
            warm_up(args)
            before = time.perf_counter()
            sample = make_sample(case, factor, seed, args.work)
            made = time.perf_counter() - before
            print(f"{case.name}, SNR x{factor:g}, seed {seed}: {sample.about} in {made:.0f} s", flush=True)
            for k, truth in enumerate(sample.truth):
                path = map_path(args.work, case, factor, "truth", seed, k)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mrc(path, truth, sample.voxel_size)
            for method in due:
                if case.kind == "profile":
                    content = profile(case, method, seed, sample, args)
                else:
                    content, _ = one(case, factor, method, seed, sample, args)
                content["seconds_simulation"] = round(made, 1)
                write_json(result_path(args.results, case, factor, method, seed), content)
                print(f"{case.name} {method}: {summary(content)}", flush=True)
            if factor == 1 and seed == figures.SEED:
                draw_case(case, args)


def draw_case(case: Case, args: argparse.Namespace) -> None:
    """The figures that the JSON files and the maps at hand allow."""
    if case.kind in ("picture", "profile"):
        return
    for path in figures.draw(case, args.results, args.work, args.figures):
        print(f"{case.name}: {path}", flush=True)


def summary(content: dict[str, Any]) -> str:
    parts = [f"{content['seconds_total']:.0f} s, {content['iterations']} iterations"]
    measured = content["metrics"]
    if "f1" in measured:
        parts.append(f"F1 {measured['f1']:.3f}")
    for row in measured.get("maps", []):
        r = row["r"]
        parts.append(
            f"{row['structure']} r {r['unfiltered']:.3f} / {r['20']:.3f} (20 Å) / {r['30']:.3f} (30 Å), "
            f"mirrored {row['r_mirrored']['20']:.3f}"
        )
    others = ("symmetry", "symmetry_of_truth", "coverage", "share")
    parts += [f"{name} {measured[name]}" for name in others if name in measured]
    return "; ".join(parts)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; none: all")
    parser.add_argument("--list", action="store_true", help="list the cases and what is missing for them")
    parser.add_argument("--seeds", type=int, help="data sets per case (default: 3, or 1 where a run takes long)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="some of them only")
    parser.add_argument("--sweep", action="store_true", help="also at half and twice the SNR")
    parser.add_argument(
        "--full",
        action="store_true",
        help="the paper's number of particles where a case has fewer (tmv): a row of its own",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny boxes of phantoms, 2 iterations: does it run?")
    parser.add_argument("--again", action="store_true", help="repeat what is there")
    parser.add_argument("--draw", action="store_true", help="run nothing: figures from the results and maps at hand")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="maps for the figures; may be deleted")
    args = parser.parse_args(words)
    args.words, args.warm = sys.argv[1:] if words is None else words, False
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    chosen = [CASES[name] for name in args.cases] or list(CASES.values())
    if args.full:
        chosen = [full(case) or case for case in chosen]
    if args.list:
        for case in chosen:
            missing = case.missing()
            print(f"{case.name:<16} {case.what}" + (f"   [missing: {', '.join(missing)}]" if missing else ""))
        return
    if args.quick and args.results == HERE / "results":
        parser.error("--quick: give --results and --figures of its own, its figures mean nothing")
    for case in chosen:
        if args.draw:
            draw_case(quick(case) if args.quick else case, args)
        else:
            run_case(case, args)
    if args.results.exists():
        page = HERE / "RESULTS.md" if args.results == HERE / "results" else args.results / "RESULTS.md"
        print(tables.write(args.results, page, args.figures), flush=True)


if __name__ == "__main__":
    main()
