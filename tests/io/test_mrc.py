"""MRC files: what mrcfile (or bytes put together by hand) holds is what is read, and the other way round."""

import os
import warnings

import mrcfile
import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.io.mrc import read_float16, read_header, read_mrc, read_volume, write_mrc


@pytest.fixture
def volume():
    return np.random.default_rng(0).integers(0, 100, (5, 6, 7)).astype(np.float32)


def save(path, data, voxel_size=2.5):
    with mrcfile.new(path, data) as mrc:
        mrc.set_volume()
        mrc.voxel_size = voxel_size
    return path


def patch(path, offset, value, dtype="<i4"):
    raw = bytearray(path.read_bytes())
    new = np.asarray(value, dtype).tobytes()
    raw[offset : offset + len(new)] = new
    path.write_bytes(raw)


def test_written_file_is_what_mrcfile_reads(tmp_path, volume):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume.astype(np.float64), 3.25)
    assert mrcfile.validate(path)
    with mrcfile.open(path) as mrc:
        np.testing.assert_array_equal(mrc.data, volume)
        assert mrc.header.mode == 2
        assert mrc.header.ispg == 1
        assert mrc.voxel_size.x == mrc.voxel_size.z == pytest.approx(3.25)
    read, voxel = read_mrc(path)
    np.testing.assert_array_equal(read, volume)
    assert voxel == pytest.approx(3.25)
    assert os.listdir(tmp_path) == ["a.mrc"]


def test_the_same_volume_gives_the_same_file(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, 1.5)
    write_mrc(tmp_path / "b.mrc", volume, 1.5)
    assert (tmp_path / "a.mrc").read_bytes() == (tmp_path / "b.mrc").read_bytes()
    assert b"faml_gpu" in (tmp_path / "a.mrc").read_bytes()[:1024]


def test_float16(tmp_path, volume):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume + 0.3, 3.25, float16=True)
    with mrcfile.open(path) as mrc:
        assert mrc.header.mode == 12
        # In words: `mrcfile.validate` takes the deviation of float16 voxels in float16, and finds it infinite.
        assert float(mrc.header.rms) == pytest.approx(volume.std(), rel=1e-2)
        assert float(mrc.header.dmean) == pytest.approx(volume.mean() + 0.3, rel=1e-2)
        np.testing.assert_array_equal(mrc.data, (volume + 0.3).astype(np.float16))
    header = read_header(path)
    assert header.float16
    assert read_float16(header).dtype == np.float16
    np.testing.assert_array_equal(read_float16(header), (volume + 0.3).astype(np.float16))
    assert read_volume(header).dtype == np.float32
    assert not read_header(save(tmp_path / "b.mrc", volume)).float16
    assert not read_header(save(tmp_path / "c.mrc", volume.astype(np.int16))).float16
    with pytest.raises(ValueError, match="finite"):
        write_mrc(path, volume + 65520, 3.25, float16=True)
    np.testing.assert_array_equal(read_float16(header), (volume + 0.3).astype(np.float16))


def test_failed_writing_leaves_the_old_file(tmp_path, volume, monkeypatch):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume, 1.5)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_mrc(path, volume + 1, 1.5)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mrc"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path, volume):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume, 1.5)
    before = path.read_bytes()
    with path.open("rb") as handle:
        write_mrc(path, volume + 1, 1.5)
        assert handle.read() == before  # replaced by name, not overwritten
    assert path.read_bytes() != before


def test_new_files_follow_the_umask(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, 1.5)
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "a.mrc").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_broken_is_written(tmp_path, volume, bad):
    volume[1, 2, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        write_mrc(tmp_path / "a.mrc", volume, 1.5)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_modes_and_byte_orders(tmp_path, volume, mode, dtype, order):
    if dtype[0] in "if":
        volume = volume - 50
    path = save(tmp_path / "a.mrc", volume.astype(order + dtype))
    with mrcfile.open(path) as mrc:
        assert mrc.header.mode == mode
    read, voxel = read_mrc(path)
    assert read.dtype == np.float32
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, volume)
    assert voxel == pytest.approx(2.5)


def test_a_wrong_machine_stamp_is_seen_through(tmp_path, volume):
    path = save(tmp_path / "a.mrc", volume.astype(">f4"))
    patch(path, 212, [0, 0, 0, 0], "u1")
    np.testing.assert_array_equal(read_mrc(path)[0], volume)


