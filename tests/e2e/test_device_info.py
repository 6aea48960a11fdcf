"""Which device is taken, and what is said where there is none: with CuPy faked, for no test machine has all its faults.

The faults are as CuPy 14 raises them: tried with its wheels on a machine without a driver, and without NVRTC.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from faml_gpu import kernels
from faml_gpu.cli import app
from faml_gpu.device_info import choose_device, cuda_info, versions
from faml_gpu.errors import InputError


class CUDARuntimeError(RuntimeError):
    """As CuPy's, its text begins with the name of the error."""


class Card(SimpleNamespace):
    """One device; `faults` are raised when it is used for what they are named after."""

    name: bytes
    capability: tuple[int, int]
    faults: dict[str, Exception]


def card(name: str = "RTX", capability: tuple[int, int] = (8, 6), **faults: Exception) -> Card:
    return Card(name=name.encode(), capability=capability, faults=faults)


class FakeCupy(ModuleType):
    """What device_info calls of CuPy, on NumPy arrays."""

    __version__ = "14.2.0"

    def __init__(self, cards: list[Card] | Exception, runtime: int = 12090, driver: int = 12090) -> None:
        super().__init__("cupy")
        self.cards = cards
        self.current = 0
        self.entered: list[int] = []
        self.compiled: list[dict[str, Any]] = []
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                getDeviceCount=self.count,
                getDeviceProperties=lambda i: {
                    "name": cards[i].name, "major": cards[i].capability[0], "minor": cards[i].capability[1],
                },
                runtimeGetVersion=lambda: runtime,
                driverGetVersion=lambda: driver,
                memGetInfo=lambda: (3 << 30, 4 << 30),
            ),
            nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            Device=self.device,
        )  # fmt: skip
        self.fft = SimpleNamespace(
            fft=lambda x: (self.fault("fft"), np.fft.fft(x))[1],
            config=SimpleNamespace(get_plan_cache=lambda: SimpleNamespace(set_size=lambda n: None)),
        )

    def count(self) -> int:
        if isinstance(self.cards, Exception):
            raise self.cards
        return len(self.cards)

    def device(self, index: int) -> AbstractContextManager[None]:
        self.current = index
        self.entered.append(index)
        self.fault("device")
        return nullcontext()

    def fault(self, name: str) -> None:
        if name in self.cards[self.current].faults:
            raise self.cards[self.current].faults[name]

    def zeros(self, shape: Any, dtype: str) -> np.ndarray:
        self.fault("memory")
        return np.zeros(shape, dtype)

    def ones(self, shape: Any, dtype: str) -> np.ndarray:
        self.fault("blas" if isinstance(shape, tuple) else "elementwise")
        return np.ones(shape, dtype)

    def RawModule(self, **given: Any) -> Any:  # noqa: N802
        self.fault("nvrtc")
        self.compiled.append(given)

        def probe(grid: tuple[int], block: tuple[int], arguments: tuple[np.ndarray]) -> None:
            self.fault("launch")
            arguments[0][:] = -1 if "wrong" in self.cards[self.current].faults else np.arange(block[0])

        return SimpleNamespace(get_function=lambda name: probe)


Fake = Callable[..., FakeCupy]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    def make(cards: list[Card] | Exception, **versions: int) -> FakeCupy:
        module = FakeCupy(cards, **versions)
        monkeypatch.setitem(sys.modules, "cupy", module)
        return module

    return make


def refused(device: str) -> str:
    with pytest.raises(InputError) as error:
        choose_device(device)
    return str(error.value)


def without_gpu(*expected: str) -> None:
    """`auto` is the CPU and says why; `cuda` is refused for the same reason; `info` says so and is well."""
    name, reason = choose_device("auto")
    assert name == "cpu"
    message = refused("cuda")
    assert reason in message
    assert "'cuda'" in message
    for text in expected:
        assert text in message
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    assert f"device       cpu ({reason})" in done.output
    assert "kernels      not compiled: no GPU" in done.output


