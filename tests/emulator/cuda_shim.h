// Enough CUDA for g++: included ahead of an unmodified .cu file, it runs a grid on the CPU.
//
// Every CUDA thread is a fiber (ucontext). A fiber runs until its thread ends or waits, at a barrier or in a warp
// exchange; when all wait, complete groups go on, and if none is complete the launch fails with who waits where.
// So barriers are real: what a thread reads before another has written it is what was there before, and
// shared memory starts every block full of NaN. The order of threads and blocks can be turned round: a kernel whose
// result depends on it has a race.
//
// Not emulated: textures, streams, cooperative groups, dynamic parallelism, memory ordering weaker than sequential.
#pragma once
#pragma GCC system_header  // warnings are for the kernels

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------------- the language
#define __CUDACC__
#define __CUDACC_RTC__
#define __CUDA_ARCH__ 750
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// thread_local: the one storage class that C++ accepts alone inside a function (static) and after extern, and whose
// variables lie together in memory, apart from all others. Fibers all run on one thread and share them.
#define __shared__ thread_local

constexpr int warpSize = 32;

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define FAML_VECTORS(type, name)                                                                                    \
    struct __align__(2 * sizeof(type)) name##2 { type x, y; };                                                      \
    struct name##3 { type x, y, z; };                                                                               \
    struct __align__(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };                   \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                     \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FAML_VECTORS(float, float)
FAML_VECTORS(double, double)
FAML_VECTORS(int, int)
FAML_VECTORS(long long, longlong)
#undef FAML_VECTORS
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------------------------- functions
#define FAML_MIN_MAX(type)                                                                                          \
    inline type min(type a, type b) { return b < a ? b : a; }                                                       \
    inline type max(type a, type b) { return a < b ? b : a; }
FAML_MIN_MAX(int)
FAML_MIN_MAX(unsigned)
FAML_MIN_MAX(long)
FAML_MIN_MAX(unsigned long)
FAML_MIN_MAX(long long)
FAML_MIN_MAX(unsigned long long)
#undef FAML_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline void sincos(float x, float* s, float* c) { sincosf(x, s, c); }
inline void sincospi(double x, double* s, double* c) {  // exact at multiples of a half
    const double quarter = rint(2 * x);
    sincos((x - quarter / 2) * M_PI, s, c);
    const int q = int(quarter - 4 * floor(quarter / 4));
    const double s0 = *s, c0 = *c;
    *s = q == 0 ? s0 : q == 1 ? c0 : q == 2 ? -s0 : -c0;
    *c = q == 0 ? c0 : q == 1 ? -s0 : q == 2 ? -c0 : s0;
}
inline void sincospif(float x, float* s, float* c) {
    double ds, dc;
    sincospi(double(x), &ds, &dc);
    *s = float(ds);
    *c = float(dc);
}
inline void sincospi(float x, float* s, float* c) { sincospif(x, s, c); }
inline double sinpi(double x) { double s, c; sincospi(x, &s, &c); return s; }
inline double cospi(double x) { double s, c; sincospi(x, &s, &c); return c; }
inline float sinpif(float x) { return float(sinpi(double(x))); }
inline float cospif(float x) { return float(cospi(double(x))); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class To, class From> To faml_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int x) { return faml_bits<float>(x); }
inline int __float_as_int(float x) { return faml_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return faml_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return faml_bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return faml_bits<double>(x); }
inline long long __double_as_longlong(double x) { return faml_bits<long long>(x); }

