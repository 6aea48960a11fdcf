"""`faml-gpu fsc` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gemmi import cif
from typer.testing import CliRunner

from faml_gpu.cli import app
from faml_gpu.fsc import fsc, fsc_with_mask, lowpass
from faml_gpu.io.mrc import read_mrc, write_mrc
from faml_gpu.masks import soft_sphere

BOX, VOXEL = 24, 5.0


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["fsc", *map(str, arguments)], env={"TERM": "dumb", "COLUMNS": "80"})
    assert result.exit_code == status, result.output
    return str(result.output)


@pytest.fixture
def maps(tmp_path: Path) -> list[np.ndarray]:
    """The same up to shell 6 of 12 (20 Å), independent beyond."""
    rng = np.random.default_rng(1)
    common, *noises = rng.standard_normal((3, BOX, BOX, BOX))
    common = lowpass(common, BOX * VOXEL / 6.5, VOXEL, edge=0)
    found = [common + n - lowpass(n, BOX * VOXEL / 6.5, VOXEL, edge=0) for n in noises]
    for name, volume in zip("ab", found, strict=True):
        write_mrc(tmp_path / f"{name}.mrc", volume, VOXEL)
    return found


def test_two_maps(maps: list[np.ndarray], tmp_path: Path) -> None:
    printed = run(tmp_path / "a.mrc", tmp_path / "b.mrc", "-o", tmp_path / "new" / "out")
    curve = fsc(*maps)
    out = tmp_path / "new" / "out"
    names = {"postprocess.mrc", "postprocess.star", "postprocess_fsc.json", "postprocess_fsc.png"}
    assert {p.name for p in out.iterdir()} == names
    assert (out / "postprocess_fsc.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "postprocess_fsc.json").read_text())
    resolution = report["levels"]["0.143"]["resolution"]
    assert BOX * VOXEL / 7 < resolution < BOX * VOXEL / 6
    assert f"{resolution:.1f} Å at FSC = 0.143" in printed
    np.testing.assert_allclose(report["shells"]["corrected"], curve, atol=1e-6)
    assert report["shells"]["masked"] is None
    star = cif.read_file(str(out / "postprocess.star"))
    table = star.find_block("fsc")
    np.testing.assert_allclose(
        [float(v) for v in table.find_values("_rlnFourierShellCorrelationUnmaskedMaps")], curve, atol=1e-6
    )
    assert [float(v) for v in table.find_values("_rlnAngstromResolution")][:3] == [999.0, 120.0, 60.0]
    assert [int(v) for v in table.find_values("_rlnSpectralIndex")] == list(range(13))
    assert float(star.find_block("general").find_value("_rlnFinalResolution")) == pytest.approx(resolution)
    rows = [line.split() for line in printed.splitlines()[1:13]]
    assert [int(row[0]) for row in rows] == list(range(1, 13))
    np.testing.assert_allclose([float(row[2]) for row in rows], curve[1:], atol=6e-4)


@pytest.mark.parametrize("way", ["mask", "radius"])
def test_two_maps_in_a_mask(way: str, maps: list[np.ndarray], tmp_path: Path) -> None:
    mask = soft_sphere(BOX, 7.0, 3.0)
    write_mrc(tmp_path / "mask.mrc", mask, VOXEL)
    option = ["--mask", tmp_path / "mask.mrc"] if way == "mask" else ["--radius", "35"]
    printed = run(tmp_path / "a.mrc", tmp_path / "b.mrc", "-o", tmp_path / "out", *option)
    expected = fsc_with_mask(*(m.astype(np.float32) for m in maps), mask)
    table = cif.read_file(str(tmp_path / "out" / "postprocess.star")).find_block("fsc")
    for name, curve in {
        "FourierShellCorrelationCorrected": expected.corrected,
        "FourierShellCorrelationUnmaskedMaps": expected.unmasked,
        "FourierShellCorrelationMaskedMaps": expected.masked,
        "CorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": expected.randomised,
    }.items():
        np.testing.assert_allclose([float(v) for v in table.find_values(f"_rln{name}")], curve, atol=1e-6)
    assert expected.randomised_from == 7
    general = cif.read_file(str(tmp_path / "out" / "postprocess.star")).find_block("general")
    assert float(general.find_value("_rlnRandomiseFrom")) == pytest.approx(BOX * VOXEL / 7)
    assert (general.find_value("_rlnMaskName") is not None) == (way == "mask")
    assert "masked" in printed


@pytest.mark.parametrize("b_factor", [None, "-600", "400"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_map_they_make_together(b_factor: str | None, masked: bool, maps: list[np.ndarray], tmp_path: Path) -> None:
    """The mean times sqrt(2 FSC / (1 + FSC)) exp(-B / 4d²) in each Fourier voxel, up to where the FSC ends."""
    window = soft_sphere(BOX, 7.0, 3.0)
    write_mrc(tmp_path / "mask.mrc", window, VOXEL)
    write_mrc(tmp_path / "b.mrc", 2 * maps[1], VOXEL)  # what the mean is made of shows
    options = (["--mask", tmp_path / "mask.mrc"] if masked else []) + (["--b-factor", b_factor] if b_factor else [])
    printed = run(tmp_path / "a.mrc", tmp_path / "b.mrc", "-o", tmp_path / "out", *options)
    found, voxel = read_mrc(tmp_path / "out/postprocess.mrc")
    assert voxel == pytest.approx(VOXEL)
    assert "postprocess.mrc" in printed.replace("\n", "")
    curve = np.array(json.loads((tmp_path / "out/postprocess_fsc.json").read_text())["shells"]["corrected"])
    k = np.fft.fftfreq(BOX, 1 / BOX)
    xi = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(BOX // 2 + 1) ** 2)
    weight = np.interp(xi, np.arange(len(curve)), np.sqrt(2 * curve.clip(0) / (1 + curve.clip(0))))
    s = xi / (BOX * VOXEL)
    expected = np.fft.rfftn((maps[0] + 2 * maps[1]) / 2) * weight * np.exp(-float(b_factor or 0) / 4 * s**2)
    spectrum = np.fft.rfftn(found)
    scale = np.abs(expected[xi < 7]).max()
    # The FSC ends between shells 6 and 7: one shell before its end the cut-off begins, one after all is gone.
    np.testing.assert_allclose(spectrum[xi < 5], expected[xi < 5], atol=1e-5 * scale)
    assert np.abs(spectrum[xi > 8]).max() < 1e-5 * scale
    general = cif.read_file(str(tmp_path / "out/postprocess.star")).find_block("general")
    told = general.find_value("_rlnBfactorUsedForSharpening")
    assert (None if told is None else float(told)) == (None if b_factor is None else float(b_factor))
    if masked:
        inside, _ = read_mrc(tmp_path / "out/postprocess_masked.mrc")
        np.testing.assert_allclose(inside, found * window, atol=1e-6)
    else:
        assert not (tmp_path / "out/postprocess_masked.mrc").exists()


def test_a_map_that_was_read_is_not_replaced(maps: list[np.ndarray], tmp_path: Path) -> None:
    write_mrc(tmp_path / "postprocess.mrc", maps[0], VOXEL)
    before = (tmp_path / "postprocess.mrc").read_bytes()
    printed = run(tmp_path / "postprocess.mrc", tmp_path / "b.mrc", "-o", tmp_path, status=2)
    assert "postprocess.mrc there was read and would be replaced" in " ".join(printed.split())
    assert (tmp_path / "postprocess.mrc").read_bytes() == before
    assert not (tmp_path / "postprocess.star").exists()


def test_maps_without_a_resolution_and_with_several_crossings(tmp_path: Path) -> None:
    one, two = np.random.default_rng(2).standard_normal((2, BOX, BOX, BOX))
    for name, volume in {"one": one, "minus": -one, "two": one}.items():
        write_mrc(tmp_path / f"{name}.mrc", volume, VOXEL)
    printed = run(tmp_path / "one.mrc", tmp_path / "minus.mrc", "-o", tmp_path)
    assert "no resolution" in printed
    report = json.loads((tmp_path / "postprocess_fsc.json").read_text())
    assert report["levels"]["0.5"]["resolution"] is None
    assert not read_mrc(tmp_path / "postprocess.mrc")[0].any()
    printed = run(tmp_path / "one.mrc", tmp_path / "two.mrc", "-o", tmp_path)
    assert "≤ 10.0 Å at FSC = 0.143" in printed
    spectrum, shells = (
        np.fft.fftn(one),
        np.rint(np.linalg.norm(np.meshgrid(*3 * [np.fft.fftfreq(BOX, 1 / BOX)]), axis=0)),
    )
    ring = np.where((shells == 4) | (shells == 7), np.fft.fftn(two), spectrum)
    write_mrc(tmp_path / "ring.mrc", np.fft.ifftn(ring).real, VOXEL)
    printed = run(tmp_path / "one.mrc", tmp_path / "ring.mrc", "-o", tmp_path)
    assert "the first of 2 crossings" in printed


def test_bad_input_is_told(maps: list[np.ndarray], tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.mrc", tmp_path / "b.mrc", tmp_path / "out"
    write_mrc(tmp_path / "small.mrc", np.ones((8, 8, 8)), VOXEL)
    write_mrc(tmp_path / "other.mrc", maps[0], 6.0)
    write_mrc(tmp_path / "slab.mrc", np.ones((8, 8, 9)), VOXEL)
    write_mrc(tmp_path / "loud.mrc", 2 * np.ones((BOX,) * 3), VOXEL)
    write_mrc(tmp_path / "empty.mrc", np.zeros((BOX,) * 3), VOXEL)
    write_mrc(tmp_path / "unsized.mrc", maps[0], 0.0)
    (tmp_path / "file").write_text("")
    cases = [
        ("small.mrc: found a box of 8 voxels, expected 24 as in", [a, tmp_path / "small.mrc"]),
        ("other.mrc: found a voxel size of 6 A, expected 5 A as in", [a, tmp_path / "other.mrc"]),
        ("slab.mrc: 9 x 8 x 8 voxels, expected a cube", [a, tmp_path / "slab.mrc"]),
        ("nowhere.mrc: cannot be read", [a, tmp_path / "nowhere.mrc"]),
        ("unsized.mrc: no voxel size in its header; give --voxel-size", [tmp_path / "unsized.mrc", b]),
        ("a.mrc: found a voxel size of 5 A, expected 7 A", [a, b, "--voxel-size", "7"]),
        ("small.mrc: found a box of 8 voxels", [a, b, "--mask", tmp_path / "small.mrc"]),
        ("loud.mrc: found values 2 to 2, expected a mask of 0 to 1", [a, b, "--mask", tmp_path / "loud.mrc"]),
        ("empty.mrc: found values 0 to 0, expected a mask", [a, b, "--mask", tmp_path / "empty.mrc"]),
        ("options mask and radius: found both", [a, b, "--mask", a, "--radius", "30"]),
        ("option b-factor: found 1e+06 A^2, expected -16000 to 16000 A^2", [a, b, "--b-factor", "1e6"]),
        ("option radius: found 99 A, expected more than 0 and at most 45 A", [a, b, "--radius", "99"]),
    ]
    for message, arguments in cases:
        printed = " ".join(run(*arguments, "-o", out, status=2).split())
        assert printed.startswith("error: ")
        assert message in printed
        assert not out.exists()
    assert "error: cannot write" in run(a, b, "-o", tmp_path / "file", status=2)
    run(tmp_path / "unsized.mrc", b, "--voxel-size", "5", "-o", out)
