"""`--dry-run`: checks what a run would, writes nothing, and reckons time and memory from a few particles."""

import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mrcfile
import numpy as np
import pytest
from typer.testing import CliRunner

from faml_gpu import dry_run, pipeline
from faml_gpu.cli import app
from faml_gpu.errors import InputError
from faml_gpu.halves import stated_halves
from faml_gpu.io.mrc import read_header, write_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.io.star import read_particles_star
from faml_gpu.options import Options
from faml_gpu.plan import Plan

FLAGS = ["--tilt-range", "-60", "60", "--mask-radius", "120", "--bandwidth", "6", "--candidates", "4"]


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"TERM": "dumb", "COLUMNS": "400"})
    assert done.exit_code == status, done.output
    return done.output


def test_it_tells_the_plan_and_writes_nothing(small_star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = run("classify", str(small_star), "-k", "2", "-o", str(out), "--dry-run", *FLAGS)
    lines = dict(line.split(maxsplit=1) for line in told.splitlines()[1:-1])
    assert lines["input"] == "6 boxes of 16 voxels of 24 Å (all read)"
    assert lines["plan"].startswith("2 classes, at most 20 iterations, detail from 77 to 54.9 Å, mask of 120 Å")
    assert " at all detail: " in lines["time"]
    by_evidence = run("average", str(small_star), "-o", str(out), "--dry-run", *FLAGS, "--band", "evidence")
    assert "detail from 77 to at most 54.9 Å" in by_evidence
    assert set(lines) == {"input", "plan", "time", "memory", "disk"}
    assert told.endswith("nothing was written\n")
    assert not out.exists()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data"]


def test_it_refuses_what_a_run_would(small_star: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "run.json").write_text("{}")

    def refused(*more: str) -> str:
        return run("average", str(small_star), "--dry-run", *FLAGS, *more, status=2)

    assert "found another run" in refused("-o", str(tmp_path / "there"))
    assert "found no run to go on with" in refused("-o", str(tmp_path / "new"), "--resume")
    assert "option mask-radius" in refused("-o", str(tmp_path / "new"), "--mask-radius", "1000")
    assert "nowhere.mrc" in refused("-o", str(tmp_path / "new"), "--reference", "nowhere.mrc")
    assert "device" in refused("-o", str(tmp_path / "new"), "--device", "tpu")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "there"}


@pytest.fixture
def many(small_star: Path, tmp_path: Path) -> Path:
    """A hundred particles of two optics groups, with poses and halves; boxes are copies of six."""
    table = read_particles_star(small_star)
    boxes = [small_star.parent / name for name in table.image_names]
    (tmp_path / "many").mkdir()
    rows = []
    for i in range(100):
        shutil.copy(boxes[i % 6], tmp_path / "many" / f"{i:03d}.mrc")
        rows.append(f"{i:03d}.mrc {1 + i // 50} {i} 20 30 {1 + i % 2}")
    columns = ("ImageName", "OpticsGroup", "AngleRot", "AngleTilt", "AnglePsi", "RandomSubset")
    head = "".join(f"_rln{name} #{k}\n" for k, name in enumerate(columns, 1))
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n1 24\n2 24\n\n"
    star = tmp_path / "many" / "particles.star"
    star.write_text(f"{optics}data_particles\n\nloop_\n{head}" + "\n".join(rows) + "\n")
    return star


def test_a_sample_is_the_same_particles(many: Path) -> None:
    whole = open_particles(many, tilt_range=(-60, 60), use_poses=True)
    some = open_particles(many, tilt_range=(-60, 60), use_poses=True, sample=4)
    rows = [0, 33, 66, 99]
    assert (len(some), some.listed, whole.listed) == (4, 100, 100)
    assert some.paths == [whole.paths[i] for i in rows]
    np.testing.assert_array_equal(some.read(np.arange(4)).boxes, whole.read(np.array(rows)).boxes)
    np.testing.assert_array_equal(some.poses.rotations, whole.poses.rotations[rows])
    np.testing.assert_array_equal(some.groups["optics"].index, [0, 0, 1, 1])
    assert len(open_particles(many, tilt_range=(-60, 60), sample=1000)) == 100
    assert stated_halves(some) is not None


def test_weights_of_a_sample(many: Path, tmp_path: Path) -> None:
    """Each particle its own, and only those of the sample are read."""
    text = many.read_text().replace("_rlnRandomSubset #6", "_rlnCtfImage #6")
    head, rows = text[: text.index("000.mrc")], text[text.index("000.mrc") :].splitlines()
    for i in range(100):
        weight = np.full((16, 16, 9), (i + 1) / 100, np.float32)
        if i != 50:
            write_mrc(many.parent / f"w{i}.mrc", weight, 24.0)
        else:
            (many.parent / "w50.mrc").write_bytes((many.parent / "w49.mrc").read_bytes()[:1500])
    new = [f"{row.rsplit(maxsplit=1)[0]} w{i}.mrc" for i, row in enumerate(rows)]
    star = many.with_name("weighted.star")
    star.write_text(head + "\n".join(new) + "\n")
    batch = open_particles(star, sample=3).read(np.arange(3))  # 0, 49, 99
    np.testing.assert_allclose(batch.weights[batch.weight_index].max(axis=(1, 2, 3)), [0.01, 0.5, 1.0], rtol=1e-6)
    with pytest.raises(InputError, match=r"w50\.mrc"):
        open_particles(star)


def test_all_headers_are_read(many: Path) -> None:
    with mrcfile.open(many.parent / "067.mrc", mode="r+") as mrc:
        mrc.voxel_size = 20.0
    with pytest.raises(InputError, match=r"067.mrc: voxel size 20 A"):
        pipeline.dry_run(many, 1, tilt_range=(-60, 60))


