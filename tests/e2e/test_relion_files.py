"""Particle files as RELION 3.0, 3.1, 4 and 5 write them, through the command: what comes back, read by starfile."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from faml_gpu.cli import app
from faml_gpu.simulate import Simulation
from faml_gpu.weights import centred_from_half

N, BOX, VOXEL = 6, 16, 24.0
BINNING = 8  # of the boxes: coordinates in pixels are in those of the tilt series, 3 Angstrom
FLAGS = shlex.split(
    "--recenter --method fa --iterations 2 --bandwidth 6 --mask-radius 120 --seed 3 --device cpu --max-shift 60"
)
OURS = [
    "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst",
    "rlnClassNumber", "rlnMaxValueProbDistribution", "rlnNrOfSignificantSamples", "rlnLogLikeliContribution",
]  # fmt: skip
ORIGINS = OURS[3:6]
FRAME = ["rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi"]
CORNER = ["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"]
CENTRED = ["rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst"]

# RELION's own layout, but for the blanks it puts behind lines: those come with `as_relion_writes`.
V3_0 = """
data_

loop_
{tags}
{rows}
"""
V3_1 = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnMicrographOriginalPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
_rlnImagePixelSize #7
_rlnImageSize #8
_rlnImageDimensionality #9
opticsGroup1            1     3.000000   300.000000     2.700000     0.100000    24.000000           16            3
opticsGroup2            2     3.000000   300.000000     2.700000     0.070000    24.000000           16            3


# version 30001

data_particles

loop_
{tags}
{rows}

"""
V4 = """
# version 30001

data_general

_rlnTomoManifoldsFile                  manifolds.star


# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnSphericalAberration #3
_rlnVoltage #4
_rlnTomoTiltSeriesPixelSize #5
_rlnCtfDataAreCtfPremultiplied #6
_rlnImageDimensionality #7
_rlnTomoSubtomogramBinning #8
_rlnImagePixelSize #9
_rlnImageSize #10
_rlnAmplitudeContrast #11
           1 opticsGroup1     2.700000   300.000000     3.000000      1      3   8.000000  24.000000     16   0.100000


# version 30001

data_particles

loop_
{tags}
{rows}

"""
V5 = V4.replace(
    "_rlnTomoManifoldsFile                  manifolds.star", "_rlnTomoSubTomosAre2DStacks                       0"
)


def as_relion_writes(text: str) -> str:
    """A blank behind each line of a table and behind each block."""
    lines = [line if not line or line.startswith(("#", "data_")) else f"{line} " for line in text.split("\n")]
    return "\n".join(lines).replace("\n\n\n", "\n \n\n")


def number(value: float) -> str:
    return f"{value:12.6f}"


