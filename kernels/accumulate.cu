// Sums of the M-step (Eq. 10). Twin: faml_gpu/ops/accumulate.py, which says what the arrays are.
#include "common.cuh"

// sums (K, m) = sum of P R^-1(w X), weight_sums (K, m) = sum of P R^-1 w over the entries of each class.
// In gather form: one thread a voxel of one class (blockIdx.y), that reads where each particle has it; no atomics, and
// the order of the sums is that of the list. order (n,): entries sorted by class; those of class k are
// class_start[k] .. class_start[k + 1]. phase (n, 3, 2 r_max + 1): exp(2 pi i k t' / N) with t' = R^T t.
// The block loads `tile` entries at a time into shared memory: tile * 3 (2 r_max + 1) cplx, tile * 9 real.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    accumulate(const cplx* __restrict__ grids, int c, const real* __restrict__ weight_grids, int d,
               const long long* __restrict__ weight_index, const long long* __restrict__ particle,
               const long long* __restrict__ order, const long long* __restrict__ class_start,
               const real* __restrict__ rotations, const cplx* __restrict__ phase,
               const double* __restrict__ probability, const int* __restrict__ coords, int m, int r_max, int padding,
               int weigh_twice, int tile, cplx_double* __restrict__ sums, double* __restrict__ weight_sums) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int width = 3 * (2 * r_max + 1);
    cplx* tables = reinterpret_cast<cplx*>(shared);
    real* matrices = reinterpret_cast<real*>(tables + tile * width);
    const int k = blockIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = j < m;  // a thread without a voxel still helps to load
    const int kx = active ? coords[3 * j] : 0, ky = active ? coords[3 * j + 1] : 0, kz = active ? coords[3 * j + 2] : 0;
    const long long grid_size = (long long)(2 * c + 1) * (2 * c + 1) * (c + 1);
    const long long weight_size = (long long)(2 * d + 1) * (2 * d + 1) * (d + 1);
    const long long last = class_start[k + 1];
    cplx_double sum = {0, 0};
    double weight_sum = 0;
    for (long long first = class_start[k]; first < last; first += tile) {
        const int entries = int(min((long long)tile, last - first));
        for (int e = threadIdx.x; e < entries * width; e += blockDim.x)
            tables[e] = phase[order[first + e / width] * width + e % width];
        for (int e = threadIdx.x; e < entries * 9; e += blockDim.x)
            matrices[e] = rotations[order[first + e / 9] * 9 + e % 9];
        __syncthreads();
        if (active) {
            cplx part = {0, 0};  // of this tile, in `real`: double is slow on workstation cards
            real weight_part = 0;
            for (int e = 0; e < entries; ++e) {
                const long long entry = order[first + e], b = particle[entry];
                const real p = real(probability[entry]);
                const real* r = matrices + 9 * e;
                const cplx *along_x = tables + e * width + r_max, *along_y = along_x + 2 * r_max + 1,
                           *along_z = along_y + 2 * r_max + 1;
                const real x = r[0] * kx + r[1] * ky + r[2] * kz;
                const real y = r[3] * kx + r[4] * ky + r[5] * kz;
                const real z = r[6] * kx + r[7] * ky + r[8] * kz;
                const real w = sample(weight_grids + weight_index[b] * weight_size, d, x, y, z);
                cplx value = sample(grids + b * grid_size, c, x * padding, y * padding, z * padding);
                value = times(value, times(times(along_x[kx], along_y[ky]), along_z[kz]));
                const real scale = weigh_twice ? p * w : p;
                part.re += scale * value.re;
                part.im += scale * value.im;
                weight_part += p * w;
            }
            sum.re += part.re;
            sum.im += part.im;
            weight_sum += weight_part;
        }
        __syncthreads();  // before the next tile overwrites what others still read
    }
    if (active) {
        sums[(long long)k * m + j] = sum;
        weight_sums[(long long)k * m + j] = weight_sum;
    }
}
