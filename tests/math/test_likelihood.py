"""The reported likelihood: half and full volume, the scale of sigma^2, its normaliser, the noise and shift updates."""

import numpy as np
import pytest

from faml_gpu import fourier, ops
from faml_gpu.expectation import log_normaliser
from faml_gpu.maximization import ZETA_FLOOR, new_sigma2, new_zeta


def half_sum(toy, oracles, i, k, p):
    """Residual per shell of one pose through the package's half list."""
    support = fourier.make_support(toy.box, toy.r_max)
    half = oracles.half_of_cube(toy.weights[toy.weight_index[i]])
    return ops.residual(
        fourier.interpolation_grid(toy.maps[k], toy.r_max, 1, compensate=False),
        support.gather(fourier.transform(toy.particles[i : i + 1])),
        support.gather(half)[None],
        np.zeros(1, np.int64),
        toy.rotations[k, i, p][None, None].copy(),
        toy.shifts[k, i, p][None, None].copy(),
        np.ones(1, np.int64),
        support,
        1,
    )[0, 0]


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("box", [12, 13])
def test_half_and_full_volume_agree(box, fractional, rng, oracles):
    toy = oracles.Toy(rng, box, oracles.Lattice, fractional=fractional)
    for i, k, p in toy.entries()[::3]:
        # Every voxel of np.fft.fftn, one after the other, in FFT order.
        x = np.fft.fftn(np.fft.ifftshift(toy.particles[i]))
        a = np.fft.fftn(np.fft.ifftshift(toy.maps[k]))
        w = np.fft.ifftshift(toy.weights[toy.weight_index[i]])
        r, t = toy.rotations[k, i, p], toy.shifts[k, i, p]
        full = 0.0
        for kz, ky, kx in np.ndindex(box, box, box):
            xi = np.array([kx, ky, kz])
            xi = np.where(xi >= box / 2, xi - box, xi)
            length = np.sqrt(xi @ xi)
            if not 0 < length <= toy.r_max:
                continue
            back = np.rint(r.T @ xi).astype(int)
            value = a[back[2] % box, back[1] % box, back[0] % box] * np.exp(-2j * np.pi * xi @ t / box)
            full += w[kz, ky, kx] ** 2 * abs(x[kz, ky, kx] - value) ** 2 / (2 * toy.sigma2[round(length)])
        half = (half_sum(toy, oracles, i, k, p)[1:] / (2 * toy.sigma2[1 : toy.r_max + 1])).sum()
        np.testing.assert_allclose(half, full, rtol=1e-11)


@pytest.mark.parametrize("box", [12, 13])
def test_scale_of_sigma2_is_that_of_real_noise(box, rng, oracles):
    """White noise of variance s^2 per voxel has sigma^2 = N^3 s^2, and the exponent is sum (x - a)^2 / (2 s^2)."""
    toy = oracles.Toy(rng, box, oracles.Lattice)
    toy.weights[:] = 1
    toy.rotations[:] = np.eye(3)
    toy.shifts[:] = 0
    found = half_sum(toy, oracles, 0, 0, 0).sum() / (2 * box**3 * 0.7)
    difference = oracles.centred_cube(toy.particles[0] - toy.maps[0])
    k = np.arange(box) - box // 2
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
    in_band = oracles.centred_volume(difference * ((square > 0) & (square <= toy.r_max**2)))
    np.testing.assert_allclose(found, (in_band**2).sum() / (2 * 0.7), rtol=1e-10)


