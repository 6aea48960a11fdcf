"""The figures an issue asks to be shown, each by one command: python bench/acceptance.py CASE [options].

Cases: groel (100 GroEL-like boxes against the truth), ribosome (share of poses found from a random start), insitu and
starts (the 40 real ribosomes in ../shared/data, from a map and from random starts), timing (one iteration of 20 boxes),
noise (boxes of two noise levels), classes (three structures in the proportions 70, 25 and 5 %), dryrun (what --dry-run
foretells and what the run takes: dryrun --n 200 --snr 0.05 --iterations 6).
One JSON line per run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from faml_gpu import faml, metrics
from faml_gpu.data import Checkpoint, Groups
from faml_gpu.fsc import fsc, lowpass
from faml_gpu.geometry import random_rotations
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles, star_poses
from faml_gpu.io.star import read_particles_star
from faml_gpu.masks import soft_sphere
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.posteriors import best_poses, one_hot
from faml_gpu.simulate import groel, ribosome, simulate_particles, tric
from faml_gpu.starting import final_averages
from faml_gpu.threads import cpu_threads

NOISE_RUNS: dict[str, dict[str, Any]] = {
    "one": {"noise_groups": "none", "normalize": False},
    "groups": {"noise_groups": "optics", "normalize": False},
    "one-normalised": {"noise_groups": "none"},
    "groups-normalised": {"noise_groups": "optics"},
    "scale-normalised": {"noise_groups": "none", "scale_correction": True},
    "both": {"noise_groups": "optics", "scale_correction": True, "normalize": False},
    "both-normalised": {"noise_groups": "optics", "scale_correction": True},
}
MAIN = "from faml_gpu.cli import main; main()"
INSITU = Path(__file__).resolve().parents[2] / "shared" / "data" / "insitu70S"


def say(**fields: Any) -> None:
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
    print(json.dumps(fields | {"machine": f"{platform.machine()} {os.cpu_count()} cores", "load": load}), flush=True)


def similarity(volume: np.ndarray, truth: np.ndarray, voxel_size: float, radius: float) -> dict[str, float]:
    """r with the truth at 20 and 30 Angstrom after global alignment."""
    return {
        f"r{resolution}": round(
            metrics.align_map(volume, truth, voxel_size=voxel_size, mask_radius=radius, resolution=resolution)[2], 4
        )
        for resolution in (20, 30)
    }


def groel_case(args: argparse.Namespace) -> None:
    """100 GroEL-like boxes of 64^3, voxel 6 A, SNR 0.003, +-60 degrees, shifts +-3 voxels, 20 iterations."""
    phantom, mask = groel(), args.mask or 100.0
    sim = simulate_particles([phantom], [args.n], box=64, voxel_size=6.0, snr=args.snr, max_shift=3.0, seed=args.seed)
    particles = ArrayParticles(sim.boxes, 6.0, weights=sim.weight)
    for name in args.runs or ("true", "default", "paper", "fa"):
        if name == "true":
            options = Options(mask_radius=mask)
            posterior = one_hot(np.zeros(args.n, np.int64), sim.rotations, sim.shifts, 1, known=True)
            maps, seconds, iterations = (
                final_averages(Plan.make(particles, options), particles, posterior),
                0.0,
                0,
            )
        else:
            preset, method = ("default", "fa") if name == "fa" else (name, "faml")
            options = Options(
                mask_radius=mask, iterations=args.iterations, preset=preset, method=method, seed=args.seed,
                threads=args.threads, resolution=args.resolution,
            )  # fmt: skip
            begin = time.perf_counter()
            result = faml.run(particles, options)
            maps, seconds, iterations = result.maps, time.perf_counter() - begin, len(result.history)
        write_mrc(Path(args.output) / f"groel_{name}_{args.seed}.mrc", maps[0], 6.0)
        r = similarity(maps[0], sim.truth[0], 6.0, phantom.radius)
        say(
            case="groel", run=name, seed=args.seed, n=args.n, snr=args.snr, iterations=iterations, s=round(seconds), **r
        )


def ribosome_case(args: argparse.Namespace) -> None:
    """Asymmetric phantom, N = 100, voxel 6 A, 64^3, SNR 0.003, random start, 40 A, 10 iterations."""
    sim = simulate_particles(
        [ribosome()], [args.n], box=64, voxel_size=6.0, snr=args.snr, max_shift=3.0, seed=args.seed
    )
    particles = ArrayParticles(sim.boxes, 6.0, weights=sim.weight)
    options = Options(mask_radius=150, resolution=40, iterations=10, seed=args.seed, threads=args.threads)
    shares: list[float] = []

    def after(checkpoint: Checkpoint) -> None:
        best = best_poses(checkpoint.posterior)
        angles, _ = metrics.pose_errors(best.rotations, best.shifts, sim.rotations, sim.shifts)
        shares.append(round(float((angles < 20).mean()), 3))

    begin = time.perf_counter()
    faml.run(particles, options, on_iteration=after)
    say(case="ribosome", seed=args.seed, within20=shares, s=round(time.perf_counter() - begin))


def insitu_case(args: argparse.Namespace) -> None:
    """The 40 real ribosomes from their reference at 60 A: share of poses within 20 degrees of the given ones.

    The command as a user types it, with --mask, --seed (not 0) and --iterations (not 20) if they are given; and whether
    all that its input says is in its output.

    And the mean FSC with the reference over the shells from 60 to 36 A, beyond the start's low-pass, in the mask: of
    the average found, of those in the given poses (which made the reference: it holds their noise too) and in random
    ones, and of the start.
    """
    particles = open_particles(INSITU / "particles.star")
    given = open_particles(INSITU / "reference_poses.star", use_poses=True).poses
    reference, voxel_size = read_mrc(INSITU / "reference_relion_reconstruction.mrc")
    mask = soft_sphere(particles.box, 150 / voxel_size, 3)  # of the comparisons, whatever that of the run
    shells = particles.box * voxel_size / np.arange(1, particles.box // 2)
    beyond = 1 + np.flatnonzero((shells < 60) & (shells >= 35.9))

    def agreement(volume: np.ndarray) -> float:
        aligned = metrics.align_map(volume, reference, voxel_size=voxel_size, mask_radius=150)[3]
        return round(float(fsc(aligned, reference, mask)[beyond].mean()), 3)

    def in_poses(rotations: np.ndarray, shifts: np.ndarray) -> float:
        n = len(particles)
        posterior = one_hot(np.zeros(n, np.int64), rotations, shifts, 1, known=True)
        return agreement(final_averages(Plan.make(particles, Options(mask_radius=150)), particles, posterior)[0])

    anyhow = random_rotations(len(particles), np.random.default_rng(args.seed))
    say(case="insitu", shells=beyond.tolist(), fsc_given=in_poses(given.rotations, given.shifts),
        fsc_random=in_poses(anyhow, np.zeros((len(particles), 3))),
        fsc_start=agreement(lowpass(reference, 60, voxel_size)))  # fmt: skip
    for resolution in args.resolutions:
        asked = {"mask-radius": args.mask, "resolution": resolution, "seed": args.seed or None, "threads": args.threads,
                 "iterations": None if args.iterations == 20 else args.iterations}  # fmt: skip
        words = [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]
        words = ["average", "particles.star", "--reference", "reference_relion_reconstruction.mrc",
                 "--initial-lowpass", "60", *words]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            _, seconds, _ = command(*words, "-o", folder, cwd=INSITU)
            found = Path(folder) / "run_data.star"
            poses = star_poses(read_particles_star(found), voxel_size)
            average, _ = read_mrc(Path(folder) / "run_class001.mrc")
            about = json.loads((Path(folder) / "run.json").read_text())
            kept = columns_kept(INSITU / "particles.star", found)
        angles, _ = metrics.pose_errors(poses.rotations, poses.shifts, given.rotations, given.shifts)
        say(case="insitu", command=shlex.join(["faml-gpu", *words]), mask=about["resolved"]["mask_radius"],
            iterations=len(about["iterations"]), within20=round(float((angles < 20).mean()), 3),
            fsc=agreement(average), columns=kept, s=round(seconds))  # fmt: skip


def columns_kept(given: Path, written: Path) -> str:
    """Whether `starfile` finds all that came in in what was written: blocks, columns in their order, and values.

    Values but those of the poses, which are new.
    """
    import starfile

    before, after = (starfile.read(path, always_dict=True) for path in (given, written))
    missing = []
    for block, table in before.items():
        if block not in after:
            missing.append(f"block {block}")
            continue
        columns = list(after[block].columns)
        missing += [f"{block}: {name}" for name in table.columns if name not in columns]
        if [name for name in columns if name in table.columns] != list(table.columns):
            missing.append(f"{block}: the order")
        for name in table.columns:
            new = name.startswith(("rlnAngle", "rlnOrigin"))
            if name in columns and not new and not table[name].equals(after[block][name]):
                missing.append(f"{block}: values of {name}")
    count = sum(len(table.columns) for table in before.values())
    return f"all {count} in the output" if not missing else "missing: " + ", ".join(missing)


def starts_case(args: argparse.Namespace) -> None:
    """The 40 real ribosomes from the poses and from the map refined elsewhere (60 A), and from random starts.

    The likelihood each ends with, and how right it is: shares of poses near the given ones, r with the map at 30 A.
    """
    given = open_particles(INSITU / "reference_poses.star", use_poses=True)
    reference, _ = read_mrc(INSITU / "reference_relion_reconstruction.mrc")
    known: dict[str, dict[str, Any]] = {
        "poses": {"use_poses": True, "initial_lowpass": 60.0},
        "map": {"reference": reference, "initial_lowpass": 60.0},
    }
    for run in args.runs or ["poses", "map", "random", "starts"]:
        for trial in range(args.n if run == "random" else 1):
            seed = args.seed + trial
            options = Options(
                mask_radius=150, iterations=args.iterations, seed=seed, threads=args.threads,
                starts=args.n if run == "starts" else 1,
                band="growing",  # one band for all, so that likelihoods compare
            )  # fmt: skip
            if trial:  # with one class the seed makes no other start: the mean of the boxes turned at random does
                plan = replace(Plan.make(given, options), trial=trial)
                result = faml.run(given, options, checkpoint=faml.begin(plan, given, None, False))
            else:
                result = faml.run(given, options, **known.get(run, {}))
            angles, _ = metrics.pose_errors(
                result.best.rotations, result.best.shifts, given.poses.rotations, given.poses.shifts
            )
            say(case="starts", start=run, seed=seed, log_likelihood=round(result.history[-1].log_likelihood, 1),
                iterations=len(result.history), within20=round(float((angles < 20).mean()), 3),
                **similarity(result.maps[0], reference, 12.0, 150.0))  # fmt: skip


def timing_case(args: argparse.Namespace) -> None:
    """One iteration of 20 boxes, K = 1, full band, 50 candidates: median of several."""
    for box in args.boxes:
        for preset in ("default", "paper"):
            sim = simulate_particles([ribosome()], [20], box=box, voxel_size=384 / box, snr=0.05, seed=args.seed)
            particles = ArrayParticles(sim.boxes, 384 / box, weights=sim.weight)
            options = Options(mask_radius=150, preset=preset, seed=args.seed, threads=args.threads, iterations=100)
            plan = Plan.make(particles, options)
            plan = replace(plan, r_start=plan.r_final)  # full band at once
            with cpu_threads(args.threads) as threads:
                checkpoint = faml.begin(plan, particles, None, False)
                checkpoint = faml.iterate(plan, particles, checkpoint)  # compiles, fills the tables
                seconds = []
                for _ in range(args.repeats):
                    begin = time.perf_counter()
                    checkpoint = faml.iterate(plan, particles, checkpoint)
                    seconds.append(time.perf_counter() - begin)
            last = checkpoint.history[-1]
            say(case="timing", box=box, preset=preset, threads=threads, L=last.bandwidth, r_max=last.r_max,
                padding=options.padding, candidates=last.candidates, median_s=round(float(np.median(seconds)), 2),
                min_s=round(min(seconds), 2), steps=last.seconds)  # fmt: skip


def noise_case(args: argparse.Namespace) -> None:
    """Ribosomes at two noise levels, deviations as 1 to `--ratio` (32^3, voxel 12 A), from the structure at 80 A.

    One noise curve for all, and one for each level; grey values as they are, and normalised, where it is the signal's
    scale that differs.
    """
    counts, box, voxel = (args.n // 2, args.n // 2), 32, 12.0
    sims = [
        simulate_particles([ribosome()], [n], box=box, voxel_size=voxel, snr=snr, max_shift=1.5, seed=seed)
        for n, snr, seed in zip(
            counts, (args.snr, args.snr / args.ratio**2), (args.seed, args.seed + 1000), strict=True
        )
    ]
    level = np.repeat([0, 1], counts)
    rotations, shifts = (np.concatenate([getattr(s, name) for s in sims]) for name in ("rotations", "shifts"))
    groups = {"optics": Groups(("quiet", "loud"), level)}
    particles = ArrayParticles(np.concatenate([s.boxes for s in sims]), voxel, sims[0].weight, groups=groups)
    for name in args.runs or NOISE_RUNS:
        options = Options(
            mask_radius=150, resolution=30, iterations=8, seed=args.seed, threads=args.threads, **NOISE_RUNS[name]
        )
        begin = time.perf_counter()
        result = faml.run(particles, options, reference=sims[0].truth[0], initial_lowpass=80)
        errors, _ = metrics.pose_errors(result.best.rotations, result.best.shifts, rotations, shifts)
        r = metrics.align_map(
            result.maps[0], sims[0].truth[0], voxel_size=voxel, mask_radius=ribosome().radius, resolution=30
        )[2]
        say(case="noise", run=name, ratio=args.ratio, seed=args.seed, n=args.n, snr=args.snr, r30=round(r, 4),
            median=[round(float(np.median(errors[level == g])), 1) for g in (0, 1)],
            within20=[round(float((errors[level == g] < 20).mean()), 3) for g in (0, 1)],
            iterations=len(result.history), s=round(time.perf_counter() - begin))  # fmt: skip


def classes_case(args: argparse.Namespace) -> None:
    """Ribosomes, GroEL and TRiC, 70, 25 and 5 % of 400 boxes, 24^3, voxel 16 A, SNR .2, +-60 degrees, K = 3.

    The two barrels are alike at the 48 A used for alignment. A structure is found where most particles of some class
    are it, and most of its particles are in that class.
    """
    counts = [round(share * args.n) for share in (0.7, 0.25, 0.05)]
    sim = simulate_particles(
        [ribosome(), groel(), tric()], counts, box=24, voxel_size=16.0, snr=args.snr, tilt_range=(-60.0, 60.0),
        seed=args.seed, resolution=36.0, max_shift=1.5,
    )  # fmt: skip
    particles = ArrayParticles(sim.boxes, sim.voxel_size, sim.weight)
    options = Options(
        n_classes=3, mask_radius=140, resolution=48, iterations=args.iterations, seed=args.seed, threads=args.threads,
        reseed="no-reseed" not in (args.runs or []),
    )  # fmt: skip
    begin = time.perf_counter()
    result = faml.run(particles, options)
    labels = metrics.best_labels(result.best.classes, sim.classes)
    confusion = metrics.confusion_matrix(labels, sim.classes, (3, 3))
    hits = np.diag(confusion)
    say(case="classes", n=args.n, snr=args.snr, seed=args.seed, reseed=options.reseed, confusion=confusion.tolist(),
        f1=[round(float(f), 3) for f in metrics.f1_score(labels, sim.classes)],
        found=((2 * hits > confusion.sum(axis=0)) & (2 * hits > confusion.sum(axis=1))).tolist(),
        reseeded={h.iteration: h.reseeded for h in result.history if h.reseeded},
        iterations=len(result.history), s=round(time.perf_counter() - begin))  # fmt: skip


def command(*words: str, cwd: Path | None = None) -> tuple[str, float, float]:
    """What `faml-gpu` prints, the seconds it takes, and the most memory it has, GB."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, "-c", MAIN, *words], stdout=told, cwd=cwd)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"faml-gpu {shlex.join(words)} ended with status {status}")
        told.seek(0)
        return told.read(), seconds, used.ru_maxrss / 2**20


