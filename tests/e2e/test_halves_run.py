"""`--halves`: half sets of each class after a run, their files, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import starfile
from typer.testing import CliRunner

import faml_gpu
from faml_gpu import run_folder
from faml_gpu.cli import app
from faml_gpu.errors import InputError
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles

OPTIONS = {"tilt_range": (-60.0, 60.0), "mask_radius": 115.0, "iterations": 3, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def mixture() -> Simulation:
    return simulate_particles(
        [groel(), ribosome()], [10, 10], box=20, voxel_size=16.0, snr=0.5, max_shift=1.0, seed=5, resolution=40.0
    )


@pytest.fixture(scope="module")
def boxes(mixture: Simulation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    for i, box in enumerate(mixture.boxes):
        write_mrc(folder / f"p{i:02d}.mrc", box, 16.0)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All that is compared: not run.json, which has times, nor what only a resumed run needs."""
    names = [p for p in folder.iterdir() if "checkpoint" not in p.name and p.suffix in (".mrc", ".star")]
    return {p.name: p.read_bytes() for p in names if "_it" not in p.name}


def test_half_sets_of_each_class(boxes: Path, tmp_path: Path) -> None:
    result = faml_gpu.classify(boxes, 2, tmp_path, halves=True, **OPTIONS)  # type: ignore[arg-type]
    assert len(result.halves) == 2
    table = starfile.read(tmp_path / "run_data.star", always_dict=True)["particles"]
    half, classes = table["rlnRandomSubset"].to_numpy(), table["rlnClassNumber"].to_numpy()
    assert set(half) == {1, 2}
    facts = json.loads((tmp_path / "run.json").read_text())["halves"]
    for k in (1, 2):
        sizes = [int(((half == h) & (classes == k)).sum()) for h in (1, 2)]
        assert facts[k - 1]["particles"] == sizes
        assert abs(sizes[0] - sizes[1]) <= 1
        for h in (1, 2):
            volume, voxel = read_mrc(tmp_path / f"run_half{h}_class00{k}_unfil.mrc")
            assert voxel == pytest.approx(16.0)
            np.testing.assert_allclose(volume, result.halves[k - 1].maps[h - 1], atol=1e-6)
        for end in (".mrc", ".star", "_fsc.json", "_fsc.png"):
            assert (tmp_path / f"postprocess_class00{k}{end}").is_file()
    with pytest.raises(InputError, match="found another run"):
        faml_gpu.classify(boxes, 2, tmp_path, **OPTIONS)  # type: ignore[arg-type]
    (tmp_path / "mine.mrc").write_text("not a run's")
    faml_gpu.classify(boxes, 2, tmp_path, overwrite=True, **OPTIONS)  # type: ignore[arg-type]
    assert not [p.name for p in tmp_path.iterdir() if "half" in p.name or "postprocess" in p.name]
    assert (tmp_path / "mine.mrc").exists()


def test_an_interrupted_half_goes_on_to_the_same_result(
    boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    faml_gpu.average(boxes, whole, halves=True, **OPTIONS)
    written = run_folder.RunFolder.write_half_iteration

    def killed(self: run_folder.RunFolder, class_number: int, half: int, checkpoint: object) -> None:
        written(self, class_number, half, checkpoint)  # type: ignore[arg-type]
        if half == 2 and checkpoint.state.iteration == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "write_half_iteration", killed)
        with pytest.raises(KeyboardInterrupt):
            faml_gpu.average(boxes, broken, halves=True, **OPTIONS)
    assert (broken / "run_half2_class001_it002_checkpoint.json").is_file()
    begun = []
    faml_gpu.average(
        boxes, broken, halves=True, resume=True,
        on_half_iteration=lambda k, h, row: begun.append((h, row.iteration)), **OPTIONS,
    )  # fmt: skip
    assert begun == [(2, 3)]  # nothing is done twice
    assert files(broken) == files(whole)
    # A run that went on has other averages: its halves begin again.
    longer = tmp_path / "longer"
    shutil.copytree(whole, longer)
    begun.clear()
    more = OPTIONS | {"iterations": 4}
    faml_gpu.average(
        boxes, longer, halves=True, resume=True,
        on_half_iteration=lambda k, h, row: begun.append((h, row.iteration)), **more,
    )  # fmt: skip
    assert begun[0] == (1, 1)


def test_a_class_without_two_halves_is_left_out(boxes: Path, tmp_path: Path) -> None:
    star = tmp_path / "particles.star"
    names = sorted(p.name for p in boxes.iterdir())
    rows = "\n".join(f"{boxes / name} {1}" for name in names)
    star.write_text(f"data_particles\n\nloop_\n_rlnImageName #1\n_rlnRandomSubset #2\n{rows}\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = faml_gpu.average(star, tmp_path / "out", halves=True, **OPTIONS)
    assert result.halves == (None,)
    assert any("class 1 has no two halves of its 20 particles" in str(w.message) for w in told)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["halves"] == [None]
    star.write_text(star.read_text().replace(" 1\n", " 3\n", 1))
    with pytest.raises(InputError, match="rlnRandomSubset is 3"):
        faml_gpu.average(star, tmp_path / "other", halves=True, **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_the_command_says_what_was_found(boxes: Path, tmp_path: Path) -> None:
    words = ["average", str(boxes), "-o", str(tmp_path / "out"), "--tilt-range", "-60", "60", "--mask-radius", "115"]
    words += ["--iterations", "2", "--device", "cpu", "--threads", "1", "--halves"]
    done = CliRunner().invoke(app, words, env={"TERM": "dumb", "COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "class 1 half 2  2/2" in done.output
    assert "half sets of 10 and 10 particles" in done.output
