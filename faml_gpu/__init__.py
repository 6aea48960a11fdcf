"""faml_gpu: averages and classifies cryo-electron subtomograms with FAML, on NVIDIA GPUs and on CPUs."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faml_gpu.data import Result
    from faml_gpu.errors import InputError
    from faml_gpu.evaluation import evaluate
    from faml_gpu.options import Options
    from faml_gpu.pipeline import average, classify
    from faml_gpu.run_folder import OutputError

__all__ = ["InputError", "Options", "OutputError", "Result", "__version__", "average", "classify", "evaluate"]

__version__ = "0.1.0"

# Steps of BLAS, FFT and Numba loops take turns, each with threads of its own. Idle threads that spin, waiting for more
# work, hold the cores the next step wants: an iteration of 20 boxes of 32^3 took 5.7 s with them and 0.6 s without (two
# busy cores). Both are read when the libraries load, so this comes before NumPy; what the user has set stands.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOME = {
    "InputError": "errors",
    "Options": "options",
    "OutputError": "run_folder",
    "Result": "data",
    "average": "pipeline",
    "classify": "pipeline",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: Numba alone takes a second, which `--help` need not wait for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
