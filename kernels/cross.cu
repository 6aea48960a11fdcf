// Cross spectra of the shift search. Launched by faml_gpu/ops/correlations.py, which says what the arrays are.
#include "common.cuh"

// crops (n, r_max + 1, 2 r_max + 1, 2 r_max + 1) = v X conj(R A) exp(2 pi i xi.c / N), 0 off the support; power (n) =
// sum v |R A|^2, both of each pair. One block an entry; no rotated volume in memory, and the crop is written once.
// rotations (n, 9), times the padding of the grid.
// Shared memory: 3 (2 r_max + 1) cplx, then a double for each warp.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    cross(const cplx* __restrict__ grid, int c, const cplx* __restrict__ spectra, const real* __restrict__ weights,
          const long long* __restrict__ weight_index, const long long* __restrict__ particle,
          const real* __restrict__ rotations, const double* __restrict__ centres, const int* __restrict__ coords, int m,
          int r_max, int box, cplx* __restrict__ crops, double* __restrict__ power) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int width = 2 * r_max + 1;
    cplx* phase = reinterpret_cast<cplx*>(shared);
    double* sums = reinterpret_cast<double*>(phase + 3 * width + width % 2);  // of 8 or 16 bytes each: even is aligned
    const long long entry = blockIdx.x, b = particle[entry];
    const int size = (r_max + 1) * width * width;
    cplx* __restrict__ crop = crops + entry * size;
    for (int e = threadIdx.x; e < 3 * width; e += blockDim.x)
        phase[e] = unit(centres[3 * entry + e / width] * (e % width - r_max) / box);
    for (int e = threadIdx.x; e < size; e += blockDim.x) crop[e] = {0, 0};
    __syncthreads();

    const real* __restrict__ r = rotations + 9 * entry;
    const real r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3], r4 = r[4], r5 = r[5], r6 = r[6], r7 = r[7], r8 = r[8];
    const cplx* __restrict__ x_particle = spectra + b * m;
    const real* __restrict__ w_particle = weights + weight_index[b] * m;
    const cplx *along_x = phase + r_max, *along_y = along_x + width, *along_z = along_y + width;
    double total = 0;
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
        const real w = w_particle[j];
        if (w == 0) continue;
        const int kx = coords[3 * j], ky = coords[3 * j + 1], kz = coords[3 * j + 2];
        const cplx a = sample(grid, c, r0 * kx + r3 * ky + r6 * kz, r1 * kx + r4 * ky + r7 * kz,
                              r2 * kx + r5 * ky + r8 * kz);
        total += w * (a.re * a.re + a.im * a.im);
        const cplx x = x_particle[j];
        const cplx product = {w * (x.re * a.re + x.im * a.im), w * (x.im * a.re - x.re * a.im)};
        crop[(kx * width + ky + r_max) * width + kz + r_max] =
            times(product, times(times(along_x[kx], along_y[ky]), along_z[kz]));
    }
    for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, step);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        double whole = 0;
        for (int warp = 0; warp < int(blockDim.x) / WARP; ++warp) whole += sums[warp];
        power[entry] = 2 * whole;
    }
}
