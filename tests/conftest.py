"""Small data that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faml_gpu.demo import write_simulation
from faml_gpu.simulate import Simulation, groel, ribosome, simulate_particles


@pytest.fixture(scope="session")
def small_simulation() -> Simulation:
    """Six boxes of 16³ voxels of 24 Å, three of each phantom: for tests of the machinery, not of the result."""
    return simulate_particles([groel(), ribosome()], [3, 3], box=16, voxel_size=24.0, snr=0.5, max_shift=1.0, seed=1)


@pytest.fixture
def small_star(tmp_path: Path, small_simulation: Simulation) -> Path:
    """The same as files: a STAR file beside a folder of boxes (no weights: needs a tilt range)."""
    return write_simulation(tmp_path / "data", small_simulation)


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder with what is in them, to see that nothing was touched."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
