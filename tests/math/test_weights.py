"""Missing wedges and weight layouts against their definitions, voxel by voxel."""

import itertools
import math

import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.weights import (
    centred_from_half,
    half_from_centred,
    missing_wedge,
    read_layout,
    wedge_consistency,
    wedge_warning,
)

RANGES = [(-60, 60), (-50, 70), (-44, 33), (20, 60), (-90, 90)]


def observed(across, kz, low, high):
    """DESIGN section 2 for one voxel; `across` is kx (tilt axis Y) or ky (tilt axis X)."""
    if across == 0:
        return kz == 0
    along = math.copysign(1, across) * kz
    return math.tan(math.radians(low)) * abs(across) <= along <= math.tan(math.radians(high)) * abs(across)


def stored(box):
    """Frequency at each index of an FFT-order axis, from the definition."""
    return [k if k < box / 2 else k - box for k in range(box)]


@pytest.mark.parametrize("box", [12, 13])
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("tilts", RANGES)
def test_wedge_is_its_definition(box, axis, tilts):
    wedge = missing_wedge(box, tilts, axis)
    assert wedge.shape == (box, box, box // 2 + 1)
    assert wedge.dtype == np.float32
    expected = np.zeros_like(wedge)
    for (i, kz), (j, ky), kx in itertools.product(enumerate(stored(box)), enumerate(stored(box)), range(box // 2 + 1)):
        expected[i, j, kx] = observed(kx if axis == "y" else ky, kz, *tilts)
    np.testing.assert_array_equal(wedge, expected)


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_wedge_is_point_symmetric(box, axis):
    cube = centred_from_half(missing_wedge(box, (-50, 70), axis), box)
    inner = cube[1 - box % 2 :, 1 - box % 2 :, 1 - box % 2 :]  # -N/2 has no partner
    np.testing.assert_array_equal(inner, inner[::-1, ::-1, ::-1])
    assert 0.3 < inner.mean() < 0.9


def test_a_tilt_on_the_grid_is_observed():
    # tan(45 degrees) is 0.9999999999999999: the last tilt must not fall out of its own range.
    wedge = missing_wedge(16, (-45, 45))
    assert wedge[5, 0, 5] == 1
    assert wedge[-5, 0, 5] == 1
    assert wedge[6, 0, 5] == 0


@pytest.mark.parametrize("tilts", [(60, -60), (30, 30), (-91, 60), (-60, 90.5), (math.nan, 60), (-60, math.inf)])
def test_wedge_refuses_tilt_ranges(tilts):
    with pytest.raises(InputError, match="--tilt-range"):
        missing_wedge(16, tilts)


def test_wedge_refuses_axes():
    with pytest.raises(InputError, match="--tilt-axis"):
        missing_wedge(16, (-60, 60), "z")


def centred_wedge(box, tilts):
    """Centred cube straight from the definition: voxel i is frequency i - N//2."""
    k = range(-(box // 2), box - box // 2)
    return np.array([[[observed(kx, kz, *tilts) for kx in k] for _ in k] for kz in k], dtype=np.float32)


@pytest.mark.parametrize("box", [12, 13])
def test_centred_cube_is_read_as_the_same_wedge(box):
    cube = centred_wedge(box, (-50, 70))
    np.testing.assert_array_equal(read_layout(cube, box), missing_wedge(box, (-50, 70)))
    np.testing.assert_array_equal(half_from_centred(cube), missing_wedge(box, (-50, 70)))


@pytest.mark.parametrize("box", [8, 9, 12])
def test_half_of_a_labelled_cube(box):
    """Each voxel carries its frequency: the half volume's voxel must be that frequency, or its point mirror."""
    k = np.arange(-(box // 2), box - box // 2)
    label = 10000 * np.abs(k[:, None, None] * 100 + k[None, :, None] * 10 + k) + 1
    # The label is point-symmetric; a plane read the wrong way round shows in it.
    half = half_from_centred(label.astype(np.float32))
    for i, j, kx in itertools.product(range(box), range(box), range(box // 2 + 1)):
        kz, ky = stored(box)[i], stored(box)[j]
        if 2 * kx == box and (2 * kz == -box or 2 * ky == -box):
            continue  # both signs at once: the cube has no such voxel's mirror
        assert half[i, j, kx] == 10000 * abs(kz * 100 + ky * 10 + kx) + 1, (kz, ky, kx)


@pytest.mark.parametrize("box", [8, 9])
def test_layouts_invert_each_other(box):
    rng = np.random.default_rng(1)
    half = rng.random((box, box, box // 2 + 1), dtype=np.float32)
    np.testing.assert_array_equal(half_from_centred(centred_from_half(half, box)), half)
    np.testing.assert_array_equal(read_layout(half, box), half)


@pytest.mark.parametrize("box", [12, 13])
def test_weight_acts_on_the_right_coefficients(box):
    """Weighting the half and the full transform of a real box gives the same box."""
    rng = np.random.default_rng(2)
    volume = rng.standard_normal((box, box, box))
    weight = missing_wedge(box, (-50, 70))
    spectrum = np.fft.fftn(volume)
    if box % 2 == 0:  # a Nyquist coefficient is its own mirror, an asymmetric wedge is not
        spectrum[box // 2], spectrum[:, box // 2], spectrum[:, :, box // 2] = 0, 0, 0
    half = np.fft.irfftn(spectrum[:, :, : box // 2 + 1] * weight, volume.shape, axes=(0, 1, 2))
    full = np.fft.ifftn(spectrum * np.fft.ifftshift(centred_from_half(weight, box)))
    np.testing.assert_allclose(full.imag, 0, atol=1e-12)
    np.testing.assert_allclose(half, full.real, atol=1e-12)


def test_read_layout_refuses():
    ok = np.ones((12, 12, 12), np.float32)
    for shape in [(12, 12, 6), (11, 12, 12), (12, 12), (7, 12, 12), (24, 12, 12), (36, 12, 7)]:
        with pytest.raises(InputError, match=r"w\.mrc.*expected a centred cube \(12, 12, 12\)"):
            read_layout(np.ones(shape, np.float32), 12, "w.mrc")
    for value in (-0.2, 1.3, np.nan, np.inf):
        bad = ok.copy()
        bad[3, 4, 5] = value
        with pytest.raises(InputError, match=r"expected values in 0 \.\. 1"):
            read_layout(bad, 12)
    with pytest.raises(InputError, match="0 everywhere"):
        read_layout(0 * ok, 12)


def test_weight_with_multiplicities_behind_it():
    """RELION 4: the sum of CTF^2, and behind it along z how often each voxel was measured."""
    sums = np.random.default_rng(5).uniform(0, 9, (12, 12, 7)).astype(np.float32)
    times = np.full_like(sums, 20)
    np.testing.assert_array_equal(read_layout(np.concatenate([sums, times]), 12, premultiplied=True), sums)
    with pytest.raises(InputError, match=r"w\.mrc: .*multiplicities.*\(24, 12, 7\).*CtfPremultiplied 1"):
        read_layout(np.concatenate([sums, times]) / 20, 12, "w.mrc")


def test_rounding_is_clipped_not_refused():
    weight = np.full((12, 12, 12), 1.0004, np.float32)
    weight[0, 0, 0] = -0.0004
    read = read_layout(weight, 12)
    assert read.max() == 1
    assert read.min() == 0


def power_of(weight, box, noise=0.05):
    """|FFT|^2 of coloured noise seen through a wedge, with a little noise everywhere."""
    rng = np.random.default_rng(3)
    k = np.fft.fftfreq(box) * box
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.arange(box // 2 + 1) ** 2)
    shape = (4, box, box, box // 2 + 1)
    return (weight + noise) * np.exp(-radius / 3) * rng.exponential(size=shape)


def test_consistency_of_the_right_wedge():
    weight = missing_wedge(24, (-50, 70))
    figures = wedge_consistency(power_of(weight, 24), weight)
    # 1.05 inside and 0.05 outside before the division by a common shell mean.
    assert figures.inside / figures.outside == pytest.approx(21, rel=0.2)
    assert figures.stated_only > 5 * figures.mirrored_only
    assert wedge_warning(figures) is None


def test_consistency_warns_of_the_mirrored_wedge():
    figures = wedge_consistency(power_of(missing_wedge(24, (-70, 50)), 24), missing_wedge(24, (-50, 70)))
    assert figures.outside < figures.inside  # the plain comparison does not see it
    text = wedge_warning(figures)
    assert text is not None
    assert "mirrored" in text
    assert f"{figures.mirrored_only:.2f}" in text


def test_consistency_warns_of_power_outside():
    other = 1 - missing_wedge(24, (-60, 60))
    figures = wedge_consistency(power_of(other, 24), missing_wedge(24, (-60, 60)))
    text = wedge_warning(figures)
    assert text is not None
    assert "outside" in text


def test_consistency_without_a_wedge_says_nothing():
    figures = wedge_consistency(power_of(1.0, 24), np.ones((24, 24, 13), np.float32))
    assert math.isnan(figures.outside)
    assert wedge_warning(figures) is None
