"""A run that was stopped, however, goes on to the result of the unbroken one, bit for bit."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import faml_gpu
from faml_gpu.cli import app
from faml_gpu.data import IterationRecord
from faml_gpu.demo import write_simulation
from faml_gpu.errors import InputError
from faml_gpu.run_folder import read_checkpoint
from faml_gpu.simulate import Simulation

ITERATIONS = 5
OPTIONS: dict[str, Any] = {
    "tilt_range": (-60.0, 60.0),
    "iterations": ITERATIONS,
    "bandwidth": 6,
    "candidates": 4,
    "mask_radius": 120.0,
    "seed": 3,
}
FLAGS = shlex.split("--tilt-range -60 60 --iterations 5 --bandwidth 6 --candidates 4 --mask-radius 120 --seed 3")
MAIN = [sys.executable, "-c", "from faml_gpu.cli import main; main()"]
# The same, with a pause in one batch: a run of six small boxes would be over before a signal arrives. A shell starts
# background jobs (such as these tests) with SIGINT ignored, and their children inherit that.
SLOW = """
import itertools, signal, time
from faml_gpu import faml
from faml_gpu.cli import main
def slow(*arguments, real=faml.expectation, count=itertools.count(1)):
    if next(count) == {batch}:
        print("batch", flush=True)
        time.sleep({seconds})
    return real(*arguments)
faml.expectation = slow
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
Contents = Callable[[Path], dict[str, bytes]]


def results(folder: Path) -> dict[str, bytes]:
    """All a run computed: maps and STAR files (timings apart), and the arrays of the last checkpoint."""
    kept = (".mrc", "_data.star", "_posteriors.star")
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(kept)}
    for path in folder.glob("*_model.star"):
        found[path.name] = path.read_bytes().partition(b"data_model_seconds")[0]
    for path in folder.glob("*_checkpoint.npz"):
        with np.load(path) as arrays:
            found |= {f"{path.name} {key}": arrays[key].tobytes() for key in arrays.files if key != "history"}
    return found


@pytest.fixture(scope="module")
def small_star(tmp_path_factory: pytest.TempPathFactory, small_simulation: Simulation) -> Path:
    """One for all: what runs made of it is compared."""
    return write_simulation(tmp_path_factory.mktemp("data"), small_simulation)