@dataclass(frozen=True)
class Theta:
    """What a run starts with: which particles its averages are of."""

    made_of: tuple[int, ...]
    iteration: int = 0


def test_the_forecast_by_hand(monkeypatch: pytest.MonkeyPatch, small_simulation) -> None:
    """Steps done once count once for each fold, the others for each particle; between bands a power of the band."""
    n, options = 1000, Options(n_classes=2, iterations=5, mask_radius=120.0, device="cpu", threads=1)
    particles = ArrayParticles(np.tile(small_simulation.boxes, (5, 1, 1, 1)), 24.0, small_simulation.weight)
    calls: list[tuple[int, int, int]] = []
    batches: list[int] = []
    clock = [0.0]

    def begin(plan: Plan, chosen, reference, use_poses):
        clock[0] += 0.02 * len(chosen)
        return SimpleNamespace(state=Theta(tuple(chosen.indices)))

    def iterate(plan: Plan, chosen, checkpoint):
        assert not {*chosen.indices} & {*checkpoint.state.made_of}  # compared with averages of others
        assert plan.options.choices.folds == 1
        calls.append((len(chosen), plan.r_max(1), checkpoint.state.iteration))
        batches.append(plan.batch.size)
        slow = 50 if len(calls) == 3 else 1  # something else was going on: the median leaves it out
        seconds = {"references": 0.1, "maximization": 0.2, "read": 0.01 * len(chosen), "rotate back": 0.0}
        seconds["pose integral"] = slow * 0.04 * len(chosen) * (plan.r_max(1) / 7) ** 3
        clock[0] += sum(seconds.values())
        return SimpleNamespace(history=[SimpleNamespace(seconds=seconds)])

    def found(options: Options, n: int = n) -> dry_run.Forecast:
        calls.clear()
        batches.clear()
        return dry_run.forecast(particles, options, n, device="cpu")

    monkeypatch.setattr(dry_run.faml, "begin", begin)
    monkeypatch.setattr(dry_run.faml, "iterate", iterate)
    monkeypatch.setattr(dry_run, "final_averages", lambda *a: None)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    one = found(options)
    plan = Plan.make(particles, options)
    assert (plan.r_start, plan.r_final) == (5, 7)
    at_full, at_coarse = ([call for call in calls if call[1] == r] for r in (7, 5))
    assert calls == at_full + at_coarse
    assert {iteration for _, _, iteration in at_full} == {19}  # as at the end of a run: symmetry and all
    assert {iteration for _, _, iteration in at_coarse} == {0}
    assert [count for count, _, _ in at_full] == [1, 1, 6, 6]  # some 0.3 s at a time, for a second, three at least
    assert (one.measured, one.batch) == (15, 16)  # all but the fifteen that averages are made of
    assert one.full == pytest.approx(0.3 * 10 + 0.05 * n)
    assert one.first == pytest.approx(0.3 * 10 + (0.01 + 0.04 * (5 / 7) ** 3) * n)
    power = np.log(one.full / one.first) / np.log(7 / 5)
    bands = [5, 6, 7, 7, 7]
    assert [plan.r_max(i) for i in range(1, 6)] == bands
    # The start, the iterations, averages in the end, and what any run takes.
    assert one.total == pytest.approx(0.02 * n + sum(one.first * (r / 5) ** power for r in bands) + 0.01 * n + 5)
    # By evidence nobody knows; at the most three shells an iteration.
    by_evidence = found(replace(options, band="evidence"))
    iterations = sum(one.first * (r / 5) ** power for r in (5, 7, 7, 7, 7))
    assert by_evidence.total == pytest.approx(0.02 * n + iterations + 0.01 * n + 5)
    alone = found(replace(options, folds=1))
    assert alone.full == pytest.approx(0.3 + 0.05 * n)
    assert alone.host < one.host
    assert found(replace(options, starts=4)).total - one.total == pytest.approx(
        3 * (0.02 * n + one.first)  # each its first iteration, a quarter of five
    )
    assert found(replace(options, halves=True)).total == pytest.approx(2 * one.total - 5)
    assert found(options, 55).batch == 5  # of a fold
    monkeypatch.setattr(dry_run, "cpu_threads", lambda n: nullcontext(4))
    found(options)
    assert {count % 4 for count, _, _ in calls} == {0}  # each thread has its share
    assert batches == [count // 4 for count, _, _ in calls]  # as many batches at a time as in the run
    found(options, 25)
    assert {count for count, _, _ in calls} == {4, 8}
    assert max(batches) == 2  # as in the run, whose folds have no more


def test_one_particle_is_enough(small_simulation) -> None:
    """There is none to compare it with but itself."""
    particles = ArrayParticles(small_simulation.boxes[:1], 24.0, small_simulation.weight)
    options = Options(mask_radius=120.0, device="cpu", bandwidth=6, candidates=4)
    found = dry_run.forecast(particles, options, 1, device="cpu")
    assert found.measured == 1
    assert 0 < found.first < found.total


def test_nothing_is_waited_for_that_is_not_needed() -> None:
    """Matplotlib takes half a second of ten."""
    code = "import sys, faml_gpu.pipeline, faml_gpu.dry_run; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_file_is_read_once(small_star: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows name it."""
    table = small_star.read_text()
    rows = [line for line in table.splitlines() if ".mrc" in line]
    small_star.write_text(table.rstrip("\n") + "\n" + "\n".join(rows * 30) + "\n")
    read = Mock(side_effect=read_header)
    monkeypatch.setattr("faml_gpu.io.particles.read_header", read)
    told = []
    some = open_particles(small_star, tilt_range=(-60, 60), sample=3, progress=lambda *call: told.append(call))
    assert some.listed == 186
    assert read.call_count == 6
    assert ("reading headers", 6, 6) in told
