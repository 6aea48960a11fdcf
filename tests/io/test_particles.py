"""Particles: what is read is what the files hold, poses follow RELION's convention, and bad input is named."""

import math
import os
import shutil
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.data import ParticleSource, Poses, frames_of
from faml_gpu.errors import InputError
from faml_gpu.fourier import shells_of_half
from faml_gpu.halves import Subset
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import ArrayParticles, open_particles
from faml_gpu.io.star import read_particles_star, write_particles_star
from faml_gpu.weights import FLOOR, centred_from_half, missing_wedge

RIBOSOMES = Path(__file__).resolve().parents[3] / "shared" / "data" / "insitu70S"
BOX = 12
VOXEL = 4.0
N = 5
WEDGE = missing_wedge(BOX, (-50, 70))
OTHER = missing_wedge(BOX, (-40, 60))


def save(path, data, voxel_size=VOXEL):
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # mrcfile warns of NaN, which some tests write on purpose
        warnings.simplefilter("ignore")
        with mrcfile.new(path, np.asarray(data), overwrite=True) as mrc:
            mrc.set_volume()
            mrc.voxel_size = voxel_size
    return path


def star(rows=None, columns=(), optics="1 opticsGroup1 4.0 12 3 0", optics_columns=(), blocks="", weights=True):
    """Text of a 3.1 STAR file; `columns` name -> values are added."""
    columns = dict(columns)
    names = ["rlnImageName", *(["rlnCtfImage"] if weights else []), "rlnOpticsGroup", *columns]
    if rows is None:
        rows = [f"sub/{i:04d}.mrc " + (f"ctf/{i:04d}.mrc " if weights else "") + "1" for i in range(1, N + 1)]
    rows = [" ".join([row, *(str(values[i]) for values in columns.values())]) for i, row in enumerate(rows)]
    optics_names = [
        "rlnOpticsGroup", "rlnOpticsGroupName", "rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality",
        "rlnCtfDataAreCtfPremultiplied", *optics_columns,
    ]  # fmt: skip
    tags = ["\n".join(f"_{name}" for name in some) for some in (optics_names, names)]
    lines = "\n".join(rows)
    return f"{blocks}data_optics\nloop_\n{tags[0]}\n{optics}\n\ndata_particles\nloop_\n{tags[1]}\n{lines}\n"


@pytest.fixture
def boxes():
    """White noise seen through the wedges."""
    noise = np.random.default_rng(0).standard_normal((N, BOX, BOX, BOX)).astype(np.float32)
    return np.stack(
        [
            np.fft.irfftn(np.fft.rfftn(box) * (WEDGE if i < 3 else OTHER), box.shape, axes=(0, 1, 2))
            for i, box in enumerate(noise)
        ]
    ).astype(np.float32)


@pytest.fixture
def project(tmp_path, boxes):
    """Five boxes in sub/, their weights in ctf/ (three share one content), and a STAR file."""
    for i, box in enumerate(boxes, 1):
        save(tmp_path / f"sub/{i:04d}.mrc", box)
        weight = WEDGE if i <= 3 else OTHER
        # Centred or half: the same weight. The header's voxel size is nonsense on purpose.
        save(tmp_path / f"ctf/{i:04d}.mrc", weight if i == 2 else centred_from_half(weight, BOX), 99.0)
    (tmp_path / "in.star").write_text(star())
    return tmp_path


