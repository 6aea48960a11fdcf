"""Simulated imaging: the Fourier slice against sums along the beam, the CTF against its zeros, the wedge's energy."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu.errors import InputError
from faml_gpu.simulate import Optics, TiltSeries, ctf, density, mtf, ribosome, tmv
from faml_gpu.simulate.data_set import FastBoxes
from faml_gpu.simulate.gridding import fourier_grid, sample, sample_vectorised
from faml_gpu.simulate.tilt_series import electron_wavelength, tilt_angles
from faml_gpu.weights import missing_wedge

VOXEL, RESOLUTION = 12.0, 40.0
ROTATION, SHIFT = Rotation.random(random_state=1).as_matrix(), np.array([1.3, -2.1, 0.4])
Axis = Literal["x", "y"]


def blobs(box: int, rotation: np.ndarray | None = None, shift: Any = (0, 0, 0)) -> np.ndarray:
    return density(ribosome(), box, VOXEL, rotation, shift, RESOLUTION)


def literal_transform(volume: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The sum over the voxels as written, origin at voxel N // 2."""
    n = len(volume)
    z, y, x = (np.exp(-2j * np.pi * np.outer(frequencies[:, a], np.arange(n) - n // 2)) for a in (2, 1, 0))
    return np.einsum("zyx,fz,fy,fx->f", volume.astype(np.float64), z, y, x, optimize=True)


def power_outside(volume: np.ndarray, weight: np.ndarray) -> float:
    """Share of the largest coefficient that is left where the weight is 0."""
    spectrum = np.abs(np.fft.rfftn(volume))
    return float(spectrum[weight == 0].max() / spectrum.max())


@pytest.mark.parametrize("box", [32, 33])
def test_samples_are_the_transform_of_the_moved_volume(box: int, rng: np.random.Generator) -> None:
    frequencies = rng.uniform(-0.25, 0.25, (300, 3)).astype(np.float32)
    found = sample(fourier_grid(blobs(box)), frequencies, ROTATION, SHIFT)
    # The analytic structure in the pose, not an interpolated one.
    expected = literal_transform(blobs(box, ROTATION, SHIFT), frequencies)
    # The kernel's aliasing is 5e-4 of a structure that fills the box.
    assert np.linalg.norm(found - expected) < 1.5e-3 * np.linalg.norm(expected)


def test_beyond_the_limit_there_is_nothing(rng: np.random.Generator) -> None:
    frequencies = rng.uniform(-0.5, 0.5, (300, 3)).astype(np.float32)
    found = sample(fourier_grid(blobs(32), limit=0.2), frequencies)
    beyond = np.linalg.norm(frequencies, axis=1) > 0.2
    assert np.all(found[beyond] == 0)
    assert np.all(found[~beyond] != 0)


def test_both_ways_to_sample_agree(rng: np.random.Generator) -> None:
    grid = fourier_grid(blobs(24))
    frequencies = rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32)
    found = sample(grid, frequencies, ROTATION, SHIFT)
    matrix = (2 * 24 * ROTATION).astype(np.float32)
    other = sample_vectorised(grid, frequencies, matrix, SHIFT.astype(np.float32), np.float32(24 * (1 + 1e-5)))
    np.testing.assert_allclose(other, found, atol=1e-5 * np.abs(found).max())


def test_several_poses_are_sampled_at_once(
    emulated_gpu: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Each as if alone, on the GPU in pieces of the frequencies that do not divide them evenly."""
    import cupy

    frequencies = rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32)
    rotations, shifts = Rotation.random(6, random_state=2).as_matrix().reshape(2, 3, 3, 3), rng.normal(size=(3, 3))
    grid = fourier_grid(blobs(24))
    alone = np.stack([[sample(grid, frequencies, rotations[i, j], shifts[j]) for j in range(3)] for i in range(2)])
    np.testing.assert_array_equal(sample(grid, frequencies, rotations, shifts), alone)
    monkeypatch.setattr("faml_gpu.simulate.gridding.working_bytes", lambda _: 6 * 500 * 70)
    found = sample(fourier_grid(cupy.asarray(blobs(24))), cupy.asarray(frequencies), rotations, shifts)
    np.testing.assert_allclose(found.get(), alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize(("axis", "angle"), [("y", 35.0), ("y", -50.0), ("x", 35.0)])
def test_projections_are_sums_along_the_beam(axis: Axis, angle: float) -> None:
    """Turn the specimen so that the image's u is x cos + z sin, sum over z, compare with the Fourier slice."""
    box, theta = 32, np.deg2rad(angle)
    # README: x' = x cos(theta) + z sin(theta) for axis Y, y' = y cos(theta) + z sin(theta) for axis X.
    c, s = np.cos(theta), np.sin(theta)
    stage = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]] if axis == "y" else [[1, 0, 0], [0, c, s], [0, -s, c]])
    summed = blobs(2 * box, stage @ ROTATION, stage @ SHIFT).sum(axis=0)  # [y, x]
    series = TiltSeries(box, VOXEL, [angle], axis, optics=None, detector=False)
    image = np.fft.irfft2(series.project(fourier_grid(blobs(box)), ROTATION, SHIFT)[0], s=(2 * box, 2 * box))
    image = np.fft.fftshift(image)  # [u, v]
    if axis == "y":
        image = image.T
    assert np.linalg.norm(image - summed) < 3e-3 * np.linalg.norm(summed)


