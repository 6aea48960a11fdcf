"""The stand-in for CuPy is as strict as CuPy, and has nothing CuPy has not."""

import gc
import importlib.util
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def device(emulator):
    with emulator.installed() as session:
        yield session


@pytest.fixture
def cp(device):
    import cupy

    return cupy


HOST = np.ones(3)


@pytest.mark.parametrize(
    "use",
    [
        lambda cp, a: np.asarray(a),
        lambda cp, a: a + HOST,
        lambda cp, a: HOST + a,
        lambda cp, a: a.__iadd__(HOST),
        lambda cp, a: a == HOST,
        lambda cp, a: a @ HOST,
        lambda cp, a: cp.sqrt(HOST),
        lambda cp, a: np.maximum(a, HOST),
        lambda cp, a: cp.where(HOST > 0, a, 0),
        lambda cp, a: cp.stack([a, HOST]),
        lambda cp, a: np.stack([a, HOST]),
        lambda cp, a: cp.sum(HOST),
        lambda cp, a: a[np.arange(2)],
        lambda cp, a: a[HOST > 0],
        lambda cp, a: a[[0, 1]],
        lambda cp, a: a.__setitem__(slice(None), HOST),
        lambda cp, a: a.__setitem__(np.arange(2), 0),
        lambda cp, a: HOST.__setitem__(slice(None), a),
        lambda cp, a: a * [1, 2, 3],
        lambda cp, a: cp.sum([1, 2, 3]),
        lambda cp, a: cp.exp([1, 2, 3]),
        lambda cp, a: np.add(HOST, HOST, out=a),
        lambda cp, a: np.add(a, a, out=np.empty(3)),
        lambda cp, a: np.add.reduce(a),
        lambda cp, a: range(a[0].astype(int)),
        lambda cp, a: hash(a),
        lambda cp, a: a[: a.argmax()],
        lambda cp, a: cp.zeros((3, a.argmax())),
        lambda cp, a: a.reshape(a.argmax() + 1, -1),
        lambda cp, a: a.sum(axis=a.argmin()),
        lambda cp, a: cp.sinc([1.0, 2.0]),
    ],
)
def test_host_arrays_and_lists_are_refused(cp, use):
    a = cp.asarray(HOST)
    with pytest.raises(TypeError):
        use(cp, a)
    np.testing.assert_array_equal(a.get(), HOST)


@pytest.mark.parametrize(
    "use",
    [
        lambda xp, a: a + 1,
        lambda xp, a: np.float32(2) * a,
        lambda xp, a: 2 - a / np.int64(3),
        lambda xp, a: a @ a.T,
        lambda xp, a: a**2 % 3 // 1,
        lambda xp, a: -abs(a) <= a,
        lambda xp, a: ~(a > 1) | (a == 2),
        lambda xp, a: np.sqrt(a),
        lambda xp, a: np.sum(a, axis=1),
        lambda xp, a: np.fft.ifftshift(a, axes=(0, 1)),
        lambda xp, a: np.linalg.norm(a, axis=1),
        lambda xp, a: xp.where(a > 2, a, xp.inf),
        lambda xp, a: xp.stack([a, a])[..., None, 1],
        lambda xp, a: xp.concatenate((a, a), axis=1),
        lambda xp, a: xp.pad(a, [(1, 1), (0, 2)]),
        lambda xp, a: xp.einsum("ij,kj->ik", a, a),
        lambda xp, a: xp.stack(xp.unravel_index(a.argmax(axis=0), (3, 4))),
        lambda xp, a: xp.argsort(a.ravel()[::-1] % 2),
        lambda xp, a: a.sum(axis=(0, 1)),
        lambda xp, a: a.mean(),
        lambda xp, a: a[1, 2],
        lambda xp, a: a[xp.asarray([0, 2])],
        lambda xp, a: a[a > 2],
        lambda xp, a: a[..., ::2].astype(np.complex64).real,
        lambda xp, a: xp.ascontiguousarray(a.T).view(np.int32).reshape(4, -1),
        lambda xp, a: xp.fft.rfft(a).imag,
        lambda xp, a: xp.arange(5) + xp.eye(5, dtype=np.float32) + xp.pi,
        lambda xp, a: xp.full((2, 3), 7, np.int64),
        lambda xp, a: xp.zeros_like(a, dtype=bool),
    ],
)
def test_results_are_numpys(cp, rng, use):
    a = rng.integers(0, 5, (3, 4)).astype(np.float32)
    expected = np.asarray(use(np, a)) if use(np, a) is not None else None
    if "argsort" in use.__code__.co_names:
        expected = np.argsort(a.ravel()[::-1] % 2, kind="stable")
    found = use(cp, cp.asarray(a))
    assert type(found) is cp.ndarray
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape) or "fft" in use.__code__.co_names
    np.testing.assert_allclose(found.get(), expected, rtol=1e-6)


