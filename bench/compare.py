"""Two results of a benchmark side by side: python bench/compare.py A.json B.json [--limit 1.1].

Rows that were run alike (same sizes, sampler, device ...) are matched. Ends with status 1 if one of B takes more than
`--limit` times as long as in A.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# What a row was run with; all else in it was found.
ASKED = (
    "box", "particles", "classes", "preset", "sampler", "candidates", "device", "threads", "rotations", "poses",
    "points", "functions", "bandwidth", "block",
)  # fmt: skip


def rows(path: Path) -> dict[tuple[tuple[str, Any], ...], dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    # "poses" of whole iterations is what they found.
    names = [name for name in ASKED if not (name == "poses" and content["benchmark"] == "end_to_end")]
    about = {"benchmark": content["benchmark"], "device": content.get("device"), "threads": content.get("threads")}
    found = {}
    for row in content["rows"]:
        key = about | {name: row[name] for name in names if name in row}
        found[tuple((name, value) for name, value in key.items() if value is not None)] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--limit", type=float, default=1.1)
    args = parser.parse_args()
    before, after = rows(args.before), rows(args.after)
    slower = 0
    for key, row in after.items():
        name = ", ".join(f"{a} {b}" for a, b in key)
        if key not in before:
            print(f"{name}: only in {args.after}")
            continue
        ratio = row["seconds"] / before[key]["seconds"]
        slower += ratio > args.limit
        print(f"{name}: {before[key]['seconds']:.4g} s -> {row['seconds']:.4g} s, {ratio:.2f} times"
              + (" SLOWER" if ratio > args.limit else ""))  # fmt: skip
    for key in before.keys() - after.keys():
        print(f"{', '.join(f'{a} {b}' for a, b in key)}: only in {args.before}")
    if not before.keys() & after.keys():
        sys.exit("no rows that were run alike")
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