def test_star_particles(project, boxes):
    particles = open_particles(project / "in.star")
    source: ParticleSource = particles
    assert len(source) == N
    assert source.box == BOX
    assert source.voxel_size == 4.0
    assert source.poses is None
    assert particles.warnings == ()
    assert particles.weight_index.tolist() == [0, 0, 0, 1, 1]
    batch = source.read(np.array([4, 0, 2]))
    np.testing.assert_array_equal(batch.boxes, boxes[[4, 0, 2]])
    assert batch.boxes.dtype == batch.weights.dtype == np.float32
    np.testing.assert_array_equal(batch.weights[batch.weight_index], np.stack([OTHER, WEDGE, WEDGE]))
    assert len(batch.weights) == len(batch.weight_ids) == 2
    # One weight keeps its name in any batch.
    alone = source.read(np.array([1]))
    assert alone.weights.shape == (1, BOX, BOX, BOX // 2 + 1)
    assert alone.weight_ids == (batch.weight_ids[batch.weight_index[1]],)
    assert alone.boxes.shape == (1, BOX, BOX, BOX)
    last = source.read(np.array([3, 4]))
    assert last.weight_index.tolist() == [0, 0]
    np.testing.assert_array_equal(last.weights, OTHER[None])


def test_boxes_stored_as_float16_stay_so(project, boxes):
    for i in (1, 2, 3):
        save(project / f"sub/{i:04d}.mrc", boxes[i - 1].astype(np.float16))
    particles = open_particles(project / "in.star")
    assert particles.warnings == ()
    halves = particles.read(np.array([2, 0]))
    assert halves.boxes.dtype == np.float16
    np.testing.assert_array_equal(halves.boxes, boxes[[2, 0]].astype(np.float16))
    mixed = particles.read(np.array([2, 4]))
    assert mixed.boxes.dtype == np.float32
    np.testing.assert_array_equal(mixed.boxes[0], boxes[2].astype(np.float16))
    np.testing.assert_array_equal(mixed.boxes[1], boxes[4])


def test_premultiplied_boxes_come_with_what_they_were_multiplied_by(project, boxes):
    """CTF^2 with multiplicities: kept as it is, boxes as read; where it is too small to divide by, 0."""
    rng = np.random.default_rng(3)
    products = [(5 * rng.random(WEDGE.shape) * w + 1e-5 * (1 - w)).astype(np.float32) for w in (WEDGE, OTHER)]
    for i in range(1, N + 1):
        save(project / f"ctf/{i:04d}.mrc", products[i > 3])
    (project / "in.star").write_text(star(optics="1 a 4.0 12 3 1"))
    particles = open_particles(project / "in.star")
    batch = particles.read(np.array([0, 4]))
    np.testing.assert_array_equal(batch.boxes, boxes[[0, 4]])
    for multiplied, weight, product in zip(batch.multiplied, batch.weights, products, strict=True):
        seen = product > FLOOR * product.max()
        assert 0.3 < seen.mean() < 0.8
        np.testing.assert_array_equal(multiplied, np.where(seen, product, 0))
        np.testing.assert_array_equal(weight > 0, seen)
    # Both are over one number a shell.
    shell = shells_of_half(BOX)
    for s in range(1, BOX // 2):
        here = (batch.multiplied > 0) & (shell == s)
        ratio = batch.weights[here] ** 2 / batch.multiplied[here]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    held = ArrayParticles(boxes, VOXEL, np.stack(products), [0, 0, 0, 1, 1], premultiplied=True).read(np.array([0, 4]))
    np.testing.assert_allclose(held.weights, batch.weights)
    np.testing.assert_array_equal(held.multiplied, batch.multiplied)
    with pytest.raises(InputError, match="premultiplied: found boxes without weights"):
        ArrayParticles(boxes, VOXEL, premultiplied=True)


def test_groups_of_the_star_file(project):
    assert open_particles(project / "in.star").groups["optics"].names == ("1",)
    rows = [f"sub/{i:04d}.mrc ctf/{i:04d}.mrc {g}" for i, g in zip(range(1, N + 1), (2, 7, 2, 2, 7), strict=True)]
    optics = "2 a 4.0 12 3 0\n7 b 4.0 12 3 0"
    columns = {"rlnMicrographName": ["m"] * N, "rlnTomoName": ["late", "early", "late", "late", "mid"]}
    (project / "in.star").write_text(star(rows, columns, optics))
    groups = open_particles(project / "in.star").groups
    assert groups["optics"].names == ("2", "7")
    assert groups["optics"].index.tolist() == [0, 1, 0, 0, 1]
    assert [groups["tomogram"].names[i] for i in groups["tomogram"].index] == columns["rlnTomoName"]
    (project / "in.star").write_text(star(columns={"rlnMicrographName": list("xyyxx")}))
    tomograms = open_particles(project / "in.star").groups["tomogram"]
    assert [tomograms.names[i] for i in tomograms.index] == list("xyyxx")
    assert open_particles(project / "sub", tilt_range=(-50, 70)).groups == {}


def test_odd_boxes(tmp_path):
    box = 13
    weight = missing_wedge(box, (-50, 70))
    for i in range(2):
        save(tmp_path / f"sub/{i + 1:04d}.mrc", np.random.default_rng(i).standard_normal((box,) * 3).astype(np.float32))
        save(tmp_path / f"ctf/{i + 1:04d}.mrc", [centred_from_half(weight, box), weight][i])
    rows = [f"sub/{i:04d}.mrc ctf/{i:04d}.mrc 1" for i in (1, 2)]
    (tmp_path / "in.star").write_text(star(rows, optics="1 a 4.0 13 3 0"))
    batch = open_particles(tmp_path / "in.star").read(np.arange(2))
    np.testing.assert_array_equal(batch.weights, weight[None])


def test_paths_relative_to_the_star_come_first(project, boxes, monkeypatch):
    elsewhere = project / "elsewhere"
    shutil.copytree(project / "ctf", elsewhere / "ctf")
    save(elsewhere / "sub/0001.mrc", boxes[1])
    (project / "sub/0005.mrc").rename(elsewhere / "sub/0005.mrc")
    monkeypatch.chdir(elsewhere)
    batch = open_particles(project / "in.star").read(np.arange(N))
    np.testing.assert_array_equal(batch.boxes, boxes)  # 1 beside the STAR file, 5 from the working directory


@pytest.mark.parametrize("how", ["folder", "glob", "relative"])
def test_folder_and_glob(project, boxes, how, monkeypatch):
    (project / "sub/notes.txt").write_text("not a box")
    monkeypatch.chdir(project)
    source = {"folder": project / "sub", "glob": str(project / "sub/000?.mrc"), "relative": "sub"}[how]
    particles = open_particles(source, tilt_range=(-50, 70))
    batch = particles.read(np.arange(N))
    np.testing.assert_array_equal(batch.boxes, boxes)
    np.testing.assert_array_equal(batch.weights, WEDGE[None])
    assert particles.voxel_size == pytest.approx(VOXEL)
    write_particles_star(project / "out.star", particles.table, {"rlnClassNumber": [1] * N})
    written = read_particles_star(project / "out.star").strings("rlnImageName")
    assert [os.path.basename(name) for name in written] == [f"{i:04d}.mrc" for i in range(1, N + 1)]
    if how == "relative":
        assert written[0] == os.path.join("sub", "0001.mrc")
    again = open_particles(project / "out.star", tilt_range=(-50, 70))
    np.testing.assert_array_equal(again.read(np.arange(N)).boxes, boxes)


def test_tilt_axis_reaches_the_weight(project):
    particles = open_particles(project / "sub", tilt_range=(-50, 70), tilt_axis="x")
    np.testing.assert_array_equal(particles.read(np.array([0])).weights[0], missing_wedge(BOX, (-50, 70), "x"))


ANGLES = {
    "rlnAngleRot": [0, 10, 90, -170, 33.5],
    "rlnAngleTilt": [0, 20, 90, 120, 5],
    "rlnAnglePsi": [0, 30, 0, 77, -9],
}


def test_poses_are_relions(project):
    origins = {
        "rlnOriginXAngst": [4, 0, 0, 2, 0],
        "rlnOriginYAngst": [0, -8, 0, 0, 0],
        "rlnOriginZAngst": [0, 0, 6, 0, 0],
    }
    (project / "in.star").write_text(star(columns=ANGLES | origins | {"rlnClassNumber": [1, 2, 1, 3, 1]}))
    poses = open_particles(project / "in.star", use_poses=True).poses
    assert poses is not None
    angles = np.stack(list(ANGLES.values()), axis=-1)
    expected = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(poses.rotations, expected, atol=1e-12)
    np.testing.assert_array_equal(poses.shifts, [[-1, 0, 0], [0, 2, 0], [0, 0, -1.5], [-0.5, 0, 0], [0, 0, 0]])
    assert poses.classes is not None
    assert poses.classes.tolist() == [0, 1, 0, 2, 0]


def test_poses_of_relion_3_0(project):
    """Origins in pixels; pixel size from the detector (micrometres) and the magnification."""
    rows = [f"sub/{i:04d}.mrc ctf/{i:04d}.mrc 0 0 0 1.5 -2.0 0.5 8.0 20000" for i in range(1, N + 1)]
    names = ["ImageName", "CtfImage", "AngleRot", "AngleTilt", "AnglePsi", "OriginX", "OriginY", "OriginZ"]
    names += ["DetectorPixelSize", "Magnification"]
    tags = "\n".join(f"_rln{name}" for name in names)
    (project / "old.star").write_text(f"data_images\nloop_\n{tags}\n" + "\n".join(rows) + "\n")
    particles = open_particles(project / "old.star", use_poses=True)
    assert particles.voxel_size == 4.0
    assert particles.poses is not None
    np.testing.assert_array_equal(particles.poses.shifts[0], [-1.5, 2.0, -0.5])
    assert particles.poses.classes is None
    write_particles_star(project / "new.star", particles.table, {})
    again = open_particles(project / "new.star", use_poses=True)
    assert again.voxel_size == 4.0
    assert again.poses is not None
    np.testing.assert_allclose(again.poses.shifts, particles.poses.shifts, atol=1e-6)
    assert read_particles_star(project / "new.star").floats("rlnOriginXAngst")[0] == 6.0


def replaced_optics(project, names, values, columns=()):
    """The project's STAR file with other columns in data_optics: `values` of group 1."""
    text = star(columns=columns)
    start, end = text.index("_rlnOpticsGroup\n"), text.index("data_particles")
    tags = "".join(f"_rln{name}\n" for name in ["OpticsGroup", *names.split()])
    (project / "in.star").write_text(f"{text[:start]}{tags}1 {values}\n\n{text[end:]}")
    return open_particles(project / "in.star")


PIXELS_OF = {
    "optics": ("ImagePixelSize", "4.0", {}),
    "optics before particles": ("ImagePixelSize", "4.0", {"rlnImagePixelSize": [9] * N, "rlnPixelSize": [9] * N}),
    "particles": ("Voltage", "300", {"rlnImagePixelSize": [4] * N}),
    "particles of 3.0": ("Voltage", "300", {"rlnPixelSize": [4] * N}),
    "detector in optics": ("DetectorPixelSize Magnification", "8.0 20000", {}),
    "detector in particles": ("Voltage", "300", {"rlnDetectorPixelSize": [8] * N, "rlnMagnification": [20000] * N}),
    "one in each": ("DetectorPixelSize", "8.0", {"rlnMagnification": [20000] * N}),
    "half of it, and the header": ("DetectorPixelSize", "8.0", {}),
}


@pytest.mark.parametrize("case", PIXELS_OF)
def test_pixel_size_beside_an_optics_block(project, boxes, case):
    """From wherever the table has it. Headers say 0 (nothing), but where nothing else does."""
    for i, box in enumerate(boxes, 1):
        save(project / f"sub/{i:04d}.mrc", box, 4.0 if "header" in case else 0)
    assert replaced_optics(project, *PIXELS_OF[case]).voxel_size == pytest.approx(4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"rlnImagePixelSize": [4, 4, 4, 5, 4]},
            r"pixel sizes differ: 4 A in .*\(particle 1\), 5 A in .*\(particle 4\)",
        ),
        ({"rlnImagePixelSize": [4, 4, 0, 4, 4]}, r"pixel size is 0 in .*\(particle 3\), expected more than 0 A"),
        ({"rlnImagePixelSize": [4, "x", 4, 4, 4]}, r"\(particle 2\): rlnImagePixelSize is x, expected a number"),
        (
            {"rlnDetectorPixelSize": [8] * N, "rlnMagnification": [1, 1, 1, 0, 1]},
            r"pixel size is inf in .*\(particle 4\)",
        ),
    ],
)
def test_bad_pixel_size_beside_an_optics_block(project, columns, message):
    with pytest.raises(InputError, match=message):
        replaced_optics(project, "Voltage", "300", columns)