template <class T> T __ldg(const T* p) { return *p; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// One thread of the CPU runs all fibers: an atomic is a plain read, change, write.
#define FAML_ATOMIC(name, type, changed)                                                                            \
    inline type name(type* address, type value) {                                                                   \
        const type old = *address;                                                                                  \
        *address = changed;                                                                                         \
        return old;                                                                                                 \
    }
#define FAML_ATOMICS(type)                                                                                          \
    FAML_ATOMIC(atomicAdd, type, old + value)                                                                       \
    FAML_ATOMIC(atomicExch, type, value)                                                                            \
    FAML_ATOMIC(atomicMax, type, max(old, value))                                                                   \
    FAML_ATOMIC(atomicMin, type, min(old, value))                                                                   \
    FAML_ATOMIC(atomicOr, type, old | value)                                                                        \
    FAML_ATOMIC(atomicAnd, type, old & value)                                                                       \
    inline type atomicCAS(type* address, type compare, type value) {                                                \
        const type old = *address;                                                                                  \
        if (old == compare) *address = value;                                                                       \
        return old;                                                                                                 \
    }
FAML_ATOMICS(int)
FAML_ATOMICS(unsigned)
FAML_ATOMICS(unsigned long long)
FAML_ATOMIC(atomicAdd, float, old + value)
FAML_ATOMIC(atomicAdd, double, old + value)
#undef FAML_ATOMICS
#undef FAML_ATOMIC

// ---------------------------------------------------------------------------------------------------------- fibers
namespace faml {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 * 1024, kGuard = 4096;
constexpr uint32_t kPoison = 0xFFF5A5A5;    // NaN as float and as double, an odd number as an integer
constexpr size_t kMaxDynamic = 64 * 1024;   // of a block, opted in (Turing)

enum class State { fresh, ready, waiting, done };
enum class Wait { block, warp };

struct Fiber {
    ucontext_t entry;   // only for its first start: swapcontext makes a system call, _longjmp does not
    jmp_buf resume;
    bool started = false;
};

struct Thread {
    State state;
    Fiber* fiber;       // the one it waits on
    Wait wait;
    const char* what;   // the barrier or exchange it waits in
    const char* file;
    int line;
    unsigned mask;                  // lanes it waits for; once released, those that came
    unsigned char in[16], out[16];  // value given to, and seen by, the lanes of a warp
};

struct Machine {
    Thread threads[kMaxThreads];
    Fiber fibers[kMaxThreads];
    Fiber* idle[kMaxThreads];
    unsigned n_idle = 0, n_fibers = 0;
    char* stacks = nullptr;
    Fiber* running = nullptr;
    unsigned current = 0;               // thread now running
    unsigned n_threads = 0, n_started = 0;
    bool reverse = false;
    int votes[2] = {0, 0};              // __syncthreads_count: being gathered, and released
    jmp_buf scheduler;
    std::function<void()> body;         // the kernel with its arguments
    std::string error;
};
static Machine machine;

// What every `extern __shared__` array is another name of (see compiler.py).
static thread_local unsigned char dynamic_shared[kMaxDynamic] asm("faml_dynamic_shared") __align__(128);

}  // namespace faml

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace faml {

static unsigned nth(unsigned i, unsigned n) { return machine.reverse ? n - 1 - i : i; }

static void enter(unsigned thread) {
    machine.current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

// Leave the running fiber; it goes on here when it is resumed.
__attribute__((noinline)) static void leave() {
    if (!_setjmp(machine.running->resume)) _longjmp(machine.scheduler, 1);
}

// What a fiber does: take threads that have not begun, one after the other. So threads that never wait cost no switch.
static void fiber_main() {
    for (;;) {
        while (machine.n_started < machine.n_threads) {
            enter(nth(machine.n_started++, machine.n_threads));
            machine.body();
            machine.threads[machine.current].state = State::done;
        }
        machine.idle[machine.n_idle++] = machine.running;
        leave();
    }
}

__attribute__((noinline)) static void run(Fiber* fiber) {
    machine.running = fiber;
    if (_setjmp(machine.scheduler)) return;
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    setcontext(&fiber->entry);
}

static void make_fibers(unsigned n) {
    if (!machine.stacks) {
        void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) { machine.error = "no memory for the stacks"; return; }
        machine.stacks = static_cast<char*>(memory);
    }
    for (; machine.n_fibers < n; ++machine.n_fibers) {
        char* stack = machine.stacks + machine.n_fibers * kStack;
        mprotect(stack, kGuard, PROT_NONE);
        ucontext_t& entry = machine.fibers[machine.n_fibers].entry;
        getcontext(&entry);
        entry.uc_stack.ss_sp = stack + kGuard;
        entry.uc_stack.ss_size = kStack - kGuard;
        entry.uc_link = nullptr;
        makecontext(&entry, fiber_main, 0);
    }
    machine.n_idle = 0;
    for (unsigned i = 0; i < n; ++i) machine.idle[machine.n_idle++] = &machine.fibers[i];
}

static void wait(Wait kind, const char* what, const char* file, int line, unsigned mask) {
    Thread& self = machine.threads[machine.current];
    const unsigned thread = machine.current;
    self.state = State::waiting;
    self.wait = kind;
    self.what = what;
    self.file = file;
    self.line = line;
    self.mask = mask;
    self.fiber = machine.running;
    leave();
    enter(thread);
}

static bool same_place(const Thread& a, const Thread& b) {
    return a.wait == b.wait && a.mask == b.mask && a.line == b.line && !strcmp(a.what, b.what) && !strcmp(a.file, b.file);
}

// Let every warp exchange go on whose lanes have all arrived at the same place with the same mask (exited and
// missing lanes do not count, as on the device); what comes from such a lane, or from outside the mask, is NaN.
static bool release_warps() {
    bool any = false;
    for (unsigned first = 0; first < machine.n_threads; first += 32) {
        Thread* lanes = machine.threads + first;
        const unsigned n = machine.n_threads - first < 32 ? machine.n_threads - first : 32;
        for (unsigned i = 0; i < n; ++i) {
            if (lanes[i].state != State::waiting || lanes[i].wait != Wait::warp) continue;
            unsigned came = 0;
            bool complete = true;
            for (unsigned j = 0; j < n; ++j) {
                if (!(lanes[i].mask >> j & 1) || lanes[j].state == State::done) continue;
                complete &= lanes[j].state == State::waiting && same_place(lanes[i], lanes[j]);
                came |= 1u << j;
            }
            if (!complete) continue;
            for (unsigned j = 0; j < n; ++j) {
                if (!(came >> j & 1)) continue;
                memcpy(lanes[j].out, lanes[j].in, sizeof lanes[j].out);
                lanes[j].mask = came;
                lanes[j].state = State::ready;
            }
            any = true;
        }
    }
    return any;
}

// Let the block go on if all its threads wait at the same barrier; one that has exited will never come.
static bool release_block() {
    for (unsigned t = 0; t < machine.n_threads; ++t) {
        const Thread& thread = machine.threads[t];
        if (thread.state != State::waiting || thread.wait != Wait::block || !same_place(thread, machine.threads[0]))
            return false;
    }
    for (unsigned t = 0; t < machine.n_threads; ++t) machine.threads[t].state = State::ready;
    machine.votes[1] = machine.votes[0];
    machine.votes[0] = 0;
    return true;
}

static std::string place(const Thread& thread) {
    if (thread.state == State::done) return "exited";
    return std::string("at ") + thread.what + ", " + thread.file + ":" + std::to_string(thread.line) +
           (thread.wait == Wait::warp ? ", mask " + std::to_string(thread.mask) : "");
}

static void report_divergence() {
    machine.error = "divergent barrier:";
    for (unsigned t = 0; t < machine.n_threads;) {  // runs of threads in the same place
        unsigned end = t + 1;
        const std::string here = place(machine.threads[t]);
        while (end < machine.n_threads && place(machine.threads[end]) == here) ++end;
        machine.error += (t ? "; " : " ") + std::string(end == t + 1 ? "thread " : "threads ") + std::to_string(t);
        if (end > t + 1) machine.error += "-" + std::to_string(end - 1);
        machine.error += " " + here;
        t = end;
        if (machine.error.size() > 1000) { machine.error += " ..."; break; }
    }
}

static uint32_t pattern[kMaxDynamic / 4];  // of kPoison

static void fill(void* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i += sizeof pattern)
        memcpy(static_cast<char*>(memory) + i, pattern, bytes - i < sizeof pattern ? bytes - i : sizeof pattern);
}

// All thread_local memory of this library, which is the shared memory of its kernels.
struct SharedMemory { unsigned char* start = nullptr; size_t size = 0; };
static SharedMemory shared_memory() {
    SharedMemory found;
    dynamic_shared[0] = 0;  // the memory is made at the first touch
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            auto* start = static_cast<unsigned char*>(info->dlpi_tls_data);
            const size_t size = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type == PT_TLS && start && start <= dynamic_shared && dynamic_shared < start + size)
                *static_cast<SharedMemory*>(result) = {start, size};
        }
        return 0;
    }, &found);
    return found;
}

