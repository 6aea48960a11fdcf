// Rotated references. Twin: faml_gpu/ops/rotate.py, which says what the arrays are.
#include "common.cuh"

// out (n, m) = (R A)(xi) = A(R^T xi). One thread a voxel, over the poses of its column of blocks.
// rotations (n, 9), times the padding of the grid; coords (m, 3).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    rotate(const cplx* __restrict__ grid, int c, const real* __restrict__ rotations, const real* __restrict__ coords,
           int n, int m, cplx* __restrict__ out) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= m) return;
    const real x = coords[3 * j], y = coords[3 * j + 1], z = coords[3 * j + 2];
    for (int i = blockIdx.y; i < n; i += gridDim.y) {
        const real* __restrict__ r = rotations + 9 * i;
        out[(long long)i * m + j] = sample(grid, c, r[0] * x + r[3] * y + r[6] * z, r[1] * x + r[4] * y + r[7] * z,
                                           r[2] * x + r[5] * y + r[8] * z);
    }
}
