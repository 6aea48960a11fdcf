"""Empty classes: which are, what they are filled with, and that a structure hidden in another's class is found."""

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu import fourier
from faml_gpu.data import Checkpoint, Poses
from faml_gpu.faml import iterate
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.maximization import direct_average
from faml_gpu.metrics import confusion_matrix
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.posteriors import one_hot
from faml_gpu.reseeding import idle_classes, reseed, split
from faml_gpu.simulate import groel, ribosome, simulate_particles
from faml_gpu.starting import average_sums, start

COUNTS = (12, 4)


def mixture():
    return simulate_particles(
        [groel(), ribosome()], COUNTS, box=20, voxel_size=18.0, snr=0.5, seed=4, resolution=40.0, max_shift=1.0
    )


def plan_for(data, **options) -> tuple[ArrayParticles, Plan]:
    particles = ArrayParticles(data.boxes, data.voxel_size, data.weight)
    chosen = Options(n_classes=2, mask_radius=130.0, resolution=50.0, iterations=20, candidates=8, **options)
    return particles, Plan.make(particles, chosen, 80.0, "cpu")


def with_row(posterior, particle, k, p):
    """One more entry for a particle: unturned, in class k, with p of its mass."""
    changed = {
        "particle": np.insert(posterior.particle, particle + 1, particle),
        "class_index": np.insert(posterior.class_index, particle + 1, k),
        "rotations": np.insert(posterior.rotations, particle + 1, np.eye(3), axis=0),
        "shifts": np.insert(posterior.shifts, particle + 1, 0.0, axis=0),
        "probability": np.insert(posterior.probability, particle + 1, p),
        "class_probability": posterior.class_probability.copy(),
    }
    changed["probability"][particle] -= p
    changed["class_probability"][particle] = np.bincount([posterior.class_index[particle], k], [1 - p, p])
    return replace(posterior, **changed)


def test_a_class_is_idle_if_it_is_small_and_no_particle_needs_it():
    def with_last(column, n=100):
        last = np.zeros(n)
        last[: len(column)] = column
        rest = (1 - last)[:, None] * np.array([0.7, 0.3])
        return np.concatenate([rest, last[:, None]], axis=1)

    assert list(idle_classes(with_last([]))) == [2]  # empty
    assert list(idle_classes(with_last([0.01] * 100))) == [2]  # a little of everything: 1 nat each
    assert list(idle_classes(with_last([0.5] * 10))) == [2]  # shares its particles with a copy: 1.4 nats each
    assert list(idle_classes(with_last([1.0, 1.0, 1.0]))) == []  # three particles that are its own
    assert list(idle_classes(with_last([0.5] * 50))) == []  # a copy, but as large as others
    assert list(idle_classes(np.ones((5, 1)))) == []


def test_the_least_even_class_is_split():
    rng = np.random.default_rng(3)

    def gains(mean, n):
        return mean + np.sqrt(2 * mean) * rng.standard_normal(n)  # by noise alone

    classes = np.repeat([0, 1], [400, 200])
    gain = np.concatenate([gains(500, 400), gains(300, 160), gains(200, 40)])
    new = split(classes, gain, np.array([2]))
    np.testing.assert_array_equal(new[:400], 0)
    assert (new == 2).sum() == 50
    assert (new[560:] == 2).sum() >= 38
    assert gain[new == 2].max() <= gain[new == 1].min()
    # A second one is taken from what is left, and not from the first.
    again = split(classes, gain, np.array([2, 3]))
    np.testing.assert_array_equal(again == 2, new == 2)
    assert (again == 3).sum() in (100, 37)
    np.testing.assert_array_equal(classes, np.repeat([0, 1], [400, 200]))
    few = np.repeat([0, 1], [7, 7])
    np.testing.assert_array_equal(split(few, rng.random(14), np.array([2])), few)


