"""Missing wedges and weight layouts against their definitions, voxel by voxel."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.weights import (
    centred_from_half,
    half_from_centred,
    missing_wedge,
    read_layout,
    tapered,
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
    with pytest.raises(InputError, match=r"w\.mrc: .*multiplicities.*\(24, 12, 7\).*CtfPremultiplied 1.*sums or means"):
        read_layout(np.concatenate([sums, times]) / 20, 12, "w.mrc")


def test_rounding_is_clipped_not_refused():
    weight = np.full((12, 12, 12), 1.0004, np.float32)
    weight[0, 0, 0] = -0.0004
    read = read_layout(weight, 12)
    assert read.max() == 1
    assert read.min() == 0


def noise_seen(tilts, axis="y", box=32, n=4, seed=3):
    """Power of tapered boxes of white noise seen through a wedge."""
    boxes = np.random.default_rng(seed).standard_normal((n, box, box, box))
    spectra = np.fft.rfftn(boxes, axes=(1, 2, 3)) * missing_wedge(box, tilts, axis)
    seen = tapered(np.fft.irfftn(spectra, s=(box, box, box), axes=(1, 2, 3)))
    return np.abs(np.fft.rfftn(seen, axes=(1, 2, 3))) ** 2


def test_beyond_is_its_definition():
    """Layer by layer: neighbours of neighbours of observed voxels, each over the mean of the observed of its shell."""
    weight = missing_wedge(13, (-50, 60))
    power = np.random.default_rng(1).uniform(1, 2, (13, 13, 7))
    seen = {
        k
        for k in itertools.product(range(-6, 7), repeat=3)
        if (weight[k] if k[2] >= 0 else weight[-k[0], -k[1], -k[2]]) == 1
    }

    half = [k for k in itertools.product(range(-6, 7), range(-6, 7), range(7)) if 0.5 < math.dist(k, (0, 0, 0)) <= 6]
    shells = {k: round(math.dist(k, (0, 0, 0))) for k in half}
    means = {s: np.mean([power[k] for k in half if k in seen and shells[k] == s]) for s in range(1, 7)}
    apart = np.abs(np.array(half)[:, None] - np.array(sorted(seen))).max(axis=2).min(axis=1)
    layer = [power[k] / means[shells[k]] for k, distance in zip(half, apart, strict=True) if distance == 2]
    assert len(layer) > 40
    assert wedge_consistency(power, weight).beyond == pytest.approx(np.mean(layer), rel=1e-12)


@pytest.mark.parametrize("box", [16, 24, 32])
@pytest.mark.parametrize(("tilts", "axis"), [((-60, 60), "y"), ((-44, 66), "y"), ((-50, 70), "x")])
def test_the_right_wedge(tilts, axis, box):
    figures = wedge_consistency(noise_seen(tilts, axis, box), missing_wedge(box, tilts, axis))
    assert figures.beyond < 0.01  # what the taper spreads over two voxels: 0.003
    assert wedge_warning(figures) is None


@pytest.mark.parametrize(
    ("stated", "axis", "least"), [((-50, 50), "y", 0.1), ((-40, 40), "y", 0.4), ((-60, 60), "x", 0.6)]
)
def test_a_wedge_that_hides_what_there_is(stated, axis, least):
    """Noise seen within 60 degrees about y, and said to be seen otherwise."""
    figures = wedge_consistency(noise_seen((-60, 60)), missing_wedge(32, stated, axis))
    assert least < figures.beyond < 1
    text = wedge_warning(figures)
    assert text is not None
    assert f"{100 * figures.beyond:.0f} %" in text
    if axis == "x":
        assert figures.others == {"about the other axis": pytest.approx(0.003, abs=0.005)}  # the mirrored are the same
        assert "--tilt-axis" in text
    else:
        assert "check the tilt range" in text


def test_the_mirrored_wedge():
    figures = wedge_consistency(noise_seen((-70, 50)), missing_wedge(32, (-50, 70)))
    text = wedge_warning(figures)
    assert text is not None
    assert min(figures.others, key=figures.others.__getitem__) == "mirrored"
    assert "give --tilt-range -HI -LO" in text
    both = wedge_warning(wedge_consistency(noise_seen((-70, 40)), missing_wedge(32, (-40, 70), "x")))
    assert both is not None
    assert "the sign of the tilts too (--tilt-range -HI -LO)" in both


def test_a_mirrored_wedge_hardly_wider():
    """A few degrees: less than the layer beyond tells, but the two sides can be compared; not where they are equal."""
    figures = wedge_consistency(noise_seen((-64, 60), n=8), missing_wedge(32, (-60, 64)))
    assert figures.beyond < 0.05
    text = wedge_warning(figures)
    assert text is not None
    assert "mirrored" in text
    assert f"{figures.mirrored_only:.2f}" in text
    uneven = 0
    for seed in range(30):  # all is seen: which side has a little more is chance
        chance = wedge_consistency(noise_seen((-90, 90), box=16, n=1, seed=seed), missing_wedge(16, (-60, 66)))
        uneven += chance.mirrored_only > 1.05 * chance.stated_only
        assert wedge_warning(replace(chance, beyond=math.nan)) is None
    assert uneven > 5


def test_power_beyond_a_filter_is_no_matter():
    """Boxes cut off at half of Nyquist: what is left beyond are rounding errors, everywhere."""
    rng = np.random.default_rng(4)
    power = noise_seen((-60, 60))
    k = np.fft.fftfreq(32) * 32
    outside = k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(17) ** 2 > 8**2
    power[:, outside] = 1e-12 * rng.exponential(size=(len(power), int(outside.sum())))
    assert wedge_warning(wedge_consistency(power, missing_wedge(32, (-60, 60)))) is None


def test_tapered_boxes_end_at_zero():
    """A steep gradient along the beam would show in the wedge."""
    box = np.broadcast_to(np.arange(24.0)[:, None, None], (1, 24, 24, 24)) + np.random.default_rng(2).normal(
        size=(1, 24, 24, 24)
    )
    low = tapered(box)
    assert abs(low[:, 0]).max() < 0.15 * abs(box).max()
    assert abs(low[:, 12, 12, 12] - (box - box.mean())[:, 12, 12, 12]) < 0.1


def test_no_wedge_says_nothing():
    figures = wedge_consistency(noise_seen((-90, 90)), np.ones((32, 32, 17), np.float32))
    assert math.isnan(figures.beyond)
    assert wedge_warning(figures) is None
