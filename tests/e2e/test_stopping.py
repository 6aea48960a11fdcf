"""A run that is asked to stop keeps what its iteration has done, and goes on with the next batch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import faml_gpu
from faml_gpu import plan, reseeding
from faml_gpu.data import IterationRecord, Result
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.run_folder import RunFolder
from faml_gpu.simulate import groel, ribosome, simulate_particles
from faml_gpu.stopping import Stopping

pytestmark = pytest.mark.filterwarnings("ignore:.*holds no checkpoint yet", "ignore:.*raise --max-shift")

N, VOXEL = 7, 24.0
OPTIONS: dict[str, Any] = {
    "n_classes": 2, "iterations": 2, "bandwidth": 6, "candidates": 4, "mask_radius": 120.0, "seed": 3, "folds": 2,
    "device": "cpu",
}  # fmt: skip
STEP = ("iteration 2", 6, N)  # after the second fold's first batch
Step = tuple[str, int, int]


class StoppedError(BaseException):
    """As KeyboardInterrupt."""


@pytest.fixture(scope="module")
def particles() -> ArrayParticles:
    """Seven boxes, each with a weight of its own or one of a box in another batch."""
    tilts = [(-60.0, 60.0), (-50.0, 66.0), (-40.0, 50.0), (-66.0, 44.0)]
    made = [
        simulate_particles([groel(), ribosome()], [1, 1], box=16, voxel_size=VOXEL, snr=0.5, max_shift=1.0, seed=i,
                           tilt_range=tilt)
        for i, tilt in enumerate(tilts)
    ]  # fmt: skip
    boxes = np.concatenate([m.boxes for m in made])[:N]
    return ArrayParticles(boxes, VOXEL, np.stack([m.weight for m in made]), [0, 1, 2, 3, 0, 1, 2])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.BATCH_PARTICLES, "cpu", 2)
    monkeypatch.setattr("faml_gpu.pipeline._write_pictures", lambda folder: None)  # it takes longer than all the rest


def classify(particles: ArrayParticles, out: Path | None, **options: Any) -> Result:
    return faml_gpu.classify(particles, output=out, **{**OPTIONS, **options})


def arrays(result: Result) -> dict[str, Any]:
    """Everything a run computed, timings apart."""
    found = {f"posterior {name}": value for name, value in vars(result.posterior).items()}
    found |= {f"state {name}": value for name, value in vars(result.state).items()}
    for record in result.history:
        found |= {f"{record.iteration} {name}": value for name, value in vars(record).items() if name != "seconds"}
    halves = [half.maps for half in getattr(result, "halves", []) if half is not None]
    return found | {"maps": result.maps, "halves": np.array(halves)}


def assert_identical(first: Result, second: Result) -> None:
    a, b = arrays(first), arrays(second)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def stopped(particles: ArrayParticles, out: Path, at: Step = STEP) -> str:
    """What a run kept that was asked to stop at a step."""
    stopping = Stopping()

    def progress(*step: Any) -> None:
        if step == at:
            stopping.ask(StoppedError())

    with pytest.raises(StoppedError):
        classify(particles, out, progress=progress, stopping=stopping)
    return stopping.kept


@pytest.mark.parametrize(
    "options",
    [
        {"scale_correction": True},
        {"sampler": "magnitude", "update": "wiener"},
        {"preset": "paper"},
        {"halves": True, "n_classes": 1},
        {"starts": 3, "iterations": 4, "folds": 1},
        {"iterations": 5, "folds": 1},
    ],
    ids=["joint", "magnitude", "paper", "halves", "starts", "reseeded"],
)
def test_stopped_at_every_step(
    options: dict[str, Any],
    particles: ArrayParticles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A process for each batch: none does again what another has done, and all together do what one does."""
    if options.get("preset"):
        options = options | {"folds": None}
    if "reseeded" in request.node.callspec.id:
        monkeypatch.setattr(reseeding, "idle_classes", lambda probability: np.array([1]))
        monkeypatch.setattr(reseeding, "FEWEST", 4)
    unbroken = classify(particles, None, **options)
    seen: list[Step] = []
    before, kept = "", list[str]()
    while True:
        stopping, first = Stopping(), list[Step]()

        def progress(*step: Any, stopping: Stopping = stopping, first: list[Step] = first) -> None:
            first.append(step)
            # When the halves are put together nothing waits, and all is done again: that takes long.
            assert len(seen) < 200, "no end of it"
            if step not in seen and not ("halves" in options and step[0] == "averages"):
                seen.append(step)
                stopping.ask(StoppedError())

        resume = bool(seen)
        try:
            result = classify(particles, tmp_path, resume=resume, progress=progress, stopping=stopping, **options)
            break
        except StoppedError:
            if before and "iteration" in seen[-2][0]:
                assert next(step for step in first if step[0] == seen[-2][0]) == seen[-2]
            before = stopping.kept
            kept.append(before)
    assert_identical(result, unbroken)
    assert not list(tmp_path.glob("*_unfinished.*"))
    assert "kept: 2 of 7 particles of iteration 1" in kept
    if "halves" in options:
        assert {f"kept: 2 of {n} particles of iteration 2 of half {half}" for half, n in ((1, 4), (2, 3))} <= {*kept}
    if "starts" in options:
        assert any(name.startswith("start 3/3, start") for name, _, _ in seen)
    if "reseeded" in request.node.callspec.id:
        assert unbroken.history[3].reseeded == [1]
        assert ("averages", 2, N) in seen


