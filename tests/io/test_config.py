"""Options in TOML: read back as written, wrong names found with the right one, and a run's own file runs it again."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from faml_gpu.cli import Shared, app
from faml_gpu.config import config_text, read_config
from faml_gpu.errors import InputError
from faml_gpu.io.mrc import read_mrc

NAMES = dict.fromkeys(("tilt_range", "resolution", "iterations", "normalize", "helix"), Any)


def test_text_reads_back() -> None:
    values = {
        "path": "a \"quoted\" \\ path\twith\nlines, é, \x01 \x7f and 𝄞", "empty": "", "n": -3, "x": 1e-7, "big": 1e22,
        "no": False, "yes": True, "pair": (-60.0, 60), "none": [], "unlimited": float("inf"),
    }  # fmt: skip
    text = config_text({**values, "left": None, "found": None}, {"found": 153.600000002, "path": 3}, "one\ntwo")
    assert tomllib.loads(text) == {**values, "pair": [-60.0, 60]}
    assert text.startswith("# one\n# two\n")
    assert text.splitlines()[-1] == "# found = 153.6   (automatic)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resoluton = 3", "found resoluton, which is no option; did you mean resolution?"),
        ("no-normalize = true", "found no-normalize, which is no option; did you mean normalize?"),
        ("qqq = 3", "found qqq, which is no option; expected one of helix, iterations, normalize"),
        ("tilt-range = [1]\ntilt_range = [1]", "found tilt_range twice"),
        ("[helix]\nrise = 1", "found a table helix, expected a value"),
        ("iterations = ", "not valid TOML: Invalid value"),
        ("a\0 = 1", "not valid TOML"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"run.toml: .*{re.escape(message)}"):
        read_config(path, NAMES)


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"path = '\xe9'")
    for name, message in (("nowhere", "No such file"), (".", "Is a directory"), ("latin", "byte 8 is no UTF-8")):
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / name, NAMES)


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"TERM": "dumb", "COLUMNS": "400"})
    assert done.exit_code == status, done.output
    return done.output


def test_every_option_can_stand_in_the_file(tmp_path: Path) -> None:
    other = {
        "output": tmp_path / "out", "tilt_range": (-60.0, 60.0), "voxel_size": 3.0, "boxes": "b",
        "reference": "map.mrc", "initial_lowpass": 60.0, "sampler": "joint", "update": "ratio",
        "mask_radius": 100.0, "resolution": 30.0, "band": "full", "max_shift": 20.0, "helix": (1.4, 22.0),
        "bandwidth": 12, "regularization": 0.5, "folds": 3, "noise_groups": "none", "reseed": False, "threads": 1,
        "log_json": tmp_path / "log.jsonl", "halves": True, "fsc_mask": "mask.mrc", "b_factor": -300.0,
    }  # fmt: skip
    usual = {f.name: f.default for f in fields(Shared) if f.name != "config"}
    values = {name: other.get(name, value) for name, value in usual.items()}
    assert None not in values.values()
    (tmp_path / "a.toml").write_text(
        config_text({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}, {})
    )
    for command in (["average"], ["classify", "-k", "2"]):
        told = run(*command, str(tmp_path / "nowhere.star"), "--config", str(tmp_path / "a.toml"), status=2)
        assert "nowhere.star" in told
    assert "found classes, which is no option" in config_error("average", "classes = 2", tmp_path)
    assert "found config, which is no option" in config_error("average", "config = 'a'", tmp_path)
    unknown = config_error("average", "o = 'a'", tmp_path)
    assert (
        "found o, which is no option; expected one of b_factor, band, bandwidth, boxes, candidates, device" in unknown
    )
    for text, told in (
        ("iterations = 'ten'", 'b.toml: iterations is "ten", expected a whole number'),
        ("iterations = true", "iterations is true, expected a whole number"),
        ("iterations = 2.5", "iterations is 2.5, expected a whole number"),
        ("tilt-range = [1]", "tilt-range is [1], expected [a number, a number]"),
        ("tilt-range = [1, true]", "tilt-range is [1, true], expected [a number, a number]"),
        ("symmetry = ['C1']", 'symmetry is ["C1"], expected text in quotes'),
        ("method = 'best'", 'method is "best", expected one of faml, fa'),
        ("normalize = 1", "normalize is 1, expected true or false"),
        ("output = 3", "output is 3, expected text in quotes"),
        ("particles = ['a']", 'particles is ["a"], expected text in quotes'),
        ("seed = 2026-11-23", "seed is 2026-11-23, expected a whole number"),
    ):
        assert told in config_error("average", text, tmp_path)


def config_error(command: str, text: str, folder: Path) -> str:
    (folder / "b.toml").write_text(text)
    return run(command, "x.star", "-o", str(folder / "out"), "--config", str(folder / "b.toml"), status=2)


def test_a_run_is_run_again_by_its_own_file(small_star: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        f'particles = "{small_star}"\nclasses = 2\ntilt_range = [-60, 60]\nmask-radius = 120\niterations = 2\n'
        'resolution = 96\nsampler = "magnitude"\nbandwidth = 8\nfolds = 2\nseed = 4\ndevice = "cpu"\n'
    )
    first, again = tmp_path / "first", tmp_path / "again"
    assert "1/1" in run("classify", "--config", str(tmp_path / "my.toml"), "-o", str(first), "--iterations", "1")
    assert run("classify", "--config", str(first / "run.toml"), "-o", str(again))
    assert (first / "run.toml").read_text() == (again / "run.toml").read_text()
    kept = tomllib.loads((first / "run.toml").read_text())
    assert kept["iterations"] == 1  # the command line wins
    assert (kept["mask_radius"], kept["seed"], kept["classes"]) == (120.0, 4, 2)
    for k in (1, 2):
        a, b = (read_mrc(folder / f"run_class00{k}.mrc")[0] for folder in (first, again))
        assert (a == b).all()
    single = tmp_path / "single"
    run("average", "--config", str(small_star.parent / "no.toml"), "-o", str(single), status=2)
    assert not single.exists()
