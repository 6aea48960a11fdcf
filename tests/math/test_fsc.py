from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.errors import InputError
from faml_gpu.fsc import (
    check_b_factor,
    crossings,
    final_map,
    fsc,
    fsc_observed,
    fsc_weight,
    fsc_with_mask,
    lowpass,
    randomise_phases,
    resolution_at,
    shell_index,
)
from faml_gpu.masks import soft_sphere

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


# --- theory -------------------------------------------------------------------------------------------------


def independent(box: int) -> np.ndarray:
    """Independent real numbers in each shell: the voxels of the full volume, as pairs share one complex number."""
    return np.bincount(full_shells(box).ravel())[: box // 2 + 1].astype(float)


@pytest.mark.parametrize("snr", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("box", [32, 33])
def test_fsc_of_a_known_snr_is_snr_over_one_plus_snr(snr: float, box: int) -> None:
    """F = SNR / (1 + SNR) per shell; its standard error is that of a correlation of n pairs, (1 - F²) / sqrt(n)."""
    signal, one, two = np.random.default_rng(11).standard_normal((3, box, box, box))
    signal *= np.sqrt(snr)
    expected = snr / (1 + snr)
    error = (1 - expected**2) / np.sqrt(independent(box))
    z = ((fsc(signal + one, signal + two) - expected) / error)[3:]
    assert np.abs(z).max() < 4
    assert 0.5 < np.sqrt(np.mean(z**2)) < 1.6  # the error itself is right: 13 shells


def test_fsc_by_shell_of_a_coloured_signal() -> None:
    """An SNR that falls from shell to shell gives the FSC of each shell its own value."""
    box = 32
    signal, one, two = np.random.default_rng(12).standard_normal((3, box, box, box))
    amplitude = np.exp(-np.arange(box) / 6.0)
    coloured = shell_filter(signal, amplitude)  # linear between shells: |ξ| is not the shell's number everywhere
    curve = fsc(coloured + one * 0.3, coloured + two * 0.3)
    power = np.interp(
        np.sqrt(sum(k**2 for k in np.meshgrid(*3 * [np.fft.fftfreq(box, 1 / box)]))), np.arange(box), amplitude
    )
    shells = full_shells(box)
    for shell in range(3, 16):
        snr = np.mean(power[shells == shell] ** 2) / 0.09
        assert curve[shell] == pytest.approx(snr / (1 + snr), abs=4 / np.sqrt((shells == shell).sum()))


def test_crossings_are_all_listed_and_the_first_counts() -> None:
    curve = [1, 1, 1, 1, 0.9, 0.4, 0.8, 0.1]
    np.testing.assert_allclose(crossings(curve, 0.5), [4.8, 6 + 3 / 7])
    assert resolution_at(curve, 0.5, 3.0, 32) == pytest.approx(32 * 3 / crossings(curve, 0.5)[0])
    assert len(crossings([1.0] * 5, 0.5)) == 0
    assert len(crossings([1.0, 0.2, 0.1], 0.5)) == 0  # from the mean down: no shell above it


# --- unobserved voxels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [24, 25])
def test_what_neither_half_saw_does_not_count(box: int) -> None:
    """Both halves hold the same start in a slab of Fourier space, independent noise elsewhere: FSC 0."""
    rng = np.random.default_rng(4)
    one, two, start = (np.fft.rfftn(v) for v in rng.standard_normal((3, box, box, box)))
    hidden = np.zeros(one.shape, bool)
    hidden[np.abs(np.fft.fftfreq(box, 1 / box)) < box / 8] = True
    one[hidden] = two[hidden] = start[hidden]
    weight = np.where(hidden, 0.05, 1.0)
    plain, everything = fsc_observed(one, two, np.ones(one.shape), np.ones(one.shape))
    curve, share = fsc_observed(one, two, weight, np.ones(one.shape))
    error = 1 / np.sqrt(independent(box))
    assert (plain[4:] > 0.15).all()
    assert (np.abs(curve[4:]) < 4 * error[4:] / np.sqrt(share[4:])).all()
    np.testing.assert_array_equal(everything, 1.0)
    slab = np.abs(np.fft.fftfreq(box, 1 / box))[:, None, None] < box / 8
    shells, full = full_shells(box), np.broadcast_to(slab, (box, box, box))
    for shell in range(box // 2 + 1):
        assert share[shell] == pytest.approx(1 - full[shells == shell].mean())
    assert curve[0] == curve[1] == curve[2] == 0  # nothing seen there
    # The weight of either half decides, and only from the threshold on.
    np.testing.assert_array_equal(fsc_observed(one, two, np.ones(one.shape), weight)[0], curve)
    np.testing.assert_array_equal(fsc_observed(one, two, weight, weight, threshold=0.05)[0], plain)


def test_observed_voxels_and_the_mask_together() -> None:
    box = 24
    one, two = np.random.default_rng(5).standard_normal((2, box, box, box))
    seen = np.ones((box, box, box // 2 + 1), bool)
    seen[:6] = False
    curves = fsc_with_mask(one, two, soft_sphere(box, 6, 3), observed=seen)
    expected, share = fsc_observed(np.fft.rfftn(one), np.fft.rfftn(two), seen, seen)
    np.testing.assert_allclose(curves.unmasked, expected, atol=1e-12)
    np.testing.assert_array_equal(curves.observed, share)


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [16, 17])
def test_random_phases_keep_amplitudes_and_what_is_coarser(box: int) -> None:
    volume = RNG.standard_normal((box, box, box))
    random = randomise_phases(volume, 5, np.random.default_rng(0))
    before, after, shells = np.fft.fftn(volume), np.fft.fftn(random), full_shells(box)
    np.testing.assert_allclose(np.abs(after), np.abs(before), rtol=1e-9)
    np.testing.assert_allclose(after[shells < 5], before[shells < 5], atol=1e-9)
    assert abs(np.mean(np.exp(1j * np.angle(after / before)[shells >= 5]))) < 4 / np.sqrt((shells >= 5).sum())


def agreeing_up_to(shell: int, box: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two maps with a strong common signal up to a shell, and independent noise beyond it only."""
    rng = np.random.default_rng(seed)
    common, one, two = rng.standard_normal((3, box, box, box))
    common = lowpass(30 * common * soft_sphere(box, 5, 3), box / (shell + 0.5), 1.0, edge=0)
    return tuple(common + noise - lowpass(noise, box / (shell + 0.5), 1.0, edge=0) for noise in (one, two))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_correction_takes_away_what_a_tight_mask_adds(seed: int) -> None:
    """Beyond shell 6 the maps are independent. A sharp, small mask spreads the strong shells before it there."""
    box, last = 48, 6
    one, two = agreeing_up_to(last, box, seed)
    curves = fsc_with_mask(one, two, soft_sphere(box, 6, 0))
    assert curves.masked is not None
    assert curves.randomised_from == last + 1
    beyond = slice(last + 3, 20)
    assert curves.masked[beyond].mean() > 0.3
    # The mask holds 1 / 120 of the box: so many fewer independent coefficients, of 1,000 to 5,000 a shell.
    assert abs(curves.corrected[beyond].mean()) < 0.1
    assert resolution_at(curves.masked, 0.143, 1.0, box) < box / 10
    np.testing.assert_array_equal(curves.corrected[: last + 3], curves.masked[: last + 3])


def test_the_correction_leaves_what_is_there() -> None:
    """Maps that do agree at all shells, under a mask that spreads nothing worth mentioning."""
    box = 32
    signal, one, two = np.random.default_rng(3).standard_normal((3, box, box, box))
    mask = soft_sphere(box, 9, 5)
    curves = fsc_with_mask(signal * mask + 0.5 * one, signal * mask + 0.5 * two, mask)
    inside = np.mean(curves.corrected[6:15])
    # Inside the mask the SNR is 4: 0.8. Outside there is noise only: the unmasked curve is far lower.
    assert inside == pytest.approx(0.8, abs=0.06)
    assert np.mean(curves.unmasked[6:15]) < 0.5


def test_independent_noise_under_a_mask_has_no_correlation() -> None:
    box = 32
    one, two = np.random.default_rng(8).standard_normal((2, box, box, box))
    curves = fsc_with_mask(one, two, soft_sphere(box, 7, 3))
    assert curves.randomised_from == 1
    assert abs(curves.corrected[4:].mean()) < 0.06


def test_identical_maps_need_no_correction() -> None:
    one = RNG.standard_normal((16, 16, 16))
    curves = fsc_with_mask(one, one, soft_sphere(16, 5, 2))
    assert curves.randomised_from is None
    assert curves.randomised is None
    np.testing.assert_allclose(curves.corrected, 1.0)
    bare = fsc_with_mask(one, one)
    assert bare.masked is None
    np.testing.assert_array_equal(bare.corrected, bare.unmasked)


@pytest.mark.parametrize(
    ("mask", "message"), [(np.ones((8, 8, 8)), "mask has shape"), (np.zeros((9, 9, 9)), "0 every")]
)
def test_masks_that_do_not_fit_are_refused(mask: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fsc_with_mask(np.ones((9, 9, 9)), np.ones((9, 9, 9)), mask)


# --- filters ------------------------------------------------------------------------------------------------


def test_weight_of_a_shell_is_the_correlation_of_the_sum_with_the_truth() -> None:
    signal, one, two = np.random.default_rng(9).standard_normal((3, 32, 32, 32))
    for noise in (0.3, 1.0, 3.0):
        a, b = signal + noise * one, signal + noise * two
        found = fsc_weight(1 / (1 + noise**2))
        assert found == pytest.approx(np.mean(fsc(a + b, signal)[8:]), abs=0.03)
    np.testing.assert_array_equal(fsc_weight([-0.5, 0.0, 1.0]), [0.0, 0.0, 1.0])


def waves(box: int, frequency: int) -> np.ndarray:
    return np.broadcast_to(np.cos(2 * np.pi * frequency * np.arange(box) / box), (box,) * 3)


def radius(box: int) -> np.ndarray:
    """|ξ| of each voxel of the half volume, Fourier voxels."""
    k = np.fft.fftfreq(box, 1 / box)
    return np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(box // 2 + 1) ** 2)


def shell_filter(volume: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Times a gain that is linear between the shells."""
    gain = np.interp(radius(len(volume)), np.arange(len(gains)), gains)
    return np.fft.irfftn(np.fft.rfftn(volume) * gain, s=volume.shape, axes=(0, 1, 2))


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("b_factor", [None, 0.0, -300.0, 200.0])
def test_the_final_map_is_weighted_sharpened_and_cut_off(box: int, b_factor: float | None) -> None:
    """Every Fourier voxel against the definition, written out; voxels of 2 Å, resolution at shell 5."""
    volume, voxel = np.random.default_rng(box).standard_normal((box,) * 3), 2.0
    curve = np.array([1.0, 1.0, 0.9, 0.6, 0.4, 0.143, 0.05, -0.2, 0.1])
    extent, xi = box * voxel, radius(box)
    correlation = np.interp(xi, np.arange(9), np.sqrt(2 * np.maximum(curve, 0) / (1 + np.maximum(curve, 0))))
    edge = np.where(xi < 4, 1.0, np.where(xi > 6, 0.0, 0.5 + 0.5 * np.cos(np.pi * (xi - 4) / 2)))
    gain = correlation * np.exp(-(b_factor or 0.0) / (4 * (extent / np.maximum(xi, 1e-9)) ** 2)) * edge
    found = np.fft.rfftn(final_map(volume, curve, extent / 5, voxel, b_factor))
    np.testing.assert_allclose(found, gain * np.fft.rfftn(volume), atol=1e-5 * np.abs(found).max())
    assert not final_map(volume, curve, np.inf, voxel, b_factor).any()


def test_sharpening_leaves_the_precision_to_what_is_kept() -> None:
    """Noise beyond the resolution times e^47 in the corners would leave no digit of what is within."""
    box, voxel = 16, 2.0
    wave, noise = waves(box, 3), np.random.default_rng(0).standard_normal((box,) * 3)
    beyond = np.fft.irfftn(np.where(radius(box) > 6.1, np.fft.rfftn(noise), 0), s=(box,) * 3, axes=(0, 1, 2))
    found = final_map(wave + beyond, np.ones(9), box * voxel / 5, voxel, -1000.0)
    np.testing.assert_allclose(found, np.exp(1000 * (3 / (box * voxel)) ** 2 / 4) * wave, rtol=1e-4, atol=1e-2)


def test_b_factors_out_of_reach_are_refused() -> None:
    for b_factor in (-2560.0, 0.0, 2560.0):
        check_b_factor(b_factor, 2.0)
    for b_factor in (-2561.0, 1e9, np.inf, np.nan):
        with pytest.raises(InputError, match=r"b-factor: found .* A\^2, expected -2560 to 2560 A\^2 with"):
            check_b_factor(b_factor, 2.0)