def test_wavelength() -> None:
    """Kirkland, Advanced Computing in Electron Microscopy, table of wavelengths."""
    for voltage, expected in ((100, 0.037014), (200, 0.025079), (300, 0.019687)):
        assert electron_wavelength(voltage) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optics", [Optics(), Optics(cs=0.0), Optics(2.0, 200.0, 2.0, 0.1), Optics(defocus=-2.0)])
def test_ctf_is_zero_where_theory_puts_it(optics: Optics) -> None:
    """sqrt(1 - A^2) sin(g) + A cos(g) = 0 where g = n pi - arcsin A: a quadratic in k^2."""
    wavelength = electron_wavelength(optics.voltage)
    a, b = 0.5 * np.pi * optics.cs * 1e7 * wavelength**3, np.pi * wavelength * optics.defocus * 1e4
    assert ctf(0.0, optics) == pytest.approx(optics.amplitude_contrast)
    for n in (1, 2, 3) if optics.defocus > 0 else (0, -1):
        g = n * np.pi - np.arcsin(optics.amplitude_contrast)
        roots = np.roots([-a, b, -g])
        square = min(r for r in np.atleast_1d(roots).real if r > 0)
        k = np.sqrt(square)
        assert ctf(k, optics) == pytest.approx(0.0, abs=1e-9)
        before, after = ctf(k * np.array([0.99, 1.01]), optics)
        assert before * after < 0


def test_protein_is_bright() -> None:
    """The first zero of the defaults, neglecting Cs, is where lambda * defocus * k^2 = 1 - arcsin(A) / pi: 34.7 A."""
    zero = np.sqrt((1 - np.arcsin(0.07) / np.pi) / (0.019687 * 6e4))
    assert np.all(ctf(np.linspace(0, 0.995 * zero, 200), Optics()) > 0)
    assert ctf(1.01 * zero, Optics()) < 0


def test_mtf_is_the_papers() -> None:
    np.testing.assert_allclose(mtf([0.0, 0.5, 1.0]), [1.0, np.sin(np.pi / 4) / (np.pi / 4), 2 / np.pi])


def test_images_carry_the_ctf_and_the_mtf() -> None:
    box, optics = 32, Optics(defocus=3.0)
    grid = fourier_grid(blobs(box))
    plain = TiltSeries(box, VOXEL, [0.0], optics=None, detector=False).project(grid, ROTATION, SHIFT)
    seen = TiltSeries(box, VOXEL, [0.0], optics=optics).project(grid, ROTATION, SHIFT)
    ku, kv = np.fft.fftfreq(64)[:, None], np.arange(33) / 64
    k = np.hypot(ku, kv)
    np.testing.assert_allclose(
        seen[0], plain[0] * ctf(k / VOXEL, optics) * np.sinc(k / 0.5 / 2), atol=1e-5 * np.abs(plain).max()
    )


def test_white_noise_is_white_and_of_variance_one() -> None:
    series = TiltSeries(24, VOXEL, tilt_angles((-60, 60), 10.0), optics=Optics())
    images = np.fft.irfft2(series.noise(np.random.default_rng(0)), s=(48, 48))
    assert images.var() == pytest.approx(1.0, rel=0.03)
    power = np.abs(np.fft.fft2(images)) ** 2 / 48**2
    assert power[:, :12, :12].mean() == pytest.approx(power[:, 12:36, 12:36].mean(), rel=0.05)


