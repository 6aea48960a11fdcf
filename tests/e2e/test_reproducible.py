"""The same seed gives the same bits; threads and batches change nothing beyond rounding; a resumed run goes on as if
it had never stopped."""

from __future__ import annotations

import copy

import numba
import numpy as np
import pytest

from faml_gpu import plan
from faml_gpu.data import Checkpoint, Result
from faml_gpu.faml import run
from faml_gpu.geometry import rotation_angle
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.options import Options
from faml_gpu.simulate import groel, ribosome, simulate_particles

# float32 carries 6e-8 per operation. Sums over some 1e4 voxels in another order, through parabolas and a second
# iteration, stay within these.
MAPS = 1e-3  # of the norm of the maps
ANGLE = 0.1  # degrees
SHIFT = 0.01  # voxels
LIKELIHOOD = 1e-5  # relative


@pytest.fixture(scope="module")
def particles() -> ArrayParticles:
    """7 + 6 boxes, each under one of two wedges."""
    one, other = (
        simulate_particles(
            [groel(), ribosome()], [4, 3], box=20, voxel_size=16.0, snr=0.3, max_shift=1.5, seed=seed, resolution=40.0,
            tilt_range=tilts,
        )
        for seed, tilts in ((1, (-60.0, 60.0)), (2, (-50.0, 66.0)))
    )  # fmt: skip
    return ArrayParticles(
        np.concatenate([one.boxes, other.boxes]), 16.0, np.stack([one.weight, other.weight]), [0] * 7 + [1] * 7
    )


def classify(particles: ArrayParticles, checkpoint: Checkpoint | None = None, **changes: object) -> Result:
    options = {
        "n_classes": 2, "iterations": 3, "mask_radius": 110.0, "resolution": 50.0, "bandwidth": 12, "candidates": 20,
        "threads": 1,
    } | changes  # fmt: skip
    return run(particles, Options(**options), checkpoint=checkpoint)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(particles: ArrayParticles) -> Result:
    return classify(particles)


def arrays(result: Result) -> dict[str, np.ndarray]:
    """Everything a run computed, timings apart."""
    found = {f"posterior {name}": value for name, value in vars(result.posterior).items()}
    found |= {f"best {name}": value for name, value in vars(result.best).items()}
    found |= {f"state {name}": np.asarray(value) for name, value in vars(result.state).items()}
    found["maps"] = result.maps
    for record in result.history:
        for name, value in vars(record).items():
            if name != "seconds":
                found[f"history {record.iteration} {name}"] = np.asarray(value)
    return found


def assert_identical(first: Result, second: Result) -> None:
    a, b = arrays(first), arrays(second)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_close(first: Result, second: Result) -> None:
    np.testing.assert_array_equal(first.best.classes, second.best.classes)
    assert np.max(rotation_angle(first.best.rotations, second.best.rotations)) < ANGLE
    assert np.max(np.abs(first.best.shifts - second.best.shifts)) < SHIFT
    assert np.linalg.norm(first.maps - second.maps) < MAPS * np.linalg.norm(first.maps)
    for one, other in zip(first.history, second.history, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=LIKELIHOOD)
        assert one.sigma == pytest.approx(other.sigma, rel=LIKELIHOOD)
        assert one.class_sizes == other.class_sizes


def test_same_seed_same_bits(particles: ArrayParticles, result: Result) -> None:
    assert_identical(classify(particles), result)


def test_another_seed_differs(particles: ArrayParticles, result: Result) -> None:
    other = classify(particles, seed=1)
    assert other.history[0].log_likelihood != result.history[0].log_likelihood
    assert np.linalg.norm(other.maps - result.maps) > MAPS * np.linalg.norm(result.maps)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread here: run by tests/math/test_threads.py")
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_threads_change_nothing_beyond_rounding(particles: ArrayParticles, result: Result, preset: str) -> None:
    one = result if preset == "default" else classify(particles, preset=preset)
    two = classify(particles, preset=preset, threads=2)
    assert_close(one, two)


@pytest.mark.parametrize("size", [1, 5])
def test_batches_change_nothing_beyond_rounding(
    particles: ArrayParticles, result: Result, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.BATCH_PARTICLES, "cpu", size)
    assert plan.Plan.make(particles, Options(mask_radius=110.0)).batch.size == size
    assert_close(result, classify(particles))


@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"method": "fa"}], ids=["default", "paper", "fa"])
@pytest.mark.parametrize("after", [1, 2])
def test_resumed_run_is_the_unbroken_one(particles: ArrayParticles, changes: dict[str, object], after: int) -> None:
    checkpoints: list[Checkpoint] = []
    options = Options(
        n_classes=2, iterations=3, mask_radius=110.0, resolution=50.0, bandwidth=10, candidates=5, threads=1,
        regularization=0.2, **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    # A copy: what the run does with its own objects afterwards must not matter.
    unbroken = run(particles, options, on_iteration=lambda c: checkpoints.append(copy.deepcopy(c)))
    assert len(checkpoints) == 3
    resumed = run(particles, options, checkpoint=checkpoints[after - 1])
    assert_identical(resumed, unbroken)
