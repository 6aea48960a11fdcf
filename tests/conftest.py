"""Small data that several tests use, and GPUs: an emulated one, and a real one where there is one."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Workers beside each other share the cores: threads that wait for a core are slower than none. Before NumPy is loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // WORKERS)))

import numpy as np
import pytest

from faml_gpu import device_info
from faml_gpu.array_backend import namespace
from faml_gpu.demo import write_simulation
from faml_gpu.errors import InputError
from faml_gpu.fast_alignment import forget_tables, joint
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
def disk_full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], AbstractContextManager[object]]:
    """Within `with disk_full(folder, n)`, all files of a folder after the first n find no room."""

    @contextmanager
    def limited(folder: Path, writes: int) -> Iterator[None]:
        left, real = writes, os.replace

        def replace(source: Any, target: Any) -> None:
            nonlocal left
            if Path(target).parent == folder:
                if left == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                left -= 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            yield

    return limited


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder with what is in them, to see that nothing was touched."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """tests/emulator as a package, loaded by path (there are no packages here)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: kernels cannot be emulated")
    if "faml_emulator" not in sys.modules:
        path = Path(__file__).parent / "emulator" / "faml_emulator.py"
        spec = importlib.util.spec_from_file_location(path.stem, path, submodule_search_locations=[str(path.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules["faml_emulator"]


@pytest.fixture
def emulated_gpu(emulator: ModuleType) -> Iterator[Any]:
    """The stand-in for CuPy in place: device "cuda:0" is emulated. What happens on it is counted."""
    forget_tables()  # those kept for "cuda:0" belong to the CuPy that made them
    with emulator.installed() as session:
        yield session
    forget_tables()


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cells and poses of `joint` the heaviest only: which others would be drawn may hang on rounding."""

    def heaviest(log_mass: Any, n: int, n_heaviest: int) -> tuple[Any, Any]:
        xp = namespace(log_mass)
        chosen = xp.argsort(-log_mass, axis=1)[:, :n]
        return chosen, xp.zeros(chosen.shape)

    monkeypatch.setattr(joint, "thinned", heaviest)


@pytest.fixture
def gpu() -> str:
    """The name of a real GPU, or a visible skip."""
    try:
        return device_info.choose_device("cuda")[0]
    except InputError as error:
        pytest.skip(f"no GPU: {str(error).partition(', but ')[2].partition(';')[0]}")
