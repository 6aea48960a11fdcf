"""CI's compilation of the kernels turns red when it should: warnings, errors, spills, kernels it knows nothing of."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from faml_gpu import kernels

SCRIPT = Path(__file__).parents[2] / ".ci/compile_kernels.py"
NVCC = shutil.which("nvcc")

# As CUDA 13's nvcc and NVRTC 13.5 print it; `helper` is a device function that was not inlined.
LOG = """ptxas info    : 144 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    40 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 40 bytes cumulative stack size, 112 bytes smem
ptxas info    : Compile time = 72.487 ms
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers, 364 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_kernels"] = module  # its dataclass looks there
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def test_log_is_read(script: ModuleType) -> None:
    found, other = script.read_log(LOG)
    assert found == {
        "first": script.Usage(registers=62, stack=48, stores=4, loads=12, shared=112),
        "second": script.Usage(registers=31),
    }
    assert other == []


@pytest.mark.parametrize(
    "line",
    ["x.cu(1): warning #177-D: never referenced", "ptxas warning : something", "nvrtc: warning: something"],
)
def test_whatever_else_a_log_says_counts(script: ModuleType, line: str) -> None:
    assert script.read_log(LOG + line + "\n")[1] == [line]


@pytest.fixture
def one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one kernel `first` in place of ours."""
    (tmp_path / "common.cuh").write_text("#pragma once\ntypedef REAL real;\nconstexpr int MAX_THREADS = 1024;\n")
    source = tmp_path / "one.cu"
    source.write_text('#include "common.cuh"\nextern "C" __global__ void first(real* x) { x[threadIdx.x] += 1; }\n')
    monkeypatch.setattr(kernels, "folder", lambda: tmp_path)
    kernels.parameters.cache_clear()
    yield source
    kernels.parameters.cache_clear()


@pytest.mark.parametrize(
    ("success", "log", "limit", "expected"),
    [
        (True, LOG, 12, None),
        (True, LOG, 11, "first spills 4 bytes of stores, 12 of loads; at most 11"),
        (True, LOG.replace("first", "other"), 12, "nothing about the kernel first"),
        (True, LOG + "ptxas warning : odd\n", 12, "ptxas warning : odd"),
        (False, LOG, 12, "failed without a message"),
    ],
)
def test_verdict(
    script: ModuleType, one_kernel: Path, success: bool, log: str, limit: int, expected: str | None
) -> None:
    seen = []

    def run(file: str, real: str, architecture: int) -> tuple[bool, str]:
        seen.append((file, real, architecture))
        return success, log

    wrong = script.compile_all([75, 90], run, {"float": limit, "double": limit})
    assert seen == [("one", real, a) for real in ("float", "double") for a in (75, 90)]
    if expected is None:
        assert wrong == []
    else:
        assert len(wrong) == 4
        assert all(expected in text for text in wrong)


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


def nvcc(script: ModuleType, folder: Path) -> list[str]:
    _, known, run = script.nvcc_compiler(NVCC, folder)
    assert 75 in known
    return list(script.compile_all([75], run, {"float": 0, "double": 0}))


@needs_nvcc
def test_nvcc_good(script: ModuleType, one_kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvcc(script, one_kernel.parent) == []
    assert "first" in capsys.readouterr().out


# More values at hand than the 64 registers a thread of such a block has.
SPILLS = """
real v[199];
#pragma unroll
for (int i = 0; i < 199; ++i) v[i] = x[i];
__syncthreads();
#pragma unroll
for (int i = 0; i < 199; ++i) x[i] = v[i] * v[198 - i] + v[0];
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "expected"),
    [("int unused;", "one.cu(2): error #177-D"), ("x[0] = missing;", "missing"), (SPILLS, "first spills")],
    ids=["warning", "error", "spill"],
)
def test_nvcc_bad(script: ModuleType, one_kernel: Path, body: str, expected: str) -> None:
    head = '#include "common.cuh"\nextern "C" __global__ void __launch_bounds__(MAX_THREADS) first(real* x) { '
    one_kernel.write_text(f"{head}{body} }}\n")
    wrong = nvcc(script, one_kernel.parent)
    assert len(wrong) == 2  # float and double
    assert all(expected in text for text in wrong)


def test_needs_a_compiler() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--nvcc or --nvrtc" in done.stderr
