"""The emulated GPU: kernels compute what they say, and what CUDA leaves undefined is reported."""

import re

import numpy as np
import pytest

# Sum of each block's values, by halves in dynamic shared memory.
TOTAL = """#line 1 "kernels/total.cu"
extern "C" __global__ void __launch_bounds__(512) total(const REAL* __restrict__ x, int n, double* __restrict__ out) {
    extern __shared__ __align__(16) unsigned char shared[];
    double* partial = reinterpret_cast<double*>(shared);
    __shared__ int first;
    if (threadIdx.x == 0) first = blockIdx.x * blockDim.x;
    __syncthreads();
    const int i = first + threadIdx.x;
    partial[threadIdx.x] = i < n ? x[i] : 0;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}
"""


@pytest.fixture
def run(emulator):
    """`run(body, grid, block, arguments, shared)`: a kernel of this text, with its parameters, on NumPy arrays."""

    def run(text, grid, block, arguments, shared=0, options=()):
        library = emulator.compile_kernels(text, options)
        (name,) = library.kernels
        emulator.Kernel(library, name)(grid, block, arguments, shared)

    return run


def total(run, text, rng, dtype=np.float32, block=64, n=1000):
    x = rng.random(n).astype(dtype)
    blocks = -(-n // block)
    out = np.full(blocks, np.nan)
    run(
        text,
        (blocks,),
        (block,),
        [x, np.int32(n), out],
        8 * block,
        (f"-DREAL={'float' if dtype == np.float32 else 'double'}",),
    )
    np.testing.assert_allclose(out, np.add.reduceat(x.astype(float), np.arange(0, n, block)), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("block", "n"), [(64, 1000), (512, 1), (1, 5), (2, 64)])
def test_sum_of_a_block(run, rng, dtype, block, n):
    total(run, TOTAL, rng, dtype, block, n)


@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_missing_barrier_is_found(emulator, run, rng, barrier):
    places = [match.span() for match in re.finditer(r"__syncthreads\(\);", TOTAL)]
    start, end = places[barrier]
    with pytest.raises(emulator.EmulatorError, match="kernel total"):
        total(run, TOTAL[:start] + TOTAL[end:], rng)
    total(run, TOTAL, rng)  # the library of another text is none the worse


def test_barrier_that_some_threads_skip(emulator, run):
    text = """#line 1 "kernels/skip.cu"
    extern "C" __global__ void skip(int* out) {
        if (threadIdx.x >= 16) return;
        __syncthreads();
        out[threadIdx.x] = 1;
    }"""
    with pytest.raises(emulator.SyncError) as error:
        run(text, (2,), (40,), [np.zeros(40, np.int32)])
    assert str(error.value) == (
        "kernel skip, block (0, 0, 0): divergent barrier: threads 0-15 at __syncthreads, kernels/skip.cu:3; "
        "threads 16-39 exited"
    )


def test_barriers_in_two_places(emulator, run):
    text = """#line 1 "kernels/two.cu"
    extern "C" __global__ void two(int* out) {
        if (threadIdx.x % 2)
            __syncthreads();
        else
            __syncthreads();
        out[threadIdx.x] = 1;
    }"""
    with pytest.raises(
        emulator.SyncError,
        match=r"thread 0 at __syncthreads, kernels/two\.cu:5; thread 1 at __syncthreads, kernels/two\.cu:3",
    ):
        run(text, (1,), (4,), [np.zeros(4, np.int32)])


def test_exchange_that_a_lane_never_joins(emulator, run):
    text = """extern "C" __global__ void lonely(int* out) {
        if (threadIdx.x == 3) __syncthreads();
        out[threadIdx.x] = __shfl_down_sync(0xffffffffu, out[threadIdx.x], 1);
        __syncthreads();
    }"""
    with pytest.raises(emulator.SyncError, match="__shfl_down_sync"):
        run(text, (1,), (32,), [np.zeros(32, np.int32)])


def test_exchange_without_oneself(emulator, run):
    text = """extern "C" __global__ void outside(int* out) {
        out[threadIdx.x] = __shfl_sync(0x0000ffffu, out[threadIdx.x], 0);
    }"""
    with pytest.raises(emulator.SyncError, match="not in its mask"):
        run(text, (1,), (32,), [np.zeros(32, np.int32)])


def test_a_kernel_works_after_its_failure(emulator, run):
    text = """extern "C" __global__ void sometimes(float* out, int skip) {
        extern __shared__ float tile[];
        if (int(threadIdx.x) < skip) return;
        out[threadIdx.x] = tile[threadIdx.x];
        const int n = __syncthreads_count(true);
        tile[threadIdx.x] = 7;
        if (threadIdx.x == 0) out[blockDim.x] = n;
    }"""
    out = np.zeros(101, np.float32)
    with pytest.raises(emulator.SyncError):
        run(text, (1,), (100,), [out, np.int32(50)], 400)
    np.testing.assert_array_equal(out, 0)
    run(text, (1,), (100,), [out, np.int32(0)], 400)
    assert np.isnan(out[:100]).all()  # no thread of the failed launch went on and wrote its 7
    assert out[100] == 100  # and those that had come to its barrier do not count


INDEX = """extern "C" __global__ void place(TYPE* out, int offset) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i + offset] = (TYPE)i;
}"""


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("long long", np.int64), ("bool", np.bool_)])
@pytest.mark.parametrize("offset", [-1, 1, 1000])
def test_write_out_of_bounds(emulator, run, name, dtype, offset):
    out = np.zeros(12, dtype)
    run(INDEX.replace("TYPE", name), (3,), (4,), [out, np.int32(0)])
    np.testing.assert_array_equal(out, np.arange(12).astype(dtype))
    place = -1 if offset < 0 else 12 * out.itemsize + max(offset - 12, 0) * out.itemsize
    with pytest.raises(emulator.OutOfBoundsError, match=rf"argument 0 .*: written at byte {place} of"):
        run(INDEX.replace("TYPE", name), (3,), (4,), [out, np.int32(offset)])