def test_changes_in_place_reach_the_array(cp):
    a = cp.zeros((2, 3))
    row = a[1]
    row += 1
    row[0] = 5
    row[cp.asarray([False, True, False])] *= 3
    number = a[0, 1]
    number -= 2
    cp.add(row, 1, out=a[0])
    np.testing.assert_array_equal(a.get(), [[6, 4, 2], [5, 3, 1]])
    total = cp.zeros(())
    assert cp.sum(a, out=total) is total
    assert float(total) == 21


def test_single_numbers_stay_on_the_device(cp):
    a = cp.asarray([3, 1, 2])
    for value in (a.max(), a[0], a.argmin(), cp.sum(a), cp.allclose(a, a), a.all(), np.min(a)):
        assert isinstance(value, cp.ndarray)
        assert value.shape == ()
    assert (int(a[0]), float(a.max()), bool(a.any()), a[1].item(), a.tolist()) == (3, 3.0, True, 1, [3, 1, 2])
    with pytest.raises(ValueError, match="size 1"):
        int(a)


@pytest.mark.parametrize(
    "use",
    [
        lambda cp: cp.vectorise,
        lambda cp: cp.zeros(3).byteswapped,
        lambda cp: cp.cuda.runtime.nothing,
        lambda cp: cp.zeros(3).__index__,
        lambda cp: cp.zeros(3).newbyteorder,
    ],
)
def test_names_cupy_has_not(cp, use):
    with pytest.raises(AttributeError):
        use(cp)


@pytest.mark.parametrize(
    "use",
    [
        lambda cp, a: cp.mean(a, where=a > 0),
        lambda cp, a: a.sum(initial=1),
        lambda cp, a: cp.sqrt(a, where=a > 0),
        lambda cp, a: cp.take(a, a.astype(int), mode="clip"),
        lambda cp, a: a.take(0, None, None, "clip"),
        lambda cp, a: cp.argsort(a, stable=True),
    ],
)
def test_keywords_cupy_has_not(cp, use):
    with pytest.raises(TypeError, match="argument"):
        use(cp, cp.ones(3))


def test_what_has_no_stand_in_says_so(cp):
    with pytest.raises(NotImplementedError, match="ElementwiseKernel"):
        _ = cp.ElementwiseKernel


def test_indices_out_of_bounds_are_refused(cp):
    with pytest.raises(IndexError):  # CuPy wraps them round
        cp.ones(3)[cp.asarray([3])]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.int32, np.int64])
def test_new_memory_is_nan(cp, dtype):
    for a in (cp.empty((2, 3), dtype), cp.empty_like(cp.zeros(3, dtype)), cp.ndarray((3, 2), dtype, order="F")):
        assert a.dtype == dtype
        values = a.get()
        assert (np.isnan(values) if values.dtype.kind in "fc" else abs(values) > 1000).all()


def test_fourier_transforms_keep_single_precision(cp, rng):
    from cupyx.scipy import fft

    a = rng.standard_normal((4, 5, 6)).astype(np.float32)
    for module in (fft, cp.fft):
        spectrum = module.rfftn(cp.asarray(a), axes=(1, 2))
        assert spectrum.dtype == np.complex64
        np.testing.assert_allclose(spectrum.get(), np.fft.rfftn(a, axes=(1, 2)), rtol=1e-5, atol=1e-5)
        back = module.irfftn(spectrum, s=(5, 6), axes=(1, 2))
        assert back.dtype == np.float32
        np.testing.assert_allclose(back.get(), a, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="workers"):
        fft.rfft(cp.asarray(a), workers=2)


