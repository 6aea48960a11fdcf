"""Wigner's d against the matrix exponential of J_y, group laws, closed forms, pyshtools and rotated harmonics."""

import warnings

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import sph_harm_y

from faml_gpu.fast_alignment.wigner import small_d, small_d_table
from faml_gpu.geometry import euler_to_matrix

DEGREES = [0, 1, 2, 5, 12]


def angular_momentum(l):
    """J_y and J_z of degree l, basis m = -l .. l, from <m + 1| J_+ |m> = sqrt((l - m)(l + m + 1))."""
    j_plus = np.zeros((2 * l + 1, 2 * l + 1))
    for m in range(-l, l):
        j_plus[m + 1 + l, m + l] = np.sqrt((l - m) * (l + m + 1))
    return (j_plus - j_plus.T) / 2j, np.diag(np.arange(-l, l + 1)).astype(complex)


@pytest.mark.parametrize("l", DEGREES)
def test_is_the_exponential_of_j_y(l):
    beta = np.array([0.0, 0.3, 1.2, np.pi / 2, 2.9, np.pi, -0.7])
    j_y, _ = angular_momentum(l)
    expected = np.stack([expm(-1j * b * j_y) for b in beta])
    np.testing.assert_allclose(small_d(l, beta), expected, atol=1e-12)


def test_degree_one_in_closed_form():
    b = 0.83
    c, s = np.cos(b), np.sin(b)
    expected = [  # rows m = -1, 0, 1, columns m'
        [(1 + c) / 2, s / np.sqrt(2), (1 - c) / 2],
        [-s / np.sqrt(2), c, s / np.sqrt(2)],
        [(1 - c) / 2, -s / np.sqrt(2), (1 + c) / 2],
    ]
    np.testing.assert_allclose(small_d(1, np.array([b]))[0], expected, atol=1e-14)


@pytest.mark.parametrize("l", [*DEGREES, 35, 72])
def test_group_laws(l):
    first, second = np.array([0.4, 1.0, 2.2]), np.array([0.9, -0.3, 1.7])
    one = np.eye(2 * l + 1)
    a, b = small_d(l, first), small_d(l, second)
    # Eigenvectors of a (2l + 1)^2 matrix are good to about (2l + 1) eps.
    np.testing.assert_allclose(a @ b, small_d(l, first + second), atol=1e-11)
    np.testing.assert_allclose(a @ a.transpose(0, 2, 1), np.broadcast_to(one, a.shape), atol=1e-11)
    np.testing.assert_allclose(small_d(l, np.zeros(1))[0], one, atol=1e-11)
    # A turn by pi sends m to -m with sign (-1)^(l - m').
    half = np.fliplr(np.diag((-1.0) ** (l + np.arange(-l, l + 1))))
    np.testing.assert_allclose(small_d(l, np.array([np.pi]))[0], half, atol=1e-11)


def test_against_pyshtools():
    with warnings.catch_warnings():
        # On import pyshtools warns of optional parts (Dask, DUCC) that are not installed.
        warnings.simplefilter("ignore")
        from pyshtools.rotate import djpi2

        # m, m' >= 0 at beta = pi / 2, axes [m, m', l]. pyshtools turns the other way round (its degree 1 has
        # d_01 = -1 / sqrt 2 where exp(-i beta J_y) has +): d(-beta) is the transpose of d(beta).
        table = djpi2(15)
    for l in range(16):
        d = small_d(l, np.array([np.pi / 2]))[0][l:, l:]
        np.testing.assert_allclose(table[: l + 1, : l + 1, l].T, d, atol=1e-12)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("bandwidth", [4, 7])
def test_table_holds_the_same_numbers(bandwidth, even):
    n_beta = 2 * bandwidth
    table = small_d_table(bandwidth, n_beta, even=even)
    beta = np.pi * (np.arange(n_beta) + 0.5) / n_beta
    used = list(range(0, bandwidth, 2 if even else 1))
    assert table.shape == (bandwidth, 2 * bandwidth - 1, n_beta, len(used))
    expected = np.zeros(table.shape)
    for i, l in enumerate(used):
        j_y, _ = angular_momentum(l)
        for j, b in enumerate(beta):
            d = expm(-1j * b * j_y).real
            for m in range(l + 1):
                for n in range(-l, l + 1):
                    expected[m, n + bandwidth - 1, j, i] = d[m + l, n + l]
    np.testing.assert_allclose(table, expected, atol=2e-7)  # float32


@pytest.mark.parametrize("l", [1, 4])
def test_turns_harmonics_as_the_matrix_turns_vectors(l, rng):
    """Y_lm(R^-1 n) = sum over m' of D_m'm(R) Y_lm'(n), D = exp(-i m' alpha) d(beta) exp(-i m gamma)"""
    alpha, beta, gamma = 0.7, 1.9, -2.1
    rotation = euler_to_matrix([alpha, beta, gamma])
    n = rng.standard_normal((10, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    m = np.arange(-l, l + 1)

    def y(points):
        theta, phi = np.arccos(points[:, 2]), np.arctan2(points[:, 1], points[:, 0])
        return np.stack([sph_harm_y(l, int(k), theta, phi) for k in m])

    d = np.exp(-1j * alpha * m)[:, None] * small_d(l, np.array([beta]))[0] * np.exp(-1j * gamma * m)
    np.testing.assert_allclose(y(n @ rotation), d.T @ y(n), atol=1e-12)  # rows n R are R^-1 n
