"""`faml-gpu simulate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from faml_gpu.cli import app

FAST = ("--fast", "--box", "24", "--voxel-size", "14", "--snr", "0.5", "--device", "cpu")


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"TERM": "dumb", "COLUMNS": "80"})
    assert result.exit_code == status, result.output
    return str(result.output)


def test_two_structures_and_then_classify(tmp_path: Path) -> None:
    printed = run("simulate", "groel", "ribosome", "-n", "4", "-n", "3", "-o", tmp_path / "sim", *FAST)
    assert "class 2: phantom ribosome" in printed
    assert "principal axis" in printed
    measured = [float(line.split()[-1]) for line in printed.splitlines() if "SNR asked 0.5, measured" in line]
    assert measured == pytest.approx([0.5, 0.5], rel=0.05)
    assert f"wrote 7 boxes: {tmp_path / 'sim' / 'particles.star'}" in printed.replace("\n", "")
    facts = json.loads((tmp_path / "sim" / "simulation.json").read_text())
    assert facts["options"]["fast"] is True
    assert [entry["count"] for entry in facts["classes"]] == [4, 3]
    # What comes out is what `classify` reads: weights included, so no tilt range has to be given.
    star = tmp_path / "sim" / "particles.star"
    run("classify", star, "-k", "2", "-o", tmp_path / "run", "--iterations", "1", "--bandwidth", "6", "--device", "cpu")
    # And `evaluate` finds each particle's truth.
    printed = run("evaluate", tmp_path / "run", "--truth", tmp_path / "sim" / "truth.star")
    assert "Particles of each true class" in printed


def test_every_option_arrives(tmp_path: Path) -> None:
    run(
        *("simulate", "groel", "-n", "1", "-o", tmp_path, "--box", "22", "--voxel-size", "15", "--resolution", "50"),
        *("--snr", "inf", "--max-shift", "10", "--about-axis", "y", "--assembly", "none", "--seed", "7"),
        *("--tilt-range", "-40", "50", "--tilt-step", "9", "--tilt-axis", "x", "--no-mtf", "--defocus", "2"),
        *("--voltage", "200", "--cs", "2", "--amplitude-contrast", "0.1", "--wiener", "0.2", "--device", "cpu"),
        *("--threads", "1", "--float16"),
    )
    assert json.loads((tmp_path / "simulation.json").read_text())["options"] == {
        "box": 22,
        "voxel_size": 15.0,
        "resolution": 50.0,
        "snr": "inf",
        "tilt_range": [-40.0, 50.0],
        "tilt_step": 9.0,
        "tilt_axis": "x",
        "max_shift": 10.0,
        "about_axis": "y",
        "fast": False,
        "ctf": True,
        "mtf": False,
        "defocus": 2.0,
        "voltage": 200.0,
        "cs": 2.0,
        "amplitude_contrast": 0.1,
        "wiener": 0.2,
        "assembly": "none",
        "float16": True,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "error: structure 'nonsense': no such file, and no phantom of that name"),
        (("groel", "--snr", "0"), "error: --snr: found 0, expected more than 0"),
        (("groel", "-n", "1", "-n", "2"), "error: --count: given 2 times for 1 structures"),
        (("groel", "-n", "0"), "error: --count: found 0"),
        (("groel", "--tilt-step", "300"), "error: --tilt-step: found 300 degrees"),
        (("groel", "--box", "12"), "error: structure groel: reaches 92 A"),
        (("groel", "--device", "gpu"), "error: option device: found 'gpu'"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    printed = run("simulate", "-o", tmp_path / "sim", *FAST, *arguments, status=2)
    assert words in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "sim").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    printed = run("simulate", "groel", "-n", "1", "-o", tmp_path, *FAST, status=2)
    assert "--overwrite" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    run("simulate", "groel", "-n", "1", "-o", tmp_path, *FAST, "--overwrite")
    assert (tmp_path / "mine.txt").exists()


def test_help_names_units_and_defaults() -> None:
    printed = run("simulate", "--help")
    for words in ("--about-axis", "proteasome", "--no-ctf", "3 voxels", "MRC map"):
        assert words in printed