def test_progress_is_told(project):
    calls = []
    open_particles(project / "in.star", progress=lambda *call: calls.append(call))
    assert calls.index(("checking boxes", N, N)) < calls.index(("checking wedges", 1, 2))
    steps = {step for step, _, _ in calls}
    assert steps == {"reading headers", "checking weights", "checking boxes", "checking wedges"}


def test_voxel_size_of_1_counts_as_unset(project, boxes):
    for i, box in enumerate(boxes, 1):
        save(project / f"sub/{i:04d}.mrc", box, 1.0)
    assert open_particles(project / "in.star").voxel_size == 4.0
    assert open_particles(project / "sub", tilt_range=(-50, 70), voxel_size=3.5).voxel_size == 3.5


def test_mirrored_tilt_range_is_warned_of(project):
    particles = open_particles(project / "sub", tilt_range=(-70, 50))
    assert len(particles.warnings) == 1
    assert "mirrored" in particles.warnings[0]
    assert open_particles(project / "sub", tilt_range=(-50, 70)).warnings == ()


@pytest.fixture
def tilted(tmp_path):
    """Twelve boxes of noise of 24 voxels, each with a weight file of its own."""
    rng = np.random.default_rng(6)
    for i in range(12):
        wedge = missing_wedge(24, (-60, 60 - 3 * i))
        box = np.fft.irfftn(np.fft.rfftn(rng.standard_normal((24,) * 3)) * wedge, (24,) * 3, axes=(0, 1, 2))
        save(tmp_path / f"{i:02d}.mrc", box.astype(np.float32))
        save(tmp_path / f"w{i:02d}.mrc", wedge)
    head = "data_particles\nloop_\n_rlnImageName\n_rlnCtfImage\n_rlnImagePixelSize\n"
    (tmp_path / "in.star").write_text(head + "".join(f"{i:02d}.mrc w{i:02d}.mrc 4\n" for i in range(12)))
    return tmp_path