def test_all_tilts_give_the_structure_back() -> None:
    """Without a missing wedge, CTF and regularisation the box is the structure in its pose, its scale included."""
    box = 32
    series = TiltSeries(box, VOXEL, np.arange(-90, 90, 2.0), optics=None, detector=False, wiener=1e-4)
    found = series.reconstruct(series.project(fourier_grid(blobs(box)), ROTATION, SHIFT))
    expected = blobs(box, ROTATION, SHIFT)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_the_weight_is_the_stated_wedge(axis: Axis, box: int) -> None:
    """The range is lopsided: a wrong sign or axis would show."""
    series = TiltSeries(box, VOXEL, tilt_angles((-40.0, 62.0), 3.0), axis, optics=None, detector=False)
    weight = series.weight
    assert weight.dtype == np.float32
    assert weight.min() == 0
    assert weight.max() <= 1
    k = np.rint(np.fft.fftfreq(box) * box)
    across = np.arange(box // 2 + 1) if axis == "y" else k[:, None]
    radius = np.broadcast_to(np.hypot(k[:, None, None], across), weight.shape)  # from the tilt axis
    # Away from the edge (the kernel reaches 1 voxel, the cut half a voxel more).
    clear = (radius > 6) & (radius < box / 2 - 2) & (np.abs(k[:, None]) < box / 2) & (np.arange(box // 2 + 1) < box / 2)
    inner = missing_wedge(box, (-28.0, 50.0), axis) > 0
    outer = missing_wedge(box, (-60.0, 82.0), axis) > 0
    assert np.all(weight[clear & inner] > 0.6)
    assert np.all(weight[clear & ~outer] == 0)
    assert np.any(clear & inner)
    assert np.any(clear & ~outer)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_no_energy_outside_the_weight(axis: Axis) -> None:
    box = 33 if axis == "x" else 32
    series = TiltSeries(box, VOXEL, tilt_angles((-40.0, 60.0), 3.0), axis, optics=Optics())
    signal = series.reconstruct(series.project(fourier_grid(blobs(box)), ROTATION, SHIFT))
    noise = series.reconstruct(series.noise(np.random.default_rng(1)))
    assert 0.2 < (series.weight == 0).mean() < 0.7
    for volume in (signal, noise):
        assert power_outside(volume, series.weight) < 1e-5
        # The box was not simply wiped: the stated wedge is where it has its energy.
        spectrum = np.abs(np.fft.rfftn(volume)) ** 2
        assert spectrum[series.weight > 0.5].mean() > 5 * spectrum[series.weight < 0.1].mean()


def test_the_weight_is_the_share_of_signal_that_comes_back() -> None:
    """Spectra of box and truth, over the wedge's inside, shell by shell: their ratio is the weight, zeros included."""
    box, optics = 48, Optics(defocus=6.0)
    series = TiltSeries(box, 9.0, np.arange(-90, 90, 2.0), optics=optics)
    truth = density(ribosome(), box, 9.0, resolution=18.0)
    found = series.reconstruct(series.project(fourier_grid(truth), np.eye(3), np.zeros(3)))
    a, b = np.fft.rfftn(np.fft.ifftshift(truth)), np.fft.rfftn(np.fft.ifftshift(found))
    k = np.fft.fftfreq(box) * box
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(box // 2 + 1) ** 2)
    shells = np.rint(radius).astype(int)
    ratio, weight = [], []
    for s in range(2, 20):
        inside = shells == s
        ratio.append((b[inside] * a[inside].conj()).real.sum() / (np.abs(a[inside]) ** 2).sum())
        weight.append((series.weight[inside] * np.abs(a[inside]) ** 2).sum() / (np.abs(a[inside]) ** 2).sum())
    np.testing.assert_allclose(ratio, weight, atol=0.12)
    # First zero: 34 A, 12.6 of 48 voxels; signal returns in between the zeros.
    zero = 48 * 9.0 * np.sqrt((1 - np.arcsin(0.07) / np.pi) / (electron_wavelength(300) * 6e4))
    at_zero = series.weight[np.abs(radius - zero) < 0.15].mean()
    assert at_zero < 0.5
    assert series.weight[np.abs(radius - 8) < 0.5].mean() > 0.85


@pytest.mark.parametrize("box", [24, 25])
def test_fast_boxes_are_the_structure_behind_the_wedge(box: int) -> None:
    model = FastBoxes(box, box, (-40.0, 60.0), "y")
    found = model.signal(fourier_grid(blobs(box)), ROTATION, SHIFT)
    spectrum = np.fft.rfftn(blobs(box, ROTATION, SHIFT)) * model.weight
    expected = np.fft.irfftn(spectrum, s=(box,) * 3, axes=(0, 1, 2))
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)
    # The stated wedge, but for the Nyquist planes of an even box, which have no partner.
    differs = np.argwhere(model.weight != missing_wedge(box, (-40.0, 60.0), "y"))
    assert np.all((differs == box / 2).any(axis=1))
    noise = model.noise(np.random.default_rng(0))
    assert power_outside(noise, model.weight) < 1e-5


def test_a_filament_leaves_the_box() -> None:
    """The density is placed in a field of twice the box, and the box is cut out."""
    box, helix = 20, tmv(length=36 * 14.0)
    model = FastBoxes(box, 2 * box, (-90.0, 90.0), "y")
    found = model.signal(fourier_grid(density(helix, 40, 14.0, resolution=60.0)), ROTATION, SHIFT)
    expected = density(helix, box, 14.0, ROTATION, SHIFT, 60.0)
    a, b = np.fft.rfftn(found), np.fft.rfftn(expected) * model.weight
    assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_tilt_angles() -> None:
    np.testing.assert_allclose(tilt_angles((-60, 60), 3), np.arange(-60, 61, 3))
    np.testing.assert_allclose(tilt_angles((-50, 70), 7), np.arange(-50, 70.1, 7))
    assert len(tilt_angles((-0.3, 0.3), 0.1)) == 7
    np.testing.assert_allclose(tilt_angles((-10, 10), 20), [-10, 10])
    for tilts, step, words in [
        ((-60, 60), 121, "--tilt-step: found 121"),
        ((-60, 60), 0, "--tilt-step: found 0"),
        ((-60, 60), np.nan, "--tilt-step"),
        ((60, -60), 3, "--tilt-range: found 60 -60"),
        ((-95, 60), 3, "--tilt-range"),
    ]:
        with pytest.raises(InputError, match=words):
            tilt_angles(tilts, step)