@pytest.fixture(scope="module")
def unbroken(small_star: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    faml_gpu.classify(small_star, 2, out, **OPTIONS)
    found = results(out)
    expected = {
        "run_class002.mrc",
        "run_data.star",
        "run_class_posteriors.star",
        f"run_it{ITERATIONS:03d}_class001.mrc",
    }
    assert expected <= found.keys()
    return found


@pytest.fixture(scope="module")
def seconds(small_star: Path, tmp_path_factory: pytest.TempPathFactory, unbroken: dict[str, bytes]) -> float:
    """What a process of its own takes from its first file to its end, report included."""
    out = tmp_path_factory.mktemp("measured") / "out"
    process = begun(small_star, out)
    start = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    took = time.monotonic() - start
    assert results(out) == unbroken
    return took


class StopError(Exception):
    pass


def stop_after(iteration: int) -> Callable[[IterationRecord], None]:
    def stop(record: IterationRecord) -> None:
        if record.iteration == iteration:
            raise StopError

    return stop


@pytest.mark.parametrize("iteration", [1, ITERATIONS - 1, ITERATIONS])
def test_resumed_equals_unbroken(iteration: int, small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        faml_gpu.classify(small_star, 2, out, on_iteration=stop_after(iteration), **OPTIONS)
    assert not (out / "run_class001.mrc").exists()
    seen: list[int] = []
    result = faml_gpu.classify(
        small_star, 2, out, resume=True, on_iteration=lambda record: seen.append(record.iteration), **OPTIONS
    )
    assert seen == list(range(iteration + 1, ITERATIONS + 1))
    assert [record.iteration for record in result.history] == list(range(1, ITERATIONS + 1))
    assert results(out) == unbroken


def test_another_seed_is_another_result(small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    """What the comparison above rests on: it can tell runs apart."""
    faml_gpu.classify(small_star, 2, tmp_path / "out", **{**OPTIONS, "seed": 4})
    assert results(tmp_path / "out")["run_class001.mrc"] != unbroken["run_class001.mrc"]


def test_damaged_newest_checkpoint(small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        faml_gpu.classify(small_star, 2, out, on_iteration=stop_after(3), **OPTIONS)
    damaged = out / "run_it003_checkpoint.npz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="run_it003_checkpoint.json is damaged"):
        faml_gpu.classify(small_star, 2, out, resume=True, **OPTIONS)
    assert results(out) == unbroken


def test_more_iterations(small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    faml_gpu.classify(small_star, 2, out, **OPTIONS)
    result = faml_gpu.classify(small_star, 2, out, resume=True, **{**OPTIONS, "iterations": ITERATIONS + 1})
    assert result.state.iteration in (ITERATIONS, ITERATIONS + 1)
    assert json.loads((out / "run.json").read_text())["options"]["iterations"] == ITERATIONS + 1


def test_other_data_are_refused(small_star: Path, tmp_path: Path, contents: Contents) -> None:
    out = tmp_path / "out"
    faml_gpu.classify(small_star, 2, out, **OPTIONS)
    before = contents(out)
    with pytest.raises(InputError, match="not the data of the run resumed"):
        faml_gpu.classify(small_star, 2, out, resume=True, **{**OPTIONS, "tilt_range": (-50.0, 60.0)})
    with pytest.raises(InputError, match="option n_classes: found 3, expected 2"):
        faml_gpu.classify(small_star, 3, out, resume=True, **OPTIONS)
    assert contents(out) == before


def begun(star: Path, out: Path, program: Sequence[str] = MAIN) -> subprocess.Popen[str]:
    """The command in a process of its own, once its first file is there."""
    command = [*program, "classify", str(star), "-k", "2", "-o", str(out), *FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (out / "run.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing begun within two minutes"
        time.sleep(0.002)
    return process


def begun_to(batch: int, star: Path, out: Path, seconds: float) -> subprocess.Popen[str]:
    """The same, while it is in a batch (six are an iteration) that takes some seconds."""
    process = begun(star, out, [sys.executable, "-c", SLOW.format(batch=batch, seconds=seconds)])
    assert process.stdout is not None
    while process.stdout.readline() != "batch\n":
        assert process.poll() is None, process.communicate()
    return process


def ended(process: subprocess.Popen[str]) -> str:
    """What it said on stderr until it ended."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return errors


def test_sigkill(small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = begun_to(13, small_star, out, 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (out / "run_it002_checkpoint.json").exists()
    assert not (out / "run_class001.mrc").exists()
    command = [*MAIN, "classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS, "--resume"]
    subprocess.run(command, check=True, capture_output=True)
    assert results(out) == unbroken
    assert not list(out.glob(".*"))


# Ten in CI; all of them with -m rare.
MOMENTS = [*range(10), *(pytest.param(i, marks=(pytest.mark.rare, pytest.mark.slow)) for i in range(10, 50))]


def stage(out: Path) -> str:
    """How far a run had come, by the files that are there."""
    if (out / "report.html").exists():
        return "after the report"
    if json.loads((out / "run.json").read_text())["status"] == "finished":
        return "report"
    if (out / "run_class001.mrc").exists():
        return "final files"
    return f"iteration {len(set(out.glob('run_it*_model.star'))) + 1}"


@pytest.mark.parametrize("trial", MOMENTS)
def test_killed_at_any_moment(
    trial: int, small_star: Path, tmp_path: Path, unbroken: dict[str, bytes], seconds: float
) -> None:
    """Within an iteration, while files are written, while the report is made, or just after the end."""
    out = tmp_path / "out"
    process = begun(small_star, out)
    time.sleep(np.random.default_rng(trial).uniform(0, seconds))
    process.kill()
    process.communicate()
    print("killed:", "not, it had ended" if process.returncode == 0 else stage(out))  # to be seen with -rP
    # A leading dot marks a file that was being written: glob finds those too, and a resumed run removes them.
    for path in out.glob("[!.]*.mrc"):
        assert path.read_bytes() == unbroken[path.name]
    for path in out.glob("*_checkpoint.json"):
        read_checkpoint(path.with_suffix(""))
    again = CliRunner().invoke(app, ["classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS, "--resume"])
    assert again.exit_code == 0, again.output
    assert results(out) == unbroken
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(
    number: signal.Signals, status: int, small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    """In the second batch of the second iteration: that is kept as well."""
    out = tmp_path / "out"
    process = begun_to(8, small_star, out, 3)
    process.send_signal(number)
    errors = ended(process)
    assert process.returncode == status, errors
    first, last = errors.splitlines()
    assert first == "stopping after this batch; the same again stops at once"
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    told, _, command = last.partition("; go on with: ")
    assert told == f"{word}; kept: 2 of 6 particles of iteration 2"
    assert (out / "run_unfinished.json").exists()
    assert not (out / "run_class001.mrc").exists()
    assert not list(out.glob(".*"))
    # The line it prints is the command to go on with, word for word.
    words = shlex.split(command)
    assert words[0] == "faml-gpu"
    log = tmp_path / "log.jsonl"
    subprocess.run([*MAIN, *words[1:], "--log-json", str(log)], check=True, capture_output=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["event"] == "iteration"] == [2, 3, 4, 5]
    assert results(out) == unbroken


def test_interrupted_twice(small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    """A batch may take long, and the user be in a hurry."""
    out = tmp_path / "out"
    process = begun_to(1, small_star, out, 60)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = ended(process)
    assert time.monotonic() - start < 30
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; no iteration was completed: nothing to go on from"
    assert not (out / "run_unfinished.json").exists()


@pytest.mark.parametrize("writes", [0, 1, 5, 6, 7, 8, 9, 15, 23])
def test_disk_full(
    writes: int,
    small_star: Path,
    tmp_path: Path,
    unbroken: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    disk_full: Any,
) -> None:
    """The disk is full after some files; whatever is there is whole, and the run goes on once there is room."""
    out = tmp_path / "out"
    arguments = ["classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS]
    with disk_full(out, writes), monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["faml-gpu", *arguments])
        result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert "disk is full" in result.stderr
    assert str(out) in result.stderr
    assert not list(out.glob(".*"))
    for path in out.glob("*.mrc"):
        assert path.read_bytes() == unbroken[path.name]
    checkpoints = sorted(out.glob("*_checkpoint.json"))
    for path in checkpoints:
        read_checkpoint(path.with_suffix(""))
    assert ("go on with: faml-gpu classify" in result.stderr) == bool(checkpoints)
    if writes:
        again = CliRunner().invoke(app, [*arguments, "--resume"])
        assert again.exit_code == 0, again.output
        assert results(out) == unbroken


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[str, str], list[str]]:
    """What runs a shell command with a file system of SIZE bytes of its own in tmp_path/disk, seen by it alone."""
    place = tmp_path / "disk"
    place.mkdir()

    def inside(size: str, command: str) -> list[str]:
        mounted = f"mount -t tmpfs -o size={size} none {shlex.quote(str(place))}"
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mounted} && {{ {command}; }}"]

    if shutil.which("unshare") is None:
        pytest.skip("no unshare: no small disk can be made")
    tried = subprocess.run(inside("64k", "true"), capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small disk can be made: {tried.stderr.strip()}")
    return inside


# Full in the second iteration's checkpoint, and where the first has none yet.
@pytest.mark.parametrize(("size", "goes_on"), [("600k", True), ("120k", False)])
def test_a_disk_that_is_full(
    size: str,
    goes_on: bool,
    small_star: Path,
    tmp_path: Path,
    unbroken: dict[str, bytes],
    small_disk: Callable[[str, str], list[str]],
) -> None:
    """A real one, where any write of a file may fail; the run goes on elsewhere, where there is room."""
    arguments = ["classify", str(small_star), "-k", "2", *FLAGS]
    run = shlex.join([*MAIN, *arguments, "-o", "disk/out"])
    script = f"{run} > told 2> error; echo $? > status; cp -a disk/out copy"
    done = subprocess.run(small_disk(size, script), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, copy = (tmp_path / "error").read_text(), tmp_path / "copy"
    assert (tmp_path / "status").read_text().strip() == "2", told
    assert "Traceback" not in told
    first = told.splitlines()[0]
    assert first.startswith("error: cannot write disk/out/run_it0"), told
    assert "the disk is full. What was written before is kept." in first
    assert ("go on with: faml-gpu classify" in told) == goes_on
    # Nothing half written, no lock, and what is there is what it should be.
    assert not list(copy.glob(".*"))
    for name, content in results(copy).items():
        if "checkpoint" not in name:  # of an earlier iteration than those the unbroken run has kept
            assert content == unbroken[name], name
    checkpoints = sorted(copy.glob("*_checkpoint.json"))
    assert bool(checkpoints) == goes_on
    for path in checkpoints:
        read_checkpoint(path.with_suffix(""))
    assert json.loads((copy / "run.json").read_text())["status"] == "running"
    if goes_on:
        again = CliRunner().invoke(app, [*arguments, "-o", str(copy), "--resume"])
        assert again.exit_code == 0, again.output
        assert results(copy) == unbroken