def dryrun_case(args: argparse.Namespace) -> None:
    """Ribosomes of 32^3, voxel 12 A: a run of some iterations, foretold before and after it, and ten thousand rows."""
    with tempfile.TemporaryDirectory() as folder:
        star, out = Path(folder) / "boxes" / "particles.star", Path(folder) / "out"
        command("simulate", "ribosome", "-n", str(args.n), "-o", str(star.parent), "--box", "32", "--voxel-size", "12",
                "--snr", str(args.snr), "--seed", str(args.seed))  # fmt: skip
        options = {"mask_radius": 150.0, "iterations": args.iterations, "device": "cpu", "resolution": args.resolution}
        options = {name: value for name, value in options.items() if value is not None}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]

        def foretold() -> dict[str, Any]:
            # As the command does, but with all digits.
            asked = f"print(json.dumps(asdict(dry_run({str(star)!r}, 1, **{options!r}).forecast)))"
            code = f"import json; from dataclasses import asdict; from faml_gpu.pipeline import dry_run; {asked}"
            told = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
            found: dict[str, Any] = json.loads(told)
            say(case="dryrun", what="forecast", n=args.n, first_s=round(found["first"], 1),
                full_s=round(found["full"], 1), total_s=round(found["total"]), host_gb=round(found["host"] / 2**30, 3),
                measured=found["measured"])  # fmt: skip
            return found

        before = foretold()
        _, seconds, memory = command("average", str(star), "-o", str(out), *words)
        records = json.loads((out / "run.json").read_text())["iterations"]
        of_iteration = [sum(record["seconds"].values()) for record in records]
        finest = max(record["r_max"] for record in records)
        of_full = [s for s, record in zip(of_iteration, records, strict=True) if record["r_max"] == finest]
        say(case="dryrun", what="run", n=args.n, first_s=round(of_iteration[0], 1), full_s=round(np.mean(of_full), 1),
            total_s=round(seconds), host_gb=round(memory, 3), iterations=len(records),
            each_s=[round(s, 1) for s in of_iteration])  # fmt: skip
        after = foretold()
        for name, real in (("first", of_iteration[0]), ("full", np.mean(of_full)), ("total", seconds)):
            say(case="dryrun", what=f"forecast over run, {name}",
                ratio=[round(found[name] / real, 2) for found in (before, after)])  # fmt: skip
        say(case="dryrun", what="forecast over run, memory",
            ratio=[round(found["host"] / 2**30 / memory, 2) for found in (before, after)])  # fmt: skip
        head, _, rest = star.read_text().partition("particles/")
        rows = f"particles/{rest}".split("\n")[: args.n]
        many = star.with_name("many.star")
        many.write_text(head + "\n".join(rows[i % len(rows)] for i in range(10_000)) + "\n")
        for _ in range(2):
            start = os.times()
            _, seconds, _ = command("average", str(many), "-o", str(Path(folder) / "none"), "--dry-run", *words)
            end = os.times()
            cpu = end.children_user - start.children_user + end.children_system - start.children_system
            say(case="dryrun", what="10,000 rows", s=round(seconds, 1), cpu_s=round(cpu, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["groel", "ribosome", "insitu", "starts", "timing", "noise", "classes", "dryrun"]
    parser.add_argument("case", choices=names)
    parser.add_argument(
        "--runs",
        nargs="+",
        help="groel: true, default, paper, fa; noise: " + ", ".join(NOISE_RUNS) + "; classes: no-reseed; "
        "starts: poses, map, random, starts (so many as --n)",
    )
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--snr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--mask", type=float, help="mask radius, A: of groel (100 by default), and of insitu")
    parser.add_argument("--resolution", type=float)
    parser.add_argument(
        "--resolutions", nargs="+", type=float, default=[None], help="A; the finest there is by default"
    )
    parser.add_argument("--boxes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=3.0, help="of the noise levels of `noise`")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", default=".")
    args = parser.parse_args()
    cases = {
        "groel": groel_case, "ribosome": ribosome_case, "insitu": insitu_case, "timing": timing_case,
        "noise": noise_case, "classes": classes_case, "starts": starts_case, "dryrun": dryrun_case,
    }  # fmt: skip
    cases[args.case](args)


if __name__ == "__main__":
    main()
