"""Files broken at random: each is read, or refused by a message that names it; nothing else happens, and nothing hangs.

And what is written reads back as it was, whatever the columns and values. Hypothesis draws the same cases each time.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from faml_gpu.cli import app
from faml_gpu.config import config_text, read_config
from faml_gpu.errors import InputError
from faml_gpu.geometry import (
    dynamo_to_matrix,
    euler_to_matrix,
    matrix_to_dynamo,
    matrix_to_euler,
    matrix_to_relion,
    relion_to_matrix,
)
from faml_gpu.io.dynamo import read_dynamo_table
from faml_gpu.io.em import read_em_header
from faml_gpu.io.mrc import read_header, read_stack, read_volume
from faml_gpu.io.particles import open_particles
from faml_gpu.io.stacks import stack_headers
from faml_gpu.io.star import read_particles_star, write_particles_star

# The same examples on every machine; files are made anew for each, so that one folder does for all of them.
settings.register_profile(
    "faml", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("faml")

BOX = 12
STAR = """\
# version 30001

data_general

_rlnTomoSubTomosAre2DStacks   0

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3   # Angstrom
_rlnImageSize #4
1 opticsGroup1 8.0 12

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnAngleRot #3
_rlnAngleTilt #4
_rlnAnglePsi #5
_rlnOddity #6
0001.mrc   1   1.50e+01  10 -20  'a "quoted" value'   # the first
0002.mrc   1  -7.000     10 20   x#notacomment
0003.mrc   1  +.5        90 0    ?
"""
TABLE = "".join(f"{i} 1 1 0.5 -1 2 30 40 {i}50 0.3 0 0 1 -60 60 0 0 0 0 7 1 1\n" for i in (1, 2, 3))
TOML = 'particles = "x.star"\ntilt_range = [-60, 60]\nresolution = 25.0\nnormalize = true\nseed = 3\n'


PIECES = [
    *(b"", b"\0", b"\xff", b"\xc3\xa9", b"\n", b"\r", b"'", b'"', b";", b"\n;\n", b"#", b"$x ", b"_", b"="),
    *(b"loop_\n", b"data_\n", b"data_particles\n", b"save_x\n", b"stop_ "),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 30, b"[" * 3000),
]


@st.composite
def broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """A few bytes changed, pieces cut out, doubled or put in, or the end missing."""
    data = bytearray(whole)
    pieces = st.sampled_from(PIECES)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 1, 2, 4, 20, 200])))
        new = draw(st.one_of(pieces, st.binary(max_size=6), st.just(bytes(data[start:end]) * 2)))
        data[start:end] = new
    if draw(st.integers(0, 5)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def survives(path: Path, data: bytes, read: Callable[[Path], Any]) -> None:
    """It is read, or refused by a message with the file's name; the file is as it was."""
    path.write_bytes(data)
    try:
        read(path)
    except InputError as error:
        message = str(error)
        assert path.stem in message or "option" in message or "--" in message, message
        assert "\n" not in message.strip()
        assert len(message) < 2000, message
    assert path.read_bytes() == data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three boxes."""
    path = tmp_path_factory.mktemp("boxes")
    rng = np.random.default_rng(1)
    for i in (1, 2, 3):
        with mrcfile.new(path / f"{i:04d}.mrc", rng.standard_normal((BOX,) * 3).astype(np.float32)) as mrc:
            mrc.voxel_size = 8.0
        (path / f"particle_{i:03d}.mrc").write_bytes((path / f"{i:04d}.mrc").read_bytes())
    return path


def opened(path: Path, **options: Any) -> None:
    particles = open_particles(path, use_poses=True, **options)
    write_particles_star(path.with_name("written.star"), particles.table, {"rlnAngleRot": np.zeros(len(particles))})
    read_particles_star(path.with_name("written.star"))


@settings(max_examples=150)
@given(data=broken(STAR.encode()))
@example(data=STAR.encode().replace(b"\n", b"\r\n"))
def test_star(folder: Path, data: bytes) -> None:
    survives(folder / "in.star", data, lambda path: opened(path, tilt_range=(-60, 60)))


@settings(max_examples=150)
@given(data=broken(TABLE.encode()))
def test_dynamo_table(folder: Path, data: bytes) -> None:
    survives(folder / "in.tbl", data, read_dynamo_table)
    survives(folder / "in.tbl", data, lambda path: opened(path, voxel_size=8.0))


def _volume(path: Path) -> None:
    for read in (read_header, lambda p: read_stack(p)[0]):
        with contextlib.suppress(InputError):  # a stack is no box, and the other way round
            read_volume(read(path))
    header = read_header(path)
    _ = header.voxel_size
    read_volume(header)


@settings(max_examples=200)
@given(st.data())
def test_mrc(folder: Path, data: st.DataObject) -> None:
    whole = (folder / "0001.mrc").read_bytes()
    survives(folder / "broken.mrc", data.draw(broken(whole[:1024])) + whole[1024:], _volume)


@settings(max_examples=150)
@given(st.data())
def test_em(folder: Path, data: st.DataObject) -> None:
    head = bytearray(512)
    head[0], head[3] = 6, 5
    head[4:16] = np.array([BOX] * 3, "<i4").tobytes()
    whole = bytes(head) + np.random.default_rng(1).standard_normal(BOX**3).astype("<f4").tobytes()
    survives(folder / "broken.em", data.draw(broken(whole[:40])) + whole[40:], lambda p: read_volume(read_em_header(p)))


@settings(max_examples=100)
@given(st.data())
def test_npy(folder: Path, data: st.DataObject) -> None:
    path = folder / "broken.npy"
    np.save(path, np.random.default_rng(1).standard_normal((2, BOX, BOX, BOX)).astype(np.float32))
    whole = path.read_bytes()
    survives(path, data.draw(broken(whole[:128])) + whole[128:], lambda p: [read_volume(h) for h in stack_headers(p)])


@settings(max_examples=150)
@given(data=broken(TOML.encode()))
@example(data=b"seed = " + b"[" * 100_000)
def test_toml(folder: Path, data: bytes) -> None:
    kinds = {"particles": str, "tilt_range": tuple[float, float] | None, "resolution": float | None, "normalize": bool}
    survives(folder / "in.toml", data, lambda path: read_config(path, {**kinds, "seed": int}))


@settings(max_examples=30)
@given(st.data())
def test_commands(folder: Path, data: st.DataObject) -> None:
    """The same through the command line: status 2 or 0, a message, no traceback, nothing written."""
    name, whole = data.draw(st.sampled_from([("in.star", STAR), ("in.tbl", TABLE), ("in.toml", TOML)]))
    path = folder / name
    path.write_bytes(data.draw(broken(whole.encode())))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = (
        ["--config", str(path)] if name.endswith("toml") else [str(path), "--tilt-range", "-60", "60", "--use-poses"]
    )
    out = folder / "out"
    done = CliRunner().invoke(app, ["average", *words, "-o", str(out), "--dry-run", "--iterations", "1"])
    assert done.exit_code in (0, 2), (done.output, repr(done.exception))
    assert done.exit_code == 0 or done.stderr.strip()
    assert "Traceback" not in done.output
    assert not out.exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# What is written reads back.

plain = st.text(string.ascii_letters + string.digits + "._/-+#", min_size=1, max_size=8).filter(
    lambda t: t[0] not in "_#$'\";[]-" and not re.match(r"(?i)(data_|save_|loop_|stop_|global_)", t)
)
numbers = st.one_of(
    st.floats(-1e6, 1e6).map(repr), st.integers(-999, 999).map(str), st.sampled_from(["0012", "1e3", "+.5", "-0"])
)
quoted = st.text(string.ascii_letters + " _#.", min_size=1, max_size=8).map(lambda t: f"'{t}'")


@settings(max_examples=100)
@given(
    odd=st.lists(st.lists(st.one_of(plain, numbers, quoted), min_size=3, max_size=3), max_size=3),
    between=st.lists(st.sampled_from([" ", "   ", "\t", "  \t "]), min_size=1, max_size=3),
    end=st.sampled_from(["\n", "\r\n"]),
    blank=st.sampled_from(["", "\n", "\n# more\n", "\ndata_more\nloop_\n_x\n1\n2\n"]),
    values=st.lists(st.floats(-360, 360), min_size=3, max_size=3),
)
def test_star_round_trip(
    folder: Path, odd: list[list[str]], between: list[str], end: str, blank: str, values: list[float]
) -> None:
    """All that is not ours comes back byte for byte, and starfile reads what we wrote as we meant it."""
    columns = ["rlnImageName", "rlnOpticsGroup", *(f"rlnOdd{i}" for i in range(len(odd)))]
    rows = [[f"{i + 1:04d}.mrc", "1", *(column[i] for column in odd)] for i in range(3)]
    head = STAR[: STAR.index("_rlnImageName")]
    text = head + "".join(f"_{name} #{i}\n" for i, name in enumerate(columns, 1))
    text += "".join(between[i % len(between)].join(row) + "\n" for i, row in enumerate(rows)) + blank
    text = text.replace("\n", end)
    path = folder / "round.star"
    path.write_bytes(text.encode())
    table = read_particles_star(path)
    write_particles_star(folder / "again.star", table, {})
    assert (folder / "again.star").read_bytes() == text.encode()
    write_particles_star(folder / "again.star", table, {"rlnAngleRot": np.array(values)})
    found = read_particles_star(folder / "again.star")
    np.testing.assert_allclose(found.floats("rlnAngleRot"), values, atol=5.1e-7)
    assert found.columns == (*columns, "rlnAngleRot")
    assert [row[:-1] for row in found.values] == list(table.values)
    assume(end == "\n" and "#" not in str(odd))  # starfile's own limits
    theirs = starfile.read(folder / "again.star")["particles"]
    np.testing.assert_allclose(theirs["rlnAngleRot"], values, atol=5.1e-7)
    assert list(theirs.columns) == list(found.columns)


angles = st.tuples(st.floats(-180, 180), st.floats(0, 180), st.floats(-180, 180))


@settings(max_examples=200)
@given(angles)
@example((30.0, 0.0, 40.0))
@example((30.0, 180.0, 40.0))
@example((30.0, 1e-7, 40.0))
def test_poses_there_and_back(found: tuple[float, float, float]) -> None:
    """RELION, Dynamo and matrices: SciPy's rotations by each one's definition, and back."""
    relion, dynamo = relion_to_matrix(found), dynamo_to_matrix(found)
    np.testing.assert_allclose(relion, Rotation.from_euler("ZYZ", found, degrees=True).inv().as_matrix(), atol=1e-12)
    np.testing.assert_allclose(dynamo, Rotation.from_euler("zxz", found, degrees=True).inv().as_matrix(), atol=1e-12)
    for matrix in (relion, dynamo):
        np.testing.assert_allclose(relion_to_matrix(matrix_to_relion(matrix)), matrix, atol=1e-7)
        np.testing.assert_allclose(dynamo_to_matrix(matrix_to_dynamo(matrix)), matrix, atol=1e-7)
        np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(matrix)), matrix, atol=1e-7)


texts = st.text(max_size=12).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["tilt_range", "reference", "seed", "normalize"]),
        st.one_of(
            texts, st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.lists(st.integers())
        ),
    )
)
def test_config_round_trip(folder: Path, values: dict[str, Any]) -> None:
    path = folder / "round.toml"
    path.write_text(config_text(values, {}), encoding="utf-8", newline="\n")
    assert read_config(path, dict.fromkeys(("tilt_range", "reference", "seed", "normalize"), Any)) == values


@settings(max_examples=40)
@given(st.data())
def test_run_json(folder: Path, data: st.DataObject) -> None:
    """A run folder whose run.json is broken is refused, and stays as it is."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    whole = json.dumps({"format": 3, "options": {"n_classes": 1}, "input": {"path": "x"}, "history": []}).encode()
    path = run / "run.json"
    path.write_bytes(data.draw(broken(whole)))
    before = path.read_bytes()
    for command in (["report", str(run)], ["view", str(run)]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code in (0, 2), (done.output, repr(done.exception))
    assert path.read_bytes() == before
    assert math.prod(p.name == "run.json" for p in run.iterdir())