@pytest.mark.parametrize("per_shell", [False, True])
@pytest.mark.parametrize("box", [16, 17])
def test_sigma2_recovers_a_known_variance(box, per_shell, rng, oracles):
    r_max = fourier.full_band(box)
    support = fourier.make_support(box, r_max)
    weights = support.gather(oracles.half_of_cube(oracles.wedge_cube(box, [0, 0, 1], 0.6)))
    # Noise of 2 per voxel, filtered to a curve that falls with the shell.
    curve = 1 / (1 + 0.2 * np.arange(r_max + 1)) if per_shell else np.ones(r_max + 1)
    noise = np.sqrt(2) * rng.standard_normal((40, box, box, box))
    x = support.gather(fourier.transform(noise)) * np.sqrt(curve[support.shell])
    residual = support.shell_sums(weights**2 * np.abs(x) ** 2).sum(axis=0)
    observed = 40 * support.shell_sums(weights**2)
    found = new_sigma2(residual, observed, np.ones(r_max + 1), per_shell=per_shell)
    # 40 boxes: in shell 1 some 40 * 10 coefficients, half of them independent, a relative error of .07.
    np.testing.assert_allclose(found[1:] / box**3, 2 * curve[1:], rtol=0.25)
    np.testing.assert_allclose(found[3:] / box**3, 2 * curve[3:], rtol=0.06)
    assert per_shell or len(set(found)) == 1


def test_sigma2_keeps_unseen_shells_and_stays_positive():
    old = np.array([7.0, 7, 7, 7, 9])
    found = new_sigma2(np.array([0.0, 4, 0, 0]), np.array([0.0, 2, 0, 5]), old, per_shell=True)
    np.testing.assert_allclose(found[[1, 2, 4]], [2, 7, 9])
    assert found[3] > 0
    np.testing.assert_array_equal(old, [7, 7, 7, 7, 9])
    assert (new_sigma2(np.zeros(4), np.ones(4), old, per_shell=False) > 0).all()
    np.testing.assert_allclose(new_sigma2(np.array([0.0, 3, 5]), np.array([0.0, 2, 2]), old, per_shell=False), 2)


def test_zeta_is_the_deviation_along_an_axis(rng):
    shifts = rng.normal(0, 2.5, (20000, 3))
    # 60000 normal numbers: relative error .003.
    np.testing.assert_allclose(new_zeta((shifts**2).sum(), 20000), 2.5, rtol=0.01)
    assert new_zeta(0.0, 5) == ZETA_FLOOR == 0.5


@pytest.mark.parametrize("per_shell", [False, True])
def test_objective_is_highest_at_the_new_sigma_and_zeta(per_shell, rng):
    """L(sigma, zeta) for one pose per particle: its maximum is where Eq. 12 and 13 put it, on both sides lower."""
    observed = np.array([0.0, 30, 90, 200])
    residual = observed * rng.uniform(2, 5, 4)
    shift2, n = 400.0, 30

    def objective(sigma2, zeta):
        exponent = -(residual[1:] / (2 * sigma2[1:])).sum() - shift2 / (2 * zeta**2)
        return exponent + log_normaliser(observed, sigma2, zeta, n)

    sigma2 = new_sigma2(residual, observed, np.ones(4), per_shell=per_shell)
    zeta = new_zeta(shift2, n)
    best = objective(sigma2, zeta)
    for factor in (0.97, 1.03):
        assert objective(sigma2, zeta * factor) < best
        for s in range(1, 4):
            changed = sigma2.copy()
            changed[s if per_shell else slice(None)] *= factor
            assert objective(changed, zeta) < best


def test_normaliser_is_the_gaussians_own(rng):
    """exp(L) integrates to a constant: with J coefficients (real ones) and 3 n shift components."""
    observed = np.array([0.0, 3, 5])
    sigma2, zeta = np.array([1.0, 4.0, 9.0]), 1.7
    expected = -0.5 * (3 * np.log(4.0) + 5 * np.log(9.0)) - 1.5 * 2 * np.log(1.7**2)
    np.testing.assert_allclose(log_normaliser(observed, sigma2, zeta, 2), expected)
    # Longer curves than the band are cut, shell 0 never counts.
    np.testing.assert_allclose(log_normaliser(observed, np.append(sigma2, 77.0), zeta, 2), expected)
    observed[0] = 1e9
    np.testing.assert_allclose(log_normaliser(observed, sigma2, zeta, 2), expected)
