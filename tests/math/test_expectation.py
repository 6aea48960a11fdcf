"""The E-step against Eq. 14-15 written out over the full Fourier volume, float64."""

import numpy as np
import pytest
from scipy.special import logsumexp

from faml_gpu import expectation as module
from faml_gpu import fourier
from faml_gpu.expectation import expectation
from faml_gpu.fast_alignment import Candidates, Observation, Reference


def run(toy, oracles, *, alpha=None, gain=None):
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
    gains = [None] * len(toy.maps) if gain is None else gain
    candidates = [
        Candidates(r, t, np.zeros(r.shape[:2]), c, g)
        for r, t, c, g in zip(toy.rotations, toy.shifts, toy.count, gains, strict=True)
    ]
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


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("zeta", [2.0, 0.02])  # priors of shifts that hardly matter, and that outdo the likelihood
def test_what_the_gain_rules_out_is_not_computed_and_not_missed(zeta, unknown, rng, oracles, monkeypatch):
    toy = oracles.Toy(rng, 12, oracles.Lattice, n_poses=10)
    toy.sigma2, toy.zeta = toy.sigma2 / 50, zeta
    expected = literal(toy, oracles)
    everything = run(toy, oracles)
    # The gain by its definition, off by as much as it may be: residual of no reference less that of the pose, halved.
    support = fourier.make_support(toy.box, toy.r_max)
    weight = support.gather(np.stack([oracles.half_of_cube(w) for w in toy.weights]))[toy.weight_index]
    power = np.abs(support.gather(fourier.transform(toy.particles))) ** 2 * weight**2 / toy.sigma2[support.shell]
    gain = np.zeros(toy.rotations.shape[:3])
    for (i, k, p), (_, residual) in expected.items():
        gain[k, i, p] = power[i].sum() - 0.5 * (residual[1:] / toy.sigma2[1 : toy.r_max + 1]).sum()
    gain *= rng.uniform(0.97, 1.0, gain.shape)
    if unknown:
        gain[:, :, -1] = np.inf
    looked_at = []
    residual = module.ops.residual
    monkeypatch.setattr(module.ops, "residual", lambda *a: looked_at.append(a[6].sum()) or residual(*a))
    found = run(toy, oracles, gain=gain)
    assert len(expected) / 20 < sum(looked_at) < len(expected) / 2
    np.testing.assert_array_equal(found.particle, everything.particle)
    np.testing.assert_array_equal(found.class_index, everything.class_index)
    order = [np.lexsort((x.probability, x.class_index, x.particle)) for x in (found, everything)]
    for name in ("probability", "rotations", "shifts", "residual"):
        np.testing.assert_allclose(getattr(found, name)[order[0]], getattr(everything, name)[order[1]], atol=1e-12)
    np.testing.assert_allclose(found.log_likelihood, everything.log_likelihood, rtol=1e-12)
    np.testing.assert_allclose(found.class_probability, everything.class_probability, atol=1e-12)
    assert found.candidates == everything.candidates
