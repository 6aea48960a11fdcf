"""Spherical harmonics against SciPy's, and their coefficients against sums written out."""

import numpy as np
import pytest
from scipy.special import sph_harm_y

from faml_gpu.fast_alignment import harmonics
from faml_gpu.fourier import make_support

# complex64 tables; sums of some hundred terms round to about 1e-6 of their norm.
SINGLE = 3e-6


def angles(directions):
    x, y, z = np.asarray(directions, float).T
    return np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)


def scipy_table(directions, bandwidth, *, even):
    """(L, n_l, n) from sph_harm_y, 0 where l < m."""
    theta, phi = angles(directions)
    used = range(0, bandwidth, 2 if even else 1)
    out = np.zeros((bandwidth, len(used), len(directions)), complex)
    for i, l in enumerate(used):
        for m in range(l + 1):
            out[m, i] = sph_harm_y(l, m, theta, phi)
    return out


@pytest.mark.parametrize(("bandwidth", "even"), [(1, True), (8, True), (9, True), (8, False), (20, True)])
def test_sphere_grid_gives_back_the_coefficients(bandwidth, even, rng):
    used = harmonics.degrees(bandwidth, even=even)
    c = rng.standard_normal((3, bandwidth, len(used))) + 1j * rng.standard_normal((3, bandwidth, len(used)))
    c[:, np.arange(bandwidth)[:, None] > used] = 0
    c[:, 0] = c[:, 0].real
    grid = harmonics.sphere_grid(bandwidth, even=even)
    y = scipy_table(grid.directions, bandwidth, even=even)
    # A real function: m and -m together are twice the real part.
    values = np.einsum("bml,mln->bn", c[:, :1], y[:1]).real + 2 * np.einsum("bml,mln->bn", c[:, 1:], y[1:]).real
    found = grid.coefficients(values.astype(np.float32))
    assert np.linalg.norm(found - c) < SINGLE * np.linalg.norm(c)


def test_sphere_grid_integrates_products(oracles):
    # Of 1 only Y_00 is left: its coefficient is the area of the sphere times conj Y_00.
    grid = harmonics.sphere_grid(12)
    one = grid.coefficients(np.ones(len(grid.directions), np.float32))
    expected = np.zeros_like(one)
    expected[0, 0] = np.sqrt(4 * np.pi)
    np.testing.assert_allclose(one, expected, atol=2e-6)


def direct_coefficients(values, points, r_max, bandwidth):
    """p_lm(r) = sum over voxels of f hat(|xi| - r) conj Y_lm(xi), hat the kernel of linear interpolation."""
    radius = np.linalg.norm(points, axis=1)
    y = scipy_table(points, bandwidth, even=True)
    out = np.zeros((r_max, bandwidth, y.shape[1]), complex)
    for r in range(1, r_max + 1):
        hat = np.maximum(1 - abs(radius - r), 0)
        out[r - 1] = (np.conj(y) * values * hat).sum(axis=-1)
    return out


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("box", "r_max", "bandwidth"), [(12, 5, 8), (13, 6, 9), (12, 1, 4)])
def test_shell_coefficients_are_sums_over_voxels(box, r_max, bandwidth, stream, rng, oracles, monkeypatch):
    if stream:
        monkeypatch.setattr(harmonics, "STREAM_ABOVE", 0)
        monkeypatch.setattr(harmonics, "PIECE", 7)  # of shells of up to 200 voxels
    harmonics._shell_harmonics.cache_clear()
    support = make_support(box, r_max)
    points, _ = oracles.ball(r_max)
    # A function on the whole ball with f(-xi) = f(xi).
    size = 2 * r_max + 1
    cube = rng.random((2, size, size, size))
    cube = cube + cube[:, ::-1, ::-1, ::-1]
    f = np.stack([oracles.at(c, support.coords) for c in cube]).astype(np.float32)
    table = harmonics.shell_harmonics(support, bandwidth)
    harmonics._shell_harmonics.cache_clear()
    assert (table.tables is None) == stream
    found = table.coefficients(f)
    for b in range(2):
        expected = direct_coefficients(oracles.at(cube[b], points), points, r_max, bandwidth)
        assert oracles.relative(found[b], expected) < SINGLE


def test_odd_degrees_of_magnitudes_vanish(rng, oracles):
    # Why only even l are kept: over both voxels of a pair an odd Y_lm sums to 0.
    points, _ = oracles.ball(4)
    theta, phi = angles(points)
    cube = rng.random((9, 9, 9))
    f = oracles.at(cube + cube[::-1, ::-1, ::-1], points)
    for l, m in [(1, 0), (3, 2), (5, 5)]:
        assert abs((f * sph_harm_y(l, m, theta, phi)).sum()) < 1e-10
