"""The executors every operation is tested on, and the oracles of tests/math (loaded by path: no packages here).

An executor is a function `run(op, *arguments, **options)` that takes NumPy arrays, computes the operation of that name
in its own way, and hands back NumPy arrays: the CPU twin, the CUDA twin emulated on the CPU, and the CUDA twin on a GPU
(shown as skipped where there is none).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from faml_gpu import kernels, ops
from faml_gpu.fourier import Support


def run_cpu(op: str, *arguments: Any, **options: Any) -> Any:
    """The CPU twin: NumPy arrays as they are."""
    return getattr(ops, op)(*arguments, **options)


def run_device(op: str, *arguments: Any, **options: Any) -> Any:
    """The CUDA twin, with whatever CuPy is in place."""
    found = getattr(ops, op)(*(_there(a) for a in arguments), **options)
    return tuple(a.get() for a in found) if isinstance(found, tuple) else found.get()


def _there(value: Any) -> Any:
    import cupy

    if isinstance(value, Support):
        return value.to("cuda:0")
    if not isinstance(value, np.ndarray):
        return value
    if value.size and not value.flags.c_contiguous:  # to be refused: a copy would lose what is wrong with it
        return cupy.asarray(np.repeat(value, 2, axis=-1))[..., ::2]
    return cupy.asarray(value)


# "emulated" in the blocks of a real launch, and in small ones of another number of warps.
EXECUTORS = ["cpu", "emulated", "emulated in blocks of 32", "emulated in blocks of 64", "cuda"]


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(executor: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`run(op, *arrays, **options)`: a public operation on one executor, NumPy in and out."""
    if executor == "cpu":
        return run_cpu
    if executor == "cuda":
        request.getfixturevalue("gpu")
        return run_device
    request.getfixturevalue("emulated_gpu")
    if "blocks of" in executor:
        for kernel in kernels.THREADS:
            monkeypatch.setitem(kernels.THREADS, kernel, int(executor.split()[-1]))
    return run_device


@pytest.fixture(scope="session")
def oracles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faml_oracles", Path(__file__).parents[1] / "math" / "oracles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