def test_wild_access(emulator, run):
    text = """extern "C" __global__ void wild(float* out, long long i) { out[0] = out[i]; }"""
    with pytest.raises(emulator.OutOfBoundsError, match=r"kernel wild, block \(0, 0, 0\): thread 0 touched memory"):
        run(text, (1,), (1,), [np.zeros(3, np.float32), np.int64(1) << 44])


def test_overflow_of_the_stack(emulator, run):
    text = """extern "C" __global__ void deep(int* out, int n) {
        volatile int large[100000];
        for (int i = 0; i < n; ++i) large[i] = i;
        *out = large[n - 1];
    }"""
    with pytest.raises(emulator.OutOfBoundsError, match="stack"):
        run(text, (1,), (64,), [np.zeros(1, np.int32), np.int32(10)])


def test_division_by_zero(emulator, run):
    text = """extern "C" __global__ void divide(int* out, int n) { *out /= n; }"""
    with pytest.raises(emulator.EmulatorError, match="divided an integer by 0"):
        run(text, (1,), (1,), [np.ones(1, np.int32), np.int32(0)])


def test_read_out_of_bounds_is_nan(run):
    text = (
        """extern "C" __global__ void right(const double* x, double* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }"""
    )
    out = np.zeros(5)
    run(text, (1,), (5,), [np.arange(5.0), out])
    np.testing.assert_array_equal(out, [1, 2, 3, 4, np.nan])


def test_write_behind_shared_memory(emulator, run):
    text = """extern __shared__ float tile[];
    extern "C" __global__ void behind(int n) {
        for (int i = 0; i < n; ++i) tile[i] = 0;
    }"""
    run(text, (1,), (1,), [np.int32(10)], 40)
    with pytest.raises(emulator.OutOfBoundsError, match="past the 40 bytes of dynamic shared memory"):
        run(text, (1,), (1,), [np.int32(11)], 40)


def test_shared_memory_starts_as_nan_in_every_block(run):
    text = """
    template <class T> __device__ T fresh() {
        __shared__ T in_template;
        const T before = in_template;
        in_template = 1;
        return before;
    }
    extern "C" __global__ void fresh_memory(double* out) {
        extern __shared__ float dynamic[];
        __shared__ float one, many[3];
        double* row = out + 5 * blockIdx.x;
        row[0] = dynamic[7], row[1] = one, row[2] = many[2], row[3] = fresh<float>(), row[4] = fresh<double>();
        dynamic[7] = one = many[2] = 1;
    }"""
    out = np.zeros((4, 5))
    run(text, (4,), (1,), [out], 32)
    assert np.isnan(out).all()


