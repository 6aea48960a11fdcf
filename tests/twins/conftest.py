"""The executors every operation is tested on, and the oracles of tests/math (loaded by path: no packages here).

An executor is a function `run(op, *arguments, **options)` that takes NumPy arrays, computes the operation of that name
in its own way, and hands back NumPy arrays. Further ones (the emulated kernels, CUDA) are one more entry of
`EXECUTORS` each; a machine without a GPU shows the CUDA ones as skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from faml_gpu import ops


def run_cpu(op: str, *arguments: Any, **options: Any) -> Any:
    """The CPU twin: NumPy arrays as they are."""
    return getattr(ops, op)(*arguments, **options)


EXECUTORS: dict[str, Callable[..., Any]] = {"cpu": run_cpu}


@pytest.fixture(params=list(EXECUTORS))
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def oracles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faml_oracles", Path(__file__).parents[1] / "math" / "oracles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(executor: str) -> Callable[..., Any]:
    """`run(op, *arrays, **options)`: a public operation on one executor, NumPy in and out."""
    return EXECUTORS[executor]
