"""`faml-gpu evaluate` as a user runs it, on a run of the program's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from faml_gpu.cli import app

RUN = [
    "--tilt-range",
    "-60",
    "60",
    "--iterations",
    "2",
    "--bandwidth",
    "6",
    "--candidates",
    "4",
    "--mask-radius",
    "120",
]


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"TERM": "dumb", "COLUMNS": "80"})
    assert result.exit_code == status, result.output
    return str(result.output)


@pytest.fixture
def finished(small_star: Path, tmp_path: Path) -> Path:
    run("classify", small_star, "-k", "2", "-o", tmp_path / "run", *RUN)
    return tmp_path / "run"


def test_a_run_against_the_truth(
    finished: Path, small_star: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before = contents(finished)
    data = small_star.parent
    printed = run(
        *("evaluate", finished, "--truth", small_star, "--pairs", "50"),
        *("--truth-map", data / "truth_groel.mrc", "--truth-map", data / "truth_ribosome.mrc"),
        *("--point-group", "D7", "--point-group", "C1", "--symmetry-order", "7", "--symmetry-axis", "z"),
    )
    heads = (
        "Particles of each true class in each found class",
        "Classes (",
        "Correlation with the truth inside the sphere",
        "Fourier shell correlation with the truth",
        "Symmetry score",
    )
    lines = printed.splitlines()
    assert all(any(line.startswith(head) for line in lines) for head in heads), printed
    assert not set(printed) & set("┃━│─┏┓"), "plain when piped"
    # Wide rows are not broken into 80 columns.
    mirrored = [line for line in lines if "mirrored" in line and line.startswith("  class")]
    assert len(mirrored) == 2
    assert all(line.endswith("Å") for line in mirrored)

    after = contents(finished)
    assert set(after) - set(before) == {"evaluation.json", "evaluation_fsc.png"}
    assert all(after[name] == content for name, content in before.items())
    found = json.loads(after["evaluation.json"])
    assert found["settings"]["particles"] == 6
    assert found["settings"]["point_group"] == ["D7", "C1"]
    assert sum(map(sum, found["classification"]["confusion"])) == 6
    assert len(found["maps"]) == len(found["symmetry"]) == 2
    assert "wrote" in lines[-1]
    # A second evaluation replaces the first; an earlier iteration can be looked at too; the run can be moved.
    moved = finished.rename(finished.with_name("moved"))
    run("evaluate", moved, "--truth", small_star, "--iteration", "1", "-o", moved / "first")
    assert json.loads((moved / "first" / "evaluation.json").read_text())["settings"]["iteration"] == 1


def test_a_map_against_itself(small_star: Path, tmp_path: Path) -> None:
    truth = small_star.parent / "truth_ribosome.mrc"
    shutil.copy(truth, tmp_path / "average.mrc")
    printed = run("evaluate", tmp_path / "average.mrc", "--truth-map", truth, "--lowpass", "60", "--radius", "150")
    row = next(line for line in printed.splitlines() if "as it is" in line)
    assert row.count("1.000 (1.000)") == 2
    assert "at 60 Å" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"evaluation.json", "evaluation_fsc.png"}


def test_errors_are_one_line(small_star: Path, tmp_path: Path) -> None:
    truth = small_star.parent / "truth_ribosome.mrc"
    for arguments, message in (
        ([tmp_path / "nothing"], "nothing: does not exist, expected a run folder or a map"),
        ([truth], "nothing to evaluate"),
        ([truth, "--truth-map", tmp_path / "none.mrc"], "none.mrc: cannot be read"),
        ([truth, "--truth-map", truth, "-o", truth], "found a file, expected a folder"),
        ([truth, "--truth-map", truth, "--point-group", "Q"], "point group: found 'Q'"),
    ):
        printed = run("evaluate", *arguments, status=2)
        assert printed.startswith("error: ")
        assert message in printed
        assert len(printed.splitlines()) == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_help_says_what_to_give() -> None:
    printed = run("evaluate", "--help")
    for word in ("--truth", "--truth-map", "--point-group", "--pairs", "--symmetry-order", "--radius", "--lowpass"):
        assert word in printed
