"""The record of an iteration: how far poses moved."""

import dataclasses
from dataclasses import replace

import numpy as np

from faml_gpu import faml
from faml_gpu.data import BestPoses, Posterior
from faml_gpu.geometry import euler_to_matrix
from faml_gpu.history import _pose_change, record
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.starting import start
from faml_gpu.symmetry import point_group


def about_z(degrees):
    return euler_to_matrix(np.deg2rad([degrees, 0, 0]))


def test_pose_change_is_to_the_nearest_pose_before_in_the_same_class():
    """Particle 0 changes between two poses as good as each other, 1 turns by 7 degrees, 2 changes class."""
    degrees = [0, 120, 240, 50, 10]
    before = Posterior(
        particle=np.array([0, 0, 0, 1, 2]),
        class_index=np.array([0, 0, 0, 1, 1]),
        rotations=np.stack([about_z(d) for d in degrees]),
        shifts=np.zeros((5, 3)),
        probability=np.array([0.34, 0.33, 0.33, 1, 1]),
        log_likelihood=np.zeros(3),
        class_probability=np.eye(2)[[0, 1, 1]],
        n_significant=np.ones(3, np.int64),
    )
    now = BestPoses(np.array([0, 1, 0]), np.stack([about_z(d) for d in (239, 57, 10)]), np.zeros((3, 3)), np.ones(3))
    np.testing.assert_allclose(_pose_change(before, now, point_group("C1")), [1, 7, 180], atol=1e-6)
    # With C6 imposed (steps of 60 degrees about z) all of particle 0's poses are one, and 57 is 7 from 50.
    tilted = euler_to_matrix(np.deg2rad([0, 50, 0]))  # the copies are those of the structure, before the pose
    before = dataclasses.replace(before, rotations=tilted @ before.rotations)
    turned = np.stack([tilted @ about_z(d) for d in (61, 117, 8)])
    now = BestPoses(np.array([0, 1, 1]), turned, np.zeros((3, 3)), np.ones(3))
    np.testing.assert_allclose(_pose_change(before, now, point_group("C6")), [1, 7, 2], atol=1e-6)


def test_a_run_has_converged_when_its_likelihood_has_too(monkeypatch):
    """All else standing still: averages, poses and classes as before."""
    rng = np.random.default_rng(3)
    particles = ArrayParticles(rng.standard_normal((4, 16, 16, 16)), 10.0)
    plan = Plan.make(particles, Options(mask_radius=40.0, max_shift=20.0, band="full", resolution=50.0, candidates=4))
    asked = []
    monkeypatch.setattr(faml, "record", lambda *args: asked.append(args) or record(*args))
    first = faml.iterate(plan, particles, start(plan, particles, None, None))
    faml.iterate(plan, particles, first)
    plan, band, before, new, _, total, _, clock = asked[-1]
    before = replace(before, state=replace(before.state, iteration=15))
    still, least = replace(new, maps=before.state.maps, iteration=16), before.history[-1].log_likelihood

    def ends(plan=plan, before=before, new=still, gain=0.0):
        return record(plan, band, before, new, before.posterior, total, least + gain * 4, clock).converged

    for gain, expected in ((-1.0, True), (0.09, True), (0.11, False)):
        assert ends(gain=gain) == expected
    # Not with averages of a wary start, nor before the symmetry is there.
    for iteration, expected in ((11, False), (12, True)):
        assert plan.options.iterations == 20
        assert ends(before=replace(before, state=replace(before.state, iteration=iteration))) == expected
    symmetric = plan.with_symmetry("C3")
    assert ends(plan=symmetric)
    assert not ends(plan=symmetric, new=replace(still, iteration=2))