static void run_block(unsigned n_threads) {
    machine.n_threads = n_threads;
    machine.n_started = 0;
    for (unsigned t = 0; t < n_threads; ++t) machine.threads[t].state = State::fresh;
    while (machine.n_started < n_threads && machine.error.empty()) run(machine.idle[--machine.n_idle]);
    while (machine.error.empty()) {
        bool waiting = false;
        for (unsigned i = 0; i < n_threads; ++i) {
            Thread& thread = machine.threads[nth(i, n_threads)];
            if (thread.state == State::ready) run(thread.fiber);
            waiting |= thread.state == State::waiting;
            if (!machine.error.empty()) return;
        }
        if (!waiting) return;
        if (!release_warps() && !release_block()) return report_divergence();
    }
}

static sigjmp_buf fault_exit;
static void on_fault(int signal, siginfo_t*, void*) { siglongjmp(fault_exit, signal); }

// Returns 0; 1 after an error of synchronisation, 2 of a memory access, 3 another. `error` says which, and where.
static int launch(const unsigned* grid, const unsigned* block, unsigned shared, bool reverse, char* error, size_t room) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    machine.reverse = reverse;
    machine.error.clear();
    machine.votes[0] = 0;
    const unsigned n_threads = block[0] * block[1] * block[2];
    make_fibers(n_threads);
    for (uint32_t& word : pattern) word = kPoison;
    const SharedMemory memory = shared_memory();

    static char signal_stack[64 * 1024];
    stack_t alternate = {}, old_alternate;
    alternate.ss_sp = signal_stack;
    alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &old_alternate);
    struct sigaction action = {}, old_segv, old_bus, old_fpe;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    sigaction(SIGFPE, &action, &old_fpe);

    volatile int status = 1;
    const unsigned long long n_blocks = 1ull * grid[0] * grid[1] * grid[2];
    if (const int signal = sigsetjmp(fault_exit, 1)) {
        status = signal == SIGFPE ? 3 : 2;
        machine.error = signal == SIGFPE ? "divided an integer by 0"
                                         : "touched memory outside every array (or overflowed its stack)";
        machine.error = "thread " + std::to_string(machine.current) + " " + machine.error;
    } else {
        for (unsigned long long i = 0; i < n_blocks && machine.error.empty(); ++i) {
            const unsigned long long b = reverse ? n_blocks - 1 - i : i;
            blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
            fill(memory.start, memory.size);
            run_block(n_threads);
            if (machine.error.empty() && memcmp(dynamic_shared + shared, pattern, kMaxDynamic - shared)) {
                status = 2;
                machine.error = "wrote past the " + std::to_string(shared) + " bytes of dynamic shared memory";
            }
        }
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaction(SIGFPE, &old_fpe, nullptr);
    sigaltstack(&old_alternate, nullptr);
    if (machine.error.empty()) return 0;
    for (Fiber& fiber : machine.fibers) fiber.started = false;  // they were left in the middle: begin anew
    snprintf(error, room, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, machine.error.c_str());
    return status;
}

