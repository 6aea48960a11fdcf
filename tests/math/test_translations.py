"""Shift search against direct sums and known shifts."""

import numpy as np
import pytest

from faml_gpu import fourier, ops
from faml_gpu.fast_alignment import shift_window


def correlations(window, support, cross):
    """Of cross spectra (n, M): of particles that have these for spectra, with a reference that is 1 all over."""
    n, r = len(cross), support.r_max
    one, nothing = np.tile(np.eye(3), (n, 1, 1)), np.zeros(n, np.int64)
    found, _ = ops.correlations(
        np.ones((2 * r + 3, 2 * r + 3, r + 2), np.complex64),
        cross.astype(np.complex64),
        np.ones((1, len(support)), np.float32),
        nothing,
        np.arange(n),
        one,
        np.zeros((n, 3)),
        window.waves,
        support,
        1,
    )
    return found


def lattice(radius):
    t = np.arange(-int(radius), int(radius) + 1)
    return np.stack(np.meshgrid(t, t, t, indexing="ij"), axis=-1)  # axes [x, y, z] of (x, y, z)


@pytest.mark.parametrize(("box", "r_max", "radius"), [(12, 5, 2.0), (13, 6, 3.4), (13, 1, 1.0), (12, 4, 0.5)])
def test_correlation_is_the_direct_sum(box, r_max, radius, rng):
    support = fourier.make_support(box, r_max)
    cross = rng.standard_normal((2, len(support))) + 1j * rng.standard_normal((2, len(support)))
    window = shift_window(support, radius)
    found = correlations(window, support, cross)
    shifts = lattice(radius)
    assert found.shape == (2, *shifts.shape[:3])
    for n in range(2):
        for index in np.ndindex(*shifts.shape[:3]):
            wave = np.exp(2j * np.pi * support.coords @ shifts[index] / box)
            # Both of each pair: twice the real part. complex64 sums of some hundred terms.
            expected = 2 * (cross[n] * wave).sum().real
            assert abs(found[n][index] - expected) < 1e-5 * np.abs(cross[n]).sum()
    np.testing.assert_array_equal(window.inside, (shifts**2).sum(axis=-1) <= radius**2)


def shifted(oracles, rng, box, shift, support):
    structure = oracles.blobs(rng, 10, 0.2 * box, 1.2)
    still = oracles.blob_transform(box, support.coords, *structure)
    moved = oracles.blob_transform(box, support.coords, structure[0] + shift, *structure[1:])
    return still, moved


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, -2, 3), (0.3, -1.4, 2.2), (-2.45, 0.5, -0.05)])
def test_known_shift_comes_back(box, shift, rng, oracles):
    support = fourier.make_support(box, fourier.full_band(box))
    still, moved = shifted(oracles, rng, box, np.array(shift), support)
    window = shift_window(support, 4.0)
    found, value = window.best(correlations(window, support, (moved * still.conj())[None]))
    # Three parabolas, one along each axis, through a peak that is neither a paraboloid nor aligned with the axes.
    np.testing.assert_allclose(found[0], shift, atol=0.15)
    # The interpolated height against the power, which the correlation reaches at the true shift; the parabola along
    # each axis alone misses some of a peak half a voxel off on all three.
    np.testing.assert_allclose(value, 2 * (np.abs(still) ** 2).sum(), rtol=0.05)


def test_best_is_the_best_lattice_shift_refined(rng):
    box, radius = 12, 2.9
    support = fourier.make_support(box, 5)
    cross = rng.standard_normal((30, len(support))) + 1j * rng.standard_normal((30, len(support)))
    window = shift_window(support, radius)
    found, value = window.best(correlations(window, support, cross))
    shifts = lattice(radius).reshape(-1, 3)
    inside = (shifts**2).sum(axis=1) <= radius**2
    waves = np.exp(2j * np.pi * shifts @ support.coords.T / box)
    direct = np.where(inside, 2 * (cross @ waves.T).real, -np.inf)
    top = direct.argmax(axis=1)
    # Whatever the radius cuts off, the lattice point is the best within it, and the refinement stays around it.
    assert (np.abs(found - shifts[top]) <= 0.5).all()
    assert (value >= direct.max(axis=1) - 1e-3).all()
    assert (value <= direct.max(axis=1) * 2).all()
    assert (np.linalg.norm(found, axis=1) <= radius + 1e-12).all()
    assert np.abs(found - np.rint(found)).max() > 0.1


def test_radius_is_respected(rng, oracles):
    box = 16
    support = fourier.make_support(box, 7)
    still, moved = shifted(oracles, rng, box, np.array([5.0, 0, 0]), support)
    cross = (moved * still.conj())[None].astype(np.complex64)
    window = shift_window(support, 2.0)
    found, _ = window.best(correlations(window, support, cross))
    assert np.linalg.norm(np.rint(found[0])) <= 2.0
    # At the rim, not beyond it; along the rim the refinement may have moved it a little.
    assert found[0, 0] > 1.8
    assert np.linalg.norm(found[0]) <= 2.0 + 1e-12
    nowhere = shift_window(support, 0.0)
    found, _ = nowhere.best(correlations(nowhere, support, cross))
    np.testing.assert_array_equal(found, 0)


def test_a_constant_correlation_stays_finite():
    support = fourier.make_support(12, 4)
    window = shift_window(support, 2.0)
    found, value = window.best(correlations(window, support, np.zeros((2, len(support)))))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(value, 0)
