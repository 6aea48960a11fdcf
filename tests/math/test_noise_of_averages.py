"""The noise that averages are held down by: measured within the mask, by how far parts of the particles differ."""

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu import fourier
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import Accumulators
from faml_gpu.options import Options
from faml_gpu.plan import Band, Plan
from faml_gpu.starting import start

BOX, R, PARTS = 24, 9, 10


def parted(sums, weights):
    """Accumulators of parts (P, K, M)."""
    parts, k, m = sums.shape
    mass = weights.max(axis=2).ravel()
    blank = Accumulators.zero(k, m, R, parts=parts)
    return replace(blank, sums=sums.reshape(-1, m), weights=weights.reshape(-1, m), mass=mass)


def test_scatter_is_free_of_the_signal_and_as_free_as_it_says(rng):
    m, v = 4000, 3.0
    weights = rng.uniform(0.2, 4, (PARTS, 2, m)) * (rng.random((PARTS, 2, m)) < 0.8)
    weights[:, :, :10] = 0  # never observed
    noise = rng.standard_normal((2, PARTS, 2, m))
    noise = np.sqrt(v * weights / 2) * (noise[0] + 1j * noise[1])
    signal = 100 * rng.standard_normal((2, m))
    residual, freedom = parted(weights * signal + noise, weights).scatter()
    alone, same = parted(noise, weights).scatter()
    np.testing.assert_allclose(residual, alone, atol=1e-9)
    np.testing.assert_array_equal(freedom, same)
    assert not residual[:, :, :10].any()
    assert not freedom[:10].any()
    assert (abs(residual) ** 2).sum() / freedom.sum() == pytest.approx(v, rel=0.03)  # of 140,000 numbers
    np.testing.assert_allclose(abs(residual.sum(axis=0)), 0, atol=1e-9)


def band_and_parts(rng, symmetry="C1", *, iteration=20, known=True, update="explore"):
    """Parts whose noise is of variance 1 within the mask and 9 beside it, and a state that says 5 everywhere."""
    particles = ArrayParticles(rng.standard_normal((2, BOX, BOX, BOX)), 1.0)
    options = Options(mask_radius=6.0, max_shift=2.0, symmetry=symmetry, update=update)
    plan = Plan.make(particles, options, 4.0 if known else None)
    state = replace(start(plan, particles, None, None).state, sigma2=np.full(plan.n_shells, 5.0 * BOX**3))
    band = Band(plan, replace(state, iteration=iteration), R, R)
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    level = np.where(x**2 + y**2 + z**2 < 10**2, 1.0, 3.0)  # the mask has a soft edge
    counts = rng.integers(2, 7, PARTS)
    signal = 10 * rng.standard_normal((BOX,) * 3)
    volumes = [n * signal + np.sqrt(n) * level * rng.standard_normal((BOX,) * 3) for n in counts]
    sums = np.stack([band.output.gather(fourier.transform(v.astype(np.float32)[None])) for v in volumes])
    weights = np.broadcast_to(counts[:, None, None].astype(float), sums.shape)
    return band, parted(sums.astype(complex), weights)


def test_what_lies_beside_the_mask_is_not_noise_within(rng):
    band, parts = band_and_parts(rng)
    expected = BOX**3 * np.mean(band.plan.mask**2)
    # The first shells hold few numbers; to the last two the noise beside the mask leaks, since the band ends there.
    found = band.noise_of_averages(parts)[2 : R - 1] / expected
    assert np.mean(found) == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(found, 1, atol=0.3)


def test_symmetric_copies_average_the_noise(rng):
    """With C4 imposed the sums hold a quarter of a particle's noise; what is asked for is a particle's."""
    band, parts = band_and_parts(rng, "C4")
    alone = replace(band, plan=band.plan.with_symmetry("C1"))
    ratio = band.noise_of_averages(band.symmetrise(parts)) / alone.noise_of_averages(parts)
    # To turn it by interpolation takes a little of the noise; on the axis copies are the same.
    assert np.mean(ratio[4 : R + 1]) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("iteration", [0, 11, 19])
@pytest.mark.parametrize(("update", "known", "measured"), [("explore", False, False), ("explore", True, True),
                                                           ("wiener", False, True)])  # fmt: skip
def test_a_random_start_takes_the_mask_s_share_of_the_noise(update, known, measured, iteration, rng):
    band, parts = band_and_parts(rng, iteration=iteration, known=known, update=update)
    share = np.mean(band.plan.mask**2)
    found = band.noise_of_averages(parts)[3 : R + 1] / (5.0 * BOX**3)
    if measured:
        assert found.mean() < 0.6 * share
    else:
        np.testing.assert_allclose(found, share)
    whole = band.noise_of_averages(parts.together())[3 : R + 1] / (5.0 * BOX**3)  # nothing to compare
    np.testing.assert_allclose(whole, share)


def test_shells_that_one_part_alone_has_seen(rng):
    """There is nothing to compare there but rounding, and what the mask spreads from other shells."""
    band, parts = band_and_parts(rng)
    shell = np.asarray(band.output.shell)
    unseen = np.isin(shell, [5, 6])
    weights, sums = parts.weights.copy(), parts.sums.copy()
    weights[1:, unseen], sums[1:, unseen] = 0, 0
    weights[1, shell == 6] = 1e-14  # rounding
    found = band.noise_of_averages(replace(parts, sums=sums, weights=weights)) / (5.0 * BOX**3)
    share = np.mean(band.plan.mask**2)
    np.testing.assert_allclose(found[5:7], share)
    assert found[8] < 0.6 * share
