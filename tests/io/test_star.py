"""STAR files: our columns change, nothing else does; starfile is the independent reader."""

import re
from dataclasses import replace

import numpy as np
import pytest
import starfile

from faml_gpu.errors import InputError
from faml_gpu.io.star import FreshTable, read_particles_star, write_particles_star, write_star

NEW = """\
# version 30001
# made by hand: keep me

data_general

_rlnTomoSubTomosAre2DStacks   0

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3   # Angstrom
1 opticsGroup1 2.50


data_particles

# about the particles
loop_
_rlnTomoName #1   of the series
_rlnImageName #2
_rlnOpticsGroup #3
_rlnAngleRot #4
_rlnOddity #5
  0012  sub/0001.mrc   1   1.50e+01   'a "quoted" value'   # the first
  0013  "sub/with space.mrc"   1  -7.000     #notacomment
# between rows

  TS_'x  sub/0003.mrc   1  +.5   ?

data_more
loop_
_rlnExtra
007   # agent
"""
NEW = NEW.replace("     #notacomment", "     x#notacomment").replace("   of the series", "   # of the series")

OLD = """\
# RELION; version 3.0.8

data_images

loop_
_rlnImageName #1
_rlnOriginX #2
_rlnOriginY #3
_rlnOriginZ #4
_rlnDetectorPixelSize #5
_rlnMagnification #6
_rlnVoltage #7
a/0001.mrc 1.0 -2.0 3.5 6.0 20000.0 300.0
a/0002.mrc 0.0 0.25 0.0 6.0 20000.0 200.0
a/0003.mrc 0.0 0.00 0.0 6.0 20000.0 300.0
"""


