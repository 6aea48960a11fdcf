"""The samplers against each other: python bench/samplers.py [--structures ...] [--snr ...] [--output FOLDER].

GroEL-like and ribosome-like boxes (64^3, voxel 6 A, +-60 degrees, shifts to +-3 voxels) from a random start, aligned to
40 A, at SNR 0.003 (100 boxes) and 0.001 (150): by iteration the share of poses within 20 degrees of the true ones
(modulo the structure's symmetry, after the best common gauge) and r, the correlation about the mean with the true map
at 40 A in a sphere of its radius, after the best alignment. Three ways to propose poses, all else as in the default:
`joint`; `magnitude`; `plain`, magnitudes without the subtraction of the shell means. `true` is the average in the true
poses. One JSON file per run, which is not made again; then table.md and samplers.png of all there are.
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
from faml_gpu.data import Checkpoint, best_poses
from faml_gpu.io.atomic import atomic_path
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options, Preset
from faml_gpu.plan import Plan
from faml_gpu.posteriors import one_hot
from faml_gpu.simulate import groel, ribosome, simulate_particles
from faml_gpu.starting import final_averages

STRUCTURES = {"groel": (groel, "D7", 100.0), "ribosome": (ribosome, "C1", 150.0)}  # and radius of the mask, A
COUNTS = {0.003: 100, 0.001: 150}
SAMPLERS = ("joint", "magnitude", "plain")
RIGHT = 20.0  # degrees
RESOLUTION = 40.0


@dataclass(frozen=True)
class PlainMagnitudes(Options):
    """Magnitudes as they are, not less their shell means."""

    @property
    def choices(self) -> Preset:
        return replace(super().choices, magnitudes="plain")


def one(structure: str, snr: float, sampler: str, seed: int, iterations: int, every: int) -> dict[str, Any]:
    """A run, and how far it was after each iteration."""
    make, group, mask = STRUCTURES[structure]
    n = COUNTS[snr]
    sim = simulate_particles([make()], [n], box=64, voxel_size=6.0, snr=snr, max_shift=3.0, seed=seed)
    particles = ArrayParticles(sim.boxes, 6.0, weights=sim.weight)
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
            volume, sim.truth[0], voxel_size=6.0, mask_radius=make().radius, resolution=RESOLUTION
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


def table(runs: list[dict[str, Any]]) -> str:
    """One row per structure, SNR and way: means and ranges over the seeds."""
    lines = [
        "| structure | SNR | boxes | poses from | seeds | within 20° after 5, 10, 15 iterations and at the end | "
        "r at 40 Å at the end | iterations | s an iteration |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for structure in STRUCTURES:
        for snr, n in COUNTS.items():
            for sampler in (*SAMPLERS, "true"):
                rows = [x for x in runs if (x["structure"], x["snr"], x["sampler"]) == (structure, snr, sampler)]
                if not rows:
                    continue
                r = [x["r40"] for x in rows]
                found = f"{np.mean(r):.3f} ({', '.join(f'{v:.3f}' for v in r)})"
                seeds = ", ".join(str(x["seed"]) for x in rows)
                if sampler == "true":
                    lines.append(f"| {structure} | {snr:g} | {n} | the truth | {seeds} | — | {found} | — | — |")
                    continue
                # A run that has ended stays where it was.
                shares = [
                    np.mean([x["within20"][min(i, len(x["within20"])) - 1] for x in rows]) for i in (5, 10, 15, 99)
                ]
                median = np.median([np.median(x["seconds"]) for x in rows])
                lines.append(
                    f"| {structure} | {snr:g} | {n} | `{sampler}` | {seeds} | {' '.join(f'{s:.2f}' for s in shares)} | "
                    f"{found} | {' '.join(str(x['iterations']) for x in rows)} | {median:.1f} |"
                )
    return "\n".join(lines) + "\n"


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Share of right poses by iteration, a line per run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(STRUCTURES), len(COUNTS), figsize=(9, 6), sharex=True, sharey=True, squeeze=False)
    for row, structure in zip(axes, STRUCTURES, strict=True):
        for ax, (snr, n) in zip(row, COUNTS.items(), strict=True):
            for colour, sampler in zip(("C0", "C1", "C2"), SAMPLERS, strict=True):
                of_kind = [x for x in runs if (x["structure"], x["snr"], x["sampler"]) == (structure, snr, sampler)]
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
    parser.add_argument("--every", type=int, default=5, help="iterations from one r to the next")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "samplers")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(1, args.seeds + 1):
        for snr in args.snr:
            for structure in args.structures:
                for sampler in args.samplers:
                    path = args.output / f"{structure}_{snr:g}_{sampler}_{seed}.json"
                    if path.exists():
                        continue
                    found = one(structure, snr, sampler, seed, args.iterations, args.every)
                    with atomic_path(path) as temporary:
                        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    print(f"{path.stem}: within 20 degrees {found['within20']}, r {found['r40']}", flush=True)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.output.glob("*.json"))]
    (args.output / "table.md").write_text(table(runs), encoding="utf-8")
    picture(runs, args.output / "samplers.png")
    print(table(runs))


if __name__ == "__main__":
    main()
