"""Files broken at random: each is read, or refused by a message that names it; nothing else happens, and nothing hangs.

And what is written reads back as it was, whatever the columns and values. Hypothesis draws the same cases each time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import re
import signal
import string
import time
from collections.abc import Callable, Iterator
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
from faml_gpu.io.mrc import read_header, read_stack, read_volume, write_mrc
from faml_gpu.io.particles import open_particles, star_poses
from faml_gpu.io.stacks import stack_headers
from faml_gpu.io.star import FreshTable, read_particles_star, write_particles_star
from faml_gpu.posteriors import one_hot
from faml_gpu.run_folder import particle_columns

# The same examples on every machine; files are made anew for each, so that one folder does for all of them.
settings.register_profile(
    "faml", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("faml")

LIMIT = 60.0  # seconds in which a file must be read or refused, a thousand times what it takes
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


class HangError(BaseException):
    """Not an `Exception`: nobody is to catch it."""


@contextlib.contextmanager
def no_hang(limit: float = LIMIT) -> Iterator[None]:
    """What takes longer is stopped, and fails; where it cannot be stopped, the whole process is, with a traceback."""

    def stop(number: int, frame: Any) -> None:
        raise HangError(f"still at it after {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(2 * limit, exit=True)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def test_a_hang_fails() -> None:
    def hang() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(HangError), no_hang(0.2):
        hang()
    assert time.monotonic() - begin < LIMIT / 2
    time.sleep(0.01)  # nothing rings later
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def survives(path: Path, data: bytes, read: Callable[[Path], Any]) -> None:
    """It is read, or refused by a message with the file's name; the file is as it was."""
    path.write_bytes(data)
    try:
        with no_hang():
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
    command("average", *words, "-o", str(out), "--dry-run", "--iterations", "1")
    assert not out.exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def command(*words: str) -> int:
    """The status of a command, 0 or 2; it has said why, without a traceback, and in time."""
    with no_hang(5 * LIMIT):  # the first one compiles
        done = CliRunner().invoke(app, list(words))
    assert done.exit_code in (0, 2), (done.output, repr(done.exception))
    assert done.exit_code == 0 or done.stderr.strip()
    assert "Traceback" not in done.output
    return int(done.exit_code)


