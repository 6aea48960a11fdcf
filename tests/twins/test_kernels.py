"""The launcher refuses what a kernel would read as rubbish, and no kernel is without a twin test."""

import ast
from pathlib import Path

import numpy as np
import pytest

from faml_gpu import kernels, ops
from faml_gpu.fourier import make_support

# Which kernels the CUDA twin of each operation launches.
KERNELS = {
    "rotate": {"rotate"},
    "residual": {"residual"},
    "normal_equations": {"normal_equations"},
    "accumulate": {"accumulate"},
    "assign": {"assign"},
    "correlations": {"cross"},
    "harmonics": {"harmonics"},
    "peaks": {"so3_maxima", "so3_select"},
}


def declared():
    """Every `__global__` in the sources, by a plain search for the word, not by the launcher's own reading."""
    found = set()
    for path in kernels.folder().glob("*.cu"):
        for part in path.read_text().split("__global__")[1:]:
            found.add(part.split("(")[1 if "__launch_bounds__" in part.split("(")[0] else 0].split()[-1])
    return found


def test_every_kernel_has_a_twin_test():
    assert declared() == set().union(*KERNELS.values())
    assert declared() == set(kernels.THREADS)
    assert declared() == {name for file in kernels.files() for name in kernels.parameters(file, "float")}
    assert set(KERNELS) == set(ops.__all__)
    tested = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run":
                tested |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    assert tested == set(KERNELS)


def calls():
    support = make_support(9, 3)
    eye, nothing = np.eye(3)[None], np.zeros((1, 3))
    grid = np.ones((9, 9, 5), np.complex64)
    zero = np.zeros(1, np.int64)
    spectra = np.ones((1, len(support)), np.complex64)
    pose, one = (eye[None], nothing[None]), np.ones(1, np.int64)
    return {
        "rotate": [(grid, eye, support.coords, 1)],
        "residual": [(grid, spectra, abs(spectra), zero, *pose, one, support, 1)],
        "normal_equations": [(grid, spectra, abs(spectra), zero, *pose, one, support, 1)],
        "accumulate": [(grid[None], abs(grid)[None], zero, zero, zero, eye, nothing, np.ones(1), support, 1, 1)],
        "assign": [(eye, nothing, *pose, one, 1.0)],
        "correlations": [(grid, spectra, abs(spectra), zero, zero, eye, nothing, spectra[:, :7].copy(), support, 1)],
        "harmonics": [(np.ones((1, 3)), 3)],
        "peaks": [(np.ones((1, 4, 4, 4), np.float32), 2, 10.0)],
    }


@pytest.mark.parametrize("op", KERNELS)
def test_each_operation_launches_its_kernels(op, emulated_gpu):
    import cupy

    def sent(a):
        return a.to("cuda:0") if hasattr(a, "to") else cupy.asarray(a) if isinstance(a, np.ndarray) else a

    before = len(emulated_gpu.launches)
    for arguments in calls()[op]:
        getattr(ops, op)(*map(sent, arguments))
    assert {launch[0] for launch in emulated_gpu.launches[before:]} == KERNELS[op]


def rotate_arguments(cupy):
    """grid, c, rotations, coords, n, m, out of the kernel `rotate`."""
    real = cupy.ones((2, 9), np.float32)
    return [cupy.ones((9, 9, 5), np.complex64), 4, real, cupy.zeros((3, 3), np.float32), 2, 3,
            cupy.zeros((2, 3), np.complex64)]  # fmt: skip


def test_the_launcher_takes_what_fits(emulated_gpu):
    import cupy

    arguments = rotate_arguments(cupy)
    kernels.launch("rotate", np.float32, (1, 2), arguments)
    np.testing.assert_array_equal(arguments[-1].get(), 1)
    kernels.launch("rotate", np.float32, (0, 2), arguments)  # nothing to do is no error


@pytest.mark.parametrize(
    ("position", "wrong", "error", "message"),
    [
        (0, lambda a, cupy: a.get(), TypeError, "rotate, grid: found ndarray, expected a cupy.ndarray"),
        (0, lambda a, cupy: a.astype(np.complex128), TypeError, "rotate, grid: .*complex128"),
        (3, lambda a, cupy: a.astype(np.int32), TypeError, "rotate, coords: .*float32.*int32"),
        (2, lambda a, cupy: cupy.ones((2, 18), np.float32)[:, ::2], TypeError, "rotate, rotations: .*C-contiguous"),
        (4, lambda a, cupy: 1 << 40, OverflowError, "int32"),
        (4, lambda a, cupy: 2.5, OverflowError, "rotate, n: found 2.5, which is no int32"),
    ],
)
def test_the_launcher_refuses(position, wrong, error, message, emulated_gpu):
    import cupy

    arguments = rotate_arguments(cupy)
    arguments[position] = wrong(arguments[position], cupy)
    with pytest.raises(error, match=message):
        kernels.launch("rotate", np.float32, (1, 2), arguments)
    assert not emulated_gpu.launches


def test_the_launcher_counts_arguments_and_shared_memory(emulated_gpu):
    import cupy

    with pytest.raises(TypeError, match="rotate: found 6 arguments, expected 7"):
        kernels.launch("rotate", np.float32, (1, 2), rotate_arguments(cupy)[:-1])
    with pytest.raises(ValueError, match=r"rotate: found 49153 bytes of shared memory, expected at most 49152"):
        kernels.launch("rotate", np.float32, (1, 2), rotate_arguments(cupy), shared=49153)


def test_the_launcher_refuses_larger_blocks_than_compiled_for(emulated_gpu, monkeypatch):
    import cupy

    assert f"MAX_THREADS = {kernels.MAX_THREADS};" in (kernels.folder() / "common.cuh").read_text()
    monkeypatch.setitem(kernels.THREADS, "rotate", 2 * kernels.MAX_THREADS)
    with pytest.raises(ValueError, match="rotate: found 512 threads a block, expected at most 256"):
        kernels.launch("rotate", np.float32, (1, 2), rotate_arguments(cupy))
    assert not emulated_gpu.launches


def test_the_launcher_refuses_arrays_of_another_device(emulator):
    with emulator.installed(devices=2):
        import cupy

        arguments = rotate_arguments(cupy)
        with cupy.cuda.Device(1), pytest.raises(ValueError, match="rotate, grid: found on device 0, expected 1"):
            kernels.launch("rotate", np.float32, (1, 2), arguments)


def test_options_change_with_the_header(tmp_path, monkeypatch):
    """CuPy keeps compiled kernels by source and options, and does not look into included files."""
    before = kernels.options("float")
    (tmp_path / "common.cuh").write_bytes((kernels.folder() / "common.cuh").read_bytes() + b"// changed\n")
    monkeypatch.setattr(kernels, "folder", lambda: tmp_path)
    changed = [a for a, b in zip(before, kernels.options("float"), strict=True) if a != b]
    assert any("COMMON" in option for option in changed)
    assert len({*kernels.options("float")} ^ {*kernels.options("double")}) == 2


def test_messages_of_the_compiler_name_the_real_file():
    first, second = kernels.source("rotate").split("\n")[:2]
    assert first == f'#line 1 "{kernels.folder() / "rotate.cu"}"'
    assert second == (kernels.folder() / "rotate.cu").read_text().split("\n")[0]
