"""The pose given out of each particle's posterior: against the expected angle, written out."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from faml_gpu import posteriors
from faml_gpu.data import Posterior
from faml_gpu.expectation import BatchPosterior
from faml_gpu.geometry import random_rotations, rotation_angle
from faml_gpu.posteriors import best_poses, unfolded
from faml_gpu.symmetry import point_group


def posterior_of(rows, n_classes=2):
    """From (particle, class, rotation, probability); shifts tell the rows apart."""
    particle, k, rotations, probability = (np.array(x) for x in zip(*rows, strict=True))
    n = particle.max() + 1
    classes = np.zeros((n, n_classes))
    np.add.at(classes, (particle, k), probability)
    return Posterior(
        particle, k, rotations, np.arange(len(rows))[:, None] * np.ones(3), probability, np.zeros(n),
        np.bincount(particle), classes,
    )  # fmt: skip


def about(axis, degrees):
    return Rotation.from_rotvec(np.deg2rad(degrees) * np.eye(3)[axis]).as_matrix()


def test_the_middle_of_most_of_the_mass_and_not_one_that_stands_for_many():
    near = [(0, 0, about(2, angle), p) for angle, p in ((-8, 0.15), (-3, 0.15), (1, 0.16), (4, 0.15), (9, 0.15))]
    far = [(0, 0, about(0, 120), 0.24)]
    best = best_poses(posterior_of(near + far))
    np.testing.assert_allclose(best.rotations[0], about(2, 1))
    np.testing.assert_array_equal(best.shifts[0], [2, 2, 2])  # of the same row
    assert best.probability[0] == 0.24
    assert best.classes[0] == 0


def test_against_the_expected_angle(rng, monkeypatch):
    """Particles of one to twelve poses in two classes, few at a time and all at once."""
    rows = []
    for i in range(40):
        p = rng.dirichlet(np.ones(1 + i % 12))
        rows += [(i, int(rng.integers(2)), random_rotations(1, rng)[0], x) for x in p]
    posterior = posterior_of(rows)
    whole = best_poses(posterior)
    monkeypatch.setattr(posteriors, "PAIRS_AT_ONCE", 1)
    few = best_poses(posterior)
    for i in range(40):
        k = posterior.class_probability[i].argmax()
        mine = np.flatnonzero((posterior.particle == i) & (posterior.class_index == k))
        r, p = posterior.rotations[mine], posterior.probability[mine]
        expected = mine[(rotation_angle(r[:, None], r[None]) @ p).argmin()]
        for found in (whole, few):
            assert found.classes[i] == k
            assert found.shifts[i, 0] == expected
            assert found.probability[i] == p.max()


def test_of_two_the_likelier():
    best = best_poses(posterior_of([(0, 1, about(2, 10), 0.4), (0, 1, about(2, 90), 0.6), (1, 0, about(0, 5), 1.0)]))
    np.testing.assert_array_equal(best.shifts[:, 0], [1, 2])
    np.testing.assert_array_equal(best.classes, [1, 0])


@pytest.mark.parametrize("name", ["C2", "D7", "O"])
def test_poses_on_both_sides_of_the_asymmetric_units_border_have_their_middle_there(name, rng):
    """Poses about a true one, each moved to its copy nearest to the identity: unfolded, they lie about it again."""
    group = point_group(name)
    truth = random_rotations(60, rng)
    rows = []
    for i, true in enumerate(truth):
        for _ in range(25):
            pose = true @ Rotation.from_rotvec(np.deg2rad(4) * rng.standard_normal(3)).as_matrix()
            copies = pose @ group
            nearest = copies[rotation_angle(copies, np.eye(3)).argmin()]
            rows.append((i, i % 2, nearest, 0.04 + 1e-6 * rng.random()))
    folded = posterior_of(rows)
    parts = {name: value for name, value in vars(folded).items() if name != "n_significant"}
    rest = {"residual": np.zeros((len(rows), 1)), "shift2": np.zeros(len(rows)), "candidates": 0, "gain": np.zeros(60)}
    found = unfolded(BatchPosterior(**parts, **rest), group)
    # Copies they are, of which the most massive one stays.
    turned = np.swapaxes(folded.rotations, 1, 2) @ found.rotations
    assert rotation_angle(turned[:, None], group).min(axis=1).max() < 1e-5
    heaviest = np.array([25 * i + folded.probability[25 * i : 25 * i + 25].argmax() for i in range(60)])
    np.testing.assert_array_equal(found.rotations[heaviest], folded.rotations[heaviest])

    def error(posterior):
        best = best_poses(posterior).rotations
        return rotation_angle(best[:, None] @ group, truth[:, None]).min(axis=1)

    # 25 poses have one within some 3 degrees of their middle; folded, the middle may be anywhere.
    assert error(folded).max() > 6
    assert error(replace(folded, rotations=found.rotations)).max() < 5
