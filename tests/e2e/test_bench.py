"""The scripts of bench/ run, check what they time against its definition, and their results can be compared."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faml_gpu import ops

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
OPERATIONS = sorted(ops.__all__)


def bench(script: str, *words: object, status: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_every_operation_has_a_benchmark() -> None:
    assert {path.stem for path in (BENCH / "kernels").glob("*.py")} - {"common"} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.json"
    words = ("--quick", "--device", "cpu", "--threads", 1, "--repeats", 1, "--json", results)
    said = bench(f"kernels/{operation}.py", *words)
    assert f"{operation}: off its definition by" in said
    content = json.loads(results.read_text(encoding="utf-8"))
    assert content["benchmark"] == operation
    assert content["copy_gb_s"] > 0
    assert content["gemm_gflop_s"] > 0
    row = content["rows"][0]
    assert row["seconds"] > 0
    assert row["of_copy"] == pytest.approx(row["gb_s"] / content["copy_gb_s"])
    assert row["of_gemm"] == pytest.approx(row["gflop_s"] / content["gemm_gflop_s"])
    monkeypatch.syspath_prepend(str(BENCH))
    table = importlib.import_module("table").kernel(content)
    assert len([line for line in table if line.startswith("|")]) == 2 + len(content["rows"])
    assert ("times_gathers" in row) == (operation in ("rotate", "residual", "correlations", "accumulate"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_wrong_is_not_timed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check against the definition sees a result that is one part in a hundred off."""
    monkeypatch.syspath_prepend(str(BENCH / "kernels"))
    for name in ("common", operation):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module(operation)
    right = getattr(ops, operation)

    def wrong(*args: Any, **more: Any) -> Any:
        found = right(*args, **more)
        if operation == "assign":
            found[0, 0] += 20
            return found
        first = found[0] if isinstance(found, tuple) else found
        first *= 1.02
        return found

    monkeypatch.setattr(ops, operation, wrong)
    monkeypatch.setattr(sys, "argv", [operation, "--quick", "--device", "cpu", "--threads", "1", "--repeats", "1"])
    with pytest.raises(SystemExit, match="wrong, not timed"):
        script.main()
    for name in ("common", operation):
        sys.modules.pop(name, None)


def test_integral(tmp_path: Path) -> None:
    bench("integral.py", "--quick", "--threads", 1, "--output", tmp_path)
    rows = json.loads((tmp_path / "integral.json").read_text(encoding="utf-8"))["rows"]
    error = {(row["method"], row["snr"]): row["error_nats"] for row in rows}
    # The grid is nearer to the integral than the sum over matched poses, and half as many cells change nothing.
    for snr in (0.1, 0.003):
        assert error["c", snr] < error["a", snr]
        assert error["half", snr] < 0.5
    assert (tmp_path / "integral.png").stat().st_size > 0


def test_end_to_end_and_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    said = bench(
        "end_to_end.py", "--particles", 3, "--boxes", 24, "--sampler", "magnitude", "joint", "--threads", 1,
        "--device", "cpu", "--repeats", 1, "--json", before,
    )  # fmt: skip
    assert "N 3, box 24, K 1, default, joint, cpu" in said
    content = json.loads(before.read_text(encoding="utf-8"))
    for row in content["rows"]:
        assert sum(row["steps"].values()) <= row["seconds"] * 1.01
        assert row["host_peak_mib"] > 0
    content["rows"][0]["seconds"] *= 1.5
    after.write_text(json.dumps(content), encoding="utf-8")
    assert "1.00 times" in bench("compare.py", before, before)
    said = bench("compare.py", before, after, status=1)
    assert said.count("SLOWER") == 1
    assert "sampler magnitude" in said.splitlines()[0]
    bench("compare.py", before, after, "--limit", 1.6)
    table = "\n".join(importlib.import_module("table").whole("before", json.loads(before.read_text(encoding="utf-8"))))
    assert table.count("| 3 | 24 | 1 | default |") == 2
    bench("compare.py", after, before)
