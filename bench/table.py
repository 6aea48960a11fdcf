"""bench/RESULTS.md from the JSON files in bench/results: python bench/table.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

HEAD = """# Benchmarks

Made by `python bench/table.py` from the files in `results/`; edit nothing here. How to make those:

    python bench/kernels/residual.py --device cpu --threads 2 --json bench/results/residual.json
    python bench/end_to_end.py --boxes 32 64 128 --sampler magnitude --json bench/results/magnitude.json

and how to compare two of them: `python bench/compare.py before.json after.json`.
"""


def machine(content: dict[str, Any]) -> str:
    about = content["machine"]
    card = "".join(f"{value}, " for name, value in about.items() if name.startswith("cuda:"))
    return f"{card}{about['cpu']}, {about['cores']} cores, {content['date'][:10]}"


def kernel(content: dict[str, Any]) -> list[str]:
    """Table of one operation."""
    gathers = any("times_gathers" in row for row in content["rows"])
    found = ("seconds", "gb_s", "gflop_s", "of_copy", "of_gemm", "times_gathers")
    sizes = [name for name in content["rows"][0] if name not in found]
    titles = [*sizes, "ms", "GB/s (of copy)", "GFLOP/s (of GEMM)"] + ["times the bare gathers"] * gathers
    lines = [
        f"## {content['benchmark']}, {content['device']}",
        "",
        f"{machine(content)}, {content['threads']} threads; copy {content['copy_gb_s']:.0f} GB/s, GEMM "
        f"{content['gemm_gflop_s']:.0f} GFLOP/s in the same run; median of {content['repeats']}; load "
        f"{content['machine']['load']} at the end.",
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
    ]
    for row in content["rows"]:
        cells = [str(row[name]) for name in sizes]
        cells += [
            f"{1e3 * row['seconds']:.2f}",
            f"{row['gb_s']:.2f} ({100 * row['of_copy']:.0f} %)",
            f"{row['gflop_s']:.1f} ({100 * row['of_gemm']:.0f} %)",
        ]
        if gathers:
            cells.append(f"{row['times_gathers']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def whole(name: str, content: dict[str, Any]) -> list[str]:
    """Table of whole iterations."""
    titles = ["N", "box", "K", "preset", "sampler", "device", "threads", "L", "r_max", "padding", "poses",
              "s an iteration", "steps, s", "host, MiB", "device, MiB", "load"]  # fmt: skip
    lines = [
        f"## Whole iterations: {name}",
        "",
        f"{machine(content)}; `bench/end_to_end.py`, median of {content['rows'][0]['repeats']}, seed "
        f"{content['rows'][0]['seed']}; poses: candidates of a particle and class in the last iteration.",
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
    ]
    for row in content["rows"]:
        steps = ", ".join(f"{step} {seconds:.2f}" for step, seconds in row["steps"].items())
        cells = [str(row[name]) for name in ("particles", "box", "classes", "preset", "sampler", "device", "threads")]
        cells += [str(row[name]) for name in ("L", "r_max", "padding")]
        cells += [f"{row['poses']:.1f}", f"{row['seconds']:.2f}", steps, str(row["host_peak_mib"])]
        cells += [str(row["device_peak_mib"] or "—"), str(row["load"])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    lines = [HEAD]
    paths = sorted((HERE / "results").glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for name, content in results.items():
        if content["benchmark"] == "end_to_end":
            lines += whole(name, content)
    for content in results.values():
        if content["benchmark"] != "end_to_end":
            lines += kernel(content)
    (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
