"""Checkpoints come back bit for bit or not at all; the folder of a run belongs to one process and to one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile

from faml_gpu.data import Checkpoint, IterationRecord, Posterior, Result, State
from faml_gpu.errors import InputError
from faml_gpu.geometry import euler_to_matrix, random_rotations
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.posteriors import best_poses
from faml_gpu.run_folder import OutputError, RunFolder, _is_ours, particle_columns, read_checkpoint, write_checkpoint

N, K, BOX, VOXEL = 5, 2, 10, 8.0


def record(iteration: int) -> IterationRecord:
    return IterationRecord(
        iteration=iteration,
        log_likelihood=-1.0 / 3.0 - iteration,
        sigma=0.1 + 0.2,
        zeta=2.0 / 3.0,
        alpha=[1 / 3, 2 / 3],
        class_sizes=[2, 3],
        r_max=3,
        resolution=80 / 3,
        bandwidth=6,
        candidates=49.5,
        changed_class=0.4,
        pose_change=1e-17,
        map_correlation=[float("nan"), 0.5],
        near_identity=0.0,
        coverage=[0.9, 1.0],
        converged=False,
        seconds={"expectation": 0.25},
    )


def checkpoint(iteration: int) -> Checkpoint:
    rng = np.random.default_rng(iteration)
    particle = np.array([0, 0, 1, 2, 2, 3, 4])
    state = State(
        iteration,
        rng.standard_normal((K, BOX, BOX, BOX)).astype(np.float32),
        np.array([1 / 3, 2 / 3]),
        rng.random(4),
        np.pi / 7,
    )
    posterior = Posterior(
        particle,
        rng.integers(0, K, len(particle)),
        random_rotations(len(particle), rng),
        rng.standard_normal((len(particle), 3)),
        np.array([0.25, 0.75, 1.0, 0.5, 0.5, 1.0, 1.0]),
        rng.standard_normal(N),
        np.bincount(particle),
        np.ones((N, K)) / K,
    )
    # A particle's best class must have a pose: that of its first pose here.
    first = np.searchsorted(particle, np.arange(N))
    posterior.class_probability[np.arange(N), posterior.class_index[first]] += 0.25
    return Checkpoint(state, posterior, [record(i) for i in range(1, iteration + 1)])


def source() -> ArrayParticles:
    return ArrayParticles(np.random.default_rng(0).standard_normal((N, BOX, BOX, BOX)), VOXEL)


def facts(**changes: Any) -> dict[str, Any]:
    options = {"iterations": 5, "seed": 0, "device": "auto", "threads": None, "candidates": 50}
    found: dict[str, Any] = {
        "options": options | changes.pop("options", {}),
        "input": {"path": "p.star", "fingerprint": "abc"},
        "start": {"use_poses": False, "reference": None, "initial_lowpass": None},
        "versions": {"faml_gpu": "0.1.0"},
    }
    return found | changes


def run_until(path: Path, iteration: int) -> None:
    with RunFolder(path) as folder:
        assert folder.begin(facts()) is None
        for done in range(1, iteration + 1):
            folder.write_iteration(checkpoint(done), source())


def same(a: Checkpoint, b: Checkpoint) -> None:
    for kind in ("state", "posterior"):
        x, y = getattr(a, kind), getattr(b, kind)
        for f in fields(x):
            left, right = np.asarray(getattr(x, f.name)), np.asarray(getattr(y, f.name))
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes(), f.name
    assert repr([asdict(h) for h in a.history]) == repr([asdict(h) for h in b.history])


def test_checkpoint_roundtrip(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run_it003_checkpoint", checkpoint(3))
    back = read_checkpoint(tmp_path / "run_it003_checkpoint")
    same(back, checkpoint(3))
    assert type(back.state.iteration) is int
    assert type(back.state.zeta) is float


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run_until(tmp_path / "out", 4)
    names = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*"))
    assert names == [f"run_it00{i}_checkpoint.{suffix}" for i in (3, 4) for suffix in ("json", "npz")]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the npz": lambda out: flip(out / "run_it003_checkpoint.npz"),
    "npz cut short": lambda out: (out / "run_it003_checkpoint.npz").write_bytes(b""),
    "npz missing": lambda out: (out / "run_it003_checkpoint.npz").unlink(),
    "JSON cut short": lambda out: (out / "run_it003_checkpoint.json").write_text('{"format": 1, "iter'),
    "JSON of another kind": lambda out: (out / "run_it003_checkpoint.json").write_text("[]"),
    "JSON of a later format": lambda out: (out / "run_it003_checkpoint.json").write_text('{"format": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_falls_back(damage: str, tmp_path: Path) -> None:
    run_until(tmp_path / "out", 3)
    DAMAGE[damage](tmp_path / "out")
    with RunFolder(tmp_path / "out", resume=True) as folder:
        with pytest.warns(UserWarning, match=r"run_it003_checkpoint.json is damaged"):
            found = folder.begin(facts())
        assert found is not None
        same(found, checkpoint(2))


def test_all_damaged(tmp_path: Path) -> None:
    run_until(tmp_path / "out", 3)
    for path in (tmp_path / "out").glob("*.npz"):
        flip(path)
    with (
        RunFolder(tmp_path / "out", resume=True) as folder,
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(InputError, match="all 2 checkpoints are damaged"),
    ):
        folder.begin(facts())


def test_resume_goes_on_from_the_newest(tmp_path: Path) -> None:
    run_until(tmp_path / "out", 3)
    with RunFolder(tmp_path / "out", resume=True) as folder:
        found = folder.begin(facts(options={"iterations": 9}))
    assert found is not None
    same(found, checkpoint(3))


def test_options_that_came_later_had_their_defaults(tmp_path: Path) -> None:
    run_until(tmp_path, 1)
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.begin(facts(options={"scale_correction": False, "noise_groups": None})) is not None
    run_until(tmp_path / "other", 1)
    with (
        RunFolder(tmp_path / "other", resume=True) as folder,
        pytest.raises(InputError, match="option scale_correction: found True, expected False as in the run resumed"),
    ):
        folder.begin(facts(options={"scale_correction": True}))


def test_resume_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    run_until(tmp_path / "out", 0)
    with RunFolder(tmp_path / "out", resume=True) as folder, pytest.warns(UserWarning, match="no checkpoint yet"):
        assert folder.begin(facts()) is None


DISAGREEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"options": {"seed": 1}}, "option seed: found 1, expected 0"),
    ({"options": {"candidates": 10}}, "option candidates: found 10, expected 50"),
    ({"options": {"iterations": 4}}, "option iterations: found 4, expected at least the 5"),
    ({"input": {"path": "q.star", "fingerprint": "xyz"}}, "q.star: not the data of the run resumed"),
    ({"start": {"use_poses": True}}, "use_poses"),
]


@pytest.mark.parametrize(("change", "message"), DISAGREEMENTS)
def test_resume_refuses_another_run(
    change: dict[str, Any], message: str, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    run_until(tmp_path, 2)
    before = contents(tmp_path)
    with RunFolder(tmp_path, resume=True) as folder, pytest.raises(InputError, match=message):
        folder.begin(facts(**change))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [{"options": {"threads": 1}}, {"versions": {"faml_gpu": "9.9.9"}}])
def test_resume_notes_what_may_change_digits(change: dict[str, Any], tmp_path: Path) -> None:
    run_until(tmp_path, 2)
    with RunFolder(tmp_path, resume=True) as folder, pytest.warns(UserWarning, match=r"the run resumed"):
        assert folder.begin(facts(**change)) is not None


def test_options_that_json_changes(tmp_path: Path) -> None:
    """A tuple is a list in run.json, NaN is null: the same options all the same."""
    options = {"helix": (12.0, 30.0), "regularization": float("nan")}
    with RunFolder(tmp_path) as folder:
        folder.begin(facts(options=options))
        folder.write_iteration(checkpoint(1), source())
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.begin(facts(options=options)) is not None
        with pytest.raises(InputError, match="option helix"):
            folder.begin(facts(options={**options, "helix": (12.0, 31.0)}))


def test_an_overwrite_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(tmp_path, 2)
    unlink, left = Path.unlink, 3

    def some(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if path.parent == tmp_path and path.name.startswith("run"):
            if not left:
                raise KeyboardInterrupt
            left -= 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, RunFolder(tmp_path, overwrite=True) as folder:
        patch.setattr(Path, "unlink", some)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(facts())
        patch.undo()
    assert (tmp_path / "run.json").exists()
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.begin(facts())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_overwrite_removes_only_what_runs_write(tmp_path: Path) -> None:
    run_until(tmp_path, 3)
    foreign = ["notes.txt", "run_notes.txt", "running.json", "run_it001_class001.mrc.bak", "mask.mrc", "run.json~"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".run_it002_class001.4242-0123abcd.tmp.mrc").write_text("left by a killed run")
    for name in ("run_unfinished.npz", "run_unfinished.json", "run_half2_class001_unfinished.json"):
        (tmp_path / name).write_text("left by a run that was stopped")
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.begin(facts())
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "run.json", ".run.lock"])


def test_no_lock_is_left(tmp_path: Path) -> None:
    run_until(tmp_path, 1)
    assert not (tmp_path / ".run.lock").exists()


def test_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from faml_gpu.run_folder import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for mode in ({}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"in use by process {other.pid}"):
                RunFolder(tmp_path, **mode).__enter__()
        other.kill()
        other.wait()
    # The lock went with the process, though its file is still there.
    assert (tmp_path / ".run.lock").exists()
    run_until(tmp_path, 1)


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"):
        run_until(tmp_path, 1)
    assert not (tmp_path / ".run.lock").exists()


def test_run_json_is_strict_json(tmp_path: Path) -> None:
    run_until(tmp_path, 2)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert [row["iteration"] for row in found["iterations"]] == [1, 2]
    assert found["iterations"][0]["map_correlation"] == [None, 0.5]


def test_time_counts_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 5 seconds, killed; one of 7 that went on with it, of which the last write was after 6."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def about() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
        return found

    with RunFolder(tmp_path) as folder:
        folder.begin(facts())
        clock[0] += 5
        folder.write_iteration(checkpoint(1), source())
        clock[0] += 100  # of these nothing is known
    first = about()
    assert (first["wall_seconds"], first["ended"]) == (5, None)
    with RunFolder(tmp_path, resume=True) as folder:
        clock[0] += 1
        folder.begin(facts())
        clock[0] += 5
        folder.write_iteration(checkpoint(2), source())
    second = about()
    assert second["wall_seconds"] == 11
    assert [session["seconds"] for session in second["sessions"]] == [5, 6]
    assert second["started"] == first["started"] == second["sessions"][0]["started"]
    for text in (second["started"], second["sessions"][1]["ended"]):
        assert datetime.fromisoformat(text).utcoffset() == timedelta(0)
    done = checkpoint(2)
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(facts())
        folder.write_final(Result(done.state.maps, best_poses(done.posterior), done.posterior, done.state,
                                  done.history, None, {}, VOXEL), source())  # fmt: skip
    last = about()
    assert last["ended"] == last["sessions"][2]["ended"]
    assert len(last["sessions"]) == 3
    # What somebody wrote there is no reason to fail.
    for odd in (3, [3], [{"started": 3, "seconds": 1}], [{"started": "", "seconds": "1"}], [{"started": ""}]):
        (tmp_path / "run.json").write_text(json.dumps(last | {"sessions": odd}))
        with RunFolder(tmp_path, resume=True) as folder:
            folder.begin(facts())
        assert len(about()["sessions"]) == 1


def test_what_was_measured_goes_beside_the_maps(tmp_path: Path) -> None:
    done = checkpoint(1)
    done.state.seen = np.random.default_rng(0).random((K, 3, BOX, BOX), dtype=np.float32)
    with RunFolder(tmp_path) as folder:
        folder.begin(facts())
        folder.write_iteration(done, source())
        with np.load(tmp_path / "run_it001_coverage.npz") as found:
            np.testing.assert_array_equal(found["planes"], done.state.seen)
        same(read_checkpoint(tmp_path / "run_it001_checkpoint"), done)
        # Where nothing is known, what was known of an earlier run of as many iterations goes.
        folder.write_iteration(checkpoint(1), source())
    assert not (tmp_path / "run_it001_coverage.npz").exists()
    assert _is_ours("run_coverage.npz")
    assert _is_ours("run_it012_coverage.npz")


def test_model_star(tmp_path: Path) -> None:
    run_until(tmp_path, 2)
    model = starfile.read(tmp_path / "run_it002_model.star")
    assert model["model_general"]["rlnSigmaOffsetsAngst"] == pytest.approx(np.pi / 7 * VOXEL)
    assert model["model_general"]["rlnLogLikelihood"] == pytest.approx(-1 / 3 - 2)
    assert list(model["model_classes"]["rlnReferenceImage"]) == ["run_it002_class001.mrc", "run_it002_class002.mrc"]
    assert list(model["model_classes"]["famlClassSize"]) == [2, 3]
    assert model["model_noise"]["rlnSigma2Noise"].to_numpy() == pytest.approx(checkpoint(2).state.sigma2)
    # Reciprocal Angstrom: shell s of a box of N voxels of v Angstrom is s / (N v).
    assert model["model_noise"]["rlnResolution"].to_numpy() == pytest.approx(np.arange(4) / (BOX * VOXEL))
    assert list(model["model_seconds"]["famlSeconds"]) == [0.25]


def test_particle_columns() -> None:
    """R = Rz(30) Ry(40) Rz(50) degrees and t = (1, -2, 3) voxels of 2 Angstrom, by hand.

    RELION's matrix is the inverse, R^-1 = Rz(-50) Ry(-40) Rz(-30) = Rz(130) Ry(40) Rz(150), and its origin the
    shift back.
    """
    rotation = euler_to_matrix(np.deg2rad([30.0, 40.0, 50.0]))
    posterior = Posterior(
        np.zeros(2, np.int64),
        np.array([0, 1]),
        np.stack([np.eye(3), rotation]),
        np.array([[0.0, 0, 0], [1.0, -2.0, 3.0]]),
        np.array([0.25, 0.75]),
        np.array([-12.5]),
        np.array([2]),
        np.array([[0.25, 0.75]]),
    )
    columns = particle_columns(posterior, 2.0)
    assert {name: float(values[0]) for name, values in columns.items()} == pytest.approx(
        {
            "rlnAngleRot": 130.0,
            "rlnAngleTilt": 40.0,
            "rlnAnglePsi": 150.0,
            "rlnOriginXAngst": -2.0,
            "rlnOriginYAngst": 4.0,
            "rlnOriginZAngst": -6.0,
            "rlnClassNumber": 2,
            "rlnMaxValueProbDistribution": 0.75,
            "rlnNrOfSignificantSamples": 2,
            "rlnLogLikeliContribution": -12.5,
        }
    )


def test_half_a_write_is_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of a file: what had that name before is still there, whole."""
    run_until(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        real(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with (
            RunFolder(tmp_path, resume=True) as folder,
            pytest.raises(OutputError, match=r"run.json: the disk is full"),
        ):
            folder.begin(facts())
        with pytest.raises(OutputError, match=r"run_it002_checkpoint.npz: the disk is full"):
            write_checkpoint(tmp_path / "run_it002_checkpoint", checkpoint(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
