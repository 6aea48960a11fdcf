"""What a run leaves of its doubts."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import starfile

import faml_gpu
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.report.summary import read_summary
from faml_gpu.simulate import groel, simulate_particles


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
    assert text in unescape((out / "report.html").read_text())


def test_shifts_beyond_what_is_looked_at_are_told(tmp_path: Path) -> None:
    data = simulate_particles([groel()], [12], box=16, voxel_size=24.0, snr=0.5, max_shift=1.5, seed=1)
    particles = ArrayParticles(data.boxes, data.voxel_size, data.weight)
    with pytest.warns(UserWarning, match="raise --max-shift"):
        faml_gpu.average(particles, tmp_path / "out", iterations=1, device="cpu", bandwidth=6, max_shift=15.0)
    assert len(json.loads((tmp_path / "out/run.json").read_text())["warnings"]) == 1
