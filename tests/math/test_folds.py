"""Each particle is compared with averages of the other particles."""

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu.data import State
from faml_gpu.errors import InputError
from faml_gpu.faml import iterate
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.simulate import ribosome, simulate_particles
from faml_gpu.starting import final_averages, start

N, VOXEL = 7, 18.0
OPTIONS = Options(mask_radius=130.0, max_shift=40.0, update="ratio", band="full", candidates=8)


def boxes(snr: float, n: int = N) -> ArrayParticles:
    data = simulate_particles([ribosome()], [n], box=20, voxel_size=VOXEL, snr=snr, seed=4, resolution=40.0)
    return ArrayParticles(data.boxes, VOXEL, data.weight)


def alone(posterior, members):
    """With no mass but that of some particles."""
    return replace(posterior, probability=np.where(np.isin(posterior.particle, members), posterior.probability, 0.0))


def test_parts_hold_every_particle_once():
    particles = boxes(0.3, 3)

    def sizes(n, **options):
        parts = Plan.make(particles, replace(OPTIONS, **options)).parts(n)
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert all((np.diff(part) == len(parts)).all() for part in parts)  # some of each end of the file
        return [len(part) for part in parts]

    assert sizes(100) == [10] * 10
    assert sorted(sizes(25, folds=4)) == [6, 6, 6, 7]
    assert sizes(3) == [1, 1, 1]
    for whole in ({"folds": 1}, {"preset": "paper"}, {"method": "fa"}, {"method": "fa", "folds": 5}):
        assert sizes(100, **whole) == [100]
    assert len(sizes(100, folds=1, band="evidence")) == 10
    with pytest.raises(InputError, match="option folds: found 0"):
        Options(folds=0)


@pytest.mark.parametrize("sampler", ["joint", "magnitude"])
def test_averages_without_a_fold_and_what_is_compared_with_them(sampler):
    """A of each fold is the average of all others; its particles have the posterior that this A alone gives them."""
    particles = boxes(0.3)
    options = replace(OPTIONS, folds=3, sampler=sampler)
    plan = Plan.make(particles, options, 80.0)
    whole = replace(plan, options=replace(options, folds=1))
    first = iterate(plan, particles, start(plan, particles, None, None))
    assert first.state.apart.shape == (3, 1, 20, 20, 20)
    told = []
    second = iterate(plan, particles, first, lambda *step: told.append(step))
    assert [done for name, done, total in told if name == "iteration 2"] == [3, 5, 7]
    for fold, members in enumerate(plan.parts(N)):
        others = [i for i in range(N) if i not in members]
        expected = final_averages(whole, particles, alone(first.posterior, others))
        band = plan.band(first.state)
        found = band.holding_out(fold).averages()
        expected = replace(band, state=replace(first.state, maps=expected, apart=None)).averages()
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())
        state: State = replace(first.state, maps=first.state.apart[fold], apart=None)
        same = iterate(whole, particles, replace(first, state=state)).posterior
        np.testing.assert_allclose(second.posterior.log_likelihood[members], same.log_likelihood[members], rtol=1e-5)
        mine, its = (np.isin(p.particle, members) for p in (second.posterior, same))
        np.testing.assert_allclose(second.posterior.probability[mine], same.probability[its], atol=1e-4)
    # Compared with what it is part of, each particle fits better.
    itself = iterate(whole, particles, replace(first, state=replace(first.state, apart=None))).posterior
    assert (itself.log_likelihood > second.posterior.log_likelihood + 1).all()


def test_what_is_unseen_of_an_average_is_that_of_its_fold():
    """The posterior with the fold's average and its unseen power, and with no other fold's."""
    particles = boxes(0.05)
    plan = Plan.make(particles, replace(OPTIONS, folds=3, update="wiener"), 80.0)
    whole = replace(plan, options=replace(plan.options, folds=1))
    first = iterate(plan, particles, start(plan, particles, None, None))
    state = first.state
    assert state.unseen.shape == (3, 20, 20, 11)
    found = iterate(plan, particles, first).posterior
    spread = []
    for fold, members in enumerate(plan.parts(N)):
        for other in range(3):
            single = replace(state, maps=state.apart[fold], apart=None, unseen=state.unseen[other : other + 1])
            same = iterate(whole, particles, replace(first, state=single)).posterior
            mine, its = (np.isin(p.particle, members) for p in (found, same))
            equal = mine.sum() == its.sum() and np.allclose(found.probability[mine], same.probability[its], atol=1e-4)
            assert equal or other != fold
            spread.append(equal)
    assert not all(spread)  # or nothing was told apart