def test_transfers_are_counted(cp, device):
    a = cp.asarray(np.zeros(10, np.float32))
    b = cp.asarray(a) * 2 + cp.ones(10)
    assert (device.to_device.count, device.to_device.bytes) == (1, 40)
    assert device.to_host.count == 0
    b.get()
    float(b[0])
    cp.asnumpy(a)
    assert (device.to_host.count, device.to_host.bytes) == (3, 80 + 8 + 40)


def test_memory_runs_out(emulator):
    with emulator.installed(memory=10_000) as device:
        import cupy as cp

        a = cp.zeros(1000)
        view = a[10:].reshape(2, -1)
        assert device.used == 8000
        assert cp.cuda.runtime.memGetInfo() == (2000, 10_000)
        with pytest.raises(cp.cuda.memory.OutOfMemoryError, match="8,000 bytes"):
            a + 1
        del a
        assert device.used == 8000
        del view
        gc.collect()
        assert (device.used, device.peak) == (0, 8000)
        assert issubclass(cp.cuda.memory.OutOfMemoryError, MemoryError)
        cp.ones(1250)


def test_devices(emulator):
    with emulator.installed(devices=2):
        import cupy as cp

        assert cp.cuda.runtime.getDeviceCount() == 2
        with cp.cuda.Device(1) as device:
            a = cp.zeros((3, 4))
            assert (device.id, cp.cuda.Device().id, device.compute_capability) == (1, 1, "75")
        assert (a.device.id, a.T[1].device.id, cp.zeros(3).device.id, cp.cuda.Device().id) == (1, 1, 0, 0)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="invalid device"), cp.cuda.Device(2):
            pass


def test_ranges_are_recorded(cp, device):
    cp.cuda.nvtx.RangePush("step")
    assert (device.ranges, device.open_ranges) == (["step"], 1)
    cp.cuda.nvtx.RangePop()
    with pytest.raises(RuntimeError):
        cp.cuda.nvtx.RangePop()


def test_modules_come_and_go(emulator, monkeypatch):
    class Real:
        pass

    monkeypatch.setitem(sys.modules, "cupy", Real)
    monkeypatch.setitem(sys.modules, "cupy.special", Real)
    with emulator.installed():
        import cupy

        importlib.import_module("cupyx.scipy.fft")
        assert cupy.ndarray.__module__ == "cupy"
        assert importlib.util.find_spec("cupyx") is not None
        assert "cupy.special" not in sys.modules
    assert sys.modules["cupy"] is Real
    assert sys.modules["cupy.special"] is Real
    assert "cupyx.scipy.fft" not in sys.modules


# --------------------------------------------------------------------------------------------------- kernels

SCALE = (
    'extern "C" __global__ void scale(const REAL* x, REAL by, REAL* out) { out[threadIdx.x] = by * x[threadIdx.x]; }'
)


@pytest.fixture
def scale(cp):
    return cp.RawModule(code=SCALE, options=("--std=c++17", "-DREAL=float", "-lineinfo"), backend="nvrtc").get_function(
        "scale"
    )


def test_kernel(cp, device, scale):
    x, out = cp.arange(4, dtype=np.float32), cp.empty(4, np.float32)
    scale((1,), (4,), (x, np.float32(3), out), shared_mem=16)
    np.testing.assert_array_equal(out.get(), [0, 3, 6, 9])
    assert device.launches == [("scale", (1,), (4,), 16)]
    assert (scale.shared_size_bytes, scale.local_size_bytes, scale.attributes["num_regs"]) == (0, 0, scale.num_regs)


def test_unordered_results_alternate(cp, emulator, monkeypatch):
    monkeypatch.setitem(emulator.UNORDERED, "listed", "a counter")
    text = 'extern "C" __global__ void listed(int* list, int* n) { list[atomicAdd(n, 1)] = threadIdx.x; }'
    module = cp.RawModule(code=text)
    found = []
    for _ in range(3):
        found.append(cp.zeros(3, np.int32))
        module.get_function("listed")((1,), (3,), (found[-1], cp.zeros(1, np.int32)))
    assert [row.tolist() for row in found] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_kernel_changes_the_memory_of_a_view(cp, scale):
    x = cp.ones((3, 4), np.float32)
    scale((1,), (4,), (x[0], np.float32(3), x[2]))
    np.testing.assert_array_equal(x.get(), [[1] * 4, [1] * 4, [3] * 4])


