"""Dynamo tables with EM or MRC boxes, and stacks: conversions by hand, and the table back as it came but for poses."""

import json
import struct
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from faml_gpu.cli import app
from faml_gpu.data import Poses
from faml_gpu.errors import InputError
from faml_gpu.geometry import dynamo_to_matrix, matrix_to_dynamo, random_rotations, relion_to_matrix
from faml_gpu.io.dynamo import read_dynamo_table
from faml_gpu.io.em import read_em_header
from faml_gpu.io.mrc import read_stack, read_volume, write_mrc
from faml_gpu.io.particles import open_particles, star_poses
from faml_gpu.io.stacks import stack_headers
from faml_gpu.io.star import read_particles_star
from faml_gpu.simulate import Simulation
from faml_gpu.weights import missing_wedge

# --- angles --------------------------------------------------------------------------------------------------


def test_angles_by_hand() -> None:
    """R takes the reference to the particle: the inverse of turns by tdrot about z, tilt about x, narot about z."""
    x, y, z = np.eye(3)
    np.testing.assert_allclose(dynamo_to_matrix([0, 0, 0]), np.eye(3), atol=1e-15)
    np.testing.assert_allclose(dynamo_to_matrix([90, 0, 0]) @ x, -y, atol=1e-15)
    np.testing.assert_allclose(dynamo_to_matrix([0, 0, 90]) @ x, -y, atol=1e-15)
    np.testing.assert_allclose(dynamo_to_matrix([0, 90, 0]) @ y, -z, atol=1e-15)
    np.testing.assert_allclose(dynamo_to_matrix([0, 90, 90]) @ x, z, atol=1e-15)  # by narot to -y, by tilt to z
    np.testing.assert_allclose(dynamo_to_matrix([90, 90, 0]) @ z, x, atol=1e-15)
    # One pose in both programs' words: x turned to y and about x.
    np.testing.assert_allclose(dynamo_to_matrix([10, 40, 70]), relion_to_matrix([-20, 40, 100]), atol=1e-12)


def test_angles_against_scipy_and_back(rng) -> None:
    angles = rng.uniform([-180, 0, -180], [180, 180, 180], (500, 3))
    expected = Rotation.from_euler("zxz", angles, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(dynamo_to_matrix(angles), expected, atol=1e-12)
    np.testing.assert_allclose(matrix_to_dynamo(expected), angles, atol=1e-6)
    poles = dynamo_to_matrix([[30.0, 0, 50], [30, 180, 50]])
    np.testing.assert_allclose(dynamo_to_matrix(matrix_to_dynamo(poles)), poles, atol=1e-12)
    found = matrix_to_dynamo(random_rotations(1000, rng))
    assert found.min() > -180
    assert found.max() <= 180


# --- EM files ------------------------------------------------------------------------------------------------


def write_em(path: Path, volume: np.ndarray, *, order: str = "<", kind: int = 5) -> None:
    types = {1: "i1", 2: "i2", 4: "i4", 5: "f4", 9: "f8"}
    nz, ny, nx = volume.shape
    head = struct.pack(f"{order}BBBB3i", 6 if order == "<" else 3, 0, 0, kind, nx, ny, nz)
    path.write_bytes(head.ljust(512, b"\0") + volume.astype(order + types.get(kind, "f4")).tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 2, 4, 5, 9])
def test_em_volumes(order: str, kind: int, tmp_path: Path, rng) -> None:
    volume = rng.integers(-100, 100, (3, 4, 5)).astype(np.float32)
    write_em(tmp_path / "a.em", volume, order=order, kind=kind)
    header = read_em_header(tmp_path / "a.em")
    assert header.shape == (3, 4, 5)
    assert header.voxel_size is None
    np.testing.assert_array_equal(read_volume(header), volume)


@pytest.mark.parametrize(("machine", "order"), [(0, ">"), (1, "<"), (2, ">"), (5, ">"), (6, "<"), (6, ">"), (3, "<")])
def test_em_byte_order(machine: int, order: str, tmp_path: Path, rng) -> None:
    """As the machine code says; where the sizes make sense in the other order only, that."""
    volume = rng.standard_normal((3, 4, 5)).astype(np.float32)
    write_em(tmp_path / "a.em", volume, order=order)
    raw = bytearray((tmp_path / "a.em").read_bytes())
    raw[0] = machine
    (tmp_path / "a.em").write_bytes(raw)
    np.testing.assert_array_equal(read_volume(read_em_header(tmp_path / "a.em")), volume)


