"""The samplers against each other: python bench/samplers.py [--structures ...] [--snr ...] [--output FOLDER].

GroEL-like and ribosome-like boxes (64^3 of 6 A; --box 32: of 12 A; +-60 degrees, shifts to +-18 A) from a random start,
aligned to 40 A, at SNR 0.003 (100 boxes) and 0.001 (150): by iteration the share of poses within 20 degrees of the true
ones (modulo the structure's symmetry, after the best common gauge) and r, the correlation about the mean with the true
map at 40 A in a sphere of its radius, after the best alignment. Three ways to propose poses, all else as in the
default: `joint`; `magnitude`; `plain`, magnitudes without the subtraction of the shell means. `true` is the average in
the true poses. One JSON file per run, which is not made again; then table.md and samplers.png of all there are: by
iteration, what an iteration takes, and how long until r is within 0.03 of that of the true poses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from faml_gpu import faml, metrics
from faml_gpu.data import Checkpoint
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options, Preset
from faml_gpu.plan import Plan
from faml_gpu.posteriors import best_poses, one_hot
from faml_gpu.simulate import groel, ribosome, simulate_particles
from faml_gpu.starting import final_averages

STRUCTURES = {"groel": (groel, "D7", 100.0), "ribosome": (ribosome, "C1", 150.0)}  # and radius of the mask, A
COUNTS = {0.003: 100, 0.001: 150}
SAMPLERS = ("joint", "magnitude", "plain")
RIGHT = 20.0  # degrees
RESOLUTION = 40.0
NEAR = 0.03  # of the ceiling: what counts as there


@dataclass(frozen=True)
class PlainMagnitudes(Options):
    """Magnitudes as they are, not less their shell means."""

    @property
    def choices(self) -> Preset:
        return replace(super().choices, magnitudes="plain")


def one(structure: str, snr: float, sampler: str, seed: int, box: int, iterations: int, every: int) -> dict[str, Any]:
    """A run, and how far it was after each iteration."""
    make, group, mask = STRUCTURES[structure]
    n, voxel = COUNTS[snr], 384 / box
    sim = simulate_particles([make()], [n], box=box, voxel_size=voxel, snr=snr, max_shift=18 / voxel, seed=seed)
    particles = ArrayParticles(sim.boxes, voxel, weights=sim.weight)
    kind = PlainMagnitudes if sampler == "plain" else Options
    options = kind(
        mask_radius=mask, resolution=RESOLUTION, iterations=iterations, seed=seed, threads=1, device="cpu",
        sampler="joint" if sampler == "joint" else "magnitude",
    )  # fmt: skip
    shares: list[float] = []
    r: dict[int, float] = {}
    seconds: list[float] = []

    def similar(volume: Any) -> float:
        found = metrics.align_map(
            volume, sim.truth[0], voxel_size=voxel, mask_radius=make().radius, resolution=RESOLUTION
        )
        return round(float(found[2]), 4)

    def after(checkpoint: Checkpoint) -> None:
        seconds.append(round(sum(checkpoint.history[-1].seconds.values()), 3))
        best = best_poses(checkpoint.posterior)
        symmetry = metrics.point_group(group)
        angles, _ = metrics.pose_errors(best.rotations, best.shifts, sim.rotations, sim.shifts, symmetry)
        shares.append(round(float((angles < RIGHT).mean()), 3))
        if len(shares) % every == 0:
            r[len(shares)] = similar(checkpoint.state.maps[0])

    about: dict[str, Any] = {"structure": structure, "snr": snr, "n": n, "sampler": sampler, "seed": seed}
    about["box"] = box
    if sampler == "true":
        posterior = one_hot(np.zeros(n, np.int64), sim.rotations, sim.shifts, 1, known=True)
        maps = final_averages(Plan.make(particles, options), particles, posterior)
    else:
        result = faml.run(particles, options, on_iteration=after)
        maps = result.maps
        about |= {"iterations": len(result.history), "log_likelihood": result.history[-1].log_likelihood}
    return about | {
        "within20": shares, "r40_by_iteration": r, "r40": similar(maps[0]), "seconds": seconds,
        "machine": f"{platform.machine()} {os.cpu_count()} cores", "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def at(values: list[float], iteration: int) -> float:
    """Of a run after an iteration; one that has ended stays where it was."""
    return values[min(iteration, len(values)) - 1]


def table(runs: list[dict[str, Any]]) -> str:
    """r and share of right poses by iteration, means over the seeds; then the end, time, and the lines to pass."""
    shown = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20)
    after = ", ".join(map(str, shown))
    by_iteration = [
        f"| box | structure | SNR | boxes | poses from | r at 40 Å (share within 20°) after {after} |",
        "|---|---|---|---|---|---|",
    ]
    ends = [
        "| box | structure | SNR | poses from | seeds | r at 40 Å at the end | iterations | s an iteration | "
        f"s until r is within {NEAR:g} of the truth's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    for box in sorted({x["box"] for x in runs}):
        for structure in STRUCTURES:
            for snr, n in COUNTS.items():
                of_case = [x for x in runs if (x["box"], x["structure"], x["snr"]) == (box, structure, snr)]
                truth = {x["seed"]: x["r40"] for x in of_case if x["sampler"] == "true"}
                final: dict[str, float] = {}
                for sampler in (*SAMPLERS, "true"):
                    rows = [x for x in of_case if x["sampler"] == sampler]
                    if not rows:
                        continue
                    r = [x["r40"] for x in rows]
                    final[sampler] = float(np.mean(r))
                    found = f"{np.mean(r):.3f} ({', '.join(f'{v:.3f}' for v in r)})"
                    start = f"| {box} | {structure} | {snr:g} |"
                    seeds = ", ".join(str(x["seed"]) for x in rows)
                    if sampler == "true":
                        by_iteration.append(f"{start} {n} | the truth | {np.mean(r):.3f} |")
                        ends.append(f"{start} the truth | {seeds} | {found} | — | — | — |")
                        continue
                    curves = [list(x["r40_by_iteration"].values()) for x in rows]
                    means = [[np.mean([at(v, i) for v in values]) for i in shown]
                             for values in (curves, [x["within20"] for x in rows])]  # fmt: skip
                    steps = [f"{a:.3f} ({b:.2f})" for a, b in zip(*means, strict=True)]
                    by_iteration.append(f"{start} {n} | `{sampler}` | {' '.join(steps)} |")
                    until = []
                    for x, curve in zip(rows, curves, strict=True):
                        there = [i for i, v in enumerate(curve) if v >= truth.get(x["seed"], np.inf) - NEAR]
                        until.append(f"{sum(x['seconds'][: there[0] + 1]):.0f}" if there else "never")
                    iterations = " ".join(str(x["iterations"]) for x in rows)
                    each = np.median([np.median(x["seconds"]) for x in rows])
                    ends.append(
                        f"{start} `{sampler}` | {seeds} | {found} | {iterations} | {each:.1f} | {', '.join(until)} |"
                    )
                if snr == 0.003 and {"joint", "true"} <= final.keys():
                    off = final["true"] - final["joint"]
                    verdict = "holds" if off <= NEAR else "FALLS SHORT"
                    lines.append(
                        f"- {structure}, {box}³, {snr:g}: joint within {NEAR:g} of the truth: {off:.3f}, {verdict}"
                    )
                if snr == 0.001 and {"joint", "magnitude"} <= final.keys():
                    ahead = final["joint"] - final["magnitude"]
                    verdict = "holds" if ahead > 0 else "FALLS SHORT"
                    lines.append(
                        f"- {structure}, {box}³, {snr:g}: joint ahead of magnitude: by {ahead:+.3f}, {verdict}"
                    )
    return "\n".join([*by_iteration, "", *ends, "", *lines, ""])


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Share of right poses by iteration, a line per run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(STRUCTURES), len(COUNTS), figsize=(9, 6), sharex=True, sharey=True, squeeze=False)
    for row, structure in zip(axes, STRUCTURES, strict=True):
        for ax, (snr, n) in zip(row, COUNTS.items(), strict=True):
            for colour, sampler in zip(("C0", "C1", "C2"), SAMPLERS, strict=True):
                kind = (structure, snr, sampler)
                of_kind = [x for x in runs if (x["structure"], x["snr"], x["sampler"]) == kind and x["box"] == 64]
                for i, x in enumerate(of_kind):
                    label = sampler if i == 0 else None
                    ax.plot(range(1, len(x["within20"]) + 1), x["within20"], colour, alpha=0.7, label=label)
            ax.set_title(f"{structure}, SNR {snr:g}, N {n}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("iteration")
    for row in axes:
        row[0].set_ylabel("share within 20°")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--snr", nargs="+", type=float, choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--samplers", nargs="+", choices=[*SAMPLERS, "true"], default=[*SAMPLERS, "true"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--box", type=int, default=64, help="voxels of 384 A / box")
    parser.add_argument("--every", type=int, default=1, help="iterations from one r to the next")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "samplers")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(1, args.seeds + 1):
        for snr in args.snr:
            for structure in args.structures:
                for sampler in args.samplers:
                    path = args.output / f"{structure}{args.box}_{snr:g}_{sampler}_{seed}.json"
                    if path.exists():
                        continue
                    found = one(structure, snr, sampler, seed, args.box, args.iterations, args.every)
                    with atomic_path(path) as temporary:
                        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    print(f"{path.stem}: within 20 degrees {found['within20']}, r {found['r40']}", flush=True)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.output.glob("*.json"))]
    (args.output / "table.md").write_text(table(runs), encoding="utf-8")
    picture(runs, args.output / "samplers.png")
    print(table(runs))


if __name__ == "__main__":
    main()