def test_working_card(fake: Fake) -> None:
    cupy = fake([card("NVIDIA RTX 3090")])
    for device in ("auto", "cuda", "cuda:0"):
        name, reason = choose_device(device)
        assert name == "cuda:0"
        assert reason == "NVIDIA RTX 3090, compute capability 8.6, 3.0 of 4.0 GiB free"
    assert cupy.compiled[0]["backend"] == "nvrtc"
    assert versions()["cupy"] == "14.2.0"


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver")
def test_card_of_this_machine() -> None:
    """What nvidia-smi shows and CuPy is there for is used."""
    pytest.importorskip("cupy")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.startswith("GPU 0"):
        pytest.skip("nvidia-smi shows no GPU")
    name, reason = choose_device("auto")
    assert name.startswith("cuda:")
    assert reason.partition(",")[0] in listed.stdout
    assert "do not compile" not in CliRunner().invoke(app, ["info"]).output


def test_cpu_asks_nobody(fake: Fake) -> None:
    cupy = fake(RuntimeError("asked"))
    cupy.cuda.runtime.getDeviceCount = pytest.fail
    assert choose_device("cpu") == ("cpu", "as asked")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda0", "cpu:0", "auto:1"])
def test_unknown_names(device: str, fake: Fake) -> None:
    fake([card()])
    assert "expected auto, cpu, cuda or cuda:0, cuda:1" in refused(device)


def test_index(fake: Fake) -> None:
    cupy = fake([card("A"), card("B")])
    assert choose_device("cuda:1")[0] == "cuda:1"
    assert choose_device("cuda:1")[1].startswith("B,")
    assert set(cupy.entered) == {1}


def test_index_that_is_not_there(fake: Fake) -> None:
    fake([card("NVIDIA T4")])
    assert "there is only cuda:0 NVIDIA T4; use cuda:0" in refused("cuda:7")
    fake([card("A"), card("B")])
    assert "there are only cuda:0 A, cuda:1 B" in refused("cuda:2")


def test_first_that_works(fake: Fake) -> None:
    fake([card("GTX 980", (5, 2)), card("B"), card("C")])
    assert choose_device("auto")[0] == choose_device("cuda")[0] == "cuda:1"
    assert "GTX 980 is too old" in refused("cuda:0")


def test_none_of_two_works(fake: Fake) -> None:
    fake([card("A", (5, 2)), card("B", (5, 0))])
    without_gpu("cuda:0 A is too old: compute capability 5.2", "cuda:1 B is too old: compute capability 5.0")


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing("cupy"), *sys.meta_path])
    without_gpu("CuPy is not installed", "cuda12", "cuda13")


