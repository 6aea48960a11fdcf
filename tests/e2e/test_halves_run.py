"""`--halves` as a user runs it: what it leaves, that it goes on after any stop, and that noise shows nothing."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile
from gemmi import cif
from typer.testing import CliRunner

import faml_gpu
from faml_gpu import halves
from faml_gpu.cli import app
from faml_gpu.data import IterationRecord, ParticleSource, Result
from faml_gpu.errors import InputError
from faml_gpu.fsc import fsc
from faml_gpu.halves import HalvesResult
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.io.star import write_particles_star
from faml_gpu.masks import soft_sphere
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.posteriors import best_poses, one_hot
from faml_gpu.run_folder import read_checkpoint
from faml_gpu.simulate import density, ribosome, simulate_particles
from faml_gpu.starting import final_averages
from faml_gpu.stopping import Stopping
from faml_gpu.weights import missing_wedge

BOX, VOXEL = 16, 24.0
OPTIONS: dict[str, Any] = {
    "tilt_range": (-60.0, 60.0),
    "halves": True,
    "iterations": 3,
    "bandwidth": 6,
    "candidates": 4,
    "mask_radius": 120.0,
    "seed": 3,
}
FLAGS = shlex.split(
    "--tilt-range -60 60 --halves --iterations 3 --bandwidth 6 --candidates 4 --mask-radius 120 --seed 3"
)
START = 384 / 5  # Angstrom, five shells: what the mask radius makes the common start


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return str(result.output)


def results(folder: Path) -> dict[str, bytes]:
    """All a run computed, timings apart."""
    kept = (".mrc", ".png", "_data.star", "_fsc.json", "_posteriors.star")
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(kept) or p.name.startswith("post")}
    for path in folder.glob("*_checkpoint.npz"):
        with np.load(path) as arrays:
            found |= {f"{path.name} {key}": arrays[key].tobytes() for key in arrays.files if key != "history"}
    return found


def histories(folder: Path) -> list[list[dict[str, Any]]]:
    """Of the halves, as run.json tells them."""
    return [part["iterations"] for part in json.loads((folder / "run.json").read_text())["iterations_of_halves"]]


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [1, 2])
def test_what_a_run_with_halves_leaves(n_classes: int, small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["average"] if n_classes == 1 else ["classify", "-k", "2"]
    printed = run(*command, small_star, "-o", out, *FLAGS)
    names = {path.name for path in out.iterdir() if not path.name.startswith("run_it")}
    expected = {"run.json", "run.toml", "run_data.star", "run_class_posteriors.star", "run_coverage.npz"}
    expected |= {"report.html", "run.cxc", "run_classes.png"}
    expected |= {f"run_class{k:03d}_angdist.bild" for k in range(1, n_classes + 1)}
    for k in range(1, n_classes + 1):
        root = "postprocess" if n_classes == 1 else f"postprocess_class{k:03d}"
        expected |= {f"{root}{end}" for end in (".mrc", ".star", "_fsc.json", "_fsc.png")}
        expected |= {f"run_half{half}_class{k:03d}_unfil.mrc" for half in (1, 2)} | {f"run_class{k:03d}.mrc"}
        assert f"class {k}: halves of" in printed
        report = json.loads((out / f"{root}_fsc.json").read_text())
        told = cif.read_file(str(out / f"{root}.star")).find_block("general").find_value("_rlnFinalResolution")
        assert float(told) == pytest.approx(report["resolution"])
        assert report == {**report, **json.loads((out / "run.json").read_text())["halves"][k - 1]}
        for half in (1, 2):
            assert (out / f"run_it003_half{half}_class{k:03d}.mrc").exists()
            kept = sorted(out.glob(f"run_it*_half{half}_class{k:03d}_checkpoint.*"))
            assert [path.name[:9] for path in kept] == ["run_it002"] * 2 + ["run_it003"] * 2
    assert names == expected
    told = [(p["class"], p["half"]) for p in json.loads((out / "run.json").read_text())["iterations_of_halves"]]
    assert told == [(k, half) for k in range(1, n_classes + 1) for half in (1, 2)]
    assert histories(out) == [
        json.loads(str(np.load(out / f"run_it003_half{half}_class{k:03d}_checkpoint.npz")["history"]))
        for k, half in told
    ]
    assert '<h2 id="fsc">' in (out / "report.html").read_text()
    assert "half 2  3/3  L " in printed

    particles = starfile.read(out / "run_data.star")["particles"]
    sizes = np.bincount(particles["rlnClassNumber"], minlength=n_classes + 1)[1:]
    for k, about in enumerate(json.loads((out / "run.json").read_text())["halves"], start=1):
        subset = particles["rlnRandomSubset"][particles["rlnClassNumber"] == k]
        assert about["particles"] == [(subset == 1).sum(), (subset == 2).sum()]
        assert sum(about["particles"]) == sizes[k - 1]
        assert about["start_resolution"] == pytest.approx(START)


def test_the_mask_and_the_sharpening_of_the_final_map(small_star: Path, tmp_path: Path) -> None:
    """As asked for, and by --resume otherwise: the halves stay, what is made of them is made anew."""
    out, box = tmp_path / "out", soft_sphere(BOX, 3.0, 2.0)
    write_mrc(tmp_path / "mask.mrc", box, VOXEL)
    once = [*FLAGS, "--iterations", "1"]

    def outcome() -> tuple[np.ndarray, np.ndarray, Any]:
        star = cif.read_file(str(out / "postprocess.star"))
        curve = star.find_block("fsc").find_values("_rlnFourierShellCorrelationMaskedMaps")
        spectrum = np.fft.rfftn(read_mrc(out / "postprocess.mrc")[0])
        return spectrum, np.array([float(v) for v in curve]), star.find_block("general")

    # All around is seen: the curve is that of the half maps in the mask.
    run("average", small_star, "-o", out, *once, "--tilt-range", "-90", "90", "--fsc-mask", tmp_path / "mask.mrc")
    plain, curve, general = outcome()
    one, two = (read_mrc(out / f"run_half{half}_class001_unfil.mrc")[0] for half in (1, 2))
    np.testing.assert_allclose(curve[1:7], fsc(one, two, box)[1:7], atol=1e-5)  # shells that are whole
    assert cif.as_string(general.find_value("_rlnMaskName")) == str(tmp_path / "mask.mrc")
    assert general.find_value("_rlnBfactorUsedForSharpening") is None
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("run_it*")}

    again = [*once, "--tilt-range", "-90", "90", "--resume", "--b-factor", "-20000"]
    printed = run("average", small_star, "-o", out, *again, "--fsc-mask", tmp_path / "mask.mrc")
    assert "1/1" not in printed  # no iteration
    sharp, same, general = outcome()
    np.testing.assert_allclose(same, curve, atol=1e-9)
    k = np.fft.fftfreq(BOX, 1 / BOX)
    s2 = (k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(BOX // 2 + 1) ** 2) / (BOX * VOXEL) ** 2
    np.testing.assert_allclose(sharp, plain * np.exp(20000 * s2 / 4), atol=1e-5 * np.abs(sharp).max())
    assert np.abs(sharp - plain).max() > 0.05 * np.abs(plain).max()
    assert float(general.find_value("_rlnBfactorUsedForSharpening")) == -20000

    run("average", small_star, "-o", out, *again)  # by the sphere of the alignment again
    _, other, general = outcome()
    np.testing.assert_allclose(other[1:7], fsc(one, two, soft_sphere(BOX, 5.0, 3.0))[1:7], atol=1e-5)
    assert general.find_value("_rlnMaskName") is None
    for half, before in ((1, one), (2, two)):
        np.testing.assert_array_equal(read_mrc(out / f"run_half{half}_class001_unfil.mrc")[0], before)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("run_it*")} == kept
    told = tomllib.loads((out / "run.toml").read_text())
    assert told["b_factor"] == -20000
    assert "fsc_mask" not in told

    # A mask that the run would replace is one of its own files.
    write_mrc(out / "run_it009_class001.mrc", box, VOXEL)
    refused = run("average", small_star, "-o", out, *again, "--fsc-mask", out / "run_it009_class001.mrc", status=2)
    assert "would replace its input run_it009_class001.mrc" in refused


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_masks_and_b_factors_that_do_not_fit_are_refused_at_once(
    dry: list[str], small_star: Path, tmp_path: Path
) -> None:
    out, mask = tmp_path / "out", tmp_path / "mask.mrc"
    plain = [flag for flag in FLAGS if flag != "--halves"]
    for values, voxel, flags, message in [
        (np.ones((BOX,) * 3), VOXEL, [*plain, "--fsc-mask", mask], "option fsc_mask: found no halves to compare"),
        (None, VOXEL, [*plain, "--b-factor", "-300"], "option b_factor: found -300.0, expected none without halves"),
        (None, VOXEL, [*FLAGS, "--b-factor", "-1e9"], "option b-factor: found -1e+09 A^2, expected -368640 to 368640"),
        (None, VOXEL, [*FLAGS, "--fsc-mask", mask], "mask.mrc: cannot be read"),
        (np.ones((8,) * 3), VOXEL, [*FLAGS, "--fsc-mask", mask], "found a box of 8 voxels, expected 16 as in the part"),
        (
            np.ones((BOX,) * 3),
            20.0,
            [*FLAGS, "--fsc-mask", mask],
            "found a voxel size of 20 A, expected 24 A as in the",
        ),
        (np.full((BOX,) * 3, 2), VOXEL, [*FLAGS, "--fsc-mask", mask], "found values 2 to 2, expected a mask of 0 to 1"),
    ]:
        mask.unlink(missing_ok=True)
        if values is not None:
            write_mrc(mask, values, voxel)
        assert message in run("average", small_star, "-o", out, *flags, *dry, status=2)
    assert not out.exists()
    with pytest.raises(InputError, match="mask: found a box of 8 voxels"):
        faml_gpu.average(small_star, **OPTIONS, fsc_mask=np.ones((8,) * 3))


def test_python_gives_what_the_command_writes(small_star: Path, tmp_path: Path) -> None:
    run("average", small_star, "-o", tmp_path / "out", *FLAGS)
    result = faml_gpu.average(small_star, **OPTIONS)
    assert isinstance(result, HalvesResult)
    np.testing.assert_array_equal(read_mrc(tmp_path / "out/run_class001.mrc")[0], result.maps[0])
    np.testing.assert_array_equal(read_mrc(tmp_path / "out/run_half2_class001_unfil.mrc")[0], result.halves[0].maps[1])
    subset = starfile.read(tmp_path / "out/run_data.star")["particles"]["rlnRandomSubset"]
    np.testing.assert_array_equal(subset, result.half)


def test_poses_belong_to_the_average(small_star: Path) -> None:
    """The average over the poses told, class by class, is the map told."""
    result = faml_gpu.classify(small_star, 2, **OPTIONS)
    source = open_particles(small_star, tilt_range=(-60, 60))
    plan = Plan.make(source, Options(n_classes=2, bandwidth=6, mask_radius=120.0))
    again = final_averages(plan, source, result.posterior)
    assert np.abs(again - result.maps).max() < 1e-4 * np.abs(result.maps).max()
    sums = np.bincount(result.posterior.particle, result.posterior.probability)
    np.testing.assert_allclose(sums, 1, atol=1e-9)


def test_overwrite_removes_these_files_and_no_other(small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("average", small_star, "-o", out, *FLAGS)
    mine = [
        "run_half1_class001.mrc",
        "postprocess_masked.mrc",
        "postprocess_notes.star",
        "run_half3_class001_unfil.mrc",
    ]
    for name in mine:
        (out / name).write_text("mine")
    plain = [flag for flag in FLAGS if flag != "--halves"]
    run("average", small_star, "-o", out, *plain, "--overwrite")
    left = {path.name for path in out.iterdir()}
    assert set(mine) <= left
    assert not {name for name in left - set(mine) if "half" in name or "postprocess" in name}
    assert "halves" not in json.loads((out / "run.json").read_text())


def test_files_of_halves_are_a_run_and_go_at_once(small_star: Path, tmp_path: Path) -> None:
    """Not only when the new run has files of its own: it may be stopped before."""
    out = tmp_path / "out"
    out.mkdir()
    names = ["postprocess_class001_fsc.json", "run_half1_class001_unfil.mrc", "run_it001_half2_class001_checkpoint.npz"]
    for name in [*names, "run.json"]:
        (out / name).write_text("")
    with pytest.raises(InputError, match=r"found another run \(4 files\)"):
        faml_gpu.average(small_star, out, **OPTIONS)

    def stop(name: str, done: int, total: int) -> None:
        if name.startswith("iteration"):
            raise StopError

    with pytest.raises(StopError):
        faml_gpu.average(small_star, out, overwrite=True, progress=stop, **OPTIONS)
    assert {path.name for path in out.iterdir()} == {"run.json", "run.toml"}


def test_two_particles_are_two_halves(tmp_path: Path) -> None:
    boxes = np.random.default_rng(0).standard_normal((2, BOX, BOX, BOX))
    source = ArrayParticles(boxes, VOXEL, missing_wedge(BOX, (-60.0, 60.0)))
    result = faml_gpu.average(source, tmp_path / "out", halves=True, iterations=1, bandwidth=6, candidates=4)
    assert sorted(result.half) == [1, 2]
    assert not result.halves[0].beyond_start


# --- stopping and going on -----------------------------------------------------------------------------------


class StopError(Exception):
    pass


def stop_at(part: str, iteration: int) -> Callable[[IterationRecord], None]:
    def stop(record: IterationRecord) -> None:
        if (record.part, record.iteration) == (part, iteration):
            raise StopError

    return stop


@pytest.fixture(scope="module")
def unbroken() -> dict[str, bytes]:
    return {}


@pytest.fixture
def whole(small_star: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> dict[str, bytes]:
    """Of the run that is not stopped; made once."""
    if not unbroken:
        faml_gpu.classify(small_star, 2, tmp_path / "unbroken", **OPTIONS)
        unbroken |= results(tmp_path / "unbroken")
    return unbroken


@pytest.mark.parametrize(
    ("part", "iteration"), [("", 2), ("", 3), ("class 1, half 1", 1), ("class 1, half 2", 3), ("class 2, half 1", 2)]
)
def test_resumed_equals_unbroken(
    part: str, iteration: int, small_star: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        faml_gpu.classify(small_star, 2, out, on_iteration=stop_at(part, iteration), **OPTIONS)
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert not (out / "run_data.star").exists()
    seen: list[tuple[str, int]] = []
    faml_gpu.classify(
        small_star, 2, out, resume=True, on_iteration=lambda r: seen.append((r.part, r.iteration)), **OPTIONS
    )
    order = [(p, i) for p in ("", *(f"class {k}, half {h}" for k in (1, 2) for h in (1, 2))) for i in (1, 2, 3)]
    assert seen == order[order.index((part, iteration)) + 1 :]
    assert results(out) == whole
    assert [[r["iteration"] for r in history] for history in histories(out)] == [[1, 2, 3]] * 4


def test_stopped_within_an_iteration_of_a_half(small_star: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out, stopping = tmp_path / "out", Stopping()

    def stop(name: str, done: int, total: int) -> None:
        if (name, done) == ("class 1, half 2, iteration 2", 1):
            stopping.ask(StopError())

    with pytest.raises(StopError):
        faml_gpu.classify(small_star, 2, out, progress=stop, stopping=stopping, **OPTIONS)
    assert re.fullmatch(r"kept: 1 of \d particles of iteration 2 of class 1, half 2", stopping.kept)
    assert (out / "run_half2_class001_unfinished.npz").exists()
    told: list[tuple[str, int]] = []
    faml_gpu.classify(small_star, 2, out, resume=True, progress=lambda *step: told.append(step[:2]), **OPTIONS)
    assert next(step for step in told if "iteration" in step[0]) == ("class 1, half 2, iteration 2", 1)
    assert results(out) == whole
    assert not list(out.glob("*_unfinished.*"))


def test_sigkill(small_star: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """While the halves are being averaged."""
    out = tmp_path / "out"
    program = [sys.executable, "-c", "from faml_gpu.cli import main; main()"]
    command = [*program, "classify", str(small_star), "-k", "2", "-o", str(out), *FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 180
    while not (out / "run_it001_half2_class001_checkpoint.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no half within three minutes"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "run_data.star").exists()
    run("classify", small_star, "-k", "2", "-o", out, *FLAGS, "--resume")
    assert results(out) == whole
    assert not list(out.glob(".*"))


# Before the last checkpoint of all particles is whole, within a half, among the final files; the others are slow.
FILES = [24, 62, 90, *(pytest.param(n, marks=pytest.mark.slow) for n in (22, 23, 26, 29, 38, 70, 72, 77, 81))]


@pytest.mark.parametrize("writes", FILES)
def test_killed_at_any_file(
    writes: int, small_star: Path, tmp_path: Path, whole: dict[str, bytes], disk_full: Any
) -> None:
    """The disk is full after some files: whatever is there is whole, and the run goes on once there is room."""
    out = tmp_path / "out"
    with disk_full(out, writes), pytest.raises(faml_gpu.OutputError, match="disk is full"):
        faml_gpu.classify(small_star, 2, out, **OPTIONS)
    for path in out.glob("*.mrc"):
        assert path.read_bytes() == whole[path.name]
    for path in out.glob("*_checkpoint.json"):
        read_checkpoint(path.with_suffix(""))
    faml_gpu.classify(small_star, 2, out, resume=True, **OPTIONS)
    assert results(out) == whole


def test_a_damaged_checkpoint_of_a_half_costs_only_time(
    small_star: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        faml_gpu.classify(small_star, 2, out, on_iteration=stop_at("class 1, half 2", 1), **OPTIONS)
    damaged = out / "run_it001_half2_class001_checkpoint.npz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="run_it001_half2_class001_checkpoint.json is damaged"):
        faml_gpu.classify(small_star, 2, out, resume=True, **OPTIONS)
    assert results(out) == whole


def test_more_iterations_begin_the_halves_again(small_star: Path, tmp_path: Path) -> None:
    """The run of all particles goes on, so the halves begin with other averages: what was found before is gone."""
    out, seen = tmp_path / "out", []
    first = faml_gpu.average(small_star, out, **{**OPTIONS, "iterations": 1})
    assert first.converged_at is None
    faml_gpu.average(
        small_star,
        out,
        resume=True,
        on_iteration=lambda r: seen.append((r.part, r.iteration)),
        **{**OPTIONS, "iterations": 2},
    )
    assert seen == [("", 2), *((f"half {h}", i) for h in (1, 2) for i in (1, 2))]
    assert [[r["iteration"] for r in history] for history in histories(out)] == [[1, 2]] * 2


def test_halves_cannot_be_taken_up_or_dropped_on_the_way(small_star: Path, tmp_path: Path) -> None:
    faml_gpu.average(small_star, tmp_path / "out", **{**OPTIONS, "iterations": 1})
    with pytest.raises(InputError, match="option halves: found False, expected True"):
        faml_gpu.average(small_star, tmp_path / "out", resume=True, **{**OPTIONS, "iterations": 1, "halves": False})


# --- what the halves share -----------------------------------------------------------------------------------


def test_halves_share_no_particle_and_nothing_finer_than_their_start(
    small_star: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = halves.faml.run

    def recorded(particles: ParticleSource, options: Options, **rest: Any) -> Result:
        result = original(particles, options, **rest)
        calls.append({"particles": particles, "result": result, **rest})
        return result

    monkeypatch.setattr(halves.faml, "run", recorded)
    result = faml_gpu.classify(small_star, 2, **OPTIONS)
    together, *of_halves = calls
    assert max(record.r_max for record in together["result"].history) == 5  # of 7: not beyond START
    assert max(record.r_max for call in of_halves for record in call["result"].history) == 7
    assert len(of_halves) == 4
    seen: set[int] = set()
    for k, (first, second) in enumerate(zip(of_halves[::2], of_halves[1::2], strict=True)):
        np.testing.assert_array_equal(first["reference"], second["reference"])
        np.testing.assert_array_equal(first["reference"], together["result"].maps[k])
        assert first["initial_lowpass"] == second["initial_lowpass"] == pytest.approx(START)
        for half, call in ((1, first), (2, second)):
            inner = call["particles"]
            members = inner.source.indices[inner.indices]
            assert not seen & set(members)
            seen |= set(members)
            assert (result.half[members] == half).all()
            assert (together["result"].best.classes[members] == k).all()
    assert seen == set(range(6))


def test_halves_the_star_file_states_are_kept(small_star: Path, tmp_path: Path) -> None:
    path = small_star.with_name("stated.star")
    source = open_particles(small_star, tilt_range=(-60, 60))
    write_particles_star(path, source.table, {"rlnRandomSubset": [2, 1, 1, 2, 2, 2]})
    faml_gpu.average(path, tmp_path / "out", **{**OPTIONS, "iterations": 1})
    subset = starfile.read(tmp_path / "out/run_data.star")["particles"]["rlnRandomSubset"]
    assert list(subset) == [2, 1, 1, 2, 2, 2]
    write_particles_star(path, source.table, {"rlnRandomSubset": [2, 1, 1, 0, 2, 2]})
    with pytest.raises(InputError, match="rlnRandomSubset is 0, expected 1 or 2"):
        faml_gpu.average(path, tmp_path / "other", **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_a_class_too_small_for_halves_is_left_out(
    small_star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = halves.faml.run

    def one_alone(particles: ParticleSource, options: Options, **rest: Any) -> Result:
        """Three classes: five particles, one particle, none."""
        result = original(particles, options, **rest)
        if options.n_classes == 1:
            return result
        classes = np.array([0, 0, 0, 1, 0, 0])
        posterior = one_hot(classes, result.best.rotations, result.best.shifts, 3, known=True)
        return replace(result, posterior=posterior, best=best_poses(posterior))

    monkeypatch.setattr(halves.faml, "run", one_alone)
    with pytest.warns(UserWarning, match="too few for halves") as told:
        result = faml_gpu.classify(small_star, 3, tmp_path / "out", **{**OPTIONS, "iterations": 1})
    texts = [str(warning.message) for warning in told]
    assert any("class 2: found 1 particles, too few for halves" in text for text in texts)
    assert any("class 3: found 0 particles, too few for halves" in text for text in texts)
    assert [found is None for found in result.halves] == [False, True, True]
    np.testing.assert_array_equal(result.best.classes, [0, 0, 0, 1, 0, 0])
    about = json.loads((tmp_path / "out/run.json").read_text())
    assert about["halves"][1:] == [None, None]
    assert set(texts) == set(about["warnings"])
    assert (tmp_path / "out/run_class002.mrc").exists()
    assert not (tmp_path / "out/run_half1_class002_unfil.mrc").exists()
    subset = starfile.read(tmp_path / "out/run_data.star")["particles"]["rlnRandomSubset"]
    assert set(subset) <= {1, 2}
    assert sorted(result.halves[0].half) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("asked", [700.0, 60.0, 0.0])
def test_a_start_with_nothing_beyond_it_is_refused(asked: float, small_star: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"initial.lowpass: found"):
        faml_gpu.average(small_star, tmp_path / "out", initial_lowpass=asked, **OPTIONS)
    assert not (tmp_path / "out").exists()


# --- what they show ------------------------------------------------------------------------------------------


# Noise lies anywhere, and one of two classes may take all of it.
@pytest.mark.filterwarnings("ignore:.*raise --max-shift", "ignore:class .. found 0 particles")
@pytest.mark.parametrize(("n_classes", "start"), [(1, "random"), (1, "wrong"), (2, "random")])
def test_noise_shows_nothing_beyond_its_start(n_classes: int, start: str, tmp_path: Path) -> None:
    weight = missing_wedge(BOX, (-60.0, 60.0))
    boxes = np.random.default_rng(n_classes).standard_normal((20 * n_classes, BOX, BOX, BOX))
    seen = np.fft.irfftn(np.fft.rfftn(boxes, axes=(1, 2, 3)) * weight, s=(BOX,) * 3, axes=(1, 2, 3))
    result = faml_gpu.classify(
        ArrayParticles(seen, VOXEL, weight),
        n_classes,
        tmp_path / "out",
        reference=density(ribosome(), BOX, VOXEL) if start == "wrong" else None,
        initial_lowpass=120.0,  # shell 3
        halves=True,
        iterations=3,
        bandwidth=8,
        candidates=8,
        threads=2,
    )
    shown = [(k, found) for k, found in enumerate(result.halves, start=1) if found is not None]
    assert max(found.curves.corrected[2] for _, found in shown) > 0.5  # they do agree, on the start
    for k, found in shown:
        assert not found.beyond_start
        assert found.resolution == 120.0
        name = "postprocess.star" if n_classes == 1 else f"postprocess_class{k:03d}.star"
        general = cif.read_file(str(tmp_path / "out" / name)).find_block("general")
        assert float(general.find_value("_rlnFinalResolution")) == pytest.approx(120.0)
        about = json.loads((tmp_path / "out/run.json").read_text())["halves"][k - 1]
        assert about["resolution"] == about["resolution_05"] == 120.0
        assert about["beyond_start"] is False


def test_a_structure_shows_more_than_its_start() -> None:
    data = simulate_particles([ribosome()], [24], box=BOX, voxel_size=VOXEL, snr=0.5, seed=3, max_shift=1.0)
    result = faml_gpu.average(
        ArrayParticles(data.boxes, VOXEL, data.weight),
        reference=density(ribosome(), BOX, VOXEL),
        initial_lowpass=110.0,
        halves=True,
        iterations=4,
        bandwidth=8,
        candidates=12,
        mask_radius=130.0,
        threads=2,
    )
    (found,) = result.halves
    assert found.beyond_start
    assert found.resolution < 60