def test_unsigned_bytes_of_imod(tmp_path):
    data = np.arange(216).reshape(6, 6, 6)
    path = save(tmp_path / "a.mrc", data.astype("u1").view("i1"))
    assert read_mrc(path)[0].min() == -128
    patch(path, 152, [1146047817, 0])
    np.testing.assert_array_equal(read_mrc(path)[0], data)
    patch(path, 156, 1)
    assert read_mrc(path)[0].min() == -128


@pytest.mark.parametrize("axes", [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)])
def test_axis_order_is_followed(tmp_path, volume, axes):
    """Columns, rows, sections lie along mapc, mapr, maps: the file is filled by that definition, voxel by voxel."""
    counts = {1: 7, 2: 6, 3: 5}  # voxels along x, y, z
    stored = np.empty([counts[axis] for axis in axes[::-1]], np.float32)
    for section, row, column in np.ndindex(*stored.shape):
        place = dict(zip(axes, (column, row, section), strict=True))
        stored[section, row, column] = volume[place[3], place[2], place[1]]
    path = save(tmp_path / "a.mrc", stored)
    patch(path, 64, axes)
    patch(path, 28, [7, 6, 5])  # mx, my, mz and the cell belong to x, y, z whatever the order
    patch(path, 40, [7 * 2.5, 6 * 2.5, 5 * 2.5], "<f4")
    read, voxel = read_mrc(path)
    np.testing.assert_array_equal(read, volume)
    assert read.flags.c_contiguous
    assert voxel == pytest.approx(2.5)
    assert read_header(path).shape == (5, 6, 7)


def test_unset_axis_order_is_the_usual_one(tmp_path, volume):
    path = save(tmp_path / "a.mrc", volume)
    patch(path, 64, [0, 0, 0])
    np.testing.assert_array_equal(read_mrc(path)[0], volume)


def test_voxel_size_absent(tmp_path, volume):
    path = save(tmp_path / "a.mrc", volume, 0.0)
    assert read_mrc(path)[1] is None
    patch(path, 28, [0, 0, 0])
    assert read_mrc(path)[1] is None


def test_voxel_sizes_that_differ_are_refused(tmp_path, volume):
    path = save(tmp_path / "a.mrc", volume, (2.5, 2.5, 3.0))
    with pytest.raises(InputError, match=r"a\.mrc: voxel size \(x, y, z\) of 2.5 2.5 3 A"):
        read_mrc(path)


def test_extended_header_is_skipped(tmp_path, volume):
    path = tmp_path / "a.mrc"
    with mrcfile.new(path, volume) as mrc:
        mrc.set_volume()
        mrc.set_extended_header(np.frombuffer(b"x" * 160, dtype="V1"))
    np.testing.assert_array_equal(read_mrc(path)[0], volume)


def broken(kind, path, volume):
    save(path, volume)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "text":
        path.write_text("not a volume" * 200)
    elif kind == "short":
        path.write_bytes(b"MAP")
    elif kind == "size":
        patch(path, 0, [-7, 6, 5])
    elif kind == "axes":
        patch(path, 64, [1, 1, 3])
    elif kind == "complex":
        with mrcfile.new(path, volume.astype(np.complex64), overwrite=True):
            pass
    elif kind == "image":
        path.unlink()
        save(path, volume[:1])
    elif kind == "volumes":
        with mrcfile.new(path, volume[None].repeat(2, 0), overwrite=True):
            pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file"),
        ("truncated", r"truncated, 1860 bytes, expected 1864"),
        ("text", "not an MRC file"),
        ("short", "not an MRC file"),
        ("size", "not an MRC file"),
        ("axes", r"axis order .* \(1, 1, 3\), expected a permutation"),
        ("complex", "mode 4, expected one of 0, 1, 2, 6, 12"),
        ("image", "2-D image or a stack"),
        ("volumes", "2-D image or a stack"),
    ],
)
def test_unusable_files_are_named(tmp_path, volume, kind, message):
    path = tmp_path / "box.mrc"
    broken(kind, path, volume)
    with pytest.raises(InputError, match=rf"box\.mrc: .*{message}"):
        read_mrc(path)


def test_stacks_are_refused_by_their_suffix(tmp_path, volume):
    path = save(tmp_path / "box.mrcs", volume)
    with pytest.raises(InputError, match="expected one 3-D volume"):
        read_header(path)


def test_reading_warns_of_nothing(tmp_path, volume):
    # mrcfile's own reader warns of bytes behind the data; warnings are not safe in threads.
    path = save(tmp_path / "a.mrc", volume)
    path.write_bytes(path.read_bytes() + b"tail")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_mrc(path)[0], volume)
