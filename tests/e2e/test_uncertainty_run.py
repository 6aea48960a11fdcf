"""What a run leaves of its doubts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import starfile
from gemmi import cif

import faml_gpu
from faml_gpu import faml, pipeline
from faml_gpu.data import Checkpoint
from faml_gpu.geometry import random_rotations
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.posteriors import best_poses, one_hot
from faml_gpu.report.summary import read_summary
from faml_gpu.run_folder import RunFolder
from faml_gpu.simulate import groel, simulate_particles
from faml_gpu.weights import missing_wedge


def test_side_table_of_a_run(tmp_path: Path, small_star: Path) -> None:
    out = tmp_path / "out"
    result = faml_gpu.classify(
        small_star, 2, out, tilt_range=(-60, 60), iterations=1, device="cpu", sampler="magnitude", bandwidth=6
    )
    table = starfile.read(out / "run_class_posteriors.star")
    names = starfile.read(out / "run_data.star")["particles"]["rlnImageName"]
    assert list(table["rlnImageName"]) == list(names)
    columns = table[["famlClassProbability001", "famlClassProbability002"]].to_numpy()
    np.testing.assert_allclose(columns, result.posterior.class_probability, atol=1e-9)
    np.testing.assert_allclose(columns.sum(axis=1), 1, atol=1e-6)
    assert (table["famlPoseEntropy"] <= np.log(table["rlnNrOfSignificantSamples"]) + 1e-9).all()
    model = starfile.read(out / "run_it001_model.star")["model_classes"]
    assert {"famlEffectiveParticles", "famlAngularCoverage", "famlFourierCoverage"} <= set(model.columns)
    assert json.loads((out / "run.json").read_text())["warnings"] == []
    faml_gpu.average(
        small_star, out, tilt_range=(-60, 60), iterations=1, device="cpu", sampler="magnitude", bandwidth=6,
        overwrite=True,
    )  # fmt: skip
    assert "famlClassProbability002" not in starfile.read(out / "run_class_posteriors.star").columns


def test_views_are_those_of_the_tomogram(tmp_path: Path) -> None:
    """Boxes that were cut in turned frames: in the model file, and in what is warned of."""
    n, rng = 60, np.random.default_rng(0)
    boxes = rng.standard_normal((n, 16, 16, 16)).astype(np.float32)
    particles = ArrayParticles(boxes, 24.0, missing_wedge(16, (-40, 40)))
    turned = ArrayParticles(boxes, 24.0, missing_wedge(16, (-40, 40)))
    turned.frames = random_rotations(n, rng)  # type: ignore[attr-defined]
    upright = one_hot(np.zeros(n, np.int64), np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3)), 1, known=True)
    options = Options(iterations=1, device="cpu", bandwidth=6, sampler="magnitude", folds=1)
    result = faml.run(particles, options)
    seen = [replace(result.history[0], coverage=[0.6])]
    result = replace(result, posterior=upright, best=best_poses(upright), history=seen)
    assert [text[:40] for text in pipeline._doubts(result, particles)] == ["class 1 has a preferred orientation: ang"]
    assert pipeline._doubts(result, turned) == []
    done = Checkpoint(result.state, upright, result.history)
    for name, source, low, high in (("a", particles, 0, 1e-9), ("b", turned, 0.8, 1)):
        with RunFolder(tmp_path / name) as folder:
            folder.begin({"options": {}, "input": {}, "start": {}, "versions": {}})
            folder.write_iteration(done, source)
        model = cif.read_file(str(tmp_path / name / "run_it001_model.star")).find_block("model_classes")
        assert low <= float(model.find_loop("_famlAngularCoverage")[0]) <= high


def test_a_wedge_that_does_not_fit_is_told_to_the_end(tmp_path: Path, small_star: Path) -> None:
    """At once, in run.json from the start, and in the report: of a run that was stopped, too."""
    out = tmp_path / "out"

    class StopError(Exception):
        pass

    def stop(_: object) -> None:
        raise StopError

    arguments = {"tilt_range": (-60, 60), "tilt_axis": "x", "iterations": 2, "device": "cpu", "bandwidth": 6}
    with pytest.warns(UserWarning, match="weights and boxes do not fit") as told, pytest.raises(StopError):
        faml_gpu.average(small_star, out, on_iteration=stop, **arguments)
    (text,) = [str(w.message) for w in told]
    assert "tilt range -60 60 about x (6 boxes)" in text
    assert "the tilt axis seems to be the other one" in text
    assert json.loads((out / "run.json").read_text())["warnings"] == [text]
    assert text in read_summary(out).doubts()
    with pytest.warns(UserWarning, match="weights and boxes do not fit") as told:
        faml_gpu.average(small_star, out, resume=True, **arguments)
    assert [str(w.message) for w in told].count(text) == 1
    assert json.loads((out / "run.json").read_text())["warnings"][0] == text
    assert text in read_summary(out).doubts()
    assert text in re.sub(r"</?code>", "", unescape((out / "report.html").read_text()))


def test_shifts_beyond_what_is_looked_at_are_told(tmp_path: Path) -> None:
    data = simulate_particles([groel()], [12], box=16, voxel_size=24.0, snr=0.5, max_shift=1.5, seed=1)
    particles = ArrayParticles(data.boxes, data.voxel_size, data.weight)
    with pytest.warns(UserWarning, match="raise --max-shift"):
        faml_gpu.average(particles, tmp_path / "out", iterations=1, device="cpu", bandwidth=6, max_shift=15.0)
    assert len(json.loads((tmp_path / "out/run.json").read_text())["warnings"]) == 1
