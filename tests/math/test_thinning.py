"""Few items that stand for many: against the equation that says which, and by what they must keep."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp

from faml_gpu.array_backend import to_host
from faml_gpu.fast_alignment.thinning import thinned


@pytest.fixture
def log_mass(rng):
    """Rows from one item that is nearly all to thousands that are alike."""
    return rng.standard_normal((6, 3000)) * np.array([30.0, 10.0, 5.0, 2.0, 1.0, 0.1])[:, None] + 500


@pytest.mark.parametrize("n", [8, 96])
def test_heavy_ones_stay_and_others_stand_for_as_much_as_the_lightest_of_them(log_mass, n):
    chosen, factor = thinned(log_mass, n, 0)
    assert chosen.shape == factor.shape == (6, n)
    for row, which, log_factor in zip(log_mass, chosen, factor, strict=True):
        mass = np.exp(row - logsumexp(row))
        log_c = brentq(lambda x, m=mass: np.minimum(m / np.exp(x), 1).sum() - n, -600, 0, xtol=1e-12)  # the definition
        assert len(set(which.tolist())) == n
        heavy = mass[which] > np.exp(log_c) * (1 + 1e-9)
        assert set(np.nonzero(mass > np.exp(log_c) * (1 + 1e-9))[0]) == set(which[heavy])
        np.testing.assert_allclose(log_factor, np.where(heavy, 0, log_c - np.log(mass[which])), atol=1e-6)


@pytest.mark.parametrize(("n", "n_heaviest"), [(10, 0), (50, 25), (50, 50)])
def test_mass_is_kept_and_the_heaviest_as_they_are(log_mass, n, n_heaviest):
    chosen, factor = thinned(log_mass, n, n_heaviest)
    kept = np.take_along_axis(log_mass, chosen, axis=1)
    if n_heaviest < n:
        np.testing.assert_allclose(logsumexp(kept + factor, axis=1), logsumexp(log_mass, axis=1), atol=1e-9)
    for row, which, log_factor in zip(log_mass, chosen, factor, strict=True):
        heaviest = set(np.argsort(-row)[:n_heaviest].tolist())
        assert heaviest <= set(which[log_factor == 0].tolist())


def test_means_over_neighbours_that_are_alike():
    """Drawn along the list: 40 of 4000 find the mean of a wave of one turn to half a step's length."""
    x = (np.arange(4000) + 0.5) / 4000
    log_mass = 2 * np.cos(2 * np.pi * (x - 0.2))[None]
    chosen, factor = thinned(log_mass, 40, 0)
    weight = np.exp(log_mass[0] - logsumexp(log_mass))
    found = np.exp(np.take_along_axis(log_mass, chosen, axis=1) + factor - logsumexp(log_mass))[0]
    for wave in (np.cos, np.sin):
        f = wave(2 * np.pi * x)
        assert abs(found @ f[chosen[0]] - weight @ f) < 0.01


def test_no_more_than_there_are():
    log_mass = np.array([[0.0, -np.inf, -3.0, -np.inf, 700.0], [-1e4, -1e4, -np.inf, -np.inf, -np.inf]])
    for n in (5, 9):
        chosen, factor = thinned(log_mass, n, 2)
        assert chosen.shape == (2, 5)
        mass = np.take_along_axis(log_mass, chosen, axis=1) + factor
        np.testing.assert_allclose(logsumexp(mass, axis=1), logsumexp(log_mass, axis=1), rtol=1e-12)
    chosen, factor = thinned(log_mass, 3, 0)
    mass = np.take_along_axis(log_mass, chosen, axis=1) + factor
    np.testing.assert_allclose(logsumexp(mass, axis=1), logsumexp(log_mass, axis=1), rtol=1e-12)


def test_on_a_gpu_the_same(log_mass, emulated_gpu):
    import cupy

    chosen, factor = thinned(log_mass, 50, 20)
    again = thinned(cupy.asarray(log_mass), 50, 20)
    assert all(isinstance(x, cupy.ndarray) for x in again)
    for row in range(len(log_mass)):
        found = dict(zip(to_host(again[0])[row].tolist(), to_host(again[1])[row].tolist(), strict=True))
        expected = dict(zip(chosen[row].tolist(), factor[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-9)