def test_shared_memory_of_a_template_is_each_librarys_own(run):
    text = """
    template <class T> __device__ T add_one() {
        __shared__ T sum;
        if (!(sum == sum)) sum = 0;
        return sum += 1;
    }
    extern "C" __global__ void NAME(double* out) { *out = add_one<float>() + add_one<float>(); }"""
    for name in ("first_library", "second_library"):
        out = np.zeros(1)
        run(text.replace("NAME", name), (1,), (1,), [out])
        assert out == 1 + 2


def test_static_shared_memory_starts_as_an_odd_integer(run):
    text = """extern "C" __global__ void counter(int* out) {
        __shared__ int n;
        out[blockIdx.x] = n++;
    }"""
    out = np.zeros(3, np.int32)
    run(text, (3,), (1,), [out])
    assert (abs(out) > 1000).all()


@pytest.mark.parametrize("body", ["atomicAdd(out, x[i])", "out[0] = x[i]", "out[i] = i ? out[i - 1] : x[i]"])
def test_order_of_threads_shows(emulator, run, rng, body):
    text = f"""extern "C" __global__ void race(const float* x, float* out) {{
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        {body};
    }}"""
    with pytest.raises(
        emulator.RaceError, match=r"kernel race, argument 1 \(f4\*\): element [0-9]+ depends on the order"
    ):
        run(text, (64,), (1,), [rng.random(64).astype(np.float32), np.zeros(64, np.float32)])


def test_integer_atomics_agree_in_any_order(run, rng):
    text = """extern "C" __global__ void
    count(const int* x, int n, int* sum, unsigned* largest, unsigned long long* total) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i >= n) return;
        atomicAdd(sum, x[i]);
        atomicMax(largest, unsigned(x[i]));
        atomicMin(sum + 1, x[i]);
        atomicAdd(total, (unsigned long long)x[i] << 32);
    }"""
    x = rng.integers(0, 1000, 77).astype(np.int32)
    found, largest, all_of_them = np.array([0, 10**6], np.int32), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    run(text, (3,), (32,), [x, np.int32(77), found, largest, all_of_them])
    assert (*found, *largest, *all_of_them) == (x.sum(), x.min(), x.max(), int(x.sum()) << 32)


def test_unordered_results_come_in_both_orders(emulator, monkeypatch):
    text = """extern "C" __global__ void listed(int* list, int* n) { list[atomicAdd(n, 1)] = threadIdx.x; }"""
    kernel = emulator.Kernel(emulator.compile_kernels(text), "listed")

    def launch():
        found = np.zeros(5, np.int32)
        kernel((1,), (5,), [found, np.zeros(1, np.int32)])
        return found.tolist()

    with pytest.raises(emulator.RaceError):
        launch()
    monkeypatch.setitem(emulator.UNORDERED, "listed", "a counter")
    assert [launch() for _ in range(3)] == [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "dtype"), [("float", np.float32), ("double", np.float64), ("int", np.int32), ("long long", np.int64)]
)
@pytest.mark.parametrize("block", [32, 64, 48, 1])
def test_shuffles(run, rng, name, dtype, block):
    text = f"""extern "C" __global__ void shuffle(const {name}* x, {name}* out) {{
        const {name} v = x[threadIdx.x];
        {name}* row = out + 6 * threadIdx.x;
        row[0] = __shfl_down_sync(0xffffffffu, v, 1);
        row[1] = __shfl_up_sync(0xffffffffu, v, 3);
        row[2] = __shfl_xor_sync(0xffffffffu, v, 5);
        row[3] = __shfl_sync(0xffffffffu, v, 2);
        row[4] = __shfl_down_sync(0xffffffffu, v, 1, 16);
        row[5] = __shfl_sync(0xffffffffu, v, 17, 16);
    }}"""
    x = (1000 * rng.random(block)).astype(dtype)
    out = np.zeros((block, 6), dtype)
    run(text, (1,), (block,), [x, out])
    poison = np.full(2, 0xFFF5A5A5, np.uint32).view(dtype)[0]
    for thread, row in enumerate(out):
        first, lane = thread // 32 * 32, thread % 32
        half = lane // 16 * 16
        sources = [
            *(lane + 1 if lane < 31 else lane, lane - 3 if lane >= 3 else lane, lane ^ 5, 2),
            *(lane + 1 if lane % 16 < 15 else lane, half + 1),
        ]
        expected = [x[first + s] if first + s < block else poison for s in sources]  # no such thread: undefined
        np.testing.assert_array_equal(row, np.array(expected, dtype))


