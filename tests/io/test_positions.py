"""Coordinates of particles that lie off the centres of their boxes: numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.io.positions import assumed_pixel_size, box_frames, recentered
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


def test_relion_3_0(tmp_path):
    """One block: pixels of the boxes where nothing else is said; priors in pixels come out in Angstrom.

    A box of 8 Angstrom per pixel, a particle found at (6, -2, 1) Angstrom: its origin is (-6, 2, -1), to be 0 from now
    on. A prior of (1, 0, -0.5) pixels is one of origins of (8, 0, -4): 14, -2 and -3 more than what is 0 now.
    """
    names = "ImageName CoordinateX CoordinateY CoordinateZ"
    priors = " OriginXPrior OriginYPrior OriginZPrior"
    old = replace(table(tmp_path, "data_\nloop_\n", names + priors, ["a.mrc 10.5 20 30 1 0 -0.5"]), voxel_size=8.0)
    assert assumed_pixel_size(old) == 8.0
    found = recentered(old, [[6, -2, 1]])
    assert [found[f"rlnCoordinate{x}"][0] for x in "XYZ"] == [11.25, 19.75, 30.125]
    assert [found[f"rlnOrigin{x}PriorAngst"][0] for x in "XYZ"] == [14, -2, -3]
    # The tomogram had smaller pixels, and a column says so.
    told = replace(
        table(tmp_path, "data_\nloop_\n", names + " MicrographPixelSize", ["a.mrc 10.5 20 30 2"]), voxel_size=8.0
    )
    assert assumed_pixel_size(told) is None
    found = recentered(told, [[6, -2, 1]])
    assert [found[f"rlnCoordinate{x}"][0] for x in "XYZ"] == [13.5, 19, 30.5]
    # Centred coordinates need no pixel size.
    centred = table(
        tmp_path, "data_\nloop_\n", "ImageName " + " ".join(f"CenteredCoordinate{x}Angst" for x in "XYZ"), ["a 1 2 3"]
    )
    assert assumed_pixel_size(replace(centred, voxel_size=8.0)) is None


def test_priors_of_origins_stay_where_they_are(tmp_path):
    """In the tomogram, that is: coordinate - A_sub prior. RELION's 999 is no prior."""
    frame = "TomoSubtomogramRot TomoSubtomogramTilt TomoSubtomogramPsi"
    coordinates = " ".join(f"CenteredCoordinate{x}Angst" for x in "XYZ")
    priors = " ".join(f"Origin{x}PriorAngst" for x in "XYZ")
    rows = ["a.mrc 1 90 0 0 100 200 -300 5 -3 1", "b.mrc 1 20 70 -130 0 0 0 5 999.0 1"]
    given = table(tmp_path, OPTICS.format("1 8.0\n"), f"ImageName OpticsGroup {frame} {coordinates} {priors}", rows)
    found = recentered(given, [[6, 1, 2], [-4, 0.5, 3]])
    before = np.array([[5, -3, 1], [5, 999, 1]])
    after = np.stack([found[f"rlnOrigin{x}PriorAngst"] for x in "XYZ"], axis=-1)
    # Rot 90: (x, y, z) -> (y, -x, z). The prior of the first lay at (100, 200, -300) - (-3, -5, 1).
    position = np.stack([found[f"rlnCenteredCoordinate{x}Angst"] for x in "XYZ"], axis=-1)
    np.testing.assert_allclose(position[0], [101, 194, -298], atol=1e-9)
    np.testing.assert_allclose(after[0], [11, -2, 3], atol=1e-9)  # (101, 194, -298) - (-2, -11, 3)
    set_ones = [0, 2]
    np.testing.assert_allclose(after[1, set_ones], before[1, set_ones] + [-4, 3], atol=1e-9)
    assert after[1, 1] == 999
    plain = table(tmp_path, OPTICS.format("1 8.0\n"), f"ImageName OpticsGroup {coordinates}", ["a.mrc 1 0 0 0"])
    assert not any("Prior" in name for name in recentered(plain, [[6, 1, 2]]))


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
            r"rlnTomoTiltSeriesPixelSize is 0 in optics group 1, expected more than 0 A",
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
    given = table(tmp_path, OPTICS.format(optics), f"ImageName OpticsGroup {columns}", [f"a.mrc 1 {row}"])
    found = replace(given, voxel_size=8.0)  # as read with its boxes: what their pixels are says nothing here
    with pytest.raises(InputError, match=message):
        recentered(found, [[0, 0, 0]])
