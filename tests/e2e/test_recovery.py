"""Poses of simulated particles come back from a random start, up to the common gauge and the structure's symmetry."""

from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.data import Result
from faml_gpu.faml import run
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.metrics import correlation, pose_errors, rotate_map
from faml_gpu.options import Options
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles


def average(simulation: Simulation, **options: object) -> Result:
    particles = ArrayParticles(simulation.boxes, simulation.voxel_size, simulation.weight)
    return run(particles, Options(**options))  # type: ignore[arg-type]


def errors(result: Result, simulation: Simulation) -> tuple[np.ndarray, np.ndarray]:
    return pose_errors(
        result.best.rotations,
        result.best.shifts,
        simulation.rotations,
        simulation.shifts,
        simulation.phantoms[0].rotations(),
    )


@pytest.mark.slow
def test_poses_of_an_asymmetric_particle() -> None:
    # Shifts of 1.5 on each axis are 2.6 voxels at most, within the 3 that are looked at. (With shifts to 3 on each axis
    # six of 16 data sets ended in another maximum of the likelihood; of the first eight of these, none.)
    simulation = simulate_particles(
        [ribosome()], [20], box=24, voxel_size=14.0, snr=0.1, max_shift=1.5, seed=6, resolution=35.0
    )
    result = average(simulation, iterations=10, mask_radius=125.0, resolution=42.0)
    angles, distances = errors(result, simulation)
    assert np.median(angles) < 3.0
    assert np.median(distances) < 0.5
    # All but a few are right, not only half of them.
    assert np.mean(angles < 20.0) >= 0.9


@pytest.mark.slow
def test_poses_of_a_symmetric_particle() -> None:
    simulation = simulate_particles(
        [groel()], [20], box=24, voxel_size=10.0, snr=0.1, max_shift=1.5, seed=1, resolution=25.0
    )
    result = average(simulation, iterations=10, mask_radius=90.0)
    angles, distances = errors(result, simulation)
    assert np.median(angles) < 3.0
    assert np.median(distances) < 0.5
    assert np.mean(angles < 20.0) >= 0.9


def test_odd_box() -> None:
    # The box centre of an odd box is a voxel, the Nyquist plane is missing: given the structure, poses must come back
    # in its own frame, and the average must be the structure.
    simulation = simulate_particles(
        [ribosome()], [12], box=23, voxel_size=14.0, snr=0.3, max_shift=2.0, seed=4, resolution=35.0
    )
    particles = ArrayParticles(simulation.boxes, simulation.voxel_size, simulation.weight)
    result = run(
        particles,
        Options(iterations=3, mask_radius=119.0, resolution=42.0),
        reference=simulation.truth[0],
        initial_lowpass=60.0,
    )
    angles, distances = errors(result, simulation)
    assert np.median(angles) < 3.0
    assert np.median(distances) < 0.5
    gauge = np.median(result.best.shifts - simulation.shifts, axis=0)
    assert np.linalg.norm(gauge) < 0.5, "a box centre half a voxel off shows as a common shift"
    assert correlation(result.maps[0], simulation.truth[0]) > correlation(
        result.maps[0], rotate_map(simulation.truth[0], np.eye(3), (1, 1, 1))
    )
    assert correlation(result.maps[0], simulation.truth[0]) > 0.8
