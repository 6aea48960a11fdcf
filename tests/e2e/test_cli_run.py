"""The commands as a user runs them: what they print and what they leave."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mrcfile
import numpy as np
import pytest
import starfile
from rich.console import Console
from typer.testing import CliRunner

import faml_gpu
from faml_gpu import cli
from faml_gpu.cli import Shared, app
from faml_gpu.data import IterationRecord
from faml_gpu.options import Options
from faml_gpu.simulate import Simulation

FLAGS = shlex.split("--tilt-range -60 60 --iterations 2 --bandwidth 6 --candidates 4 --mask-radius 120")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return str(result.output)


def test_classify_leaves_what_is_promised(small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS)
    lines = [line for line in printed.splitlines() if re.match(r"[12]/2 ", line)]
    assert len(lines) == 2
    for word in ("L ", "sigma ", "resolution ", "classes ", "changed ", " s"):
        assert word in lines[0]

    names = {path.name for path in out.iterdir()}
    expected = {"run.json", "run_data.star", "run_class_posteriors.star", "run_class001.mrc", "run_class002.mrc"}
    expected |= {"run.toml", "report.html", "run.cxc", "run_classes.png"}
    expected |= {f"run_class00{k}_angdist.bild" for k in (1, 2)}
    for i in (1, 2):
        expected |= {f"run_it00{i}_{rest}" for rest in ("class001.mrc", "class002.mrc", "data.star", "model.star")}
        expected |= {f"run_it00{i}_checkpoint.{suffix}" for suffix in ("json", "npz")}
    expected |= {f"{stem}_coverage.npz" for stem in ("run", "run_it001", "run_it002")}
    assert names == expected

    with mrcfile.open(out / "run_class001.mrc") as mrc:
        assert mrc.header.mode == 2
        assert mrc.data.shape == (16, 16, 16)
        assert float(mrc.voxel_size.x) == pytest.approx(24.0)
    particles = starfile.read(out / "run_data.star")["particles"]
    given = starfile.read(small_star)["particles"]
    assert list(particles["rlnImageName"]) == list(given["rlnImageName"])
    assert set(particles["rlnClassNumber"]) <= {1, 2}
    assert {"rlnAngleRot", "rlnOriginXAngst", "rlnLogLikeliContribution", "rlnNrOfSignificantSamples"} <= set(particles)
    about = json.loads((out / "run.json").read_text())
    assert about["status"] == "finished"
    assert about["resolved"]["mask_radius"] == 120
    assert about["input"]["particles"] == 6
    assert [row["r_max"] for row in about["iterations"]]
    assert about["versions"]["numpy"] == np.__version__


def test_python_gives_what_the_command_writes(small_star: Path, tmp_path: Path) -> None:
    run("average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS)
    result = faml_gpu.average(
        small_star, tilt_range=(-60, 60), iterations=2, bandwidth=6, candidates=4, mask_radius=120
    )
    with mrcfile.open(tmp_path / "out/run_class001.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, result.maps[0])
    assert result.best.rotations.shape == (6, 3, 3)
    assert len(result.history) == 2


def test_folder_and_pattern_give_the_same(small_star: Path, tmp_path: Path) -> None:
    folder = small_star.parent / "particles"
    maps = []
    for name, given in (("a", str(folder)), ("b", f"{folder}/*.mrc"), ("c", str(small_star))):
        run("average", given, "-o", str(tmp_path / name), *FLAGS)
        maps.append((tmp_path / name / "run_class001.mrc").read_bytes())
    assert maps[0] == maps[1] == maps[2]


def test_overwrite(small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS)
    (out / "notes.txt").write_text("mine")
    run("average", str(small_star), "-o", str(out), *FLAGS, "--overwrite")
    assert not (out / "run_class002.mrc").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_recenter(small_star: Path, tmp_path: Path) -> None:
    """Coordinates in pixels of 12 A, boxes of 24 A: a particle found 24 A off its centre is 2 pixels away."""
    tables = starfile.read(small_star)
    n = len(tables["particles"])
    for axis, letter in enumerate("XYZ"):
        tables["particles"][f"rlnCoordinate{letter}"] = np.arange(n) + 100.0 * axis
    tables["optics"]["rlnTomoTiltSeriesPixelSize"] = 12.0
    given = small_star.with_name("placed.star")
    starfile.write(tables, given)
    run("average", str(given), "-o", str(tmp_path / "out"), "--recenter", *FLAGS)
    found = starfile.read(tmp_path / "out/run_data.star")["particles"]
    moved = starfile.read(tmp_path / "out/run_data_recentered.star")["particles"]
    for axis, letter in enumerate("XYZ"):
        np.testing.assert_array_equal(found[f"rlnCoordinate{letter}"], np.arange(n) + 100.0 * axis)
        shift = -found[f"rlnOrigin{letter}Angst"]
        np.testing.assert_allclose(moved[f"rlnCoordinate{letter}"], np.arange(n) + 100.0 * axis + shift / 12, atol=2e-6)
        assert (moved[f"rlnOrigin{letter}Angst"] == 0).all()
    assert np.abs(found["rlnOriginXAngst"]).max() > 1
    np.testing.assert_array_equal(moved["rlnAngleTilt"], found["rlnAngleTilt"])
    refused = CliRunner().invoke(app, ["average", str(small_star), "-o", str(tmp_path / "no"), "--recenter", *FLAGS])
    assert refused.exit_code == 2
    assert "has no coordinates" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_start_from_a_reference(small_star: Path, tmp_path: Path) -> None:
    truth = small_star.parent / "truth_ribosome.mrc"
    arguments = ["--reference", str(truth), "--initial-lowpass", "80"]
    run("average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS, *arguments)
    about = json.loads((tmp_path / "out/run.json").read_text())
    assert about["start"]["initial_lowpass"] == 80
    assert len(about["start"]["reference"]) == 64


def test_start_from_poses(small_star: Path, tmp_path: Path) -> None:
    run("average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS, "--use-poses")
    assert json.loads((tmp_path / "out/run.json").read_text())["start"]["use_poses"] is True


def test_command_line_defaults_are_the_options_defaults() -> None:
    shown = {field.name: field.default for field in fields(Shared)}
    for field in fields(Options):
        if field.name != "n_classes":
            assert shown[field.name] == field.default, field.name


def test_help_names_every_option() -> None:
    text = run("classify", "--help")
    for name in shlex.split(
        "--iterations --seed --device --threads --tilt-range --tilt-axis --voxel-size --mask-radius --resolution "
        "--bandwidth --candidates --max-shift --method --preset --sampler --update --regularization --padding "
        "--use-poses --reference --initial-lowpass --halves --resume --overwrite --invert --no-normalize --classes "
        "--output"
    ):
        assert name in text


def test_version_and_info() -> None:
    assert run("--version").strip() == f"faml-gpu {faml_gpu.__version__}"
    text = run("info")
    for word in ("numpy", np.__version__, "cpu", "threads", "memory", "cuda", "device", "kernels"):
        assert word in text


def test_no_arguments_shows_help() -> None:
    command = [sys.executable, "-c", "from faml_gpu.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "classify" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_run_json_says_the_band_a_start_from_a_map_begins_at(
    small_star: Path, tmp_path: Path, small_simulation: Simulation
) -> None:
    for lowpass in (None, 120.0):
        faml_gpu.average(small_star, tmp_path / "out", tilt_range=(-60, 60), iterations=1, bandwidth=6, candidates=4,
                         mask_radius=120, reference=small_simulation.truth[0], initial_lowpass=lowpass,
                         overwrite=True)  # fmt: skip
        about = json.loads((tmp_path / "out/run.json").read_text())
        assert about["resolved"]["r_start"] == about["iterations"][0]["r_max"] == (7 if lowpass is None else 5)


def test_a_log_for_programs(small_star: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run("average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS, "--log-json", str(log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    names = ["start, averages", "iteration 1", "iteration 2", "averages"]
    assert [(s["step"], s["done"], s["total"]) for s in steps if "ing " not in s["step"]] == [(n, 6, 6) for n in names]
    assert all(s["seconds"] >= 0 == s["seconds_left"] for s in steps)
    lines = [line for line in lines if line["event"] != "step"]
    assert [line["event"] for line in lines] == ["start", "iteration", "iteration", "end"]
    assert lines[0]["version"] == faml_gpu.__version__
    history = json.loads((tmp_path / "out" / "run.json").read_text())["iterations"]
    for line, record in zip(lines[1:3], history, strict=True):
        assert {name: line[name] for name in record} == record
        assert line["of"] == 2
        assert line["seconds_left"] == round(sum(record["seconds"].values()) * (2 - record["iteration"]), 1)
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert (lines[3]["status"], lines[3]["message"]) == ("finished", "")


def test_a_profile_at_the_end(small_star: Path, tmp_path: Path) -> None:
    command = ["average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS]
    assert "matrix product" not in run(*command)
    said = run(*command, "--overwrite", "--profile")
    assert "machine: copy" in said
    rows = {line[:34].strip(): line[34:].split() for line in said.splitlines()}
    for step in json.loads((tmp_path / "out" / "run.json").read_text())["iterations"][-1]["seconds"]:
        assert rows[step][1].endswith("%")
    assert len(rows["joint: cells"]) == 7  # with a bound
    assert int(rows["pose integral"][2]) >= 2  # once a batch in two iterations


def test_the_log_tells_how_a_run_ended(small_star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    command = ["average", str(small_star), "-o", str(tmp_path / "out"), *FLAGS, "--log-json", str(log)]

    def last() -> tuple[str, str]:
        line = json.loads(log.read_text().splitlines()[-1])
        assert line["event"] == "end"
        return line["status"], line["message"]

    result = CliRunner().invoke(app, [*command, "--mask-radius", "1000"])
    assert result.exit_code == 2
    assert last() == ("failed", "option mask-radius: found 1000 A, expected 48 to 132 A (box of 384 A)")
    for error, told in ((KeyboardInterrupt, "interrupted"), (cli._Terminated, "terminated")):
        monkeypatch.setattr("faml_gpu.pipeline.classify", Mock(side_effect=error))
        assert CliRunner().invoke(app, command).exit_code > 128
        assert last() == (told, "")
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert [event for event in events if event != "step"] == ["start", "end"] * 3  # they follow one another


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    found = Mock(return_value=1000.0)
    monkeypatch.setattr(cli.time, "monotonic", found)
    return found


def test_a_step_that_takes_long_is_told_of(tmp_path: Path, clock: Mock, capsys: pytest.CaptureFixture[str]) -> None:
    """In a log: once a minute, with what is left of it; 80 of 400 particles in 64 s leave 256 s. And at its end."""
    log = tmp_path / "log.jsonl"
    with cli.Display(3, log) as display:
        for name in ("iteration 1", "iteration 2"):
            for done in (0, 40, 80, 120, 160, 200, 400):
                display.step(name, done, 400)
                clock.return_value += 32.0
        clock.return_value += 1000.0  # of what comes between two steps
        for done in (0, 400, 0):  # of one half, and then of the other
            display.step("averages", done, 400)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        line
        for i in (1, 2)
        for line in (
            f"iteration {i}: 80 of 400, left 4 min",
            f"iteration {i}: 160 of 400, left 3 min",
            f"iteration {i}: 400 in 3 min",
        )
    ]
    steps = [json.loads(line) for line in log.read_text().splitlines()][1:-1]
    assert [(s["event"], s["step"], s["done"], s["seconds"], s["seconds_left"]) for s in steps] == [
        *(
            ("step", f"iteration {i}", done, seconds, left)
            for i in (1, 2)
            for done, seconds, left in ((80, 64.0, 256.0), (160, 128.0, 192.0), (400, 192.0, 0.0))
        ),
        ("step", "averages", 400, 0.0, 0.0),
        ("step", "averages", 0, 0.0, 0.0),
    ]


def test_a_step_that_is_gone_on_with(clock: Mock, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 400 particles 300 were done before: 50 in 100 s leave 100 s."""
    with cli.Display(3) as display:
        for done in (300, 350, 400):
            display.step("iteration 2", done, 400)
            clock.return_value += 100.0
        display.iteration(record(2))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "iteration 2: 350 of 400, left 2 min"
    assert [line[:3] for line in rest] == ["2/3"]  # which tells that it is over


