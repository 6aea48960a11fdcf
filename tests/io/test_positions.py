"""Coordinates of particles that lie off the centres of their boxes: numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.io.positions import box_frames, recentered
from faml_gpu.io.star import StarTable, read_particles_star

OPTICS = "data_optics\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n{}data_particles\nloop_\n"


def table(tmp_path: Path, optics: str, columns: str, rows: list[str]) -> StarTable:
    path = tmp_path / "in.star"
    tags = "".join(f"_rln{name} #{i}\n" for i, name in enumerate(columns.split(), 1))
    path.write_text(f"{optics}{tags}" + "\n".join(rows) + "\n")
    return read_particles_star(path)


def test_frames_of_boxes(tmp_path):
    """Columns that are missing are 0, and without any of them boxes lie as their tomogram does."""
    turned = table(tmp_path, "data_particles\nloop_\n", "ImageName TomoSubtomogramTilt", ["a.mrc 90", "b.mrc 0"])
    # Tilt 90: (x, y, z) of the box -> (-z, y, x) of the tomogram.
    np.testing.assert_allclose(box_frames(turned), [[[0, 0, -1], [0, 1, 0], [1, 0, 0]], np.eye(3)], atol=1e-12)
    plain = table(tmp_path, "data_particles\nloop_\n", "ImageName AngleTilt", ["a.mrc 90", "b.mrc 0"])
    np.testing.assert_array_equal(box_frames(plain), [np.eye(3)] * 2)
    frame = "TomoSubtomogramRot TomoSubtomogramTilt TomoSubtomogramPsi"
    three = table(tmp_path, "data_particles\nloop_\n", f"ImageName {frame}", ["a.mrc 20 -50 170"])
    expected = Rotation.from_euler("ZYZ", [20, -50, 170], degrees=True).inv().as_matrix()
    np.testing.assert_allclose(box_frames(three)[0], expected, atol=1e-12)


def test_relion_5(tmp_path):
    """Angstrom from the centre. Rot 90 takes x of the box to -y of the tomogram, tilt 90 takes x to +z."""
    frame = "TomoSubtomogramRot TomoSubtomogramTilt TomoSubtomogramPsi"
    coordinates = " ".join(f"CenteredCoordinate{x}Angst" for x in "XYZ")
    rows = [
        "a.mrc 1 0 0 0 100 200 -300",
        "b.mrc 1 90 0 0 100 200 -300",
        "c.mrc 1 0 90 0 100 200 -300",
    ]
    found = recentered(
        table(tmp_path, OPTICS.format("1 8.0\n"), f"ImageName OpticsGroup {frame} {coordinates}", rows),
        [[6, 1, 2]] * 3,
    )
    position = np.stack([found[f"rlnCenteredCoordinate{x}Angst"] for x in "XYZ"], axis=-1)
    # Rot 90: (x, y, z) -> (y, -x, z); tilt 90: (x, y, z) -> (-z, y, x).
    np.testing.assert_allclose(position, [[106, 201, -298], [101, 194, -298], [98, 201, -294]], atol=1e-9)
    assert all((found[f"rlnOrigin{x}Angst"] == 0).all() for x in "XYZ")
    assert len(found) == 6


def test_relion_4(tmp_path):
    """Pixels of the tilt series, which differ between optics groups; not those of the boxes."""
    optics = (
        "data_optics\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnTomoTiltSeriesPixelSize #3\n"
        "1 8.0 2.0\n2 8.0 1.0\ndata_particles\nloop_\n"
    )
    rows = ["a.mrc 1 10.5 20 30", "b.mrc 2 10.5 20 30"]
    found = recentered(
        table(tmp_path, optics, "ImageName OpticsGroup CoordinateX CoordinateY CoordinateZ", rows), [[6, -2, 1]] * 2
    )
    assert found["rlnCoordinateX"].tolist() == [13.5, 16.5]
    assert found["rlnCoordinateY"].tolist() == [19, 18]
    assert found["rlnCoordinateZ"].tolist() == [30.5, 31]


@pytest.mark.parametrize(
    ("columns", "row", "optics", "message"),
    [
        ("", "", "1 8.0\n", r"recenter: .*in\.star has no coordinates.*rlnCenteredCoordinateXAngst"),
        ("CoordinateX", "5", "1 8.0\n", r"has no coordinates"),
        ("CoordinateX CoordinateY CoordinateZ", "1 2 3", "1 8.0\n", r"does not say the pixel size"),
        (
            "CoordinateX CoordinateY CoordinateZ",
            "1 2 3",
            "_rlnTomoTiltSeriesPixelSize #3\n1 8.0 0\n",
            r"rlnTomoTiltSeriesPixelSize is 0 in data_optics, expected more than 0 A",
        ),
        (
            "CoordinateX CoordinateY CoordinateZ",
            "1 two 3",
            "_rlnTomoTiltSeriesPixelSize #3\n1 8.0 2\n",
            r"rlnCoordinateY is two, expected a number",
        ),
    ],
)
def test_what_cannot_be_moved(tmp_path, columns, row, optics, message):
    found = table(tmp_path, OPTICS.format(optics), f"ImageName OpticsGroup {columns}", [f"a.mrc 1 {row}"])
    with pytest.raises(InputError, match=message):
        recentered(found, [[0, 0, 0]])