def test_what_is_no_em_file(tmp_path: Path) -> None:
    path = tmp_path / "a.em"
    with pytest.raises(InputError, match=r"a\.em: cannot be read"):
        read_em_header(path)
    path.write_bytes(b"\6")
    with pytest.raises(InputError, match=r"not an EM file \(1 bytes\)"):
        read_em_header(path)
    path.write_bytes(b"text " * 200)
    with pytest.raises(InputError, match="not an EM file"):
        read_em_header(path)
    write_em(path, np.zeros((3, 3, 3)), kind=8)
    with pytest.raises(InputError, match="EM data type 8, expected one of 1, 2, 4, 5, 9"):
        read_em_header(path)
    write_em(path, np.zeros((3, 3, 3)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated, 619 bytes, expected 620"):
        read_em_header(path)


# --- tables --------------------------------------------------------------------------------------------------


def row(
    tag: int, shift=(0, 0, 0), angles=(0, 0, 0), *, tilting=(1, -60, 60, 0, 0), tomogram=1, class_=0, voxel=0
) -> str:
    values = [tag, 0, 1, *shift, *angles, 0.5, 0, 0, *tilting, 0, 0, tomogram, 0, class_, 0, 10, 20, 30]
    return " ".join(map(str, [*values, *[0] * 6, 7, *[0] * 2, voxel]))  # column 33: whatever


@pytest.fixture
def project(small_simulation: Simulation, tmp_path: Path) -> Path:
    """A Dynamo project's boxes, EM and MRC, and their table with the true poses; tags from 5."""
    boxes, rows = tmp_path / "data", []
    boxes.mkdir()
    angles = matrix_to_dynamo(small_simulation.rotations)
    for i, box in enumerate(small_simulation.boxes):
        if i % 2:
            write_mrc(boxes / f"particle_{i + 5:05d}.mrc", box, 24.0)
        else:
            write_em(boxes / f"particle_{i + 5:06d}.em", box)
        rows.append(row(i + 5, small_simulation.shifts[i], angles[i], tomogram=1 + i // 4, class_=1 + i // 3))
    (boxes / "crop.tbl").write_text("\n".join(rows) + "\n")
    return boxes / "crop.tbl"


def test_voxel_sizes_of_rows(tmp_path: Path) -> None:
    """0 and nan say nothing; two sizes are one too many."""

    def stated(*sizes: float) -> float | None:
        (tmp_path / "t.tbl").write_text("\n".join(row(i, voxel=size) for i, size in enumerate(sizes, 1)) + "\n")
        return read_dynamo_table(tmp_path / "t.tbl").stated_voxel_size()

    assert stated(6.8, 0, float("nan"), 6.801) == 6.8
    assert stated(0, 0) is None
    with pytest.raises(InputError, match=r"t\.tbl: voxel sizes.*5 A in row 3, 6\.8 A in row 1; expected the same"):
        stated(6.8, 0, 5.0)


def test_a_table_is_its_particles(project: Path, small_simulation: Simulation, tmp_path: Path) -> None:
    found = open_particles(project, use_poses=True)
    assert found.voxel_size == 24.0
    np.testing.assert_allclose(found.read(np.arange(6)).boxes, small_simulation.boxes, rtol=1e-6)
    np.testing.assert_allclose(found.poses.rotations, small_simulation.rotations, atol=1e-9)
    np.testing.assert_allclose(found.poses.shifts, small_simulation.shifts, atol=1e-9)
    assert found.poses.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.groups["tomogram"].index.tolist() == [0, 0, 0, 0, 1, 1]
    assert [path.name for path in found.paths[:2]] == ["particle_000005.em", "particle_00006.mrc"]
    batch = found.read(np.arange(6))
    np.testing.assert_array_equal(batch.weights[batch.weight_index[3]], missing_wedge(16, (-60, 60)))
    elsewhere = tmp_path / "refined.tbl"
    elsewhere.write_text(project.read_text())
    assert open_particles(elsewhere, boxes=project.parent).paths == found.paths
    with pytest.raises(InputError, match=r"6 of 6 boxes are not in .* \(tags 5, 6, 7, ...\).*--boxes"):
        open_particles(elsewhere)


def test_tilt_ranges_of_the_rows(project: Path) -> None:
    kinds = [(1, -60, 60, 0, 0), (1, -40, 60, 0, 0), (2, 0, 0, -50, 30), (0, 0, 0, 0, 0), (1, -60, 60, 9, 9), (2, 0, 0, -50, 30)]  # fmt: skip  # noqa: E501
    project.write_text("\n".join(row(i + 5, tilting=kind) for i, kind in enumerate(kinds)))
    batch = open_particles(project).read(np.arange(6))
    expected = [("y", -60, 60), ("y", -40, 60), ("x", -50, 30), None, ("y", -60, 60), ("x", -50, 30)]
    for i, series in enumerate(expected):
        weight = np.ones((16, 16, 9)) if series is None else missing_wedge(16, series[1:], series[0])
        np.testing.assert_array_equal(batch.weights[batch.weight_index[i]], weight)
    assert len(batch.weights) == 4
    one = open_particles(project, tilt_range=(-30, 30), tilt_axis="x").read(np.arange(6))
    np.testing.assert_array_equal(one.weights, missing_wedge(16, (-30, 30), "x")[None])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty, expected a Dynamo table"),
        ("1 2 3\n", "row 1: 3 columns, expected at least 9"),
        (row(5) + "\n1 2\n", "row 2: 2 columns, expected 36 as in the first"),
        (row(5) + "\n" + row(5).replace("0.5", "x"), "row 2: column 10 is x, expected a number"),
        (row(5, angles=("NaN", 0, 0)), "row 1: column 7 is NaN"),
        (row(5) + "\n" + row(5), "tag 5 stands in 2 rows"),
        (row(5.5), "row 1: tag is 5.5, expected a whole number"),
        (row(1e30), r"row 1: column 1 is 1e\+30, expected a number"),
        (row(99), "1 of 1 boxes are not in"),
        (row(5, tilting=(3, -60, 60, -60, 60)), r"row 1: kind of tilting \(column 13\) is 3"),
        (row(5, tilting=(1, 60, -60, 0, 0)), "row 1: tilt range from 60 to -60 degrees"),
        ("5 0 0 0 0 0 0 0 0\n", r"has 9 columns, none of the tilt range \(13 to 17\)"),
        ("é" * 30, r"not a Dynamo table in text form \(byte 0\)"),
        (row(5, voxel=20), "voxel size"),
    ],
)
def test_wrong_tables(text: str, message: str, project: Path) -> None:
    """What is wrong is told with its row, before any box is read."""
    (project.parent / "particle_000005.em").unlink()
    write_mrc(project.parent / "particle_000005.mrc", np.random.default_rng(0).random((16,) * 3), 24.0)
    project.write_text(text)
    with pytest.raises(InputError, match=message):
        open_particles(project)


def test_two_boxes_of_one_tag_and_boxes_without_a_table(project: Path) -> None:
    write_mrc(project.parent / "particle_5.mrc", np.zeros((16,) * 3), 24.0)
    with pytest.raises(InputError, match=r"particle_5.mrc: found particle_000005.em too"):
        open_particles(project)
    with pytest.raises(InputError, match="--boxes: belongs to a Dynamo table"):
        open_particles(project.parent, tilt_range=(-60, 60), boxes=project.parent)


def test_a_table_comes_back_as_it_was_but_for_poses(project: Path, rng) -> None:
    table = read_dynamo_table(project)
    poses = Poses(random_rotations(6, rng), rng.uniform(-3, 3, (6, 3)), np.array([0, 1, 0, 1, 2, 2]))
    (project.parent / "new.tbl").write_text(table.table_text(poses))
    back = read_dynamo_table(project.parent / "new.tbl")
    np.testing.assert_allclose(back.poses().rotations, poses.rotations, atol=1e-6)
    np.testing.assert_allclose(back.poses().shifts, poses.shifts, atol=1e-3)
    assert back.poses().classes.tolist() == poses.classes.tolist()
    assert (back.values[:, 33] == poses.classes + 1).all()
    kept = [i for i in range(36) if i not in (1, 3, 4, 5, 6, 7, 8, 21, 33)]
    for old, new in zip(table.tokens, back.tokens, strict=True):
        assert [old[i] for i in kept] == [new[i] for i in kept]
    assert (back.values[:, 1] == 1).all()


def test_a_run_on_a_table(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--iterations", "1", "--bandwidth", "6", "--candidates", "4", "--mask-radius", "120", "--device", "cpu"]
    done = CliRunner().invoke(app, ["classify", str(project), "-k", "2", "-o", str(out), "--use-poses", *flags])
    assert done.exit_code == 0, done.output
    star = star_poses(read_particles_star(out / "run_data.star"), 24.0)
    for name in ("run_data.tbl", "run_it001_data.tbl"):
        found = read_dynamo_table(out / name).poses()
        np.testing.assert_allclose(found.rotations, star.rotations, atol=1e-5)
        np.testing.assert_allclose(found.shifts, star.shifts, atol=1e-3)
        np.testing.assert_array_equal(found.classes, star.classes)
    assert json.loads((out / "run.json").read_text())["input"]["particles"] == 6
    again = CliRunner().invoke(app, ["classify", "--config", str(out / "run.toml"), "-o", str(out), "--overwrite"])
    assert again.exit_code == 0, again.output


# --- stacks --------------------------------------------------------------------------------------------------


def test_stacks(small_simulation: Simulation, tmp_path: Path) -> None:
    boxes = small_simulation.boxes
    np.save(tmp_path / "boxes.npy", boxes)
    np.save(tmp_path / "double.npy", boxes.astype(">f8"))
    np.save(tmp_path / "one.npy", boxes[0])
    with mrcfile.new(tmp_path / "volumes.mrc") as mrc:
        mrc.set_data(boxes)
        mrc.voxel_size = 24.0
    assert mrcfile.open(tmp_path / "volumes.mrc").is_volume_stack()
    with mrcfile.new(tmp_path / "flat.mrcs") as mrc:
        mrc.set_data(boxes.reshape(-1, 16, 16))
        mrc.voxel_size = 24.0
    for name in ("boxes.npy", "double.npy", "volumes.mrc", "flat.mrcs"):
        found = open_particles(tmp_path / name, tilt_range=(-60, 60), voxel_size=24.0)
        np.testing.assert_allclose(found.read(np.arange(6)).boxes, boxes, rtol=1e-6)
        assert found.table.image_names[4] == f"000005@{tmp_path / name}"
    assert len(open_particles(tmp_path / "one.npy", tilt_range=(-60, 60), voxel_size=24.0)) == 1
    assert len(read_stack(tmp_path / "volumes.mrc")) == 6
    out = tmp_path / "out"
    flags = ["--iterations", "1", "--bandwidth", "6", "--candidates", "4", "--mask-radius", "120", "--device", "cpu"]
    done = CliRunner().invoke(
        app, ["average", str(tmp_path / "volumes.mrc"), "-o", str(out), "--tilt-range", "-60", "60", *flags]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 4, 5)), r"array of shape \(3, 4, 4, 5\), expected \(n, N, N, N\)"),
        (np.zeros((4, 4)), r"array of shape \(4, 4\)"),
        (np.asfortranarray(np.random.default_rng(0).random((3, 4, 4, 4))), "in Fortran's order"),
        (np.zeros((3, 4, 4, 4), complex), "found complex128, expected real numbers"),
        (np.array([{}]), "not an array in NumPy's format"),
    ],
)
def test_arrays_that_are_no_boxes(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=f"a.npy: .*{message}"):
        stack_headers(tmp_path / "a.npy")


def test_sections_that_are_no_cubes(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(np.zeros((20, 16, 16), np.float32))
    with pytest.raises(InputError, match=r"a.mrc: 16 x 16 x 20 voxels, expected cubes one after the other \(16 sec"):
        open_particles(tmp_path / "a.mrc", tilt_range=(-60, 60))
    (tmp_path / "b.npy").write_bytes(b"no")
    with pytest.raises(InputError, match=r"b\.npy: not an array"):
        stack_headers(tmp_path / "b.npy")
