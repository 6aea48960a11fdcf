// Masked residual sums of the E-step. Twin: faml_gpu/ops/residual.py, which says what the arrays are.
#include "common.cuh"

// Terms a lane adds up in `real` before the sum goes on in double (double is slow on workstation cards).
constexpr int RUN = 8;
// Shifts of one rotation that share its samples: the six that `refine` tries. Each costs registers.
constexpr int SHIFTS = 6;

// out (B, n, k, r_max + 1): sum over each shell of w^2 |X(xi) - A(R^T xi) exp(-2 pi i xi.t / N)|^2, both of each pair,
// of k shifts (B, n, k, 3) of each rotation (B, n, 9), which is times the padding of the grid.
// One block for MOST shifts of a (particle, rotation); its warps share the shells. Rotated, shifted, subtracted,
// weighted, squared and summed in registers: no rotated volume in memory.
// phase: shared memory, MOST * 3 (2 r_max + 1) of them.
template <int MOST>
__device__ __forceinline__ void residuals(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra,
                                          const real* __restrict__ weights, const long long* __restrict__ weight_index,
                                          const real* __restrict__ rotations, const double* __restrict__ shifts,
                                          const long long* __restrict__ count, const int* __restrict__ coords,
                                          const long long* __restrict__ shell_start, int n, int k, int m, int r_max,
                                          int box, cplx* phase, double* __restrict__ out) {
    const int parts = (k + MOST - 1) / MOST, first_shift = int(blockIdx.x % parts) * MOST;
    const int n_shifts = min(MOST, k - first_shift);
    const long long rotation = blockIdx.x / parts, first_pose = rotation * k + first_shift;
    const int b = int(rotation / n), i = int(rotation % n), width = 2 * r_max + 1;
    if (i >= count[b]) return;
    // exp(-2 pi i k t / N) per axis: xi is on the lattice, so its phase is a product of three table entries.
    for (int e = threadIdx.x; e < n_shifts * 3 * width; e += blockDim.x)
        phase[e] = unit(-shifts[3 * first_pose + e / width] * (e % width - r_max) / box);
    __syncthreads();

    const real* __restrict__ r = rotations + 9 * rotation;
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
        double total[MOST] = {};
        for (int first = int(shell_start[s]); first < last; first += RUN * WARP) {
            const int end = min(last, first + RUN * WARP);
            real part[MOST] = {};
            for (int j = first + lane; j < end; j += WARP) {
                const real w = w_particle[j];
                if (w == 0) continue;
                const int kx = coords[3 * j], ky = coords[3 * j + 1], kz = coords[3 * j + 2];
                const cplx a = sample(grid, c, r0 * kx + r3 * ky + r6 * kz, r1 * kx + r4 * ky + r7 * kz,
                                      r2 * kx + r5 * ky + r8 * kz);
                const cplx x = x_particle[j];
#pragma unroll
                for (int q = 0; q < MOST; ++q) {
                    if (q >= n_shifts) break;
                    const int at = 3 * width * q;
                    const cplx model = times(a, times(times(along_x[at + kx], along_y[at + ky]), along_z[at + kz]));
                    const real re = w * (x.re - model.re), im = w * (x.im - model.im);
                    part[q] += re * re + im * im;
                }
            }
#pragma unroll
            for (int q = 0; q < MOST; ++q) total[q] += part[q];
        }
#pragma unroll
        for (int q = 0; q < MOST; ++q) {
            for (int step = WARP / 2; step > 0; step /= 2) total[q] += __shfl_down_sync(0xffffffffu, total[q], step);
            if (lane == 0 && q < n_shifts) out[(first_pose + q) * (r_max + 1) + s] = 2 * total[q];
        }
    }
}

// One shift of each rotation, k = 1.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    residual(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra, const real* __restrict__ weights,
             const long long* __restrict__ weight_index, const real* __restrict__ rotations,
             const double* __restrict__ shifts, const long long* __restrict__ count, const int* __restrict__ coords,
             const long long* __restrict__ shell_start, int n, int m, int r_max, int box, double* __restrict__ out) {
    extern __shared__ __align__(16) unsigned char shared[];
    residuals<1>(grid, c, spectra, weights, weight_index, rotations, shifts, count, coords, shell_start, n, 1, m, r_max,
                 box, reinterpret_cast<cplx*>(shared), out);
}

// Several. The sums of each take registers: half as many blocks find room.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS / 2)
    residual_shifts(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra,
                    const real* __restrict__ weights, const long long* __restrict__ weight_index,
                    const real* __restrict__ rotations, const double* __restrict__ shifts,
                    const long long* __restrict__ count, const int* __restrict__ coords,
                    const long long* __restrict__ shell_start, int n, int k, int m, int r_max, int box,
                    double* __restrict__ out) {
    extern __shared__ __align__(16) unsigned char shared[];
    residuals<SHIFTS>(grid, c, spectra, weights, weight_index, rotations, shifts, count, coords, shell_start, n, k, m,
                      r_max, box, reinterpret_cast<cplx*>(shared), out);
}
