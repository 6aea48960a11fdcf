"""Each particle is compared with averages of the other particles."""

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu.data import Poses, State
from faml_gpu.errors import InputError
from faml_gpu.faml import iterate, maximize
from faml_gpu.geometry import random_rotations
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import Accumulators
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
        assert all((np.diff(part) > 0).all() for part in parts)
        return [len(part) for part in parts]

    assert sizes(100) == [10] * 10
    # Some of each end of the file, which may be sorted by class, and not every tenth either.
    for part in Plan.make(particles, OPTIONS).parts(400):
        assert part[0] < 100
        assert part[-1] >= 300
        assert len(np.unique(part % 10)) > 5
    assert sorted(sizes(25, folds=4)) == [6, 6, 6, 7]
    assert sizes(3) == [1, 1, 1]
    for whole in ({"folds": 1}, {"preset": "paper"}, {"method": "fa"}):
        assert sizes(100, **whole) == [100]
    assert len(sizes(100, folds=1, band="evidence")) == 10
    for wrong, found in (
        ({"folds": 0}, "option folds: found 0"),
        ({"folds": 5, "method": "fa"}, "option folds: found 5"),
    ):
        with pytest.raises(InputError, match=found):
            Options(**wrong)
    with pytest.raises(InputError, match="option update: found 'wiener'"):
        Options(update="wiener", method="fa")


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
    assert [done for name, done, total in told if name == "iteration 2"] == [0, 3, 5, 7]
    for fold, members in enumerate(plan.parts(N)):
        others = [i for i in range(N) if i not in members]
        expected = final_averages(whole, particles, alone(first.posterior, others))
        band = plan.band(first.state)
        found = band.averages(fold)
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


def test_a_start_from_poses_is_held_apart_too():
    """Else the first iteration finds each particle's own noise where it lay. A map from elsewhere has none of it."""
    particles = boxes(0.3)
    plan = Plan.make(particles, replace(OPTIONS, folds=3), 80.0)
    whole = replace(plan, options=replace(plan.options, folds=1))
    poses = Poses(random_rotations(N, np.random.default_rng(2)), np.zeros((N, 3)))
    begun = start(plan, particles, None, poses)
    for fold, members in enumerate(plan.parts(N)):
        others = [i for i in range(N) if i not in members]
        expected = plan.lowpass(final_averages(whole, particles, alone(begun.posterior, others)))
        np.testing.assert_allclose(begun.state.apart[fold], expected, atol=1e-4 * abs(expected).max())
    assert start(plan, particles, begun.state.maps[0], None).state.apart is None
    assert start(whole, particles, None, poses).state.apart is None


def test_a_class_that_only_a_fold_has_particles_of_keeps_what_others_made_of_it():
    particles = boxes(0.3)
    plan = Plan.make(particles, replace(OPTIONS, folds=3, n_classes=2, regularization=0.0))
    first = iterate(plan, particles, start(plan, particles, None, None))
    assert first.state.apart is not None
    first.state.apart = first.state.apart + np.float32(0.1) * np.arange(3, dtype=np.float32)[:, None, None, None, None]
    band = plan.band(first.state)
    size = 2, len(band.output), band.r_max
    total = Accumulators.zero(*size, n_curves=1, parts=3)
    total.mass[:] = [2, 0, 2, 2, 2, 0]  # class 1 has mass in the second fold only
    total.n, total.shift2 = N, 1.0
    total.residual += 1.0
    total.observed += 1.0
    new = maximize(plan, band, first.state, total)
    np.testing.assert_array_equal(new.apart[1, 1], first.state.apart[1, 1])
    assert not np.array_equal(new.apart[1, 1], first.state.maps[1])


@pytest.mark.parametrize("update", ["printed", "ratio"])
def test_averages_of_a_fold_are_those_of_a_run_without_it(update, rng):
    """What Eq. 10 fills a wedge with, and the common mean that classes lean on, are without the fold too."""
    particles = boxes(0.3)
    options = replace(OPTIONS, folds=3, n_classes=2, update=update, regularization=1.0)
    plan = Plan.make(particles, options)
    first = iterate(plan, particles, start(plan, particles, None, None)).state
    band = plan.band(first)
    total = Accumulators.zero(2, len(band.output), band.r_max, n_curves=1, parts=3)
    weights = rng.uniform(0, 1, total.weights.shape)
    total.sums[:] = weights * 50 * (rng.standard_normal((*weights.shape, 2)) @ [1, 1j])
    total.weights[:], total.mass[:] = weights, [1.0, 2.0, 0.5, 1.5, 1.2, 0.8]
    total.residual += 1.0
    total.observed += 1.0
    total.n, total.shift2 = N, 1.0
    found = maximize(plan, band, first, total)
    for fold in range(3):
        single = replace(plan, options=replace(options, folds=1))
        of_others = replace(first, maps=first.apart[fold], apart=None)
        expected = maximize(single, single.band(of_others), of_others, total.without(fold))
        np.testing.assert_allclose(found.apart[fold], expected.maps, atol=1e-5 * abs(expected.maps).max())
        assert not np.allclose(found.apart[fold], found.maps, atol=0.01 * abs(expected.maps).max())