@pytest.mark.parametrize("by", [3, 3.0, np.zeros(1, np.float32), np.float64(3)])
def test_arguments_cupy_would_misread_are_refused(cp, scale, by):
    with pytest.raises(TypeError, match="kernel scale, argument 1"):
        scale((1,), (4,), (cp.zeros(4, np.float32), by, cp.zeros(4, np.float32)))


@pytest.mark.parametrize("launch", [([1], (4,), ()), (1, (4,), ()), ((1,), (4.0,), ()), ((1,), (4,), [])])
def test_launches_cupy_refuses(scale, launch):
    with pytest.raises(TypeError):
        scale(*launch)


def test_driver_errors(cp, scale):
    x, out = cp.zeros(4, np.float32), cp.zeros(4, np.float32)
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="block"):
        scale((1,), (2048,), (x, np.float32(3), out))
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="shared"):
        scale((1,), (4,), (x, np.float32(3), out), shared_mem=50_000)
    scale.max_dynamic_shared_size_bytes = 50_000
    scale((1,), (4,), (x, np.float32(3), out), shared_mem=50_000)
    with pytest.raises(cp.cuda.driver.CUDADriverError):
        scale.max_dynamic_shared_size_bytes = 100_000
    module = cp.RawModule(code=SCALE.replace('extern "C"', ""), options=("-DREAL=float",))
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        module.get_function("scale")  # its name is mangled
    with pytest.raises(cp.cuda.compiler.CompileException, match="REAL"):
        cp.RawModule(code=SCALE).get_function("scale")


# ------------------------------------------------------------------------------------------ against the real CuPy


def real_cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: its API cannot be compared")


def test_api_is_the_real_one(emulator):
    cupy = real_cupy()
    from faml_emulator import fake_cupy, make_cupy_api

    if cupy.__version__ != fake_cupy.API["version"]:
        pytest.skip(f"CuPy {cupy.__version__} is installed, {make_cupy_api.FILE.name} is of {fake_cupy.API['version']}")
    assert make_cupy_api.current_api() == fake_cupy.API


def test_other_names_are_real(emulator):
    real_cupy()
    from faml_emulator import fake_cupy

    for name, module in fake_cupy.modules().items():
        first, *rest = name.split(".")
        real = reduce(getattr, rest, importlib.import_module(first))
        if name in fake_cupy.NOT_IMPORTABLE:
            with pytest.raises(ImportError):
                importlib.import_module(name)
        else:
            importlib.import_module(name)
        offered = [key for key in vars(module) if not key.startswith("_")]
        assert [key for key in offered if not hasattr(real, key)] == [], name
    real = importlib.import_module("cupy")
    pairs = [
        (fake_cupy.ndarray, real.ndarray),
        (fake_cupy.RawKernel, real.RawKernel),
        (fake_cupy.RawModule, real.RawModule),
        (fake_cupy.Device, real.cuda.Device),
        (fake_cupy.Stream, real.cuda.Stream),
        (fake_cupy.Event, real.cuda.Event),
        (fake_cupy.MemoryPool, real.cuda.MemoryPool),
        (fake_cupy.PinnedMemoryPool, real.cuda.PinnedMemoryPool),
        (fake_cupy.PlanCache, importlib.import_module("cupy.fft._cache").PlanCache),
    ]
    for ours, theirs in pairs:
        offered = [key for key in vars(ours) if not key.startswith("_")]
        assert [key for key in offered if not hasattr(theirs, key)] == [], ours


def test_what_a_side_stream_copies_is_there_once_it_is_waited_for(cp):
    import cupyx

    for wait in (cp.cuda.Stream.synchronize, lambda side: cp.cuda.get_current_stream().wait_event(side.record())):
        side, locked = cp.cuda.Stream(non_blocking=True), cupyx.empty_pinned((3,))
        locked[...] = HOST
        with side:
            there = cp.empty(3)
            there.set(locked, stream=side)
        assert np.isnan(there.get()).all()
        wait(side)
        assert (there.get() == HOST).all()
    with side:
        there.set(locked + 1)
    side.synchronize()
    assert np.isnan(there.get()).all()  # what was to be copied is gone


def test_the_data_file_is_small():
    assert Path(__file__).with_name("cupy_api.json").stat().st_size < 60_000
