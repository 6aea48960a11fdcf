"""Starts from given poses and from a map, for one class and two."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from faml_gpu import faml
from faml_gpu.data import Checkpoint, Poses
from faml_gpu.errors import InputError
from faml_gpu.faml import iterate, run
from faml_gpu.geometry import rotation_angle
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.masks import soft_sphere
from faml_gpu.metrics import correlation
from faml_gpu.options import Options
from faml_gpu.plan import Plan
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles
from faml_gpu.starting import start

OPTIONS = {"mask_radius": 125.0, "resolution": 42.0, "iterations": 3, "candidates": 20}


@pytest.fixture(scope="module")
def ribosomes() -> Simulation:
    return simulate_particles(
        [ribosome()], [12], box=24, voxel_size=14.0, snr=0.2, max_shift=2.0, seed=3, resolution=35.0
    )


@pytest.fixture(scope="module")
def mixture() -> Simulation:
    return simulate_particles(
        [groel(), ribosome()], [8, 8], box=24, voxel_size=14.0, snr=0.2, max_shift=2.0, seed=5, resolution=35.0
    )


def as_particles(simulation: Simulation, *, poses: bool = False, classes: bool = False) -> ArrayParticles:
    """Boxes, with their true poses and classes where asked for."""
    known = Poses(simulation.rotations, simulation.shifts, simulation.classes if classes else None)
    return ArrayParticles(simulation.boxes, simulation.voxel_size, simulation.weight, poses=known if poses else None)


def similarity(volume: np.ndarray, truth: np.ndarray) -> float:
    """Pearson inside the mask: no alignment, the frame is given by the start."""
    return correlation(volume, truth, soft_sphere(len(truth), 9, 2))


def assert_in_the_frame_of_the_truth(rotations: np.ndarray, shifts: np.ndarray, simulation: Simulation) -> None:
    angles = rotation_angle(rotations, simulation.rotations)
    distances = np.linalg.norm(shifts - simulation.shifts, axis=1)
    assert np.median(angles) < 4.0
    assert np.mean(angles < 20.0) >= 0.75
    assert np.median(distances) < 0.5


def test_from_poses(ribosomes: Simulation) -> None:
    result = run(as_particles(ribosomes, poses=True), Options(**OPTIONS), use_poses=True)  # type: ignore[arg-type]
    assert_in_the_frame_of_the_truth(result.best.rotations, result.best.shifts, ribosomes)
    assert similarity(result.maps[0], ribosomes.truth[0]) > 0.8
    # Poses that the boxes came with are looked at only when asked for: without them the frame is another.
    blind = run(as_particles(ribosomes, poses=True), Options(**OPTIONS | {"iterations": 1}))  # type: ignore[arg-type]
    assert np.median(rotation_angle(blind.best.rotations, ribosomes.rotations)) > 30.0


def test_from_poses_and_classes(mixture: Simulation) -> None:
    particles = as_particles(mixture, poses=True, classes=True)
    result = run(particles, Options(n_classes=2, **OPTIONS), use_poses=True)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result.best.classes, mixture.classes)
    for k in range(2):
        assert similarity(result.maps[k], mixture.truth[k]) > 0.7
        assert similarity(result.maps[k], mixture.truth[k]) > similarity(result.maps[1 - k], mixture.truth[k]) + 0.1


@pytest.mark.parametrize("lowpass", [None, 60.0])
def test_from_a_map(ribosomes: Simulation, lowpass: float | None) -> None:
    # A grey scale and background of its own: only the shape of the map may count.
    reference = (0.01 * ribosomes.truth[0]).astype(np.float32)
    result = run(
        as_particles(ribosomes),
        Options(**OPTIONS),  # type: ignore[arg-type]
        reference=reference,
        initial_lowpass=lowpass,
    )
    assert_in_the_frame_of_the_truth(result.best.rotations, result.best.shifts, ribosomes)
    assert similarity(result.maps[0], ribosomes.truth[0]) > 0.8


@pytest.mark.slow
def test_two_classes_from_one_map(mixture: Simulation) -> None:
    result = run(
        as_particles(mixture),
        Options(n_classes=2, **OPTIONS | {"iterations": 6, "resolution": 56.0}),  # type: ignore[arg-type]
        reference=mixture.truth[1],
        initial_lowpass=60.0,
    )
    # The frame is the map's; which class becomes which is left to the random split.
    ribosomes = int(np.argmax([similarity(m, mixture.truth[1]) for m in result.maps]))
    assert similarity(result.maps[ribosomes], mixture.truth[1]) > 0.7
    mine = mixture.classes == 1
    assert np.mean(result.best.classes[mine] == ribosomes) >= 0.75
    angles = rotation_angle(result.best.rotations[mine], mixture.rotations[mine])
    assert np.mean(angles < 20.0) >= 0.75


def test_poses_that_are_not_there(ribosomes: Simulation) -> None:
    with pytest.raises(InputError, match="poses"):
        run(as_particles(ribosomes), Options(**OPTIONS), use_poses=True)  # type: ignore[arg-type]


def test_unobserved_voxels_of_a_start_stay_empty(ribosomes: Simulation) -> None:
    # All boxes lie alike, so their average knows nothing inside the wedge. What masks leak there from bright low
    # frequencies must not be divided by a coverage of next to nothing.
    particles = as_particles(ribosomes)
    plan = Plan.make(particles, Options(**OPTIONS))  # type: ignore[arg-type]
    average = start(plan, particles, None, None).state.maps[0]
    n = len(average)
    power = np.abs(np.fft.rfftn(average)) ** 2
    kz, ky, kx = np.meshgrid(np.fft.fftfreq(n) * n, np.fft.fftfreq(n) * n, np.arange(n // 2 + 1), indexing="ij")
    square = kx**2 + ky**2 + kz**2
    low, unseen = (square > 0) & (square <= 8**2), ribosomes.weight == 0
    assert 0.2 < unseen[low].mean() < 0.5, "a wedge of 60 of 180 degrees"
    assert power[low & unseen].mean() < 0.5 * power[low & ~unseen].mean()


def test_of_several_random_starts_the_likeliest_goes_on(ribosomes: Simulation) -> None:
    """After its trial, each start by itself has the likelihood that was compared; the run goes on from the best."""
    particles, seen = as_particles(ribosomes), []
    options = Options(**(OPTIONS | {"iterations": 4}), starts=3, device="cpu")  # type: ignore[arg-type]
    result = run(particles, options, on_iteration=lambda c: seen.append(c.state.iteration))
    assert seen == [1, 2, 3, 4]  # the trial of 1 of 4 iterations is told once
    trials = result.history[0].starts
    assert trials is not None
    assert len(trials) == 3
    alone = []
    for trial in range(3):
        plan = dataclasses.replace(Plan.make(particles, options, None, "cpu"), trial=trial)
        alone.append(iterate(plan, particles, start(plan, particles, None, None)).history[-1].log_likelihood)
    np.testing.assert_allclose(trials, alone, rtol=1e-9)
    assert len(set(trials)) == 3
    assert result.history[0].log_likelihood == max(trials)
    assert all(row.starts is None for row in result.history[1:])


def test_starts_are_compared_by_the_same_data(ribosomes: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """By evidence each would take in the Fourier voxels it has come to, and the likelihood is a sum over them."""
    particles, bands = as_particles(ribosomes), []
    chosen = {"iterations": 16, "starts": 2, "band": "evidence", "method": "fa", "device": "cpu"}
    options = Options(**(OPTIONS | chosen))  # type: ignore[arg-type]
    original = faml.iterate

    def recorded(plan: Plan, particles: ArrayParticles, checkpoint: Checkpoint, *rest: Any) -> Checkpoint:
        done = original(plan, particles, checkpoint, *rest)
        bands.append((plan.trial, done.history[-1].r_max))
        return done

    monkeypatch.setattr(faml, "iterate", recorded)
    plan = Plan.make(particles, options, None, "cpu")
    best = faml.likeliest_start(plan, particles)
    assert bands == [(trial, plan.r_start) for trial in (0, 1) for _ in range(4)]
    # They were held: the first alone goes further by then, and so does the run after them.
    alone = Plan.make(particles, dataclasses.replace(options, starts=1), None, "cpu")
    checkpoint = faml.begin(alone, particles, None, False)
    for _ in range(4):
        checkpoint = original(alone, particles, checkpoint)
    assert checkpoint.history[-1].r_max > plan.r_start
    assert best.state.r_max is not None
    assert best.state.r_max > plan.r_start


def test_several_starts_from_a_map_are_refused(ribosomes: Simulation) -> None:
    options = Options(**OPTIONS, starts=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="option starts: found 2"):
        run(as_particles(ribosomes), options, reference=ribosomes.truth[0])