def test_sum_of_a_warp_and_votes(run, rng):
    text = """extern "C" __global__ void warp(const double* x, double* sum, unsigned* votes) {
        double v = x[threadIdx.x];
        for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
        sum[threadIdx.x] = v;
        __syncwarp();
        unsigned* row = votes + 6 * threadIdx.x;
        row[0] = __ballot_sync(0xffffffffu, x[threadIdx.x] > 0.5);
        row[1] = __any_sync(0xffffffffu, x[threadIdx.x] > 1);
        row[2] = __all_sync(0xffffffffu, x[threadIdx.x] > 0);
        row[3] = __syncthreads_count(x[threadIdx.x] > 0.5);
        row[4] = __syncthreads_or(threadIdx.x == 5);
        row[5] = __syncthreads_and(threadIdx.x != 5);
    }"""
    x = rng.random(64)
    total, votes = np.zeros(64), np.zeros((64, 6), np.uint32)
    run(text, (1,), (64,), [x, total, votes])
    for warp in (slice(0, 32), slice(32, 64)):
        np.testing.assert_allclose(total[warp], x[warp].sum(), rtol=1e-14)
        ballot = sum(1 << lane for lane in range(32) if x[warp][lane] > 0.5)
        assert (votes[warp] == [ballot, 0, 1, (x > 0.5).sum(), 1, 0]).all()


def test_lanes_of_two_masks_exchange_apart(run):
    text = """extern "C" __global__ void halves(int* out) {
        const unsigned lane = threadIdx.x;
        if (lane < 16) out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
        else out[lane] = __shfl_xor_sync(0xffff0000u, lane, 2);
    }"""
    out = np.zeros(32, np.int32)
    run(text, (1,), (32,), [out])
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, np.where(lanes < 16, lanes ^ 1, lanes ^ 2))


def test_places_in_three_dimensions(run):
    text = """extern "C" __global__ void where(int* out) {
        const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = 100 * block + thread;
    }"""
    out = np.zeros((24, 30), np.int32)
    run(text, (2, 3, 4), (5, 3, 2), [out])
    np.testing.assert_array_equal(out, 100 * np.arange(24)[:, None] + np.arange(30))


def test_functions_of_cuda(run):
    text = """extern "C" __global__ void functions(const double* x, double* out) {
        const double v = x[threadIdx.x];
        double* row = out + 8 * threadIdx.x;
        sincospi(v, row, row + 1);
        float s, c;
        sincospif(float(v), &s, &c);
        row[2] = s, row[3] = c;
        row[4] = rsqrt(v * v + 1);
        row[5] = fma(v, v, 1.0);
        row[6] = max(v, min(0.5, v));
        row[7] = __longlong_as_double(__double_as_longlong(v));
    }"""
    x = np.concatenate([np.arange(-4, 4.25, 0.25), [1e-9, 7.3, -123.4]])
    out = np.zeros((len(x), 8))
    run(text, (1,), (len(x),), [x, out])
    s, c = np.sin(np.pi * x), np.cos(np.pi * x)
    expected = np.stack([s, c, s, c, (x * x + 1) ** -0.5, x * x + 1, x, x], axis=1)
    assert abs(out - expected)[:, [0, 1, 4, 5, 6, 7]].max() < 1e-12
    assert abs(out - expected).max() < 2e-5  # 123.4 in single precision
    whole = x == np.rint(x)
    assert (out[whole, 0] == 0).all()
    assert (abs(out[whole, 1]) == 1).all()


def test_vector_types_constants_and_templates(run):
    text = """
    __constant__ double weights[3] = {1, 10, 100};
    template <class T, int N> __device__ __forceinline__ T weigh(const T (&v)[N]) {
        T sum = 0;
    #pragma unroll
        for (int i = 0; i < N; ++i) sum += T(weights[i]) * v[i];
        return sum;
    }
    extern "C" __global__ void vectors(const float2* __restrict__ a, float4* __restrict__ b, double2 scale) {
        static_assert(sizeof(float2) == 8 && alignof(float4) == 16 && sizeof(double3) == 24 && warpSize == 32);
        const float2 v = __ldg(a + threadIdx.x);
        const float parts[3] = {v.x, v.y, 1};
        b[threadIdx.x] = make_float4(v.x * float(scale.x), v.y * float(scale.y), weigh(parts), INFINITY);
    }"""
    a = np.array([1 + 2j, 3 + 4j], np.complex64)
    out = np.zeros((2, 4), np.float32)
    run(text, (1,), (2,), [a, out, np.complex128(2 + 3j)])
    np.testing.assert_array_equal(out, [[2, 6, 121, np.inf], [6, 12, 143, np.inf]])