@pytest.mark.parametrize("folds", [1, 3])
def test_new_averages_are_those_of_the_new_classes(folds):
    """Of the class that is filled and of that it is taken from; of each fold those without it; cut off at the band."""
    data = mixture()
    particles, plan = plan_for(data, folds=folds, band="growing")
    state = start(plan, particles, None, Poses(data.rotations, data.shifts, data.classes)).state
    state.iteration = 8
    if folds > 1:
        state.apart = np.repeat(state.maps[None], folds, axis=0)
    posterior = one_hot(np.zeros(16, int), data.rotations, data.shifts, 2, known=True)
    # The first particle has a tenth of its mass in the idle class, in some other pose: that goes with the class.
    posterior = with_row(posterior, 0, 1, 0.1)
    gain = np.arange(16.0)[::-1] + 100  # the last four are explained worst
    new, filled = reseed(plan, particles, state, posterior, gain)
    assert filled == [1]
    np.testing.assert_allclose(new.alpha, [0.75, 0.25])
    support = fourier.make_support(20, fourier.full_band(20))
    inside = support.shell <= plan.band(state).r_max
    assert not inside.all()
    parts = plan.parts(16)
    for fold in range(-1, folds if folds > 1 else 0):
        others = np.arange(16) if fold < 0 else np.setdiff1d(np.arange(16), parts[fold])
        known = one_hot((np.arange(16) >= 12).astype(int), data.rotations, data.shifts, 2, known=True)
        known.probability[0] = 0.9
        expected = plan.to_maps(direct_average(*average_sums(plan, particles, known, members=others)) * inside, support)
        found = new.maps if fold < 0 else new.apart[fold]
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())
    # Nothing is idle: nothing changes.
    same, filled = reseed(plan, particles, state, replace(posterior, class_probability=np.eye(2)[[0, 1] * 8]), gain)
    assert same is state
    assert filled == []


def test_what_is_not_taken_from_stays():
    data = mixture()
    particles, plan = plan_for(data)
    plan = replace(plan, options=replace(plan.options, n_classes=3))
    classes = np.repeat([0, 2], [12, 4])  # 1 is empty, 2 too small to be split
    state = start(plan, particles, None, Poses(data.rotations, data.shifts)).state
    posterior = one_hot(classes, data.rotations, data.shifts, 3, known=True)
    new, filled = reseed(plan, particles, state, posterior, np.linspace(50, 100, 16))
    assert filled == [1]
    np.testing.assert_array_equal(new.maps[2], state.maps[2])
    assert abs(new.maps[0] - state.maps[0]).max() > 0
    np.testing.assert_allclose(new.alpha, [9 / 16, 3 / 16, 4 / 16])


def test_a_structure_hidden_in_the_class_of_another_is_found():
    """GroEL and ribosomes share one average, the other is empty. Left alone, it stays so."""
    data = mixture()
    found = []
    for wanted in (True, False):
        particles, plan = plan_for(data, reseed=wanted)
        checkpoint = start(plan, particles, None, Poses(data.rotations, data.shifts))
        state = checkpoint.state
        state.iteration, state.alpha = 7, np.array([0.97, 0.03])  # 5 + 3 is the first at which classes are begun anew
        state.maps, state.apart = np.stack([state.maps.mean(axis=0), np.zeros_like(state.maps[0])]), None
        rows = []
        for _ in range(3):
            checkpoint: Checkpoint = iterate(plan, particles, checkpoint)
            rows.append(checkpoint.history[-1].reseeded)
        assert rows == ([[1], [], []] if wanted else [[], [], []])
        classes = checkpoint.posterior.class_probability.argmax(axis=1)
        found.append(confusion_matrix(classes, data.classes, (2, 2)).tolist())
    assert found == [[[12, 0], [0, 4]], [[12, 4], [0, 0]]]


def test_only_now_and_then():
    _, plan = plan_for(mixture())
    assert [i for i in range(21) if plan.reseeds(i)] == [8, 11, 14]
    for other in ({"reseed": False}, {"preset": "paper"}):
        assert not any(replace(plan, options=replace(plan.options, **other)).reseeds(i) for i in range(21))
    assert replace(plan, options=replace(plan.options, preset="paper", reseed=True)).reseeds(8)