// --------------------------------------------------------------------------------------- waiting, as kernels call it
static void fail(const std::string& error) {
    if (machine.error.empty()) machine.error = error;
    leave();
}

template <class T> void give(T value, const char* what, const char* file, int line, unsigned mask) {
    static_assert(sizeof(T) <= sizeof(Thread::in));
    if (!(mask >> (machine.current % 32) & 1))
        fail(std::string(what) + ", " + file + ":" + std::to_string(line) + ": the calling lane is not in its mask");
    memcpy(machine.threads[machine.current].in, &value, sizeof value);
    wait(Wait::warp, what, file, line, mask);
}

static bool came(unsigned lane) { return machine.threads[machine.current].mask >> lane & 1; }

template <class T> T seen(unsigned lane) {
    T value;
    if (came(lane)) memcpy(&value, machine.threads[machine.current / 32 * 32 + lane].out, sizeof value);
    else fill(&value, sizeof value);
    return value;
}

// Lane `source` of the calling lane's group of `width`; outside the group the lane's own value.
template <class T> T shuffle(T value, int source, int width, const char* what, const char* file, int line, unsigned mask) {
    give(value, what, file, line, mask);
    const int lane = int(machine.current % 32), group = lane / width * width;
    return source < group || source >= group + width ? value : seen<T>(unsigned(source));
}