def write(tmp_path, text, name="in.star"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def rewritten(tmp_path, text, columns, **known):
    table = replace(read_particles_star(write(tmp_path, text)), **known)
    out = tmp_path / "out.star"
    write_particles_star(out, table, columns)
    return out


def test_nothing_to_set_changes_no_byte(tmp_path):
    for text in (NEW, NEW.replace("\n", "\r\n")):
        assert rewritten(tmp_path, text, {}).read_bytes() == text.encode()


def test_only_our_columns_change(tmp_path):
    out = rewritten(tmp_path, NEW, {"rlnAngleRot": [1.0, 2.5, -3.0], "rlnClassNumber": np.array([1, 2, 1])})
    text = out.read_bytes().decode()
    expected = (
        NEW.replace("1.50e+01", "1.000000")
        .replace("-7.000", "2.500000")
        .replace("+.5", "-3.000000")
        .replace("_rlnOddity #5\n", "_rlnOddity #5\n_rlnClassNumber #6\n")
        .replace("""'a "quoted" value'""", """'a "quoted" value' 1""")
        .replace("x#notacomment", "x#notacomment 2")
        .replace("?\n", "? 1\n")
    )
    assert text == expected


def test_windows_line_ends_stay(tmp_path):
    out = rewritten(tmp_path, NEW.replace("\n", "\r\n"), {"rlnClassNumber": [1, 2, 3]})
    text = out.read_bytes().decode()
    assert text.count("\n") == text.count("\r\n") == NEW.count("\n") + 1


def test_starfile_reads_what_we_write(tmp_path):
    # starfile takes comments behind values for values, and knows neither nested quotes nor # in a value.
    plain = NEW
    for text, simpler in [
        ("   # the first", ""),
        ('a "quoted" value', "a quoted value"),
        ("TS_'x", "TS_x"),
        ("x#", "x"),
    ]:
        plain = plain.replace(text, simpler)
    out = rewritten(tmp_path, plain, {"rlnAngleRot": [1.0, 2.5, -3.0], "rlnClassNumber": [1, 2, 1]})
    blocks = starfile.read(out, always_dict=True, parse_as_string=["rlnTomoName"])
    assert list(blocks) == ["general", "optics", "particles", "more"]
    particles = blocks["particles"]
    assert particles["rlnTomoName"].tolist()[:2] == ["0012", "0013"]
    assert particles["rlnAngleRot"].tolist() == [1.0, 2.5, -3.0]
    assert particles["rlnClassNumber"].tolist() == [1, 2, 1]
    assert particles["rlnImageName"].tolist() == ["sub/0001.mrc", "sub/with space.mrc", "sub/0003.mrc"]


def test_values_are_text_until_asked(tmp_path):
    table = read_particles_star(write(tmp_path, NEW))
    assert table.strings("rlnTomoName") == ["0012", "0013", "TS_'x"]
    assert table.strings("rlnImageName")[1] == "sub/with space.mrc"
    assert table.values[0][3] == "1.50e+01"
    np.testing.assert_array_equal(table.floats("rlnAngleRot"), [15.0, -7.0, 0.5])
    assert table.optics == {
        "rlnOpticsGroup": ["1"],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnImagePixelSize": ["2.50"],
    }
    assert table.general == {"rlnTomoSubTomosAre2DStacks": "0"}
    assert [NEW.splitlines()[line - 1].split()[0] for line in table.lines] == ["0012", "0013", "TS_'x"]


def test_optics_as_pairs(tmp_path):
    text = NEW.replace(
        "loop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnImagePixelSize #3   # Angstrom\n1 opticsGroup1 2.50\n",
        "_rlnOpticsGroup 1\n_rlnImagePixelSize 2.50\n",
    )
    assert read_particles_star(write(tmp_path, text)).optics == {"rlnOpticsGroup": ["1"], "rlnImagePixelSize": ["2.50"]}


def test_text_field_in_a_row(tmp_path):
    text = "data_particles\nloop_\n_rlnImageName\n_rlnNote\na.mrc\n;two\nlines # no comment\n;\nb.mrc short\n"
    out = rewritten(tmp_path, "data_optics\n_rlnOpticsGroup 1\n" + text, {"rlnClassNumber": [1, 2]})
    blocks = read_particles_star(out)
    assert blocks.strings("rlnClassNumber") == ["1", "2"]
    assert blocks.strings("rlnNote") == ["two\nlines # no comment", "short"]
    assert ";two\nlines # no comment\n; 1\nb.mrc short 2\n" in out.read_text()


def test_six_decimals_and_no_minus_zero(tmp_path):
    out = rewritten(tmp_path, NEW, {"rlnAngleRot": [-1e-9, 1 / 3, -180.0]})
    assert read_particles_star(out).strings("rlnAngleRot") == ["0.000000", "0.333333", "-180.000000"]


def test_column_of_wrong_length(tmp_path):
    with pytest.raises(ValueError, match="rlnClassNumber has 2 values, expected 3"):
        rewritten(tmp_path, NEW, {"rlnClassNumber": [1, 2]})
    assert not (tmp_path / "out.star").exists()


def test_one_block_comes_back_in_two(tmp_path):
    columns = {"rlnAngleRot": [10.0, 20.0, 30.0], "rlnOriginXAngst": [7.5, 0.0, 0.0]}
    out = rewritten(tmp_path, OLD, columns, voxel_size=3.0, box=64)
    blocks = starfile.read(out, always_dict=True)
    assert list(blocks) == ["optics", "particles"]
    optics, particles = blocks["optics"], blocks["particles"]
    assert optics["rlnOpticsGroup"].tolist() == [1, 2]
    assert optics["rlnImagePixelSize"].tolist() == [3.0, 3.0]
    assert optics["rlnImageSize"].tolist() == [64, 64]
    assert optics["rlnImageDimensionality"].tolist() == [3, 3]
    assert optics["rlnVoltage"].tolist() == [300.0, 200.0]
    assert particles["rlnOpticsGroup"].tolist() == [1, 2, 1]
    assert list(particles)[:7] == [
        "rlnImageName", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst",
        "rlnDetectorPixelSize", "rlnMagnification", "rlnVoltage",
    ]  # fmt: skip
    assert particles["rlnOriginXAngst"].tolist() == [7.5, 0.0, 0.0]  # ours
    assert particles["rlnOriginYAngst"].tolist() == [-6.0, 0.75, 0.0]  # pixels times 3 A
    assert particles["rlnOriginZAngst"].tolist() == [10.5, 0.0, 0.0]
    text = out.read_text()
    assert text.startswith("# RELION; version 3.0.8\n")
    # RELION takes a file without these lines for one of version 3.0.
    assert re.findall(r"^# version 30001\n\n(?:#.*\n)?(data_\w+)", text, re.MULTILINE) == [
        "data_optics",
        "data_particles",
    ]
    assert "rlnSphericalAberration, rlnAmplitudeContrast: not known" in text
    assert "6.0 20000.0 300.0" in text  # digits as they were
    again = read_particles_star(out)
    assert again.optics is not None
    assert again.optics["rlnVoltage"] == [
        "300.0",
        "200.0",
    ]


def test_nameless_block(tmp_path):
    out = rewritten(tmp_path, OLD.replace("data_images", "data_"), {}, voxel_size=3.0, box=64)
    assert list(starfile.read(out, always_dict=True)) == ["optics", "particles"]


def test_fresh_table(tmp_path):
    out = tmp_path / "out.star"
    write_particles_star(out, FreshTable(("a/0001.mrc", "a b/2.mrc"), 4.5, 32), {"rlnAngleTilt": [1.0, 2.0]})
    blocks = starfile.read(out, always_dict=True)
    assert list(blocks) == ["optics", "particles"]
    assert blocks["particles"]["rlnImageName"].tolist() == ["a/0001.mrc", "a b/2.mrc"]
    assert blocks["particles"]["rlnAngleTilt"].tolist() == [1.0, 2.0]
    optics = blocks["optics"].iloc[0]
    assert optics["rlnImagePixelSize"] == 4.5
    assert optics["rlnImageSize"] == 32
    assert {"rlnVoltage", "rlnSphericalAberration"} <= set(blocks["optics"])  # RELION reads no optics without them
    assert read_particles_star(out).strings("rlnOpticsGroup") == ["1", "1"]


def test_write_star(tmp_path):
    path = tmp_path / "model.star"
    write_star(
        path,
        {
            "model_general": {"rlnLogLikelihood": -1234567.125, "rlnNrClasses": 2, "note": "two words", "flag": True},
            "model_classes": {"rlnReferenceImage": ["a.mrc", "0012"], "rlnClassDistribution": np.array([0.25, 0.75])},
        },
    )
    blocks = starfile.read(path, always_dict=True, parse_as_string=["rlnReferenceImage"])
    assert blocks["model_general"] == {
        "rlnLogLikelihood": -1234567.125,
        "rlnNrClasses": 2,
        "note": "two words",
        "flag": 1,
    }
    assert blocks["model_classes"]["rlnReferenceImage"].tolist() == ["a.mrc", "0012"]
    assert blocks["model_classes"]["rlnClassDistribution"].tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="mixes"):
        write_star(path, {"a": {"x": 1, "y": [1, 2]}})
    with pytest.raises(ValueError, match="zip"):
        write_star(path, {"a": {"x": [1], "y": [1, 2]}})
    assert "model_classes" in path.read_text()  # the old one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("hello\n", "not a valid STAR file"),
        ("data_particles\nloop_\n_rlnImageName\n_rlnAngleRot\na.mrc 1 b.mrc\n", "Wrong number of values"),
        ("data_particles\nloop_\n_rlnImageName\n", "no particles in block data_particles"),
        ("data_particles\nloop_\n_rlnCoordinateX\n1\n", r"no loop with rlnImageName \(blocks: data_particles\)"),
        ("data_a\nloop_\n_rlnImageName\na\ndata_b\nloop_\n_rlnImageName\nb\n", "2 loops with rlnImageName"),
        ("data_a\nloop_\n_rlnImageName\ncaf\u00e9.mrc\n", "beyond ASCII"),
    ],
)
def test_unusable_files_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=rf"in\.star: .*{message}"):
        read_particles_star(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.star: cannot be read"):
        read_particles_star(tmp_path / "none.star")
    path = tmp_path / "binary.star"
    path.write_bytes(b"data_\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.star: not a STAR file"):
        read_particles_star(path)


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "?"])
def test_a_value_that_is_no_number_is_named(tmp_path, value):
    table = read_particles_star(write(tmp_path, NEW.replace("-7.000", value)))
    with pytest.raises(InputError, match=r"line 27 \(particle 2\): rlnAngleRot is"):
        table.floats("rlnAngleRot")


