"""Point groups and helices imposed in whole runs."""

from __future__ import annotations

import numpy as np
import pytest

from faml_gpu.data import Result
from faml_gpu.errors import InputError
from faml_gpu.faml import run
from faml_gpu.geometry import rotation_angle
from faml_gpu.io.particles import ArrayParticles
from faml_gpu.metrics import align_map, rotate_map
from faml_gpu.options import Options
from faml_gpu.simulate import Simulation, groel, simulate_particles
from faml_gpu.symmetry import point_group

BOX, VOXEL, RADIUS = 24, 16.0, 100.0


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate_particles(
        [groel()], [40], box=BOX, voxel_size=VOXEL, snr=0.02, tilt_range=(-60.0, 60.0), seed=3, resolution=36.0,
        max_shift=1.5,
    )  # fmt: skip


def averaged(simulation: Simulation, known: bool = False, **options: object) -> Result:
    """From nothing, or from the structure at 80 Angstrom, which lies on the axes."""
    particles = ArrayParticles(simulation.boxes, simulation.voxel_size, simulation.weight)
    # 20 iterations: averages held down where they are noise gain detail slowly.
    chosen = {"iterations": 20, "mask_radius": RADIUS, "resolution": 36.0, "seed": 3, "device": "cpu"} | options
    start = {"reference": simulation.truth[0], "initial_lowpass": 80.0} if known else {}
    return run(particles, Options(**chosen), **start)  # type: ignore[arg-type]


def agreement(result: Result, simulation: Simulation) -> float:
    arguments = {"voxel_size": VOXEL, "mask_radius": RADIUS, "resolution": 36.0}
    return align_map(result.maps[0], simulation.truth[0], **arguments)[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "known", "groups"),
    [("joint", False, ["C7"]), ("joint", True, ["D7"]), ("magnitude", True, ["C7", "D7"])],
)
def test_the_symmetry_of_the_structure_brings_the_average_nearer_to_it(
    simulation: Simulation, sampler: str, known: bool, groups: list[str]
) -> None:
    alone = averaged(simulation, known, sampler=sampler)
    for name in groups:
        result = averaged(simulation, known, sampler=sampler, symmetry=name)
        # The axes of a start from nothing lie anywhere: they were found.
        assert agreement(result, simulation) > max(0.96, agreement(alone, simulation) + 0.01)
        volume = result.maps[0]
        for element in point_group(name)[1:4]:
            turned = rotate_map(volume, element)
            inside = np.s_[6:-6, 6:-6, 6:-6]
            assert np.corrcoef(turned[inside].ravel(), volume[inside].ravel())[0, 1] > 0.97
        nearest = rotation_angle(result.best.rotations[:, None] @ point_group(name), np.eye(3)).min(axis=1)
        # Of the copies of a pose, that in the asymmetric unit or up to a step of the search (14 degrees) outside, and
        # what refinement moves it. Were all 7 or 14 copies looked for, a quarter of the poses or fewer would lie so.
        assert (rotation_angle(result.best.rotations, np.eye(3)) < nearest + 20).mean() > 0.75


def test_unknown_groups_and_helices_that_cannot_be_are_refused_at_once(simulation: Simulation) -> None:
    for options, found in (
        ({"symmetry": "C0"}, "C0"),
        ({"symmetry": "octahedral"}, "octahedral"),
        ({"helix": (1.4, 22.0)}, "start from nothing"),
    ):
        with pytest.raises(InputError, match=found):
            averaged(simulation, **options)