static int lane() { return int(machine.current % 32); }

static unsigned ballot(bool predicate, const char* what, const char* file, int line, unsigned mask) {
    give(int(predicate), what, file, line, mask);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (came(i)) votes |= unsigned(seen<int>(i)) << i;
    return votes;
}

static int count(bool predicate, const char* what, const char* file, int line) {
    machine.votes[0] += predicate;
    wait(Wait::block, what, file, line, 0);
    return machine.votes[1];
}

// ------------------------------------------------------------------------------------------------ calls from Python
template <class T> std::string code() {
    using U = std::remove_cv_t<T>;
    const std::string size = std::to_string(sizeof(U));
    if constexpr (std::is_same_v<U, bool>) return "b1";
    else if constexpr (std::is_floating_point_v<U>) return "f" + size;
    else if constexpr (std::is_integral_v<U>) return (std::is_signed_v<U> ? "i" : "u") + size;
    else return "V" + size;
}

template <class T> std::string parameter() {
    using P = std::remove_pointer_t<T>;
    if constexpr (std::is_pointer_v<T>) return (std::is_const_v<P> ? "const " : "") + code<P>() + "*";
    else return code<T>();
}

template <class... A> const char* signature(void (*)(A...)) {
    static const std::string text = ((parameter<A>() + ",") + ... + "");
    return text.c_str();
}

template <class... A, size_t... I> void prepare(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    machine.body = [=] { kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...); };
}
template <class... A> void prepare(void (*kernel)(A...), void** arguments) {
    prepare(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace faml

// Bytes of static shared memory, up to padding.
extern "C" unsigned faml_static_shared() { return unsigned(faml::shared_memory().size - faml::kMaxDynamic); }

#define __syncthreads() faml::wait(faml::Wait::block, "__syncthreads", __FILE__, __LINE__, 0)
#define __syncthreads_count(p) faml::count(p, "__syncthreads_count", __FILE__, __LINE__)
#define __syncthreads_or(p) int(faml::count(p, "__syncthreads_or", __FILE__, __LINE__) > 0)
#define __syncthreads_and(p) int(faml::count(!(p), "__syncthreads_and", __FILE__, __LINE__) == 0)

#define FAML_CALL(name) name, const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncwarp(unsigned FAML_CALL(mask = 0xFFFFFFFF)) { faml::give(0, "__syncwarp", file, line, mask); }
template <class T> T __shfl_sync(unsigned mask, T value, int source, int FAML_CALL(width = 32)) {
    const int group = faml::lane() / width * width;
    return faml::shuffle(value, group + (source & (width - 1)), width, "__shfl_sync", file, line, mask);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int FAML_CALL(width = 32)) {
    return faml::shuffle(value, faml::lane() + int(delta), width, "__shfl_down_sync", file, line, mask);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int FAML_CALL(width = 32)) {
    return faml::shuffle(value, faml::lane() - int(delta), width, "__shfl_up_sync", file, line, mask);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int FAML_CALL(width = 32)) {
    return faml::shuffle(value, faml::lane() ^ bits, width, "__shfl_xor_sync", file, line, mask);
}
inline unsigned __ballot_sync(unsigned mask, int FAML_CALL(predicate)) {
    return faml::ballot(predicate, "__ballot_sync", file, line, mask);
}
inline int __any_sync(unsigned mask, int FAML_CALL(predicate)) {
    return faml::ballot(predicate, "__any_sync", file, line, mask) != 0;
}
inline int __all_sync(unsigned mask, int FAML_CALL(predicate)) {
    return faml::ballot(!predicate, "__all_sync", file, line, mask) == 0;
}
#undef FAML_CALL