def test_every_weight_is_compared(tilted):
    assert len(open_particles(tilted / "in.star").weight_ids) == 12
    assert open_particles(tilted / "in.star").warnings == ()
    save(tilted / "w07.mrc", missing_wedge(24, (-60, 60), "x"))
    (text,) = open_particles(tilted / "in.star").warnings
    assert f"1 of 12: {tilted}/w07.mrc (1 box): " in text
    assert "the tilt axis seems to be the other one" in text


def test_a_gradient_is_no_power_in_the_wedge(tilted):
    """A box cut from where the background changes along the beam: its faces do not fit together.

    By 1.2 standard deviations of the noise; without a taper such boxes have 0.5 and more beyond the wedge.
    """
    for path in tilted.glob("[01]*.mrc"):
        save(path, read_mrc(path)[0] + 0.05 * np.arange(24, dtype=np.float32)[:, None, None])
    assert open_particles(tilted / "in.star").warnings == ()


def test_of_very_many_weights_some_are_compared(tilted, monkeypatch):
    monkeypatch.setattr("faml_gpu.io.particles.WEDGE_WEIGHTS", 3)
    save(tilted / "w00.mrc", missing_wedge(24, (-60, 60), "x"))
    (text,) = open_particles(tilted / "in.star").warnings
    assert "1 of 3 looked at: " in text
    assert "(1 box)" in text


