"""Two structures in one set of boxes are told apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from faml_gpu.data import Checkpoint
from faml_gpu.faml import run
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.metrics import best_labels, f1_score
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles
from faml_gpu.starting import start


@pytest.fixture(scope="module")
def mixture() -> Simulation:
    return simulate_particles(
        [groel(), ribosome()], [12, 12], box=24, voxel_size=14.0, snr=0.1, max_shift=2.0, seed=2, resolution=35.0
    )


@pytest.fixture(scope="module")
def particles(mixture: Simulation) -> ArrayParticles:
    return ArrayParticles(mixture.boxes, mixture.voxel_size, mixture.weight)


@pytest.mark.slow
def test_two_phantoms_separate(mixture: Simulation, particles: ArrayParticles) -> None:
    result = run(particles, Options(n_classes=2, iterations=10, mask_radius=125.0, resolution=56.0))
    np.testing.assert_array_equal(f1_score(best_labels(result.best.classes, mixture.classes), mixture.classes), 1.0)
    assert result.history[-1].class_sizes == np.bincount(result.best.classes).tolist()


def test_fa_gives_one_pose_and_class(particles: ArrayParticles) -> None:
    result = run(
        particles, Options(n_classes=2, method="fa", iterations=2, mask_radius=125.0, resolution=70.0, bandwidth=10)
    )
    n = len(particles)
    np.testing.assert_array_equal(result.posterior.particle, np.arange(n))
    np.testing.assert_array_equal(result.posterior.probability, 1.0)
    np.testing.assert_array_equal(result.posterior.n_significant, 1)
    one_hot = np.eye(2)[result.best.classes]
    np.testing.assert_allclose(result.posterior.class_probability, one_hot, atol=1e-12)
    assert np.isfinite(result.maps).all()
    assert len(result.history) == 2
    assert result.history[-1].candidates == 0.5, "one candidate in one of two classes"


def test_regularization_pulls_the_averages_together(particles: ArrayParticles) -> None:
    options = Options(n_classes=2, iterations=3, mask_radius=125.0, resolution=70.0, bandwidth=8, candidates=5)

    def difference(maps: np.ndarray) -> float:
        return float(np.linalg.norm(maps[0] - maps[1]) / np.linalg.norm(maps[0] + maps[1]))

    def begin(regularization: float) -> float:
        plan = Plan.make(particles, replace(options, regularization=regularization))
        return difference(start(plan, particles, None, None).state.maps)

    # p particles more per class that show the mean of both, beside the n/K it has: differences shrink by 1 / (1 + p).
    free = begin(0.0)
    np.testing.assert_allclose([begin(1.0), begin(9.0)], [free / 2, free / 10], rtol=1e-3)
    # The pull ends: the averages part again, and nothing goes wrong on the way.
    seen: list[Checkpoint] = []
    run(particles, replace(options, regularization=9.0), on_iteration=seen.append)
    differences = [difference(checkpoint.state.maps) for checkpoint in seen]
    assert np.isfinite(differences).all()
    assert differences[-1] > 2 * differences[0]


def test_an_empty_class_stays_finite_and_is_reported(particles: ArrayParticles) -> None:
    options = Options(
        n_classes=2,
        iterations=3,
        mask_radius=125.0,
        resolution=70.0,
        bandwidth=8,
        candidates=5,
        regularization=0.0,
    )
    begin = start(Plan.make(particles, options), particles, None, None)
    # Bright where the particles are dark, and a hundred times stronger than the noise: no particle can belong to it.
    hopeless = begin.state.maps.copy()
    hopeless[1] *= -100.0
    seen: list[Checkpoint] = []
    result = run(
        particles,
        options,
        checkpoint=replace(begin, state=replace(begin.state, maps=hopeless, apart=None)),
        on_iteration=seen.append,
    )
    assert seen
    for checkpoint in seen:
        state, record = checkpoint.state, checkpoint.history[-1]
        assert record.class_sizes == [len(particles), 0]
        # Half a particle is left to it, so that it may win some back.
        np.testing.assert_allclose(record.alpha, np.array([len(particles), 0.5]) / (len(particles) + 0.5))
        assert record.coverage[1] == 0.0
        assert np.isfinite([record.log_likelihood, record.sigma, record.zeta, *record.map_correlation]).all()
        assert np.isfinite(state.maps).all()
        assert np.isfinite(state.sigma2).all()
        np.testing.assert_array_equal(state.maps[1], hopeless[1], err_msg="an empty class keeps its average")
        np.testing.assert_array_equal(checkpoint.posterior.class_index, 0)
        np.testing.assert_allclose(checkpoint.posterior.class_probability, [[1.0, 0.0]] * len(particles), atol=1e-9)
    assert np.isfinite(result.maps).all()
    np.testing.assert_array_equal(result.best.classes, 0)
