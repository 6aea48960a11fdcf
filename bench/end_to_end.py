"""Whole iterations, by step: python bench/end_to_end.py [--particles 20 ...] [--boxes 32 64 ...] [--classes 1 ...].

Every combination is simulated (ribosome-like and GroEL-like phantoms, SNR 0.05, +-60 degrees, voxels of 384 A / box),
written to files and read from them, and run in a process of its own, so that its peak of memory is its own. From the
first structure at 60 A and at the whole band: one iteration that compiles and fills tables, then `--repeats` timed
ones, of which the median counts.

    python bench/end_to_end.py --boxes 32 64 128 --sampler magnitude
    python bench/end_to_end.py --boxes 32 --particles 1000 --classes 2 --preset default
    python bench/end_to_end.py --boxes 64 --particles 1000 --device cuda --json new.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from faml_gpu import faml
from faml_gpu.array_backend import use_device
from faml_gpu.device_info import choose_device, cuda_info, machine
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import open_particles
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.simulate import SimulationOptions, simulate_data_set
from faml_gpu.threads import cpu_threads

STRUCTURES = ("ribosome", "groel", "tric")
START = 60.0  # A


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One combination, in this process."""
    box, n, k = case["box"], case["particles"], case["classes"]
    voxel = 384 / box
    device, _ = choose_device(case["device"])
    with tempfile.TemporaryDirectory(dir=case["work"]) as folder, cpu_threads(case["threads"]) as threads:
        counts = [n // k + (c < n % k) for c in range(k)]
        simulated = SimulationOptions(box=box, voxel_size=voxel, snr=0.05, fast=True, seed=case["seed"])
        simulate_data_set(STRUCTURES[:k], counts, folder, simulated, device="cpu", threads=threads, overwrite=True)
        particles = open_particles(Path(folder) / "particles.star")
        options = Options(
            n_classes=k, mask_radius=150, preset=case["preset"], sampler=case["sampler"], seed=case["seed"],
            threads=threads, iterations=100, candidates=case["candidates"],
        )  # fmt: skip
        with use_device(device):
            plan = Plan.make(particles, options, START, device)
            plan = replace(plan, r_start=plan.r_final)  # the whole band at once
            truth, _ = read_mrc(Path(folder) / "truth_class001.mrc")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            checkpoint = faml.begin(plan, particles, truth, False)
            checkpoint = faml.iterate(plan, particles, checkpoint)
            seconds, steps = [], []
            for _ in range(case["repeats"]):
                begin = time.perf_counter()
                checkpoint = faml.iterate(plan, particles, checkpoint)
                seconds.append(time.perf_counter() - begin)
                steps.append(checkpoint.history[-1].seconds)
            peak = 0
            if device != "cpu":
                import cupy

                peak = cupy.get_default_memory_pool().total_bytes()
    last = checkpoint.history[-1]
    return {key: case[key] for key in ("particles", "box", "classes", "preset", "sampler", "candidates")} | {
        "device": device,
        "threads": threads,
        "L": last.bandwidth,
        "r_max": last.r_max,
        "padding": options.padding,
        "poses": last.candidates,
        "batch": plan.batch.size,
        "seconds": float(np.median(seconds)),
        "fastest": min(seconds),
        "steps": {name: float(np.median([s[name] for s in steps])) for name in steps[0]},
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "host_before_mib": before >> 10,
        "device_peak_mib": peak >> 20,
        "repeats": case["repeats"],
        "seed": case["seed"],
        "load": round(os.getloadavg()[0], 2),
    }


def line(row: dict[str, Any]) -> str:
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["steps"].items())
    memory = f"{row['host_peak_mib']} MiB" + (f" + {row['device_peak_mib']} MiB" if row["device_peak_mib"] else "")
    return (
        f"N {row['particles']}, box {row['box']}, K {row['classes']}, {row['preset']}, {row['sampler']}, "
        f"{row['device']}, {row['threads']} threads, L {row['L']}, r_max {row['r_max']}, padding {row['padding']}, "
        f"{row['poses']:.1f} poses: {row['seconds']:.2f} s ({steps}); {memory}; load {row['load']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", nargs="+", type=int, default=[20])
    parser.add_argument("--boxes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--classes", nargs="+", type=int, default=[1], help=f"at most {len(STRUCTURES)}")
    parser.add_argument("--preset", nargs="+", choices=["default", "paper"], default=["default"])
    parser.add_argument("--sampler", nargs="+", choices=["joint", "magnitude"], default=["magnitude"])
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where boxes are written (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    rows = []
    each = itertools.product(args.boxes, args.particles, args.classes, args.preset, args.sampler)
    for box, n, k, preset, sampler in each:
        case = {"box": box, "particles": n, "classes": k, "preset": preset, "sampler": sampler}
        case |= {name: getattr(args, name) for name in ("candidates", "device", "threads", "repeats", "seed")}
        case["work"] = None if args.work is None else str(args.work)
        command = [sys.executable, __file__, "--one", json.dumps(case)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if args.json is not None:
        about = {key: value for key, value in machine().items() if key != "executable"}
        if any(row["device"] != "cpu" for row in rows):
            about |= cuda_info()
        content = {
            "benchmark": "end_to_end",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": about | {"cores": os.cpu_count()},
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
