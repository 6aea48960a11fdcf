"""40 bacterial ribosomes in situ, from the low-passed reference: most poses found elsewhere are found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faml_gpu.faml import run
from faml_gpu.io.mrc import read_mrc
from faml_gpu.io.particles import open_particles
from faml_gpu.metrics import pose_errors
from faml_gpu.options import Options

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "insitu70S"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="real data are not here: ../shared/data/insitu70S")
def test_poses_of_real_ribosomes() -> None:
    reference, _ = read_mrc(DATA / "reference_relion_reconstruction.mrc")
    given = open_particles(DATA / "reference_poses.star", use_poses=True).poses
    assert given is not None
    result = run(
        open_particles(DATA / "particles.star"),
        Options(iterations=5, mask_radius=130.0, max_shift=24.0, resolution=48.0),
        reference=reference,
        initial_lowpass=60.0,
    )
    angles, distances = pose_errors(result.best.rotations, result.best.shifts, given.rotations, given.shifts)
    near = angles < 20.0
    # Random rotations come within 20 degrees with probability .002. The program found 45 to 50 % under six sets of
    # options; the single boxes are too noisy for all of them.
    assert np.mean(near) >= 0.35
    assert np.median(distances[near]) < 2.0


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="real data are not here: ../shared/data/insitu70S")
def test_poses_of_real_ribosomes_stay() -> None:
    """To the end of a run and with all detail: averages held back too much lose what they were begun with."""
    reference, _ = read_mrc(DATA / "reference_relion_reconstruction.mrc")
    given = open_particles(DATA / "reference_poses.star", use_poses=True).poses
    assert given is not None
    options = Options(mask_radius=150.0, seed=1)
    result = run(open_particles(DATA / "particles.star"), options, reference=reference, initial_lowpass=60.0)
    angles, _ = pose_errors(result.best.rotations, result.best.shifts, given.rotations, given.shifts)
    # 57, 55 and 55 % with three seeds; 25 % where noise counts as if poses were sure.
    assert np.mean(angles < 20.0) >= 0.45