def test_a_box_that_vanishes_is_named(project):
    particles = open_particles(project / "in.star")
    (project / "sub/0002.mrc").unlink()
    with pytest.raises(InputError, match=r"0002\.mrc: cannot be read"):
        particles.read(np.array([0, 1]))


# --- bad input: each case breaks the good project in one place


def mrc(name, data, voxel_size=VOXEL):
    return lambda project: save(project / name, np.asarray(data, np.float32), voxel_size)


def text(**arguments):
    return lambda project: (project / "in.star").write_text(star(**arguments))


def premultiplied(weight):
    """The project's boxes said to be multiplied by their CTF, one of the weights replaced."""

    def spoil(project):
        save(project / "ctf/0002.mrc", np.asarray(weight, np.float32))
        (project / "in.star").write_text(star(optics="1 a 4.0 12 3 1"))

    return spoil


def nan_box(value):
    box = np.random.default_rng(1).standard_normal((BOX, BOX, BOX))
    box[3, 4, 5] = value
    return box


TWO_GROUPS = [f"sub/{i:04d}.mrc ctf/{i:04d}.mrc {1 + i % 2}" for i in range(1, N + 1)]
BAD_STAR = {
    "absent": (lambda project: (project / "in.star").unlink(), {}, r"in\.star: does not exist"),
    "empty": (lambda project: (project / "in.star").write_text(""), {}, r"in\.star: empty"),
    "missing boxes": (
        lambda project: [(project / f"sub/{i:04d}.mrc").unlink() for i in (1, 2, 4, 5)],
        {},
        r"rlnImageName of 4 of 5 particles does not exist: sub/0001\.mrc \(line 16\), sub/0002\.mrc \(line 17\), "
        r"sub/0004\.mrc \(line 19\), \.\.\.",
    ),
    "missing weight": (
        lambda project: (project / "ctf/0003.mrc").unlink(),
        {},
        r"rlnCtfImage of 1 of 5 particles does not exist: ctf/0003\.mrc",
    ),
    "another size": (
        mrc("sub/0004.mrc", nan_box(0)[:10, :10, :10]),
        {},
        r"1 of 5 boxes .*0004\.mrc \(10 x 10 x 10\); expected 12 x 12 x 12 voxels as .*0001\.mrc",
    ),
    "not cubic": (mrc("sub/0001.mrc", nan_box(0)[:10]), {}, r"0001\.mrc: 12 x 12 x 10 voxels .*, expected a cubic"),
    "nan": (mrc("sub/0002.mrc", nan_box(np.nan)), {}, r"1 of 5 boxes .*0002\.mrc \(NaN or Inf\)"),
    "inf": (mrc("sub/0005.mrc", nan_box(-np.inf)), {}, r"1 of 5 boxes .*0005\.mrc \(NaN or Inf\)"),
    "constant": (mrc("sub/0003.mrc", np.full((BOX,) * 3, 2.5)), {}, r"1 of 5 boxes .*0003\.mrc \(constant, 2\.5\)"),
    "header contradicts": (
        mrc("sub/0003.mrc", nan_box(0), 4.1),
        {},
        r"0003\.mrc: voxel size 4\.1 A, but 4 A in .*in\.star",
    ),
    "option contradicts": (lambda project: None, {"voxel_size": 4.2}, r"--voxel-size: voxel size 4\.2 A, but 4 A in"),
    "option nonsense": (lambda project: None, {"voxel_size": -1.0}, "--voxel-size: found -1"),
    "option nan": (lambda project: None, {"voxel_size": math.nan}, "--voxel-size: found nan"),
    "pixel sizes differ": (
        text(rows=TWO_GROUPS, optics="1 a 4.0 12 3 0\n2 b 4.01 12 3 0"),
        {},
        "pixel sizes differ: 4 A in optics group 1, 4.01 A in optics group 2",
    ),
    "pixel size nonsense": (
        text(optics="1 a zero 12 3 0"),
        {},
        "rlnImagePixelSize is zero in optics group 1, expected a number",
    ),
    "group absent": (text(rows=TWO_GROUPS), {}, r"line 16 \(particle 1\): rlnOpticsGroup 2 is not in data_optics"),
    "image size": (text(optics="1 a 4.0 64 3 0"), {}, "rlnImageSize is 64 in optics group 1, but the boxes have 12"),
    "two dimensions": (text(optics="1 a 4.0 12 2 0"), {}, "rlnImageDimensionality is 2 .*RELION 5: extract without"),
    "2-D stacks": (
        text(rows=[f"{i:06d}@sub/stack.mrcs ctf/0001.mrc 1" for i in range(1, N + 1)]),
        {},
        r"line 16 \(particle 1\): rlnImageName 000001@sub/stack\.mrcs is a 2-D image or stack, expected one 3-D",
    ),
    "image of a stack": (
        text(rows=[f"{i:06d}@sub/0001.mrc ctf/0001.mrc 1" for i in range(1, N + 1)]),
        {},
        r"rlnImageName 000001@sub/0001\.mrc is a 2-D image or stack",
    ),
    "relion 5 stacks": (
        text(blocks="data_general\n_rlnTomoSubTomosAre2DStacks 1\n\n"),
        {},
        "rlnTomoSubTomosAre2DStacks is 1",
    ),
    "premultiplied, no weights": (
        text(optics="1 a 4.0 12 3 1", weights=False),
        {},
        "rlnCtfDataAreCtfPremultiplied is 1, but there is no rlnCtfImage",
    ),
    "premultiplied, a wedge": (
        text(optics="1 a 4.0 12 3 1", weights=False),
        {"tilt_range": (-60, 60)},
        "rlnCtfDataAreCtfPremultiplied is 1, but there is no rlnCtfImage",
    ),
    "premultiplied in part": (
        text(rows=TWO_GROUPS, optics="1 a 4.0 12 3 0\n2 b 4.0 12 3 1"),
        {},
        r"rlnCtfDataAreCtfPremultiplied differs between optics groups \(1 in 2, 0 in 1\)",
    ),
    "premultiplied nonsense": (
        text(optics="1 a 4.0 12 3 maybe"),
        {},
        "rlnCtfDataAreCtfPremultiplied is maybe in optics group 1, expected 0 or 1",
    ),
    "premultiplied by a signed CTF": (
        premultiplied(np.linspace(-1, 1, BOX**3).reshape((BOX,) * 3)),
        {},
        r"0002\.mrc: Fourier weight from -1 to 1, expected 0 or more",
    ),
    "weight above 1": (
        mrc("ctf/0002.mrc", np.full((BOX,) * 3, 3.0)),
        {},
        r"0002\.mrc: Fourier weight from 3 to 3, expected values in 0 \.\. 1 .*rlnCtfDataAreCtfPremultiplied 1",
    ),
    "weight shape": (
        mrc("ctf/0004.mrc", np.ones((2 * BOX, BOX, BOX))),
        {},
        r"0004\.mrc: Fourier weight of shape .* = \(24, 12, 12\), expected a centred cube \(12, 12, 12\)",
    ),
    "weight with multiplicities": (
        mrc("ctf/0004.mrc", np.ones((2 * BOX, BOX, BOX // 2 + 1))),
        {},
        r"0004\.mrc: Fourier weight with multiplicities behind it.* expected boxes that are multiplied by their CTF",
    ),
    "weight signed": (
        mrc("ctf/0002.mrc", np.linspace(-1, 1, BOX**3).reshape((BOX,) * 3)),
        {},
        r"0002\.mrc: Fourier weight from -1 to 1, expected values in 0 \.\. 1",
    ),
    "weight nan": (mrc("ctf/0002.mrc", nan_box(np.nan)), {}, r"0002\.mrc: Fourier weight from nan"),
    "both weight and wedge": (lambda project: None, {"tilt_range": (-60, 60)}, "give only one of the two"),
    "no tilt range": (text(weights=False), {}, r"has no rlnCtfImage: the tilt range is needed"),
    "no poses": (lambda project: None, {"use_poses": True}, "--use-poses: .* has no rlnAngleRot, rlnAngleTilt"),
    "pose no number": (
        text(columns=ANGLES | {"rlnAngleTilt": [0, 0, "x", 0, 0]}),
        {"use_poses": True},
        r"line 21 \(particle 3\): rlnAngleTilt is x, expected a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STAR)
def test_bad_star_input(project, case):
    spoil, options, message = BAD_STAR[case]
    assert len(open_particles(project / "in.star")) == N  # good before
    spoil(project)
    with pytest.raises(InputError, match=message):
        open_particles(project / "in.star", **options)


TILTS = {"tilt_range": (-60, 60)}
BAD_FOLDER = {
    "no tilt range": (lambda project: None, {}, "the tilt range is needed"),
    "reversed": (lambda project: None, {"tilt_range": (60, -60)}, "--tilt-range: found 60 -60"),
    "beyond 90": (lambda project: None, {"tilt_range": (-60, 95)}, "--tilt-range: found -60 95"),
    "axis": (lambda project: None, TILTS | {"tilt_axis": "z"}, "--tilt-axis: found 'z'"),
    "poses": (lambda project: None, TILTS | {"use_poses": True}, "--use-poses: .* is no STAR file"),
    "empty": (lambda project: [path.unlink() for path in project.glob("sub/*")], TILTS, r"sub: no \.mrc or \.em files"),
    "absent": (lambda project: (project / "sub").rename(project / "other"), TILTS, "sub: does not exist"),
    "not mrc": (lambda project: (project / "sub/0002.mrc").write_text("x"), TILTS, r"0002\.mrc: not an MRC file"),
    "voxel sizes differ": (mrc("sub/0002.mrc", nan_box(0), 4.5), TILTS, r"0002\.mrc: voxel size 4\.5 A, but 4 A in"),
    "option contradicts": (lambda project: None, TILTS | {"voxel_size": 5.0}, r"0001\.mrc: voxel size 4 A, but 5 A"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDER)
def test_bad_folder_input(project, case):
    spoil, options, message = BAD_FOLDER[case]
    assert len(open_particles(project / "sub", **TILTS)) == N
    spoil(project)
    with pytest.raises(InputError, match=message):
        open_particles(project / "sub", **options)


@pytest.mark.parametrize("unset", [0.0, 1.0])
def test_voxel_size_absent(project, boxes, unset):
    for i, box in enumerate(boxes, 1):
        save(project / f"sub/{i:04d}.mrc", box, unset)
    with pytest.raises(InputError, match="give --voxel-size"):
        open_particles(project / "sub", **TILTS)


def test_two_kinds_of_boxes(project):
    (project / "sub" / "0001.em").write_bytes(bytes(512))
    with pytest.raises(InputError, match=r"sub: found 5 \.mrc and 1 \.em files, expected boxes of one kind"):
        open_particles(project / "sub", tilt_range=(-60, 60))


@pytest.mark.parametrize("name", ["a\nb.mrc", "a'b \"c.mrc", "a\udcff.mrc"])
def test_names_no_star_file_can_hold(project, name):
    (project / "sub" / "0001.mrc").rename(project / "sub" / name)
    with pytest.raises(InputError, match=r"sub: 1 of 5 names cannot stand in a STAR file"):
        open_particles(project / "sub", tilt_range=(-60, 60))


def test_tilt_axis_needs_a_tilt_range(project):
    with pytest.raises(InputError, match=r"--tilt-axis: goes with --tilt-range"):
        open_particles(project / "in.star", tilt_axis="x")


def test_bad_boxes_of_a_stack_are_numbered(project, boxes):
    bad = boxes.copy()
    bad[1, 2, 3, 4] = np.nan
    np.save(project / "all.npy", bad)
    with pytest.raises(InputError, match=r"1 of 5 boxes cannot be used: 000002@.*all\.npy \(NaN or Inf\)"):
        open_particles(project / "all.npy", tilt_range=(-60, 60), voxel_size=VOXEL)
    np.save(project / "all.npy", np.full((2, BOX, BOX, BOX), 1e300))
    with pytest.raises(InputError, match=r"2 of 2 boxes cannot be used: 000001@"):
        open_particles(project / "all.npy", tilt_range=(-60, 60), voxel_size=VOXEL)
    np.save(project / "all.npy", bad[:0])
    with pytest.raises(InputError, match=r"all\.npy: array of shape \(0, .*n >= 1"):
        open_particles(project / "all.npy", tilt_range=(-60, 60), voxel_size=VOXEL)


def test_glob_without_match(project):
    with pytest.raises(InputError, match=r"x\*\.mrc: no files that match"):
        open_particles(project / "sub/x*.mrc", **TILTS)


def test_turned_boxes_have_no_common_wedge(project):
    turned = {
        "rlnTomoSubtomogramRot": [30, 0, 0, 0, 0],
        "rlnTomoSubtomogramTilt": [0, 0, 0, 40, 0],
        "rlnTomoSubtomogramPsi": [-30, 0, 0, 0, 0],
    }
    path = project / "in.star"
    path.write_text(star(weights=False, columns=turned))
    # Rot 30, tilt 0, psi -30 is no rotation: one particle of five is turned.
    with pytest.raises(InputError, match=r"\(particle 4\): the boxes of 1 of 5 particles are turned"):
        open_particles(path, **TILTS)
    turned["rlnTomoSubtomogramTilt"][3] = 0
    path.write_text(star(weights=False, columns=turned))
    assert len(open_particles(path, **TILTS)) == N
    turned["rlnTomoSubtomogramTilt"][3] = 40
    path.write_text(star(columns=turned))
    assert len(open_particles(path)) == N  # each has its own weight


def test_frames_of_boxes(project):
    """A_sub of each particle, and of those of a sample; boxes that say nothing lie as their tomogram does."""
    angles = np.array([[30, 50, -20], [0, 90, 0], [10, 0, -10], [0, 0, 0], [5, 6, 7]])
    names = [f"rlnTomoSubtomogram{name}" for name in ("Rot", "Tilt", "Psi")]
    (project / "in.star").write_text(star(columns=dict(zip(names, angles.T, strict=True))))
    expected = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(open_particles(project / "in.star").frames, expected, atol=1e-12)
    np.testing.assert_allclose(open_particles(project / "in.star", sample=2).frames, expected[[0, 4]], atol=1e-12)
    plain = open_particles(project / "sub", tilt_range=(-50, 70))
    np.testing.assert_array_equal(plain.frames, [np.eye(3)] * N)
    np.testing.assert_array_equal(frames_of(plain), plain.frames)
    some = Subset(open_particles(project / "in.star"), np.array([4, 1]))
    np.testing.assert_allclose(frames_of(some), expected[[4, 1]], atol=1e-12)
    held = ArrayParticles(plain.read(np.arange(N)).boxes, VOXEL)
    np.testing.assert_array_equal(frames_of(held), plain.frames)


# --- arrays


def test_array_particles(boxes):
    poses = Poses(np.tile(np.eye(3), (N, 1, 1)), np.zeros((N, 3)))
    source: ParticleSource = ArrayParticles(boxes, 4, [WEDGE, OTHER], [0, 0, 0, 1, 1], poses)
    assert (len(source), source.box, source.voxel_size, source.poses) == (N, BOX, 4.0, poses)
    batch = source.read(np.array([3, 1]))
    np.testing.assert_array_equal(batch.boxes, boxes[[3, 1]])
    np.testing.assert_array_equal(batch.weights[batch.weight_index], np.stack([OTHER, WEDGE]))
    assert source.read(np.array([0])).weight_ids[0] == batch.weight_ids[batch.weight_index[1]]
    np.testing.assert_array_equal(ArrayParticles(boxes, 4).read(np.array([0])).weights, np.ones((1, BOX, BOX, 7)))
    np.testing.assert_array_equal(ArrayParticles(boxes, 4, WEDGE).read(np.array([2])).weights, WEDGE[None])


def test_array_and_file_particles_agree(project, boxes):
    from_files = open_particles(project / "in.star").read(np.arange(N))
    from_arrays = ArrayParticles(boxes, VOXEL, [WEDGE, OTHER], [0, 0, 0, 1, 1]).read(np.arange(N))
    assert from_files.weight_ids == from_arrays.weight_ids
    np.testing.assert_array_equal(from_files.boxes, from_arrays.boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((2, 12, 12))}, "boxes: shape"),
        ({"boxes": np.zeros((2, 12, 12, 10))}, "boxes: shape"),
        ({"boxes": np.zeros((0, 12, 12, 12))}, "boxes: shape"),
        ({"boxes": np.zeros((2, 12, 12, 12))}, r"box 0 \(constant, 0\)"),
        ({"boxes": np.stack([nan_box(0), nan_box(np.nan)])}, r"1 of 2 boxes .*box 1 \(NaN or Inf\)"),
        ({"voxel_size": 0}, "voxel_size: found 0"),
        ({"weights": np.ones((12, 12, 12))}, "weights: shape"),
        ({"weights": 2 * WEDGE}, r"weights\[0\]: Fourier weight from 0 to 2"),
        ({"weights": [WEDGE, OTHER]}, "weight_index: missing"),
        ({"weights": [WEDGE, OTHER], "weight_index": [0, 2]}, "weight_index: expected 2 numbers from 0 to 1"),
        ({"poses": Poses(np.eye(3)[None], np.zeros((1, 3)))}, "poses: expected 2"),
        ({"names": ["a"]}, "names: found 1, expected 2"),
    ],
)
def test_bad_arrays(change, message):
    good = {"boxes": np.stack([nan_box(0), nan_box(1)]), "voxel_size": 4.0}
    assert len(ArrayParticles(**good)) == 2
    with pytest.raises(InputError, match=message):
        ArrayParticles(**(good | change))


# --- real data


@pytest.mark.skipif(not RIBOSOMES.is_dir(), reason="the real ribosomes (shared/data/insitu70S) are not here")
def test_real_ribosomes(tmp_path):
    path = RIBOSOMES / "reference_poses.star"
    particles = open_particles(path, use_poses=True)
    assert (len(particles), particles.box, particles.voxel_size) == (40, 32, 12.0)
    assert len(particles.weight_ids) == 4  # one per tomogram
    assert particles.warnings == ()
    assert particles.poses is not None
    batch = particles.read(np.arange(40))
    # Outside its weight a box has next to no power: layout, axes and centre of the weights are right.
    power = np.abs(np.fft.rfftn(batch.boxes, axes=(1, 2, 3))) ** 2
    weights = batch.weights[batch.weight_index]
    outside = power[weights == 0].mean() / power[weights == 1].mean()
    assert outside < 0.05
    # With the weights mirrored (kz -> -kz) more than twice as much.
    mirrored = np.roll(weights[:, ::-1], 1, axis=1)
    assert power[mirrored == 0].mean() / power[mirrored == 1].mean() > 2 * outside
    out = tmp_path / "out.star"
    write_particles_star(out, particles.table, {})
    assert out.read_bytes() == path.read_bytes()
