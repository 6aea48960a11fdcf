"""CUDA on a CPU, for tests: the unmodified kernels and the unmodified callers of CuPy run without a GPU.

`cuda_shim.h` makes a `.cu` file C++ that g++ compiles (`compiler`), `launch` runs its kernels on NumPy arrays and
reports what a GPU would leave undefined (races, divergent barriers, accesses out of bounds), and `fake_cupy` stands in
for CuPy so that the product's launcher is tested too. The fixture `emulator` of tests/conftest.py loads it.
"""

from faml_emulator.compiler import CompileError, CompilerMissingError, Library, compile_kernels
from faml_emulator.fake_cupy import installed
from faml_emulator.launch import UNORDERED, EmulatorError, Kernel, LaunchError, OutOfBoundsError, RaceError, SyncError

__all__ = [
    "UNORDERED",
    "CompileError",
    "CompilerMissingError",
    "EmulatorError",
    "Kernel",
    "LaunchError",
    "Library",
    "OutOfBoundsError",
    "RaceError",
    "SyncError",
    "compile_kernels",
    "installed",
]
