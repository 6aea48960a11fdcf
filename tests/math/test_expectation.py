"""The E-step against Eq. 14-15 written out over the full Fourier volume, float64."""

import numpy as np
import pytest
from scipy.special import logsumexp

from faml_gpu import expectation as module
from faml_gpu import fourier
from faml_gpu.expectation import expectation
from faml_gpu.fast_alignment import Candidates, Observation, Reference


def run(toy, oracles, *, alpha=None):
    support = fourier.make_support(toy.box, toy.r_max)
    half = np.stack([oracles.half_of_cube(w) for w in toy.weights])
    observation = Observation(
        support,
        support.gather(fourier.transform(toy.particles)),
        support.gather(half),
        toy.weight_index,
        ("a", "b"),
    )
    sampler, unused = toy.sampler, np.zeros(0)
    references = [
        Reference(
            fourier.interpolation_grid(m, toy.r_max, sampler.padding, compensate=sampler.compensate),
            sampler.padding,
            0,
            unused,
            unused,
        )
        for m in toy.maps
    ]
    candidates = [Candidates(r, t, unused, c) for r, t, c in zip(toy.rotations, toy.shifts, toy.count, strict=True)]
    alpha = toy.alpha if alpha is None else alpha
    return expectation(observation, references, candidates, list(toy.log_volumes), alpha, toy.sigma2, toy.zeta)


def literal(toy, oracles):
    """log P of every candidate before normalising, and its residual per shell."""
    samplers = [toy.sampler(m) for m in toy.maps]
    return {
        (i, k, p): oracles.log_joint(
            toy.box,
            toy.r_max,
            toy.particles[i],
            toy.weights[toy.weight_index[i]],
            samplers[k],
            toy.rotations[k, i, p],
            toy.shifts[k, i, p],
            toy.log_volumes[k, i, p],
            toy.alpha[k],
            toy.sigma2,
            toy.zeta,
        )
        for i, k, p in toy.entries()
    }


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("box", [12, 13])
@pytest.mark.parametrize("name", ["Lattice", "Padded"])
def test_is_eq_14_and_15(name, box, fractional, rng, oracles, monkeypatch):
    monkeypatch.setattr(module, "KEPT_MASS", 1.0)
    toy = oracles.Toy(rng, box, getattr(oracles, name), fractional=fractional)
    expected = literal(toy, oracles)
    found = run(toy, oracles)
    evidence = np.array([logsumexp([v for (i, _, _), (v, _) in expected.items() if i == j]) for j in range(3)])
    np.testing.assert_allclose(found.log_likelihood, evidence, rtol=1e-10)
    assert list(zip(found.particle, found.class_index, strict=True)) == [(i, k) for i, k, _ in toy.entries()]
    for n, (i, k, p) in enumerate(toy.entries()):
        value, residual = expected[i, k, p]
        np.testing.assert_allclose(found.probability[n], np.exp(value - evidence[i]), atol=1e-9)
        np.testing.assert_allclose(found.residual[n], residual, rtol=1e-9)
        np.testing.assert_array_equal(found.rotations[n], toy.rotations[k, i, p])
        np.testing.assert_array_equal(found.shifts[n], toy.shifts[k, i, p])
    # The posteriors are spread out: more than one pose, and both classes, carry mass.
    assert np.sort(found.probability)[-4] > 0.05
    mass = np.zeros((3, 2))
    np.add.at(mass, (found.particle, found.class_index), found.probability)
    np.testing.assert_allclose(found.class_probability, mass, atol=1e-12)
    np.testing.assert_allclose(mass.sum(axis=1), 1)


def test_cut_keeps_the_smallest_set_of_enough_mass(rng, oracles):
    toy = oracles.Toy(rng, 12, oracles.Lattice, n_poses=10)
    toy.sigma2 = toy.sigma2 / 4
    expected = literal(toy, oracles)
    found = run(toy, oracles)
    for i in range(3):
        values = np.array([v for (j, _, _), (v, _) in expected.items() if j == i])
        p = np.sort(np.exp(values - logsumexp(values)))[::-1]
        kept = np.searchsorted(np.cumsum(p), module.KEPT_MASS) + 1
        mine = np.sort(found.probability[found.particle == i])[::-1]
        assert len(mine) == kept
        np.testing.assert_allclose(mine, p[:kept] / p[:kept].sum(), rtol=1e-8)
        np.testing.assert_allclose(found.class_probability[i].sum(), 1)  # of all poses, before the cut
    assert len(found.particle) < len(expected)


def test_differences_of_many_hundreds_stay_finite(rng, oracles):
    toy = oracles.Toy(rng, 12, oracles.Lattice)
    toy.sigma2 = toy.sigma2 / 1e4
    expected = literal(toy, oracles)
    found = run(toy, oracles)
    assert np.ptp([v for v, _ in expected.values()]) > 2000
    assert np.isfinite(found.log_likelihood).all()
    np.testing.assert_allclose(np.bincount(found.particle, found.probability), 1)


def test_empty_class_and_class_without_candidates(rng, oracles):
    toy = oracles.Toy(rng, 12, oracles.Lattice)
    toy.count[1] = [0, 2, 0]
    found = run(toy, oracles, alpha=np.array([1.0, 0.0]))
    np.testing.assert_allclose(found.class_probability, [[1, 0]] * 3, atol=1e-12)
    assert np.isfinite(found.log_likelihood).all()
    assert (found.class_index == 0).all()
