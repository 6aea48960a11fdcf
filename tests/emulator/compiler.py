"""Kernel source to a loaded library: g++ with cuda_shim.h ahead of the text and a launcher per kernel behind it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["CompileError", "CompilerMissingError", "Library", "compile_kernels"]

SHIM = Path(__file__).with_name("cuda_shim.h")
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-shared"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"),
    "-fstack-clash-protection",  # a large local array meets the guard page, not the next fiber
    "-U_FORTIFY_SOURCE",  # which takes the switch of a fiber by longjmp for an attack
    *("-fno-gnu-unique", "-Wl,-z,defs"),  # shared memory of a template is not merged with another library's
]

# What NVRTC takes and has a meaning here, or none on a CPU.
OPTIONS = re.compile(r"-[ID].+|(-std|--std)=c\+\+1[147]|-lineinfo|--generate-line-info|(-|--)fmad=(true|false)")

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
BOUNDS = r"(?:__launch_bounds__\s*\(([^,()]+)(?:,[^()]*)?\)\s*)?"
KERNEL = re.compile(rf"__global__\s+{BOUNDS}(?:static\s+)?void\s+{BOUNDS}(\w+)\s*\(")
DYNAMIC = re.compile(r"\bextern\s+__shared__\s[^;]*?(\w+)\s*\[\s*\]\s*;")

LAUNCHER = """
extern "C" const char* faml_signature_{name}() {{ return faml::signature({name}); }}
extern "C" unsigned faml_max_threads_{name}() {{ return {bounds}; }}
extern "C" int faml_launch_{name}(
    void** arguments, const unsigned* grid, const unsigned* block, unsigned shared, int reverse,
    char* error, size_t room
) {{
    faml::prepare({name}, arguments);
    return faml::launch(grid, block, shared, reverse, error, room);
}}
"""


class CompilerMissingError(RuntimeError):
    """No g++ here; tests turn this into a skip."""


class CompileError(RuntimeError):
    """g++ refused the source."""


class Library:
    """The kernels of one source file, compiled and loaded."""

    def __init__(self, path: Path, kernels: dict[str, str]) -> None:
        self.path = path
        self.kernels = kernels  # name to launch bound
        self.library = ctypes.CDLL(str(path))

    def exports(self, name: str) -> bool:
        """Whether a kernel of this name can be found, that is: it is `extern "C"`."""
        return name in self.kernels and hasattr(self.library, name)

    def signature(self, name: str) -> list[str]:
        """Type of each parameter: b1, i4, u4, i8, f4, f8, V8 (a structure of 8 bytes); `*` and `const` as in C."""
        function = self.library[f"faml_signature_{name}"]
        function.restype = ctypes.c_char_p
        return [item for item in function().decode().split(",") if item]

    def max_threads(self, name: str) -> int:
        """Largest block, from `__launch_bounds__`."""
        return int(self.library[f"faml_max_threads_{name}"]())

    def static_shared(self) -> int:
        """Bytes of `__shared__` variables, of all kernels of the file together."""
        return int(self.library["faml_static_shared"]())

    def launch(
        self, name: str, grid: list[int], block: list[int], shared: int, reverse: bool, addresses: list[int]
    ) -> tuple[int, str]:
        """Run a grid on what lies at the addresses (one per parameter): status (0 is good) and message."""
        error = ctypes.create_string_buffer(4096)
        status = self.library[f"faml_launch_{name}"](
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_uint(shared),
            ctypes.c_int(reverse),
            error,
            ctypes.c_size_t(len(error)),
        )
        return status, error.value.decode()


@cache
def find_compiler() -> tuple[str, str]:
    """Path and version of g++."""
    path = shutil.which("g++")
    if path is None:
        raise CompilerMissingError("the CUDA emulator needs g++, and none is in PATH")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder in the temporary folder that is this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"faml_emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: remove it")
    return folder


def kernels_of(source: str) -> dict[str, str]:
    """Kernels defined in a source text: name, and its launch bound as written."""
    text = COMMENT.sub(" ", source)
    return {match[3]: (match[1] or match[2] or "faml::kMaxThreads").strip() for match in KERNEL.finditer(text)}


def compile_kernels(source: str, options: tuple[str, ...] = ()) -> Library:
    """Compile a kernel file as NVRTC would be asked to; done once for the same text, headers and options."""
    compiler, version = find_compiler()
    for option in options:
        if not OPTIONS.fullmatch(option):
            raise CompileError(f"option {option!r} is not one the emulator knows")
    folders = [Path(option[2:]) for option in options if option.startswith("-I")]
    headers = [path.read_text() for folder in folders for path in sorted([*folder.glob("*.cuh"), *folder.glob("*.h")])]
    kernels = kernels_of(source)
    dynamic = {name for text in [source, *headers] for name in DYNAMIC.findall(COMMENT.sub(" ", text))}
    launchers = [LAUNCHER.format(name=name, bounds=bounds) for name, bounds in kernels.items()]
    # Every `extern __shared__` array is the same memory, as on the device.
    launchers += [f'asm(".globl {name}\\n.set {name}, faml_dynamic_shared");\n' for name in sorted(dynamic)]
    text = "\n".join([source, '#line 1 "emulator launchers"', *launchers])

    key = hashlib.sha256("\0".join([version, *FLAGS, SHIM.read_text(), *headers, *options, text]).encode()).hexdigest()
    path = cache_folder() / f"{key[:32]}.so"
    if not path.exists():
        extra = [option for option in options if option[:2] in ("-I", "-D")]
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, *extra, "-include", str(SHIM), "-x", "c++", "-", "-o", str(built)]
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
            )
            if done.returncode:
                raise CompileError(done.stderr)
            built.replace(path)  # atomic: other processes may compile the same
    return Library(path, kernels)
