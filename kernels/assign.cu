// Nearest-neighbour (Voronoi) assignment. Twin: faml_gpu/ops/assign.py, which says what the arrays are.
#include "common.cuh"

// hits (B, n) += points of this block nearest to each candidate under tau^2 = 6 - 2 tr(R1^T R2) + a |t1 - t2|^2.
// Blocks 0 .. chunks - 1 take the points for particle 0, and so on; one thread a point. Counts are integers: atomics
// do not make them depend on the order. In double, as the twin, so that both name the same candidate.
// Shared memory: n int.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    assign(const double* __restrict__ points, const double* __restrict__ units, const double* __restrict__ rotations,
           const double* __restrict__ shifts, const long long* __restrict__ count, double translation_weight,
           int n_points, int n, int chunks, unsigned long long* __restrict__ hits) {
    extern __shared__ __align__(16) unsigned char shared[];
    int* block_hits = reinterpret_cast<int*>(shared);
    __shared__ double low[3], span[3];
    const int b = blockIdx.x / chunks, p = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    const int candidates = int(count[b]);
    const double* __restrict__ r = rotations + 9LL * b * n;
    const double* __restrict__ t = shifts + 3LL * b * n;
    if (candidates == 0) return;
    for (int i = threadIdx.x; i < candidates; i += blockDim.x) block_hits[i] = 0;
    for (int axis = threadIdx.x; axis < 3; axis += blockDim.x) {  // the box around the candidates' shifts
        double least = t[axis], most = t[axis];
        for (int i = 1; i < candidates; ++i) {
            least = min(least, t[3 * i + axis]);
            most = max(most, t[3 * i + axis]);
        }
        low[axis] = least;
        span[axis] = most - least;
    }
    __syncthreads();
    if (p < n_points) {
        double point[9], place[3];
        for (int e = 0; e < 9; ++e) point[e] = points[9LL * p + e];
        for (int axis = 0; axis < 3; ++axis) place[axis] = low[axis] + span[axis] * units[3LL * p + axis];
        int nearest = 0;
        double least = 0;
        for (int i = 0; i < candidates; ++i) {
            double trace = 0;
            for (int e = 0; e < 9; ++e) trace += point[e] * r[9 * i + e];
            double distance = -2 * trace;
            for (int axis = 0; axis < 3; ++axis) {
                const double apart = place[axis] - t[3 * i + axis];
                distance += translation_weight * apart * apart;
            }
            if (i == 0 || distance < least) {
                least = distance;
                nearest = i;
            }
        }
        atomicAdd(block_hits + nearest, 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < candidates; i += blockDim.x)
        if (block_hits[i]) atomicAdd(hits + (long long)b * n + i, (unsigned long long)block_hits[i]);
}