FAST = ["--iterations", "1", "--folds", "1", "--bandwidth", "6", "--candidates", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes with weights, a map, tables, and a finished run of them in run/."""
    path = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(1)
    weight = np.ones((BOX, BOX, BOX // 2 + 1), np.float32)
    for name in ("0001", "0002", "0003", "map"):
        write_mrc(path / f"{name}.mrc", rng.standard_normal((BOX,) * 3).astype(np.float32), 8.0)
    write_mrc(path / "ctf.mrc", weight, 8.0)
    for i in (1, 2, 3):
        (path / f"particle_{i:03d}.mrc").write_bytes((path / f"{i:04d}.mrc").read_bytes())
    text = STAR.replace("_rlnOddity", "_rlnCtfImage")
    for value in ("'a \"quoted\" value'   # the first", "x#notacomment", "?"):
        text = text.replace(value, "ctf.mrc")
    (path / "in.star").write_text(text)
    (path / "in.tbl").write_text(TABLE)
    (path / "in.toml").write_text(f'particles = "{path}/in.star"\nresolution = 25.0\nnormalize = true\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faml_gpu.pipeline._write_pictures", lambda folder: None)
        assert command("average", str(path / "in.star"), "-o", str(path / "run"), *FAST) == 0
    return path


def with_field(offset: int, value: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:offset] + value.to_bytes(4, "little") + whole[offset + 4 :]


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half a header": lambda whole: whole[:500],
    "cut off": lambda whole: whole[:-100],
    "no MRC": lambda whole: whole[:208] + b"pam " + whole[212:],
    "mode of complex numbers": with_field(12, 3),
    "mode that is none": with_field(12, 77),
    "one column more": with_field(0, BOX + 1),
    "columns below 0": with_field(0, 2**32 - BOX),
    "columns without end": with_field(0, 2**31 - 1),
    "an axis twice": with_field(64, 2),
    "NaN": lambda whole: whole[:-4] + np.float32(np.nan).tobytes(),
    "0 everywhere": lambda whole: whole[:1024] + bytes(len(whole) - 1024),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["0002.mrc", "map.mrc", "ctf.mrc"])
def test_broken_volumes(project: Path, kind: str, fault: str) -> None:
    """As a box, as the map to start from, and as a weight: refused by name, and the run there is as it was."""
    path, run = project / kind, project / "run"
    whole, before = path.read_bytes(), {p.name: p.read_bytes() for p in run.iterdir()}
    path.write_bytes(FAULTS[fault](whole))
    start = ["--reference", str(path)] if kind == "map.mrc" else []
    try:
        done = CliRunner().invoke(app, ["average", str(project / "in.star"), *start, "-o", str(run), "--overwrite"])
    finally:
        path.write_bytes(whole)
    assert done.exit_code == 2, (done.output, repr(done.exception))
    assert done.stderr.startswith("error: ")
    assert kind in done.stderr
    assert "Traceback" not in done.output
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


KINDS = ["in.star", "in.tbl", "in.toml", "0002.mrc", "map.mrc", "ctf.mrc"]


@settings(max_examples=60)
@given(st.data())
def test_overwrite(project: Path, data: st.DataObject) -> None:
    """A command that is to replace a finished run: either it does, wholly, or the old one is as it was.

    Broken is one of what it reads: a table, the options, a box, the map to start from, or a weight.
    """
    run = project / "run"
    kind = data.draw(st.sampled_from(KINDS))
    path, whole = project / kind, (project / kind).read_bytes()
    head = whole[:256] if kind.endswith("mrc") else whole  # of a header the part that is not for people
    words = {
        "in.tbl": [str(project / "in.tbl"), "--voxel-size", "8"],
        "in.toml": ["--config", str(project / "in.toml")],
        "map.mrc": [str(project / "in.star"), "--reference", str(project / "map.mrc")],
    }.get(kind, [str(project / "in.star")])

    def all_else() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in project.rglob("*") if p.is_file() and run not in p.parents}

    def of_run() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in run.iterdir()}

    path.write_bytes(data.draw(broken(head)) + whole[len(head) :])
    try:
        others, before = all_else(), of_run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("faml_gpu.pipeline._write_pictures", lambda folder: None)  # they take most of the time
            status = command("average", *words, "-o", str(run), "--overwrite", *FAST)
        assert all_else() == others
        if status == 2:
            assert of_run() == before
        else:
            assert json.loads((run / "run.json").read_bytes())["status"] == "finished"
            assert {"run_class001.mrc", "run_data.star", "run_it001_checkpoint.json"} <= of_run().keys()
        assert not list(run.glob(".*"))
    finally:
        path.write_bytes(whole)


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


coordinates = st.lists(st.tuples(*[st.floats(-99, 99)] * 3), min_size=3, max_size=3)


@settings(max_examples=100)
@given(
    angles=st.lists(angles, min_size=3, max_size=3),
    origins=coordinates,
    pixel=st.floats(0.5, 20),
    in_pixels=st.booleans(),
)
def test_particles_there_and_back(
    folder: Path, angles: list[Any], origins: list[Any], pixel: float, in_pixels: bool
) -> None:
    """A RELION file, with origins in Angstrom (3.1) or pixels (3.0), matrices, a Dynamo table, and back to RELION."""
    columns = ["rlnImageName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    columns += [f"rlnOrigin{axis}{'' if in_pixels else 'Angst'}" for axis in "XYZ"]
    written = [[x / pixel for x in row] if in_pixels else row for row in origins]
    rows = [
        " ".join([f"{i:04d}.mrc", *map(repr, [*a, *o])]) for i, (a, o) in enumerate(zip(angles, written, strict=True))
    ]
    head = "data_particles\nloop_\n" + "".join(f"_{name}\n" for name in columns)
    (folder / "relion.star").write_text(head + "\n".join(rows) + "\n")
    found = star_poses(read_particles_star(folder / "relion.star"), pixel)
    turned, shifts = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix(), -np.array(origins) / pixel
    np.testing.assert_allclose(found.rotations, turned, atol=1e-9)
    np.testing.assert_allclose(found.shifts, shifts, atol=1e-9)

    (folder / "in.tbl").write_text(TABLE)
    (folder / "dynamo.tbl").write_text(read_dynamo_table(folder / "in.tbl").table_text(found))
    values = np.loadtxt(folder / "dynamo.tbl")
    close = np.abs(shifts).max() * 5e-5 + 1e-9  # five digits
    by_definition = Rotation.from_euler("zxz", values[:, 6:9], degrees=True).inv().as_matrix()
    np.testing.assert_allclose(by_definition, turned, atol=1e-6)
    np.testing.assert_allclose(values[:, 3:6], shifts, atol=close)
    dynamo = read_dynamo_table(folder / "dynamo.tbl").poses()
    np.testing.assert_allclose(dynamo.rotations, by_definition, atol=1e-9)
    np.testing.assert_allclose(dynamo.shifts, values[:, 3:6], atol=1e-9)

    posterior = one_hot(np.zeros(3, np.int64), dynamo.rotations, dynamo.shifts, 1, known=True)
    again = FreshTable(("a.mrc", "b.mrc", "c.mrc"), pixel, BOX)
    write_particles_star(folder / "again.star", again, particle_columns(posterior, pixel))
    table = read_particles_star(folder / "again.star")
    back = star_poses(table, pixel)
    np.testing.assert_allclose(back.rotations, turned, atol=1e-6)
    np.testing.assert_allclose(back.shifts, shifts, atol=close + 1e-6 / pixel)
    in_angstrom = np.stack([table.floats(f"rlnOrigin{axis}Angst") for axis in "XYZ"], axis=1)
    np.testing.assert_allclose(in_angstrom, origins, atol=close * pixel + 1e-6)


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
    for name in ("report", "view"):
        command(name, str(run))
    assert path.read_bytes() == before
    assert math.prod(p.name == "run.json" for p in run.iterdir())