def test_pairs_beside_the_loop_of_optics(tmp_path):
    """Each holds for all groups; two loops of different length are no table."""
    optics = "data_optics\n_rlnImageDimensionality 3\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n1 2.5\n2 2.5\n"
    particles = "data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\na.mrc 1\nb.mrc 2\n"
    path = tmp_path / "in.star"
    path.write_text(optics + particles)
    assert read_particles_star(path).optics_values("rlnImageDimensionality") == {"1": "3", "2": "3"}
    path.write_text(optics.replace("loop_", "loop_\n_rlnVoltage\n1\n2\n3\nloop_") + particles)
    with pytest.raises(InputError, match=r"in\.star: loops of different length in data_optics"):
        read_particles_star(path)


def test_other_editors(tmp_path):
    path = tmp_path / "in.star"
    text = "data_\nloop_\n_rlnImageName\na.mrc\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_particles_star(path).image_names == ("a.mrc",)
    path.write_bytes(text.replace("\n", "\r").encode())
    with pytest.raises(InputError, match=r"in\.star: line ends of an old Mac"):
        read_particles_star(path)


def test_a_column_that_is_not_there(tmp_path):
    path = tmp_path / "in.star"
    path.write_text("data_\nloop_\n_rlnImageName\na.mrc\n")
    with pytest.raises(InputError, match=r"in\.star: no column rlnOther in data_"):
        read_particles_star(path).floats("rlnOther")