def record(iteration: int, r_max: int = 5, **changes: Any) -> IterationRecord:
    """Of an iteration that took 30 s a Fourier shell, half of that for each of two steps."""
    found = IterationRecord(
        iteration, -1e6, 1.0, 1.0, [1.0], [10], r_max, 40.0, 10, 4.0, 0.1, 2.0, [0.9], 0.1, [1.0], converged=False,
        seconds={"read": 15.0 * r_max, "expectation": 15.0 * r_max},
    )  # fmt: skip
    return replace(found, **changes)


def test_what_is_left_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The iterations to come as long as the last; they take longer while the band grows, and may not be needed."""
    log = tmp_path / "log.jsonl"
    with cli.Display(10, log) as display:
        for done in (record(1), record(2, 6), record(6, 8), record(10, 8)):
            display.iteration(done)
    with cli.Display(10, log) as display:
        display.iteration(record(7, 8, converged=True))
    with cli.Display(4, log, parts=True) as display:
        for done in (record(3, 8), record(1, 6, part="half 2"), record(2, 7, part="half 2")):
            display.iteration(done)
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "left about 22 min",  # 9 of 150 s
        "left more than 24 min",  # 8 of 180 s
        "left at most 16 min",  # 4 of 240 s
        "",
        "",
        "left at most 4 min of this part",
        "left about 9 min of half 2",
        "left more than 7 min of half 2",
    ]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    left = [event["seconds_left"] for event in events if event["event"] == "iteration"]
    assert left == [1350, 1440, 960, 0, 0, 240, 540, 420]


def test_bars_on_a_terminal(clock: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the step and of the run is there however long a batch takes, for each part of the run anew."""
    monkeypatch.setattr(cli, "Console", partial(Console, force_terminal=True, file=StringIO()))

    def bars() -> list[str]:
        """What is at the left and at the right of each bar, without the time gone by."""
        shown = StringIO()
        Console(file=shown, width=80).print(display._bars.get_renderable())
        return [
            " ".join(re.sub(r" +[━╸╺ ]{20,}", " | ", re.sub(r"\d:\d\d:\d\d ", "", line)).split())
            for line in shown.getvalue().splitlines()
        ]

    with cli.Display(4, parts=True) as display:
        display.step("iteration 2", 0, 400)
        assert bars() == ["iterations | 1/4", "iteration 2 | 0/400"]
        clock.return_value += 90.0
        display.step("iteration 2", 100, 400)
        assert bars() == ["iterations | 1/4", "iteration 2 | 100/400 left 4 min"]
        clock.return_value += 90.0
        display.step("iteration 2", 400, 400)
        display.iteration(record(2))
        assert bars()[-2] == "iterations | 2/4 left about 5 min"
        display.step("class 2, half 1, iteration 1", 0, 200)
        assert bars() == ["class 2, half 1 | 0/4", "class 2, half 1, iteration 1 | 0/200"]
        display.iteration(record(1, part="class 2, half 1"))
        assert bars()[-2] == "class 2, half 1 | 1/4 left about 8 min"


def test_warnings_stand_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past rich, the bars would be drawn over them."""
    shown = StringIO()
    monkeypatch.setattr(cli, "Console", partial(Console, force_terminal=True, file=shown))
    with cli._ending(cli.Resume(None)), cli.Display(4):
        warnings.warn("the box is tight", stacklevel=1)
    assert "warning: the box is tight" in shown.getvalue()
