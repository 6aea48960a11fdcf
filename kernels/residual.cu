// Masked residual sums of the E-step. Twin: faml_gpu/ops/residual.py, which says what the arrays are.
#include "common.cuh"

// Terms a lane adds up in `real` before the sum goes on in double (double is slow on workstation cards).
constexpr int RUN = 8;

// out (B, n, r_max + 1): sum over each shell of w^2 |X(xi) - A(R^T xi) exp(-2 pi i xi.t / N)|^2, both of each pair.
// One block a (particle, pose); its warps share the shells. Rotated, shifted, subtracted, weighted, squared and summed
// in registers: no rotated volume in memory. rotations (B, n, 9), times the padding of the grid.
// Shared memory: 3 (2 r_max + 1) cplx.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    residual(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra, const real* __restrict__ weights,
             const long long* __restrict__ weight_index, const real* __restrict__ rotations,
             const double* __restrict__ shifts, const long long* __restrict__ count, const int* __restrict__ coords,
             const long long* __restrict__ shell_start, int n, int m, int r_max, int box, double* __restrict__ out) {
    extern __shared__ __align__(16) unsigned char shared[];
    // exp(-2 pi i k t / N) per axis: xi is on the lattice, so its phase is a product of three table entries.
    cplx* phase = reinterpret_cast<cplx*>(shared);
    const long long pose = blockIdx.x;
    const int b = int(pose / n), i = int(pose % n), width = 2 * r_max + 1;
    if (i >= count[b]) return;
    for (int e = threadIdx.x; e < 3 * width; e += blockDim.x)
        phase[e] = unit(-shifts[3 * pose + e / width] * (e % width - r_max) / box);
    __syncthreads();

    const real* __restrict__ r = rotations + 9 * pose;
    const real r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3], r4 = r[4], r5 = r[5], r6 = r[6], r7 = r[7], r8 = r[8];
    const cplx* __restrict__ x_particle = spectra + (long long)b * m;
    const real* __restrict__ w_particle = weights + weight_index[b] * m;
    const cplx *along_x = phase + r_max, *along_y = along_x + width, *along_z = along_y + width;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    // A shell holds about s^2 voxels. Dealt out from the largest down, to and fro, every warp gets nearly as many.
    for (int round = 0; round * warps < r_max; ++round) {
        const int s = r_max - round * warps - (round % 2 ? warps - 1 - warp : warp);
        if (s < 1) continue;
        const int last = int(shell_start[s + 1]);
        double total = 0;
        for (int first = int(shell_start[s]); first < last; first += RUN * WARP) {
            const int end = min(last, first + RUN * WARP);
            real part = 0;
            for (int j = first + lane; j < end; j += WARP) {
                const real w = w_particle[j];
                if (w == 0) continue;
                const int kx = coords[3 * j], ky = coords[3 * j + 1], kz = coords[3 * j + 2];
                const cplx a = sample(grid, c, r0 * kx + r3 * ky + r6 * kz, r1 * kx + r4 * ky + r7 * kz,
                                      r2 * kx + r5 * ky + r8 * kz);
                const cplx model = times(a, times(times(along_x[kx], along_y[ky]), along_z[kz]));
                const real re = w * (x_particle[j].re - model.re), im = w * (x_particle[j].im - model.im);
                part += re * re + im * im;
            }
            total += part;
        }
        for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, step);
        if (lane == 0) out[pose * (r_max + 1) + s] = 2 * total;
    }
}