class Missing:
    """Finds nothing, and says so for one module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


BROKEN = {
    "library": ("raise OSError('libcuda.so.1: cannot open shared object file')", ["OSError: libcuda.so.1: cannot"]),
    "part of it": ("import cupy_backends_missing", ["No module named 'cupy_backends_missing'"]),
    "framed": (
        "try:\n    raise ImportError('libcudart.so.13: no such file')\n"
        "except ImportError as e:\n    raise ImportError('=====\\nFailed to import CuPy.\\n=====') from e",
        ["ImportError: libcudart.so.13: no such file"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_cupy(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, expected = BROKEN[case]
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    without_gpu("CuPy cannot be imported", *expected)


INSUFFICIENT = CUDARuntimeError(
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)


def test_no_driver(fake: Fake) -> None:
    fake(INSUFFICIENT, driver=0)
    without_gpu("there is no NVIDIA driver")
    info = cuda_info()
    assert info["driver"] == "none"
    assert info["cuda runtime"] == "12.9"


def test_driver_too_old(fake: Fake) -> None:
    fake(INSUFFICIENT, runtime=13020, driver=12040)
    without_gpu("driver is too old: it supports CUDA 12.4, CuPy needs 13.2", "580 or newer")


@pytest.mark.parametrize("cards", [[], CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")])
def test_no_device(cards: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    without_gpu("sees no device;")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    without_gpu("CUDA_VISIBLE_DEVICES is '-1'")


def test_driver_that_fails(fake: Fake) -> None:
    fake(CUDARuntimeError("cudaErrorUnknown: unknown error"))
    without_gpu("CUDA does not work: CUDARuntimeError: cudaErrorUnknown: unknown error")


@pytest.mark.parametrize(
    ("capability", "runtime", "works"),
    [((5, 2), 12090, False), ((6, 0), 12090, True), ((7, 0), 13020, False), ((7, 5), 13020, True),
     ((10, 0), 13020, True)],
)  # fmt: skip
def test_oldest_cards(capability: tuple[int, int], runtime: int, works: bool, fake: Fake) -> None:
    fake([card("Card", capability)], runtime=runtime)
    if works:
        assert choose_device("auto")[0] == "cuda:0"
        return
    major, minor = capability
    without_gpu(f"cuda:0 Card is too old: compute capability {major}.{minor}, CUDA {runtime // 1000} needs")
    assert ("cuda12 in place of cuda13" in refused("cuda")) == (major >= 6)


FAULTS: dict[str, tuple[dict[str, Exception], list[str]]] = {
    "no NVRTC": (
        {"nvrtc": RuntimeError('Failure finding "libnvrtc.so.13 or libnvrtc.so.12"')},
        ["NVRTC, which compiles the kernels, does not work on cuda:0 RTX", "libnvrtc.so.12", "extra"],
    ),
    "launch": ({"launch": RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")}, ["NVRTC", "CUDA_ERROR_NO_BINARY_FOR_GPU"]),
    "wrong numbers": ({"wrong": Exception()}, ["a kernel gave -1.0, expected 31"]),
    "no headers": ({"elementwise": RuntimeError('could not open "cuda_fp16.h"')}, ["CuPy does not", "cuda_fp16.h"]),
    "no cuBLAS": ({"blas": ImportError("libcublas.so.12: no such file")}, ["cuBLAS does not", "libcublas.so.12"]),
    "no cuFFT": ({"fft": ImportError("libcufft.so.11: no such file")}, ["cuFFT does not work on", "libcufft.so.11"]),
    "memory": ({"memory": MemoryError("Out of memory allocating 512 bytes")}, ["RTX has no memory left", "nvidia-smi"]),
    "memory of CUDA": ({"device": CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")}, ["no memory left"]),
    "memory of cuBLAS": ({"blas": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")}, ["no memory left"]),
    "broken card": ({"device": CUDARuntimeError("cudaErrorECCUncorrectable")}, ["CUDA does not work on cuda:0 RTX"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case: str, fake: Fake) -> None:
    faults, expected = FAULTS[case]
    fake([card(**faults)])
    without_gpu(*expected)


def test_cuda_info(fake: Fake) -> None:
    fake([card("A"), card("B", device=CUDARuntimeError("cudaErrorECCUncorrectable"))])
    info = cuda_info()
    assert {key: info[key] for key in ("cupy", "cuda runtime", "nvrtc")} == {
        "cupy": "14.2.0", "cuda runtime": "12.9", "nvrtc": "12.9",
    }  # fmt: skip
    assert "for CUDA up to 12.9" in info["driver"]
    assert info["cuda:0"] == "A, compute capability 8.6, 3.0 of 4.0 GiB free"
    assert "cudaErrorECCUncorrectable" in info["cuda:1"]


def test_info_without_nvrtc(fake: Fake) -> None:
    def missing() -> None:
        raise RuntimeError("Failure finding libnvrtc")

    fake([card()]).cuda.nvrtc.getVersion = missing
    assert "Failure finding libnvrtc" in cuda_info()["nvrtc"]


def test_info_compiles_the_kernels(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake([card("old", (5, 0)), card()])
    compiled = [{"kernel": kernel, "real": real} for kernel in ("a", "b") for real in ("float", "double")]
    monkeypatch.setattr(kernels, "compile_all", lambda: compiled)
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    assert "device       cuda:1 (RTX, compute capability 8.6" in done.output
    assert "kernels      2, in float and double, compiled in 0.0 s" in done.output
    assert cupy.current == 1


def test_info_shows_the_compilers_message(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("residual.cu(7): error: expected a ';'")

    fake([card()])
    monkeypatch.setattr(kernels, "compile_all", fail)
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    assert "kernels      do not compile: RuntimeError: residual.cu(7): error: expected a ';'" in done.output
