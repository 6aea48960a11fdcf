"""Spherical harmonics on every executor, against SciPy's."""

import numpy as np
import pytest
from scipy.special import sph_harm_y


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("bandwidth", "n"), [(1, 4), (2, 40), (9, 129), (40, 33), (3, 0)])
def test_harmonics(run, bandwidth, n, even, rng):
    directions = rng.standard_normal((n, 3))
    # The poles, the equator, both signs; lengths other than 1.
    directions[:4] = np.array([[0, 0, 1], [0, 0, -2], [3, 0, 0], [0, -1, 0]])[:n]
    found = run("harmonics", directions, bandwidth, even=even)
    used = range(0, bandwidth, 2 if even else 1)
    x, y, z = directions.T
    theta, phi = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    expected = np.zeros((n, 2, bandwidth, len(used)))
    for i, l in enumerate(used):
        for m in range(l + 1):
            value = sph_harm_y(l, m, theta, phi).conj()
            expected[:, 0, m, i], expected[:, 1, m, i] = value.real, value.imag
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    # Rounded to float32 once: values reach sqrt((2 l + 1) / 4 pi) = 2.5.
    np.testing.assert_allclose(found, expected, atol=2.5 * 2.0**-23)


@pytest.mark.parametrize("how", ["dtype", "strided", "shape"])
def test_harmonics_refuses(run, how, rng):
    points = rng.standard_normal((5, 3))
    wrong = {
        "dtype": points.astype(np.float32),
        "strided": np.repeat(points, 2, axis=1)[:, ::2],
        "shape": points[:, :2].copy(),
    }
    with pytest.raises((TypeError, ValueError), match="points"):
        run("harmonics", wrong[how], 4)


def test_harmonics_refuses_a_bandwidth_of_0(run):
    with pytest.raises(ValueError, match="bandwidth"):
        run("harmonics", np.ones((1, 3)), 0)
