"""The pose integral, measured: python bench/integral.py [--quick] [--output FOLDER].

Per particle, ways to the integral over poses of Eq. 3, given the right averages and noise: (a) the paper's sum over
magnitude-matched candidates with Voronoi weights, (b) the same without weights, (p) the same with the shell means left
in the magnitudes, (c) the joint grid (sampler `joint`) as a run has it, with more and with fewer poses, and (d) the
joint grid with more cells, more splitting and more candidates, which serves as the truth. Its own error is about the
difference to a grid of half as many cells, the row "half of (d)".

Reported over SNR and missing wedge: error of the log marginal likelihood (nats; the constant that (a), (b) and (p)
leave out, the volume of the box their shares are of, is taken out as the median over particles and classes), total
variation of the class posterior (K = 2, two phantoms, `wrong` the share of particles whose likeliest class is not
that of (d)), and error of the update of A, ||A - A_d|| / ||A_d||. Prints a table, writes integral.json and
integral.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

from faml_gpu import ops, voronoi
from faml_gpu.array_backend import Array
from faml_gpu.data import State
from faml_gpu.expectation import BatchPosterior, expectation
from faml_gpu.fast_alignment import Candidates, Observation, Reference, joint, marginal
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import direct_average
from faml_gpu.options import Options, Preset
from faml_gpu.plan import Band, Plan
from faml_gpu.simulate import groel, ribosome, simulate_particles
from faml_gpu.threads import cpu_threads

METHODS = {
    "a": "matched, Voronoi",
    "b": "matched, no weights",
    "p": "matched, shell means",
    "c": "joint, 50 poses",
    "more": "joint, 200 poses",
    "few": "joint, 10 poses",
    "half": "joint, half of (d)",
}
BOX, VOXEL, R_MAX, L = 32, 12.0, 10, 16
FINER = {"SELECTED": 1024, "SPLIT": 96, "SPREAD": 1e3, "MASS": 0.9999}
N_FINER, SHIFTS_FINER, ROUNDS_FINER = 4000, 24, 4


@dataclass(frozen=True)
class PlainMagnitudes(Options):
    """The shell means left in the magnitudes."""

    @property
    def choices(self) -> Preset:
        return replace(super().choices, magnitudes="plain")


def magnitude(band: Band, observation: Observation, references: list[Reference], weighted: bool) -> Any:
    """Candidates as the default preset finds them, with Voronoi shares, or equal ones."""
    found = [band.align(observation, r, {}) for r in references]
    points = voronoi.draw_points(voronoi.N_POINTS, "haar", np.random.default_rng(0))
    volumes: list[Array] = []
    for c in found:
        if weighted:
            volumes.append(voronoi.log_volumes(points, c.rotations, c.shifts, c.count))
        else:
            volumes.append(np.tile(-np.log(c.count)[:, None], (1, c.rotations.shape[1])))
    return found, volumes


def grid(
    band: Band, observation: Observation, references: list[Reference], n: int, n_shifts: int, rounds: int | None
) -> Any:
    """Candidates and volumes of the joint grid."""
    found: list[Candidates] = []
    volumes = []
    for r in references:
        reference = marginal.make_joint_reference(r.grid, r.padding, band.r_max, r.bandwidth)
        [(c, v)] = joint.integrate(
            observation, [reference], band.precision,
            max_shift=band.plan.max_shift, zeta=band.state.zeta, n_candidates=n, n_shifts=n_shifts,
            rounds=rounds,
        )  # fmt: skip
        found.append(c)
        volumes.append(v)
    return found, volumes


def finer(factor: int, band: Band, observation: Observation, references: list[Reference]) -> Any:
    """The joint grid with 1 / factor of the cells of (d)."""
    before = {name: getattr(joint, name) for name in FINER}
    try:
        for name, value in FINER.items():
            setattr(joint, name, value // factor if name in ("SELECTED", "SPLIT") else value)
        return grid(band, observation, references, N_FINER, SHIFTS_FINER, ROUNDS_FINER)
    finally:
        for name, value in before.items():
            setattr(joint, name, value)


def evidence(candidates: list[Candidates], volumes: list[Array], zeta: float) -> Any:
    """Log marginal likelihood (B, K) from gains known to the voxel, less that of no reference."""
    out = []
    for c, v in zip(candidates, volumes, strict=True):
        value = c.known_gain() + v - 0.5 * (c.shifts**2).sum(axis=-1) / zeta**2
        out.append(logsumexp(np.where(np.arange(v.shape[1]) < c.count[:, None], value, -np.inf), axis=1))
    return np.stack(out, axis=1)


def exact_gain(band: Band, observation: Observation, reference: Reference, c: Candidates) -> Candidates:
    """The same candidates with the gain of the residual in place of the parabola's."""
    shells = ops.residual(
        reference.grid, observation.spectra, observation.weights, observation.weight_index, c.rotations,
        c.shifts, c.count, observation.support, reference.padding,
    )  # fmt: skip
    precision = np.zeros(band.r_max + 1)
    precision[1:] = 1 / band.state.sigma2[1 : band.r_max + 1]
    weight = observation.weights[observation.weight_index] ** 2 * band.precision
    nothing = (weight * np.abs(observation.spectra) ** 2).sum(axis=1, dtype=np.float64)
    return Candidates(c.rotations, c.shifts, c.correlation, c.count, nothing[:, None] - 0.5 * (shells @ precision))