@pytest.fixture(scope="module")
def unbroken() -> list[Result]:
    return []


@pytest.fixture
def whole(particles: ArrayParticles, unbroken: list[Result]) -> Result:
    """The run that is not stopped; made once."""
    if not unbroken:
        unbroken.append(classify(particles, None))
    return unbroken[0]


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_damaged_file_costs_the_iteration(
    suffix: str, particles: ArrayParticles, tmp_path: Path, whole: Result
) -> None:
    assert stopped(particles, tmp_path) == "kept: 6 of 7 particles of iteration 2"
    damaged = (tmp_path / "run_unfinished").with_suffix(suffix)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    told: list[Step] = []
    with pytest.warns(UserWarning, match=r"run_unfinished\.json is left out, its iteration begins anew: "):
        result = classify(particles, tmp_path, resume=True, progress=lambda *step: told.append(step))
    assert told[0] == ("iteration 2", 0, N)
    assert_identical(result, whole)
    assert not list(tmp_path.glob("*_unfinished.*"))


def test_other_options_begin_the_iteration_anew(particles: ArrayParticles, tmp_path: Path) -> None:
    """With more iterations the band of this one is another."""

    def killed(record: IterationRecord) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        classify(particles, tmp_path / "killed", on_iteration=killed)
    expected = classify(particles, tmp_path / "killed", resume=True, iterations=3)
    stopped(particles, tmp_path / "stopped")
    with pytest.warns(UserWarning, match="begins anew: it was begun with other options"):
        result = classify(particles, tmp_path / "stopped", resume=True, iterations=3)
    assert_identical(result, expected)


def test_what_a_killed_process_left_of_an_iteration_that_is_done(
    particles: ArrayParticles, tmp_path: Path, whole: Result
) -> None:
    """Killed between the checkpoint and the removal of what it makes useless."""
    stopped(particles, tmp_path)
    left = {path: path.read_bytes() for path in tmp_path.glob("run_unfinished.*")}
    classify(particles, tmp_path, resume=True)
    for path, content in left.items():
        path.write_bytes(content)
    told: list[Step] = []
    assert_identical(classify(particles, tmp_path, resume=True, progress=lambda *step: told.append(step)), whole)
    assert {name for name, _, _ in told} == {"averages"}
    assert not list(tmp_path.glob("run_unfinished.*"))


def test_starts_that_are_done_survive_a_kill(particles: ArrayParticles, tmp_path: Path) -> None:
    options = {"starts": 3, "iterations": 4, "folds": 1}

    def killed(*step: Any) -> None:
        if step == ("start 3/3, iteration 1", 4, N):
            raise StoppedError

    with pytest.raises(StoppedError):
        classify(particles, tmp_path, progress=killed, **options)
    assert not list(tmp_path.glob("run_it*"))
    told: list[Step] = []
    result = classify(particles, tmp_path, resume=True, progress=lambda *step: told.append(step), **options)
    assert told[0] == ("start 3/3, iteration 1", 0, N)
    assert_identical(result, classify(particles, None, **options))


def test_without_a_folder_there_is_nothing_to_wait_for(particles: ArrayParticles) -> None:
    stopping = Stopping()

    def progress(*step: Any) -> None:
        if step == ("iteration 1", 2, N):
            stopping.ask(StoppedError())
            pytest.fail("it went on")

    with pytest.raises(StoppedError):
        classify(particles, None, progress=progress, stopping=stopping)
    assert stopping.kept == ""


def test_a_second_request_does_not_wait() -> None:
    """Nor does one while the first is being answered."""
    stopping = Stopping()
    stopping.hold(lambda: "all")
    stopping.ask(StoppedError("first"))
    with pytest.raises(StoppedError, match="second"):
        stopping.ask(StoppedError("second"))

    stopping = Stopping()
    stopping.hold(lambda: stopping.ask(StoppedError("second")) or "all")
    stopping.check()
    stopping.ask(StoppedError("first"))
    with pytest.raises(StoppedError, match="second"):
        stopping.check()
    assert stopping.kept == ""


def test_a_request_while_an_iteration_is_written_waits_for_that(
    particles: ArrayParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, write = Stopping(), RunFolder.write_iteration

    def asked(*arguments: Any) -> None:
        stopping.ask(StoppedError())
        write(*arguments)

    monkeypatch.setattr(RunFolder, "write_iteration", asked)
    with pytest.raises(StoppedError):
        classify(particles, tmp_path, stopping=stopping)
    assert (tmp_path / "run_it001_checkpoint.json").exists()
    assert not list(tmp_path.glob("run_it002*"))
