from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.fsc import fsc, lowpass, resolution_at, shell_index

RNG = np.random.default_rng(3)


def full_shells(box: int) -> np.ndarray:
    k = np.fft.fftfreq(box, 1 / box)
    return np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int)


@pytest.mark.parametrize("box", [12, 13])
def test_shell_index_is_the_half_of_the_full_volume(box: int) -> None:
    np.testing.assert_array_equal(shell_index(box), full_shells(box)[:, :, : box // 2 + 1])


@pytest.mark.parametrize("box", [12, 13])
def test_fsc_is_its_definition_over_the_full_volume(box: int) -> None:
    a, b = RNG.standard_normal((2, box, box, box)) + 0.3
    fa, fb, shells = np.fft.fftn(a), np.fft.fftn(a + b), full_shells(box)
    curve = fsc(a, a + b)
    assert curve.shape == (box // 2 + 1,)
    for shell, value in enumerate(curve):
        x, y = fa[shells == shell], fb[shells == shell]
        expected = np.sum(x * y.conj()).real / np.sqrt(np.sum(abs(x) ** 2) * np.sum(abs(y) ** 2))
        assert value == pytest.approx(expected, abs=1e-12)


def test_fsc_of_closed_forms() -> None:
    a = RNG.standard_normal((16, 16, 16))
    np.testing.assert_allclose(fsc(a, 3 * a), 1.0)
    np.testing.assert_allclose(fsc(a, -a), -1.0)
    np.testing.assert_array_equal(fsc(a, np.zeros_like(a)), 0.0)
    # Signal S and independent noise of the same power in each half: FSC = S / (S + N) = ½ on average.
    signal, one, two = RNG.standard_normal((3, 48, 48, 48))
    np.testing.assert_allclose(fsc(signal + one, signal + two)[8:], 0.5, atol=0.06)


def test_fsc_and_resolution_of_maps_that_agree_up_to_a_shell() -> None:
    """The same coefficients up to shell 10, independent ones beyond: 1 there, near 0 beyond, 0.5 in between."""
    one, two = RNG.standard_normal((2, 48, 48, 48))
    low = lowpass(one, 48 * 4.0 / 10.5, 4.0, edge=0)
    curve = fsc(one, low + two - lowpass(two, 48 * 4.0 / 10.5, 4.0, edge=0))
    np.testing.assert_allclose(curve[:11], 1.0, atol=1e-4)
    np.testing.assert_allclose(curve[11:], 0.0, atol=0.12)  # 1,400 coefficients in shell 11: 0.03
    assert 48 * 4.0 / 11 < resolution_at(curve, 0.5, 4.0, 48) < 48 * 4.0 / 10
    assert 48 * 4.0 / 11 < resolution_at(curve, 0.143, 4.0, 48) < resolution_at(curve, 0.5, 4.0, 48)


def test_fsc_looks_inside_the_mask_only() -> None:
    a, b = RNG.standard_normal((2, 12, 12, 12))
    mask = np.zeros((12, 12, 12))
    mask[3:9, 3:9, 3:9] = 1
    np.testing.assert_allclose(fsc(a, np.where(mask > 0, a, b), mask), 1.0)


def test_fsc_refuses_different_boxes() -> None:
    with pytest.raises(InputError, match="second map"):
        fsc(np.zeros((8, 8, 8)), np.zeros((9, 9, 9)))
    with pytest.raises(InputError, match="cube"):
        fsc(np.zeros((8, 8, 9)), np.zeros((8, 8, 9)))


def test_resolution_at_interpolates_the_first_crossing() -> None:
    # 0.9 at shell 4 and 0.4 at shell 5 cross 0.5 at 4.8; the return at shell 6 does not count.
    curve = [1, 1, 1, 1, 0.9, 0.4, 0.8, 0.1]
    assert resolution_at(curve, 0.5, voxel_size=3.0, box=32) == pytest.approx(32 * 3 / 4.8)


def test_resolution_at_the_ends() -> None:
    assert resolution_at([1.0] * 9, 0.143, voxel_size=2.0, box=16) == 4.0  # Nyquist
    assert resolution_at([1.0, 0.1, 0.1], 0.143, voxel_size=2.0, box=16) == np.inf


@pytest.mark.parametrize("box", [32, 33])
def test_lowpass_gain_of_plane_waves(box: int) -> None:
    """Half height at the cut, 8 Fourier voxels, edge 2: gains 1, ½ and 0 at 7, 8 and 9."""
    x = np.arange(box)
    for frequency, gain in [(0, 1), (5, 1), (7, 1), (8, 0.5), (9, 0), (12, 0)]:
        wave = np.broadcast_to(np.cos(2 * np.pi * frequency * x / box), (box,) * 3)
        for axes in [(0, 1, 2), (2, 1, 0), (0, 2, 1)]:
            volume = np.transpose(wave, axes)
            np.testing.assert_allclose(lowpass(volume, box * 5.0 / 8, 5.0), gain * volume, atol=1e-5)


def test_lowpass_sharp() -> None:
    wave = np.broadcast_to(np.cos(2 * np.pi * 8 * np.arange(32) / 32), (32,) * 3)
    np.testing.assert_allclose(lowpass(wave, 32 * 5.0 / 8.01, 5.0, edge=0), wave, atol=1e-5)
    np.testing.assert_allclose(lowpass(wave, 32 * 5.0 / 7.99, 5.0, edge=0), 0, atol=1e-5)


def test_lowpass_refuses_no_resolution() -> None:
    with pytest.raises(InputError, match="resolution"):
        lowpass(np.zeros((8, 8, 8)), 0.0, 5.0)