def case(snr: float, wedge: float, n: int, seed: int) -> list[dict[str, Any]]:
    """All methods at one SNR and tilt range +-wedge."""
    sim = simulate_particles(
        [ribosome(), groel()], [n, n], box=BOX, voxel_size=VOXEL, snr=snr, max_shift=1.5, seed=seed,
        tilt_range=(-wedge, wedge),
    )  # fmt: skip
    particles = ArrayParticles(sim.boxes, VOXEL, weights=sim.weight)
    asked: dict[str, Any] = {
        "n_classes": 2, "mask_radius": 150, "resolution": BOX * VOXEL / R_MAX, "bandwidth": L, "normalize": False,
        "seed": seed, "sampler": "magnitude",
    }  # fmt: skip
    options = Options(**asked)
    plan, plain = Plan.make(particles, options), Plan.make(particles, PlainMagnitudes(**asked))
    sigma2 = np.full(plan.n_shells, np.mean([t.var() for t in sim.truth]) / snr * BOX**3)
    state = State(options.iterations, sim.truth.astype(np.float32), np.array([0.5, 0.5]), sigma2, 1.0)
    band, plain_band = (Band(p, state, p.r_final, p.r_final) for p in (plan, plain))
    batch = particles.read(np.arange(2 * n))
    spectra = plan.spectra(batch)
    observation, plain_observation = (b.observe(batch, spectra) for b in (band, plain_band))
    references = band.references()
    ways = {
        "a": lambda: magnitude(band, observation, references, True),
        "b": lambda: magnitude(band, observation, references, False),
        "p": lambda: magnitude(plain_band, plain_observation, plain_band.references(), False),
        "c": lambda: grid(band, observation, references, 50, 1, None),
        "more": lambda: grid(band, observation, references, 200, 6, None),
        "few": lambda: grid(band, observation, references, 10, 1, None),
        "half": lambda: finer(2, band, observation, references),
        "d": lambda: finer(1, band, observation, references),
    }
    results: dict[str, Any] = {}
    for name, way in ways.items():
        begin = time.perf_counter()
        found, volumes = way()
        seconds = time.perf_counter() - begin
        exact = [exact_gain(band, observation, r, c) for r, c in zip(references, found, strict=True)]
        log_l = evidence(exact, volumes, state.zeta)
        posterior: BatchPosterior = expectation(
            observation, references, exact, volumes, state.alpha, sigma2, state.zeta
        )
        sums = band.accumulate(posterior, observation, batch, spectra)
        averages = direct_average(sums.sums, sums.weights, sums.mass)
        classes = np.exp(log_l - logsumexp(log_l, axis=1, keepdims=True))
        results[name] = log_l, classes, averages, seconds, posterior.candidates
    truth, classes_d, averages_d, _, _ = results["d"]
    rows = []
    for name in METHODS:
        log_l, classes, averages, seconds, candidates = results[name]
        # Of both classes together: what it is under the wrong one alone does not matter.
        error = logsumexp(log_l, axis=1) - logsumexp(truth, axis=1)
        if name in ("a", "b", "p"):
            error = error - np.median(error)
        rows.append(
            {
                "snr": snr, "wedge": wedge, "method": name, "particles": 2 * n,
                "error_nats": float(np.sqrt((error**2).mean())), "bias_nats": float(error.mean()),
                "total_variation": float(0.5 * np.abs(classes - classes_d).sum(axis=1).mean()),
                "wrong": float((classes.argmax(axis=1) != classes_d.argmax(axis=1)).mean()),
                "a_error": float(np.linalg.norm(averages - averages_d) / np.linalg.norm(averages_d)),
                "candidates": candidates / (4 * n), "s_per_particle": seconds / (2 * n),
            }
        )  # fmt: skip
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The three errors over SNR, one line per method and wedge; what is below 1e-4 is drawn there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), constrained_layout=True)
    columns = {
        "error_nats": "log marginal likelihood, nats (rms)",
        "total_variation": "class posterior, total variation",
        "a_error": "update of A, relative",
    }
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for k, (name, title) in enumerate(METHODS.items()):
            for wedge, line in ((60.0, "-"), (90.0, "--")):
                some = [r for r in rows if r["method"] == name and r["wedge"] == wedge]
                if some:
                    axis.plot(
                        [r["snr"] for r in some], [max(r[column], 1e-4) for r in some], line, color=f"C{k}", marker="o",
                        label=f"{title}, ±{wedge:.0f}°",
                    )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="SNR", title=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two SNRs, one wedge, 2 particles a class")
    parser.add_argument("--n", type=int, default=8, help="particles per class")
    parser.add_argument("--snr", nargs="+", type=float, default=[0.1, 0.03, 0.01, 0.003, 0.001])
    parser.add_argument("--wedge", nargs="+", type=float, default=[60.0, 90.0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path())
    args = parser.parse_args()
    if args.quick:
        args.n, args.snr, args.wedge = 2, [0.1, 0.003], [60.0]
    rows: list[dict[str, Any]] = []
    print("  SNR wedge method              rms nats   bias     TV  wrong  A error  poses  s/particle")
    with cpu_threads(args.threads) as threads:
        for wedge in args.wedge:
            for snr in args.snr:
                for row in case(snr, wedge, args.n, args.seed):
                    rows.append(row)
                    print(
                        f"{snr:5g} {wedge:5g} {METHODS[row['method']]:20s} {row['error_nats']:7.2f} "
                        f"{row['bias_nats']:6.2f} {row['total_variation']:6.3f} {row['wrong']:6.2f} "
                        f"{row['a_error']:8.3f} {row['candidates']:6.0f} {row['s_per_particle']:8.3f}",
                        flush=True,
                    )
    args.output.mkdir(parents=True, exist_ok=True)
    about = {
        "box": BOX, "r_max": R_MAX, "L": L, "coarse_r": marginal.COARSE_R, "coarse_L": marginal.COARSE_L, "padding": 2,
        "candidates": {"magnitude": 50, "joint": [50, 200, 10], "converged": N_FINER},
        "threads": threads, "seed": args.seed,
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
    }  # fmt: skip
    (args.output / "integral.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    picture(rows, args.output / "integral.png")


if __name__ == "__main__":
    main()