def columns_of(version: str) -> dict[str, list[str]]:
    """What RELION has in its particle table, as written; odd where files in the wild are."""
    rng = np.random.default_rng(5)

    def some(low: float, high: float) -> list[str]:
        return [number(x) for x in rng.uniform(low, high, N)]

    def numbered(form: str) -> list[str]:
        return [form.format(i) for i in range(1, N + 1)]

    frame = {name: some(0, 180) for name in FRAME}
    angles = {name: some(0, 180) for name in OURS[:3]}
    origins = {name: some(-20, 20) for name in ORIGINS}
    pixels = {name: some(200, 800) for name in CORNER}
    if version == "3.0":
        return {
            "rlnMicrographName": ["tomograms/0012.mrc"] * N, **pixels, "rlnImageName": numbered("sub/{:04d}.mrc"),
            "rlnCtfImage": ["ctf/3.0.mrc"] * N, "rlnGroupNumber": ["           1"] * N,
            "rlnMagnification": [number(10000)] * N, "rlnDetectorPixelSize": [number(24)] * N, **angles,
            "rlnOriginX": some(-1, 1), "rlnOriginY": some(-1, 1), "rlnOriginZ": some(-1, 1),
            "rlnOriginXPrior": some(-1, 1), "rlnClassNumber": ["           1"] * N, "rlnNormCorrection": some(0.5, 1),
            "rlnVoltage": [number(300)] * N,
        }  # fmt: skip
    if version == "3.1":
        return {
            **pixels, "rlnMicrographName": ["007"] * N, "rlnImageName": numbered("sub/{:04d}.mrc"),
            "rlnCtfImage": ["ctf/3.1.mrc"] * N, "rlnOpticsGroup": ["2", "1", "2", "2", "1", "1"],
            "rlnOriginXPriorAngst": some(-20, 20), **origins, **angles, "rlnBeamTiltX": ["0.10"] * N,
            "wrpMyColumn": numbered("1e{}"),
        }  # fmt: skip
    tomo = {"rlnTomoName": ["TS_01", "TS_01", "0012", "0012", "1e5", "TS_03"]}
    if version == "4":
        return {
            **tomo, "rlnTomoParticleName": numbered("TS_01/{}"), "rlnTomoParticleId": numbered("{:12d}"), **pixels,
            **origins, **frame, "rlnAngleTiltPrior": [number(90)] * N, **angles,
            "rlnRandomSubset": ["1", "2"] * (N // 2), "rlnGroupNumber": ["1"] * N, "rlnOpticsGroup": ["1"] * N,
            "rlnImageName": numbered("sub/{:04d}.mrc"), "rlnCtfImage": ["ctf/4.mrc"] * N,
        }  # fmt: skip
    return {
        **tomo, "rlnTomoParticleName": numbered("TS_01/{}"), **{name: some(-900, 900) for name in CENTRED}, **frame,
        "rlnTomoVisibleFrames": ["[1,1,1,0,1]"] * N, "rlnOpticsGroup": ["1"] * N, **origins, **angles,
        "rlnImageName": numbered("sub/{:04d}.mrc"), "rlnCtfImage": ["ctf/5.mrc"] * N, "rlnAngleRotPrior": some(0, 90),
        "rlnOriginXPriorAngst": some(-20, 20), "rlnOriginYPriorAngst": [number(999)] * N,
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, small_simulation: Simulation) -> Path:
    """Boxes and weights as the versions lay them out: cube, FFTW half, and sums of CTF^2 with multiplicities behind."""
    half = np.asarray(small_simulation.weight, np.float32)
    weights = {
        "3.0": centred_from_half(half, BOX), "3.1": half, "4": np.concatenate([half, np.ones_like(half)]), "5": half,
    }  # fmt: skip
    volumes = {f"sub/{i:04d}.mrc": box for i, box in enumerate(small_simulation.boxes, 1)}
    for name, data in (volumes | {f"ctf/{name}.mrc": weight for name, weight in weights.items()}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with mrcfile.new(tmp_path / name, np.ascontiguousarray(data, np.float32)) as file:
            file.set_volume()
            file.voxel_size = VOXEL
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    """Blocks as starfile has them, every value as written."""
    blocks = starfile.read(path, always_dict=True)
    names = [name for table in blocks.values() if not isinstance(table, dict) for name in table]
    return dict(starfile.read(path, always_dict=True, parse_as_string=names))


def as_pairs(block: Any) -> list[tuple[str, Any]]:
    """Names and values in their order."""
    return [(name, values if isinstance(block, dict) else list(values)) for name, values in block.items()]


def floats(table: Any, names: list[str]) -> np.ndarray:
    return np.stack([table[name].astype(float) for name in names], axis=-1)


@pytest.mark.parametrize("version", ["3.0", "3.1", "4", "5"])
def test_a_file_of_relion(version: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = columns_of(version)
    tags = "\n".join(f"_{name} #{i}" for i, name in enumerate(columns, 1))
    rows = "\n".join(" ".join(row) for row in zip(*columns.values(), strict=True))
    template = {"3.0": V3_0, "3.1": V3_1, "4": V4, "5": V5}[version]
    given_path, out = project / "given.star", project / "out"
    given_path.write_text(as_relion_writes(template.format(tags=tags, rows=rows)))
    done = CliRunner().invoke(app, ["average", str(given_path), "-o", str(out), *FLAGS], env={"TERM": "dumb"})
    assert done.exit_code == 0, done.output
    given, found, moved = read(given_path), read(out / "run_data.star"), read(out / "run_data_recentered.star")

    # Blocks in their order, those without particles verbatim; one block becomes two, as of RELION 3.1.
    block = "particles" if version != "3.0" else ""
    assert list(found) == list(moved) == (list(given) if version != "3.0" else ["optics", "particles"])
    for name in set(given) - {block}:
        assert as_pairs(found[name]) == as_pairs(moved[name]) == as_pairs(given[name])
    if version == "3.0":
        optics = found["optics"].iloc[0]
        assert (float(optics["rlnImagePixelSize"]), optics["rlnImageSize"], optics["rlnVoltage"]) == (
            24,
            "16",
            "300.000000",
        )

    # Columns in their order, ours behind where they are new; values as written but for ours.
    named = [f"{name}Angst" if name.startswith("rlnOrigin") and version == "3.0" else name for name in columns]
    new = [name for name in OURS if name not in named] + ["rlnOpticsGroup"] * (version == "3.0")
    before, after, placed = given[block], found["particles"], moved["particles"]
    assert list(after)[: len(named)] == list(placed)[: len(named)] == named
    assert set(list(after)[len(named) :]) == set(list(placed)[len(named) :]) == set(new)
    coordinates = CENTRED if version == "5" else CORNER
    priors = [name for name in named if name.endswith("PriorAngst")]
    for old, name in zip(columns, named, strict=True):
        if name not in [*OURS, *(priors if version == "3.0" else [])]:
            assert list(after[name]) == list(before[old]) == [value.strip() for value in columns[old]], name
        if name not in [*OURS, *coordinates, *priors]:
            assert list(placed[name]) == list(before[old]), name
    assert set(after["rlnClassNumber"]) == {"1"}
    text = (out / "run_data.star").read_text()
    assert f"{columns['rlnMicrographName' if version[0] == '3' else 'rlnTomoName'][2]} " in text

    # Where the particles are in the tomogram: coordinate - A_sub origin, the new origin 0, priors in the same place.
    origins = floats(after, ORIGINS)
    assert abs(origins).max() > 1
    angles = floats(after, FRAME) if version in "45" else np.zeros((N, 3))
    frames = Rotation.from_euler("ZYZ", angles, degrees=True).inv()
    size = {"3.0": VOXEL, "3.1": VOXEL / BINNING, "4": VOXEL / BINNING, "5": 1.0}[version]
    expected = floats(after, coordinates) - frames.apply(origins) / size
    np.testing.assert_allclose(floats(placed, coordinates), expected, atol=2e-6)
    assert (floats(placed, ORIGINS) == 0).all()
    for name in priors:
        axis = "XYZ".index(name[len("rlnOrigin")])
        kept = floats(after, [name])[:, 0]
        wanted = kept if (kept == 999).all() else kept - origins[:, axis]
        np.testing.assert_allclose(floats(placed, [name])[:, 0], wanted, atol=2e-6)
    if version == "3.0":
        np.testing.assert_allclose(
            after["rlnOriginXPriorAngst"].astype(float), VOXEL * floats(before, ["rlnOriginXPrior"])[:, 0]
        )
    assert (
        "does not say the pixel size that rlnCoordinateX counts in; taken as that of the boxes, 24 A" in done.stderr
    ) == (version == "3.0")

    # Views are those in the tomogram.
    poses = Rotation.from_euler("ZYZ", floats(after, OURS[:3]), degrees=True).inv()
    beam = (frames * poses).inv().apply([0, 0, 1])
    even = 1.5 * (1 - np.linalg.eigvalsh(beam.T @ beam / N)[-1])
    model = starfile.read(out / "run_it002_model.star")["model_classes"]
    assert float(model["famlAngularCoverage"].iloc[0]) == pytest.approx(even, abs=1e-5)
    # What was written is read again, as a start.
    monkeypatch.chdir(project)
    flags = ["-o", "again", "--use-poses", "--dry-run", *FLAGS[1:]]
    again = CliRunner().invoke(app, ["average", "out/run_data.star", *flags])
    assert again.exit_code == 0, again.output
