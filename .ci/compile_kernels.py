"""Compile every CUDA kernel as users' machines will, without a GPU; print the registers and spills of each.

    python .ci/compile_kernels.py --nvcc                        # with the CUDA toolkit on PATH
    python .ci/compile_kernels.py --nvrtc .../libnvrtc.so.12    # with NVRTC, such as of NVIDIA's wheel

Every `kernels/*.cu` is compiled with REAL=float and REAL=double for each card, with the options faml_gpu itself uses.
Any warning, error, kernel that ptxas does not report on, or spill above --max-spill ends with exit status 1.
Needs Python >= 3.11 and NumPy (faml_gpu.kernels imports it).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from faml_gpu import kernels  # noqa: E402

# Pascal (GTX 10), Volta, Turing (RTX 20), Ampere (A100; RTX 30), Ada (RTX 40), Hopper (H100); what a compiler no longer
# knows is left out: CUDA 13 begins with 75.
ARCHITECTURES = (60, 70, 75, 80, 86, 89, 90)
REALS = ("float", "double")


@dataclass
class Usage:
    """What ptxas says of one kernel: registers, stack and spills (bytes) of a thread, static shared memory (bytes)."""

    registers: int = 0
    stack: int = 0
    stores: int = 0
    loads: int = 0
    shared: int = 0


Compiler = Callable[[str, str, int], tuple[bool, str]]  # (file, REAL, architecture) -> (success, log)


def read_log(log: str) -> tuple[dict[str, Usage], list[str]]:
    """Usage of every kernel in a log of ptxas -v, and the lines that are not ptxas's information.

    Device functions that were not inlined count to the kernel they are reported after. That CUDA 12 is the last for
    sm_60 and sm_70 is known, and NVRTC 12.9 has no option against saying so.
    """
    found: dict[str, Usage] = {}
    other = []
    now = Usage()
    for line in log.splitlines():
        if entry := re.search(r"info\s*: Compiling entry function '(\w+)'", line):
            now = found.setdefault(entry[1], Usage())
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, frame.groups())
            now.stack, now.stores, now.loads = now.stack + stack, now.stores + stores, now.loads + loads
        elif used := re.search(r"info\s*: Used (\d+) registers", line):
            now.registers = max(now.registers, int(used[1]))
            if shared := re.search(r"(\d+) bytes smem", line):
                now.shared = int(shared[1])
        elif line.strip() and not re.match(
            r"ptxas info\s*:|nvrtc: warning: Architectures prior to .* deprecated", line
        ):
            other.append(line)
    return found, other


def nvcc_compiler(nvcc: str, work: Path) -> tuple[str, list[int], Compiler]:
    """Name, architectures and compile function of nvcc.

    Its -warn-spills is not used: as an error it would ignore --max-spill.
    """
    version = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    flags = ["-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]

    def run(file: str, real: str, architecture: int) -> tuple[bool, str]:
        target = ["-arch", f"sm_{architecture}", "-o", str(work / f"{file}_{real}_{architecture}.cubin")]
        source = str(kernels.folder() / f"{file}.cu")
        done = subprocess.run([nvcc, *flags, *kernels.options(real), *target, source], capture_output=True, text=True)
        return done.returncode == 0, done.stdout + done.stderr

    return f"nvcc {version[1] if version else ''}", [int(n) for n in re.findall(r"compute_(\d+)\b", listed)], run


def nvrtc_compiler(path: str) -> tuple[str, list[int], Compiler]:
    """Name, architectures and compile function of an NVRTC library.

    CUDA 12's NVRTC has no -Werror; a log with more than ptxas's information is a failure for both.
    """
    library = ctypes.CDLL(path)
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    listed = (ctypes.c_int * count.value)()
    check(library, library.nvrtcGetSupportedArchs(listed))

    def run(file: str, real: str, architecture: int) -> tuple[bool, str]:
        words = [*kernels.options(real), f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
        options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        text = kernels.source(file).encode()
        check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, f"{file}.cu".encode(), 0, None, None))
        try:
            status = library.nvrtcCompileProgram(program, len(words), options)
            check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(library, library.nvrtcGetProgramLog(program, log))
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))
        return status == 0, log.value.decode(errors="replace")

    return f"NVRTC {major.value}.{minor.value}", list(listed), run


def check(library: ctypes.CDLL, status: int) -> None:
    """End with NVRTC's own words for a status other than success."""
    if status != 0:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        sys.exit(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


def compile_all(architectures: list[int], run: Compiler, max_spill: dict[str, int]) -> list[str]:
    """Compile every file for every architecture and print the table; what was wrong, in words."""
    jobs = [(file, real, a) for file in kernels.files() for real in REALS for a in architectures]
    wrong = [] if jobs else [f"nothing to compile in {kernels.folder()}"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        logs = dict(zip(jobs, pool.map(lambda job: run(*job), jobs), strict=True))
    table: dict[tuple[str, str, str], dict[int, Usage]] = {}
    for (file, real, a), (success, log) in logs.items():
        where = f"{file}.cu, REAL={real}, sm_{a}"
        found, other = read_log(log)
        if other or not success:
            wrong.append(f"{where}:\n" + ("\n".join(other) or "  failed without a message"))
            continue
        for kernel in kernels.parameters(file, real):
            usage = found.get(kernel, Usage())
            table.setdefault((file, kernel, real), {})[a] = usage
            if usage.registers == 0:
                wrong.append(f"{where}: ptxas reported nothing about the kernel {kernel}")
            if max(usage.stores, usage.loads) > max_spill[real]:
                wrong.append(
                    f"{where}: {kernel} spills {usage.stores} bytes of stores, {usage.loads} of loads; "
                    f"at most {max_spill[real]} are allowed"
                )
    cells = "".join(f"{f'sm_{a}':>16}" for a in architectures)
    print(f"  {'file':<12} {'kernel':<12} {'REAL':<7} {'shared':>6}{cells}   (registers, stack, +spill stores/loads)")
    for (file, kernel, real), row in table.items():
        cells = "".join(f"{cell(row[a]) if a in row else 'failed':>16}" for a in architectures)
        print(f"  {file:<12} {kernel:<12} {real:<7} {max(u.shared for u in row.values()):>6}{cells}")
    return wrong


def cell(usage: Usage) -> str:
    """`48`, `62, 40` with 40 bytes of stack, `48, 8 +4/4` with spills."""
    stack = f", {usage.stack}" if usage.stack else ""
    spill = f" +{usage.stores}/{usage.loads}" if usage.stores or usage.loads else ""
    return f"{usage.registers}{stack}{spill}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", nargs="?", const="nvcc", metavar="PROGRAM", help="compile with nvcc")
    parser.add_argument("--nvrtc", nargs="+", default=[], metavar="LIBRARY", help="compile with libnvrtc.so.13, .so.12")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, metavar="75", help="compute capabilities")
    parser.add_argument(
        "--max-spill", nargs=2, type=int, default=(0, 0), metavar=("FLOAT", "DOUBLE"), help="bytes a kernel may spill"
    )
    given = parser.parse_args()
    if not given.nvcc and not given.nvrtc:
        parser.error("give --nvcc or --nvrtc")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        compilers = [nvcc_compiler(given.nvcc, Path(work))] if given.nvcc else []
        for name, known, run in [*compilers, *map(nvrtc_compiler, given.nvrtc)]:
            architectures = [a for a in given.arch if a in known]
            if not architectures:
                wrong.append(f"{name} knows none of {', '.join(f'sm_{a}' for a in given.arch)}")
                continue
            start = time.monotonic()
            print(f"{name}, from {kernels.folder()}:")
            found = compile_all(architectures, run, dict(zip(REALS, given.max_spill, strict=True)))
            wrong += [f"{name}: {text}" for text in found]
            print(f"  {len(architectures)} architectures in {time.monotonic() - start:.1f} s")
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
