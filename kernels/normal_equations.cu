// Normal equations of the refinement of poses. Twin: faml_gpu/ops/normal_equations.py, which says what the arrays are.
#include "common.cuh"

constexpr int SUMS = 28;  // of seven functions with one another
// Terms a thread adds up in `real` before those of its warp go on in double. (28 doubles of its own would not fit into
// its registers.)
constexpr int RUN = 32;

// As `sample`, and its derivatives along x, y and z.
__device__ __forceinline__ cplx sample(const cplx* __restrict__ grid, int c, real x, real y, real z, cplx* gradient) {
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
    gradient[0] = gradient[1] = gradient[2] = value;
#pragma unroll
    for (int dz = 0; dz < 2; ++dz) {
#pragma unroll
        for (int dy = 0; dy < 2; ++dy) {
            const real wy = dy ? fy : 1 - fy, wz = dz ? fz : 1 - fz;
            const cplx low = corner[dz * plane + dy * row], high = corner[dz * plane + dy * row + 1];
            const cplx step = {high.re - low.re, high.im - low.im};
            const cplx at = {low.re + fx * step.re, low.im + fx * step.im};
            value.re += wz * wy * at.re;
            value.im += wz * wy * at.im;
            gradient[0].re += wz * wy * step.re;
            gradient[0].im += wz * wy * step.im;
            gradient[1].re += (dy ? wz : -wz) * at.re;
            gradient[1].im += (dy ? wz : -wz) * at.im;
            gradient[2].re += (dz ? wy : -wy) * at.re;
            gradient[2].im += (dz ? wy : -wy) * at.im;
        }
    }
    if (negative) {  // f(-u) = conj f(u): of the derivatives the real part changes its sign
        value.im = -value.im;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) gradient[axis].re = -gradient[axis].re;
    }
    return value;
}

// out (B, n, 7, 7): sum of w^2 Re[conj(g_p) g_q], both of each pair, g the derivatives of A(R^T xi) exp(-2 pi i xi.t / N)
// along a rotation vector and along t, and last X less that. rotations (B, n, 9), times the padding of the grid.
// One block for a pose. Its sums take registers: half as many blocks as of `residual` find room.
// Shared memory: 28 doubles for each warp, then 3 (2 r_max + 1) cplx.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS / 2)
    normal_equations(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra,
                     const real* __restrict__ weights, const long long* __restrict__ weight_index,
                     const real* __restrict__ rotations, const double* __restrict__ shifts,
                     const long long* __restrict__ count, const int* __restrict__ coords, int n, int m, int r_max,
                     int box, double* __restrict__ out) {
    extern __shared__ __align__(16) unsigned char shared[];
    const long long pose = blockIdx.x;
    const int b = int(pose / n), i = int(pose % n), width = 2 * r_max + 1;
    if (i >= count[b]) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    double* sums = reinterpret_cast<double*>(shared);
    cplx* phase = reinterpret_cast<cplx*>(sums + SUMS * warps);
    for (int e = threadIdx.x; e < 3 * width; e += blockDim.x)
        phase[e] = unit(-shifts[3 * pose + e / width] * (e % width - r_max) / box);
    for (int e = threadIdx.x; e < SUMS * warps; e += blockDim.x) sums[e] = 0;
    __syncthreads();

    const real* __restrict__ r = rotations + 9 * pose;
    const real r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3], r4 = r[4], r5 = r[5], r6 = r[6], r7 = r[7], r8 = r[8];
    const cplx* __restrict__ x_particle = spectra + (long long)b * m;
    const real* __restrict__ w_particle = weights + weight_index[b] * m;
    const cplx *along_x = phase + r_max, *along_y = along_x + width, *along_z = along_y + width;
    const real turn = real(6.283185307179586) / box;
    double* of_warp = sums + SUMS * warp;
    for (int first = 0; first < m; first += RUN * blockDim.x) {
        const int end = min(m, first + RUN * int(blockDim.x));
        real part[SUMS] = {};
        for (int j = first + threadIdx.x; j < end; j += blockDim.x) {
            const real w = w_particle[j];
            if (w == 0) continue;
            const int kx = coords[3 * j], ky = coords[3 * j + 1], kz = coords[3 * j + 2];
            const real x = kx, y = ky, z = kz;
            cplx d[3];
            const cplx a = sample(grid, c, r0 * x + r3 * y + r6 * z, r1 * x + r4 * y + r7 * z,
                                  r2 * x + r5 * y + r8 * z, d);
            cplx p = times(times(along_x[kx], along_y[ky]), along_z[kz]);
            p = {w * p.re, w * p.im};
            // R grad A, with the padding; its vector product with xi.
            const cplx u = {r0 * d[0].re + r1 * d[1].re + r2 * d[2].re, r0 * d[0].im + r1 * d[1].im + r2 * d[2].im};
            const cplx v = {r3 * d[0].re + r4 * d[1].re + r5 * d[2].re, r3 * d[0].im + r4 * d[1].im + r5 * d[2].im};
            const cplx q = {r6 * d[0].re + r7 * d[1].re + r8 * d[2].re, r6 * d[0].im + r7 * d[1].im + r8 * d[2].im};
            const cplx model = times(a, p), of_particle = x_particle[j];
            const cplx g[7] = {times({v.re * z - q.re * y, v.im * z - q.im * y}, p),
                               times({q.re * x - u.re * z, q.im * x - u.im * z}, p),
                               times({u.re * y - v.re * x, u.im * y - v.im * x}, p),
                               {turn * x * model.im, -turn * x * model.re},
                               {turn * y * model.im, -turn * y * model.re},
                               {turn * z * model.im, -turn * z * model.re},
                               {w * of_particle.re - model.re, w * of_particle.im - model.im}};
            int e = 0;
#pragma unroll
            for (int s = 0; s < 7; ++s) {
#pragma unroll
                for (int t = s; t < 7; ++t) part[e++] += g[s].re * g[t].re + g[s].im * g[t].im;
            }
        }
#pragma unroll
        for (int e = 0; e < SUMS; ++e) {
            for (int step = WARP / 2; step > 0; step /= 2) part[e] += __shfl_down_sync(0xffffffffu, part[e], step);
            if (lane == 0) of_warp[e] += part[e];
        }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < 49; place += blockDim.x) {
        const int s = min(place / 7, place % 7), t = max(place / 7, place % 7);
        double whole = 0;
        for (int other = 0; other < warps; ++other) whole += sums[SUMS * other + s * 7 - s * (s - 1) / 2 + t - s];
        out[49 * pose + place] = 2 * whole;
    }
}