# ------------------------------------------------------------------------------------------- what a launch refuses


@pytest.mark.parametrize(
    "value",
    [1, 1.0, np.int64(1), np.float32(1), np.zeros(3, np.int32), None],
    ids=["int", "float", "int64", "float32", "array", "None"],
)
def test_wrong_numbers_are_refused(run, value):
    with pytest.raises(TypeError, match=r"kernel place, argument 1 \(i4\)"):
        run(INDEX.replace("TYPE", "float"), (1,), (1,), [np.zeros(3, np.float32), value])


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), np.zeros(3, np.int32), np.zeros(6, np.float32)[::2], np.float32(0), np.zeros(3, np.complex128), None],
    ids=["float64", "int32", "strided", "scalar", "complex128", "None"],
)
def test_wrong_arrays_are_refused(run, value):
    with pytest.raises(TypeError, match=r"kernel place, argument 0 \(f4\*\)"):
        run(INDEX.replace("TYPE", "float"), (1,), (1,), [value, np.int32(0)])


def test_wrong_number_of_arguments(run):
    with pytest.raises(TypeError, match="found 1 arguments, expected 2"):
        run(INDEX.replace("TYPE", "float"), (1,), (1,), [np.zeros(3, np.float32)])


def test_overlapping_output_is_refused(run):
    text = 'extern "C" __global__ void copy(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x]; }'
    x = np.zeros(8, np.float32)
    run(text, (1,), (4,), [x[:4], x[4:]])
    with pytest.raises(TypeError, match="arguments 1 and 0 overlap"):
        run(text, (1,), (4,), [x[:5], x[4:]])


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [
        *[((0,), (1,), 0), ((1,), (0,), 0), ((1, 65536), (1,), 0), ((1, 1, 65536), (1,), 0), ((2**31,), (1,), 0)],
        *[((1,), (1025,), 0), ((1,), (32, 33), 0), ((1,), (513,), 0), ((1,), (1, 1, 65), 0), ((1,), (1,), 49153)],
    ],
)
def test_launches_the_driver_refuses(emulator, run, grid, block, shared):
    arguments = [np.zeros(1, np.float32), np.int32(0), np.zeros(1)]
    with pytest.raises(emulator.LaunchError, match="kernel total"):
        run(TOTAL, grid, block, arguments, shared, ("-DREAL=float",))


# ------------------------------------------------------------------------------------------------- compilation


def test_errors_name_the_real_line(emulator):
    text = '#line 1 "kernels/wrong.cu"\n\nextern "C" __global__ void wrong(float* x) { x[0] = y; }'
    with pytest.raises(emulator.CompileError, match=r"kernels/wrong\.cu:2:.* 'y' was not declared"):
        emulator.compile_kernels(text)


def test_headers_are_part_of_the_key(emulator, run, tmp_path):
    text = '#include "value.cuh"\nextern "C" __global__ void value(int* out) { out[0] = VALUE; }'
    for value in (1, 2):
        (tmp_path / "value.cuh").write_text(f"#define VALUE {value}\n")
        out = np.zeros(1, np.int32)
        run(text, (1,), (1,), [out], options=(f"-I{tmp_path}",))
        assert out[0] == value


def test_unknown_options_are_refused(emulator):
    with pytest.raises(emulator.CompileError, match="-O3"):
        emulator.compile_kernels(TOTAL, ("-O3",))


def test_kernels_are_found_in_the_text(emulator):
    from faml_emulator.compiler import kernels_of

    text = """// extern "C" __global__ void comment(int n)
    extern "C" __global__ void a(int n) {}
    extern "C" __global__ void __launch_bounds__(256) b() {}
    extern "C" __global__ __launch_bounds__(THREADS, 2) void
        c(int n) {}
    __device__ void d() {}"""
    assert kernels_of(text) == {"a": "faml::kMaxThreads", "b": "256", "c": "THREADS"}


def test_without_compiler(emulator, monkeypatch):
    from faml_emulator import compiler

    compiler.find_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(emulator.CompilerMissingError, match=r"needs g\+\+"):
        emulator.compile_kernels(TOTAL)
