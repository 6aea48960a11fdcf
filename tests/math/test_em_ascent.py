"""Expectation-maximisation never lowers the objective, where every step of it is exact.

Candidates and volumes are fixed, the box is odd, rotations are the 24 of the cube through the unpadded sampler (exact
permutations of the Fourier lattice), shifts are any real ones; no mask, no regularisation, float64, and the posterior
is not cut. What is left is EM as in the textbook: a fall of L is a wrong update, sign or factor.
"""

import numpy as np
import pytest

from faml_gpu import expectation as expectation_module
from faml_gpu import fourier, maximization
from faml_gpu.expectation import expectation, log_normaliser
from faml_gpu.fast_alignment import Candidates, Observation, Reference

ITERATIONS = 12
BOX = 11
R_MAX = 5


class Loop:
    """The loop of `faml.iterate`, from the same public functions, without fast alignment and masks."""

    def __init__(self, oracles, rng, *, per_shell, update, fractional):
        self.per_shell, self.update = per_shell, update
        n, poses = 20, 10
        self.support = fourier.make_support(BOX, R_MAX)
        truth = [oracles.blob_volume(BOX, *oracles.blobs(rng, 6, 2.5, 1.0)) * 40 for _ in range(2)]
        cubes = oracles.cube_rotations()
        rotations, shifts = cubes[rng.integers(0, 24, n)], rng.uniform(-2, 2, (n, 3))
        w = np.stack([oracles.wedge_cube(BOX, v, 0.3) for v in rng.standard_normal((4, 3))])
        if fractional:
            soft = rng.uniform(0.3, 1, w.shape)
            w *= (soft + soft[:, ::-1, ::-1, ::-1]) / 2
        self.weights = np.stack([oracles.half_of_cube(v) for v in w])
        self.weight_index = np.arange(n) % 4
        particles = []
        for i in range(n):
            cube = np.zeros((BOX,) * 3, complex)
            points, _ = oracles.ball(R_MAX)
            x, y, z = (points + BOX // 2).T
            cube[z, y, x] = oracles.model(oracles.Lattice(truth[i % 2]), points, rotations[i], shifts[i], BOX)
            cube += 0.7 * oracles.centred_cube(rng.standard_normal((BOX,) * 3))
            particles.append(oracles.centred_volume(cube * w[self.weight_index[i]]))
        self.spectra = fourier.transform(np.array(particles))
        gather = self.support.gather
        self.observation = Observation(
            self.support, gather(self.spectra), gather(self.weights), self.weight_index, ("a", "b", "c", "d")
        )
        # The true pose is among the candidates of its particle, the others are any.
        self.candidates, self.log_volumes = [], []
        for _ in range(2):
            r, t = cubes[rng.integers(0, 24, (n, poses))], rng.uniform(-2, 2, (n, poses, 3))
            r[:, 3], t[:, 3] = rotations, shifts
            self.candidates.append(Candidates(r, t, np.zeros((n, poses)), rng.integers(4, poses + 1, n)))
            self.log_volumes.append(np.log(rng.dirichlet(np.ones(poses), n)))
        self.averages = gather(fourier.transform(rng.standard_normal((2, BOX, BOX, BOX))))
        self.alpha, self.zeta = np.array([0.5, 0.5]), 4.0
        self.sigma2 = np.full(R_MAX + 1, 2.0 * BOX**3)

    def iterate(self):
        """L of the parameters as they are, then the next ones."""
        maps = fourier.inverse_transform(self.support.scatter(self.averages), BOX)
        grids = fourier.interpolation_grid(maps, R_MAX, 1, compensate=False)
        references = [Reference(g, 1, 0, np.zeros(0), np.zeros(0)) for g in grids]
        posterior = expectation(
            self.observation, references, self.candidates, self.log_volumes, self.alpha, self.sigma2, self.zeta
        )
        n = len(self.spectra)
        (residual,), (observed,) = maximization.noise_sums(
            posterior, self.observation.weights, self.weight_index, self.support
        )
        likelihood = posterior.log_likelihood.sum() + log_normaliser(observed, self.sigma2, self.zeta, n)
        printed = self.update == "printed"
        sums, weights = maximization.rotate_back(
            self.spectra,
            self.weights,
            self.weight_index,
            None,
            posterior,
            self.support,
            1,
            2,
            weigh_twice=printed,
            compensate=False,
        )
        assert sums.dtype == np.complex128
        mass = np.bincount(posterior.class_index, posterior.probability, minlength=2)
        self.coverage = (weights / mass[:, None]).min()
        if printed:
            inside = np.ones(len(self.support), bool)
            self.averages = maximization.update_average(sums, weights, mass, self.averages, inside)
        else:
            self.averages = maximization.direct_average(sums, weights, mass)
        self.alpha = mass / mass.sum()
        self.sigma2 = maximization.new_sigma2(residual, observed, self.sigma2, per_shell=self.per_shell)
        self.zeta = maximization.new_zeta(posterior.probability @ (posterior.shifts**2).sum(axis=1), n)
        return likelihood


# Eq. 10 as printed multiplies w by w X: with w of 0 and 1 that is w X, with fractions it is no EM step.
@pytest.mark.parametrize(
    ("update", "fractional"), [("printed", False), ("filled", False), ("ratio", False), ("ratio", True)]
)
@pytest.mark.parametrize("per_shell", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_likelihood_never_falls(update, fractional, per_shell, seed, oracles, monkeypatch):
    monkeypatch.setattr(expectation_module, "KEPT_MASS", 1.0)
    loop = Loop(oracles, np.random.default_rng(seed), per_shell=per_shell, update=update, fractional=fractional)
    likelihoods = []
    for _ in range(ITERATIONS):
        likelihoods.append(loop.iterate())
        assert loop.zeta > maximization.ZETA_FLOOR
        # Where the floor on the coverage is at work the ratio is not the maximiser.
        assert update != "ratio" or loop.coverage > maximization.COVERAGE_FLOOR
    rise = np.diff(likelihoods)
    assert (rise >= -1e-9 * np.abs(likelihoods[1:])).all(), likelihoods
    assert likelihoods[-1] > likelihoods[0] + 100  # it did go somewhere
