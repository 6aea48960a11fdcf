// Types and the trilinear sample that the kernels share. REAL (float or double) comes from the compiler's options.
#pragma once

typedef REAL real;

struct alignas(2 * sizeof(real)) cplx {  // complex64 or complex128
    real re, im;
};

struct alignas(16) cplx_double {  // complex128, of sums
    double re, im;
};

constexpr int WARP = 32;
constexpr int MAX_THREADS = 256;  // of a block; faml_gpu/kernels.py launches no more
// Blocks of a multiprocessor the compiler is to leave registers for. Left to itself it aims at more, and spills.
constexpr int BLOCKS = sizeof(real) == sizeof(float) ? 4 : 2;

// Value at (x, y, z) of a centred half grid (2c + 1, 2c + 1, c + 1), axes [z, y, x]; x < 0 by Hermitian symmetry.
// |x|, |y|, |z| < c: the caller has checked that the grid reaches one step beyond the samples.
__device__ __forceinline__ cplx sample(const cplx* __restrict__ grid, int c, real x, real y, real z) {
    const bool negative = x < 0;
    if (negative) {
        x = -x;
        y = -y;
        z = -z;
    }
    y += c;
    z += c;
    const int ix = int(x), iy = int(y), iz = int(z);
    const real fx = x - ix, fy = y - iy, fz = z - iz;
    const int row = c + 1, plane = (2 * c + 1) * row;
    const cplx* __restrict__ corner = grid + (iz * plane + iy * row + ix);
    cplx value = {0, 0};
#pragma unroll
    for (int dz = 0; dz < 2; ++dz) {
#pragma unroll
        for (int dy = 0; dy < 2; ++dy) {
            const real w = (dz ? fz : 1 - fz) * (dy ? fy : 1 - fy);
            const cplx low = corner[dz * plane + dy * row], high = corner[dz * plane + dy * row + 1];
            value.re += w * (low.re + fx * (high.re - low.re));
            value.im += w * (low.im + fx * (high.im - low.im));
        }
    }
    if (negative) value.im = -value.im;
    return value;
}

// The same of a real, point-symmetric function.
__device__ __forceinline__ real sample(const real* __restrict__ grid, int c, real x, real y, real z) {
    if (x < 0) {
        x = -x;
        y = -y;
        z = -z;
    }
    y += c;
    z += c;
    const int ix = int(x), iy = int(y), iz = int(z);
    const real fx = x - ix, fy = y - iy, fz = z - iz;
    const int row = c + 1, plane = (2 * c + 1) * row;
    const real* __restrict__ corner = grid + (iz * plane + iy * row + ix);
    real value = 0;
#pragma unroll
    for (int dz = 0; dz < 2; ++dz) {
#pragma unroll
        for (int dy = 0; dy < 2; ++dy) {
            const real w = (dz ? fz : 1 - fz) * (dy ? fy : 1 - fy);
            const real low = corner[dz * plane + dy * row], high = corner[dz * plane + dy * row + 1];
            value += w * (low + fx * (high - low));
        }
    }
    return value;
}

__device__ __forceinline__ cplx times(cplx a, cplx b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }

// exp(2 pi i turns). The whole turns go in double: k t / N of a far shift would lose its fraction in float.
__device__ __forceinline__ cplx unit(double turns) {
    const real angle = real(2 * (turns - rint(turns)));
    cplx value;
    if constexpr (sizeof(real) == sizeof(float))
        sincospif(angle, (float*)&value.im, (float*)&value.re);
    else
        sincospi(angle, (double*)&value.im, (double*)&value.re);
    return value;
}
