"""Bad input: one clear message on stderr, exit status 2, no traceback, nothing in the output folder touched."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from typer.testing import CliRunner

from faml_gpu.cli import app

# The default mask radius wants a box of more than 16 voxels.
WEDGE = ["--tilt-range", "-60", "60", "--mask-radius", "120"]
CLASSIFY = ["classify", "{star}", "-k", "2", "-o", "{out}"]
AVERAGE = ["average", "{star}", "-o", "{out}"]


def box(value: float | None = None, size: int = 16) -> np.ndarray:
    volume = np.random.default_rng(0).standard_normal((size,) * 3).astype(np.float32)
    if value is not None:
        volume[1, 2, 3] = value
    return volume


def write(path: Path, volume: np.ndarray, voxel: float = 24.0) -> None:
    with warnings.catch_warnings(), mrcfile.new(path, overwrite=True) as mrc:
        warnings.simplefilter("ignore")  # of NaN
        mrc.set_data(volume)
        mrc.voxel_size = voxel


def refused(arguments: list[str], expected: list[str]) -> None:
    """The command ends with status 2, says all of `expected`, and shows no traceback."""
    result = CliRunner().invoke(app, arguments, env={"TERM": "dumb", "COLUMNS": "400"})
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for text in expected:
        assert text in result.stderr


OPTIONS = [
    (["classify", "{star}", "-k", "0", "-o", "{out}", *WEDGE], ["n_classes", "0", "at least 1"]),
    (["classify", "{star}", "-k", "-1", "-o", "{out}", *WEDGE], ["n_classes", "-1", "at least 1"]),
    (["classify", "{star}", "-k", "7", "-o", "{out}", *WEDGE], ["n_classes", "7", "6 particles"]),
    ([*AVERAGE], ["particles.star", "--tilt-range"]),
    ([*AVERAGE, "--tilt-range", "60", "-60"], ["60", "-60"]),
    ([*AVERAGE, "--tilt-range", "-60", "95"], ["95", "90"]),
    ([*AVERAGE, *WEDGE, "--voxel-size", "10"], ["10", "24"]),
    ([*AVERAGE, *WEDGE, "--device", "cuda:99"], ["device", "cuda:99", "use the CPU"]),
    ([*AVERAGE, *WEDGE, "--device", "tpu"], ["device", "tpu", "auto"]),
    ([*AVERAGE, *WEDGE, "--preset", "fast"], ["preset", "fast", "paper"]),
    ([*AVERAGE, *WEDGE, "--method", "sva"], ["method", "sva", "faml"]),
    ([*AVERAGE, *WEDGE, "--noise-groups", "tomogram"], ["noise-groups", "tomogram", "rlnTomoName"]),
    ([*AVERAGE, *WEDGE, "--iterations", "0"], ["iterations", "0", "at least 1"]),
    ([*AVERAGE, *WEDGE, "--threads", "0"], ["threads", "0", "at least 1"]),
    ([*AVERAGE, *WEDGE, "--mask-radius", "1000"], ["mask-radius", "1000"]),
    ([*AVERAGE, *WEDGE, "--max-shift", "1000"], ["max-shift", "1000"]),
    ([*AVERAGE, *WEDGE, "--resolution", "1000"], ["resolution", "1000"]),
    ([*AVERAGE, *WEDGE, "--initial-lowpass", "60"], ["initial_lowpass", "reference"]),
    ([*AVERAGE, *WEDGE, "--use-poses", "--initial-lowpass", "-1"], ["initial_lowpass", "-1", "more than 0"]),
    ([*AVERAGE, *WEDGE, "--resume", "--overwrite"], ["resume", "overwrite"]),
    ([*AVERAGE, *WEDGE, "--resume"], ["no run to go on with"]),
    ([*AVERAGE, *WEDGE, "--reference", "{data}/nowhere.mrc"], ["nowhere.mrc"]),
    ([*AVERAGE, *WEDGE, "--frobnicate"], ["--frobnicate"]),
    (["average", "{data}/nowhere.star", "-o", "{out}", *WEDGE], ["nowhere.star"]),
    (["average", "{data}/particles", "-o", "{out}", *WEDGE, "--use-poses"], ["use-poses", "no STAR file"]),
    (["average", "{data}/*.nothing", "-o", "{out}", *WEDGE], ["*.nothing"]),
    (["average", "{star}", *WEDGE], ["--output"]),
]


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS, ids=[" ".join(a) for a, _ in OPTIONS])
def test_options(arguments: list[str], expected: list[str], small_star: Path, tmp_path: Path) -> None:
    names = {"star": small_star, "data": small_star.parent, "out": tmp_path / "out"}
    refused([text.format(**names) for text in arguments], expected)
    assert not (tmp_path / "out").exists()


def spoil_rows(data: Path) -> None:
    (data / "particles/000002.mrc").unlink()
    (data / "particles/000004.mrc").unlink()


def spoil_optics(data: Path) -> None:
    star = data / "particles.star"
    text = star.read_text()
    group = next(line for line in text.splitlines() if line.startswith("1 opticsGroup1"))
    other = group.replace("1 opticsGroup1", "2 opticsGroup2").replace("24.0", "20.0")
    star.write_text(text.replace(group, f"{group}\n{other}").replace("000003.mrc 1 ", "000003.mrc 2 "))


FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "rows without file": (spoil_rows, ["2 of 6", "000002.mrc", "000004.mrc"]),
    "empty STAR": (lambda data: (data / "particles.star").write_text(""), ["particles.star", "empty"]),
    "other size": (lambda data: write(data / "particles/000003.mrc", box(size=20)), ["000003.mrc", "20", "16"]),
    "not cubic": (lambda data: write(data / "particles/000001.mrc", box()[:, :, :8]), ["000001.mrc", "cubic"]),
    "NaN": (lambda data: write(data / "particles/000003.mrc", box(np.nan)), ["000003.mrc", "NaN"]),
    "constant": (lambda data: write(data / "particles/000003.mrc", np.ones((16,) * 3, np.float32)), ["000003.mrc"]),
    "header voxel": (lambda data: write(data / "particles/000003.mrc", box(), 20.0), ["20", "24"]),
    "optics groups": (spoil_optics, ["20", "24"]),
    "not MRC": (lambda data: (data / "particles/000003.mrc").write_text("hello"), ["000003.mrc", "MRC"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, small_star: Path, tmp_path: Path) -> None:
    spoil, expected = FILES[case]
    spoil(small_star.parent)
    refused(["average", str(small_star), "-o", str(tmp_path / "out"), *WEDGE], expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("volume", "voxel", "expected"),
    [
        (box(size=20), 24.0, ["reference", "(20, 20, 20)", "(16, 16, 16)"]),
        (box(), 20.0, ["reference", "20 A", "24 A"]),
        (box(np.nan), 24.0, ["reference", "NaN"]),
        (np.ones((16,) * 3, np.float32), 24.0, ["reference", "same value"]),
    ],
    ids=["box", "voxel size", "NaN", "constant"],
)
def test_reference(volume: np.ndarray, voxel: float, expected: list[str], small_star: Path, tmp_path: Path) -> None:
    write(tmp_path / "reference.mrc", volume, voxel)
    arguments = ["--reference", str(tmp_path / "reference.mrc")]
    refused(["average", str(small_star), "-o", str(tmp_path / "out"), *WEDGE, *arguments], expected)
    assert not (tmp_path / "out").exists()


def test_output_is_a_file(small_star: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    arguments = ["average", str(small_star), "-o", str(tmp_path / "out"), *WEDGE]
    refused(arguments, ["out", "expected a folder"])
    assert (tmp_path / "out").read_text() == "mine"


def test_another_run_is_not_touched(
    small_star: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run_class001.mrc").write_bytes(b"an average that took a week")
    (out / "run.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    arguments = ["average", str(small_star), "-o", str(out), *WEDGE]
    refused(arguments, ["another run", "--resume", "--overwrite"])
    assert contents(out) == before
    # --overwrite removes nothing either as long as the new input is not known to be good.
    refused([*arguments, "--overwrite", "--voxel-size", "3"], ["3", "24"])
    assert contents(out) == before


def test_files_of_another_program_are_not_touched(
    small_star: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    """RELION gives its files the same names; there is no run.json beside them."""
    out = tmp_path / "job012"
    out.mkdir()
    for name in ("run_it025_data.star", "run_class001.mrc", "run_half1_class001_unfil.mrc", "postprocess.mrc"):
        (out / name).write_text("precious")
    before = contents(out)
    for more in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        refused(
            ["average", str(small_star), "-o", str(out), *WEDGE, *more], ["4 files", "no run.json", "another program"]
        )
    assert contents(out) == before


def test_a_run_does_not_replace_its_input(
    small_star: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    star = out / "run_data.star"
    star.write_text(small_star.read_text())
    map_path = out / "run_class001.mrc"
    write(map_path, box())
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in star.name, map_path.name:
        given = [str(star)] if name == star.name else [str(small_star), "--reference", str(map_path)]
        cwd = small_star.parent  # image names are relative to here too
        with contextlib.chdir(cwd):
            refused(["average", *given, "-o", str(out), *WEDGE, "--overwrite"], [f"would replace its input {name}"])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_the_output_is_looked_at_before_the_boxes(small_star: Path, tmp_path: Path) -> None:
    """Not after an hour of reading: here the boxes are bad too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    for path in small_star.parent.rglob("*.mrc"):
        path.write_bytes(b"")
    refused(["average", str(small_star), "-o", str(tmp_path / "out"), *WEDGE], ["found another run"])
    refused(["average", str(small_star), "-o", str(small_star / "out"), *WEDGE], ["a file, expected a folder"])
    resumed = {"format": 3, "options": {"n_classes": 1, "seed": 4}}
    (tmp_path / "out" / "run.json").write_text(json.dumps(resumed))
    for more in ([], ["--dry-run"]):
        told = ["option seed: found 0, expected 4"]
        refused(["average", str(small_star), "-o", str(tmp_path / "out"), *WEDGE, "--resume", *more], told)


@pytest.mark.parametrize("where", ["input", "output", "both"])
def test_names_that_are_too_long(where: str, small_star: Path, tmp_path: Path) -> None:
    long = "n" * 300
    given = long if where != "output" else str(small_star)
    refused(["average", given, "-o", str(tmp_path / (long if where != "input" else "out")), *WEDGE], ["too long"])
    star = small_star.with_name("long.star")
    star.write_text(small_star.read_text().replace("000001.mrc", f"{long}.mrc"))
    refused(["average", str(star), "-o", str(tmp_path / "out"), *WEDGE], ["1 of 6 particles does not exist", "line "])


def test_a_disk_that_is_full_for_what_is_printed(small_star: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from faml_gpu.cli import main; main()", "average", str(small_star)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "out"), *WEDGE], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


def test_demo_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(["demo", "-o", str(tmp_path)], [str(tmp_path), "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
