// Local maxima on the SO(3) grid. Twin: faml_gpu/ops/peaks.py, which says what the arrays are.
#include "common.cuh"

// Value of one function (n_beta, n_alpha, n_alpha), axes [beta, gamma, alpha], up to one step beyond the grid:
// across a pole the neighbour of (alpha, beta, gamma) is (alpha + pi, -beta, gamma + pi).
__device__ __forceinline__ real at(const real* __restrict__ score, int n_beta, int n_alpha, int j, int g, int a) {
    if (j < 0 || j >= n_beta) {
        j = j < 0 ? -1 - j : 2 * n_beta - 1 - j;
        g += n_alpha / 2;
        a += n_alpha / 2;
    }
    return score[(j * n_alpha + (g + n_alpha) % n_alpha) * n_alpha + (a + n_alpha) % n_alpha];
}

// found (B, capacity), n_found (B,): grid points above their 26 neighbours, in no fixed order. Of a plateau the first
// point counts. Blocks 0 .. chunks - 1 take the points of function 0, and so on; one thread a point.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    so3_maxima(const real* __restrict__ scores, int n_beta, int n_alpha, int chunks, int capacity,
               int* __restrict__ found, int* __restrict__ n_found) {
    const int b = blockIdx.x / chunks, index = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    const int size = n_beta * n_alpha * n_alpha;
    if (index >= size) return;
    const real* __restrict__ score = scores + (long long)b * size;
    const int j = index / (n_alpha * n_alpha), g = index / n_alpha % n_alpha, a = index % n_alpha;
    const real value = score[index];
    for (int dj = -1; dj <= 1; ++dj)
        for (int dg = -1; dg <= 1; ++dg)
            for (int da = -1; da <= 1; ++da) {
                if (dj == 0 && dg == 0 && da == 0) continue;
                const real other = at(score, n_beta, n_alpha, j + dj, g + dg, a + da);
                const bool before = dj < 0 || (dj == 0 && (dg < 0 || (dg == 0 && da < 0)));
                if (other > value || (before && other == value)) return;
            }
    const int slot = atomicAdd(n_found + b, 1);
    if (slot < capacity) found[(long long)b * capacity + slot] = index;
}

// Vertex of the quadratic through the neighbourhood of (j, g, a): its place in steps (beta, gamma, alpha), its height.
__device__ double vertex(const real* __restrict__ score, int n_beta, int n_alpha, int j, int g, int a,
                         double offset[3]) {
    double v[3][3][3];
    for (int dj = 0; dj < 3; ++dj)
        for (int dg = 0; dg < 3; ++dg)
            for (int da = 0; da < 3; ++da)
                v[dj][dg][da] = at(score, n_beta, n_alpha, j + dj - 1, g + dg - 1, a + da - 1);
    const double centre = v[1][1][1];
    const double gradient[3] = {(v[2][1][1] - v[0][1][1]) / 2, (v[1][2][1] - v[1][0][1]) / 2,
                                (v[1][1][2] - v[1][1][0]) / 2};
    const double bb = v[2][1][1] + v[0][1][1] - 2 * centre, gg = v[1][2][1] + v[1][0][1] - 2 * centre,
                 aa = v[1][1][2] + v[1][1][0] - 2 * centre;
    const double bg = (v[2][2][1] - v[2][0][1] - v[0][2][1] + v[0][0][1]) / 4,
                 ba = (v[2][1][2] - v[2][1][0] - v[0][1][2] + v[0][1][0]) / 4,
                 ga = (v[1][2][2] - v[1][2][0] - v[1][0][2] + v[1][0][0]) / 4;
    const double minor = bb * gg - bg * bg;
    // Adjugate of the symmetric Hessian: H^-1 = adj / det.
    const double adjugate[3][3] = {{gg * aa - ga * ga, ba * ga - bg * aa, bg * ga - ba * gg},
                                   {ba * ga - bg * aa, bb * aa - ba * ba, bg * ba - bb * ga},
                                   {bg * ga - ba * gg, bg * ba - bb * ga, minor}};
    const double det = bb * adjugate[0][0] + bg * adjugate[0][1] + ba * adjugate[0][2];
    const bool concave = bb < 0 && minor > 0 && det < 0;
    double farthest = 0;
    for (int axis = 0; axis < 3; ++axis) {
        offset[axis] = 0;
        if (concave && det < 1e-6 * bb * gg * aa)
            for (int e = 0; e < 3; ++e) offset[axis] -= adjugate[axis][e] * gradient[e] / det;
        farthest = max(farthest, fabs(offset[axis]));
    }
    if (concave && farthest <= 1)
        return centre + 0.5 * (gradient[0] * offset[0] + gradient[1] * offset[1] + gradient[2] * offset[2]);
    // A ridge (as at the poles) or a saddle: one axis at a time.
    const double curvature[3] = {bb, gg, aa};
    for (int axis = 0; axis < 3; ++axis) {
        offset[axis] = 0;
        if (curvature[axis] < 0) offset[axis] = min(0.5, max(-0.5, -gradient[axis] / curvature[axis]));
    }
    return centre;
}

constexpr double PI = 3.141592653589793;
constexpr int RECORD = 13;  // of a kept maximum: matrix (9), alpha, beta, gamma, height

// Whether a point comes after another: it is lower, or as high and later on the grid.
__device__ __forceinline__ bool below(real value, int index, real other_value, int other_index) {
    return value < other_value || (value == other_value && index > other_index);
}

// Best first: angles (B, n, 3), values (B, n), count (B,). One block a function. Each round takes the highest maximum
// not yet looked at (of equals the first grid point), refines it and drops it if one kept is closer than the merge
// angle. kept (B, n, RECORD) is scratch. Shared memory: blockDim.x real, blockDim.x int.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    so3_select(const real* __restrict__ scores, int n_beta, int n_alpha, int capacity, const int* __restrict__ found,
               const int* __restrict__ n_found, int n, double merge_trace, double* __restrict__ kept,
               double* __restrict__ angles, double* __restrict__ values, long long* __restrict__ count) {
    extern __shared__ __align__(16) unsigned char shared[];
    real* best_value = reinterpret_cast<real*>(shared);
    int* best_index = reinterpret_cast<int*>(best_value + blockDim.x);
    __shared__ double candidate[RECORD];
    __shared__ int clashes;
    const int b = blockIdx.x, size = n_beta * n_alpha * n_alpha, me = threadIdx.x;
    const real* __restrict__ score = scores + (long long)b * size;
    const int* __restrict__ list = found + (long long)b * capacity;
    double* mine = kept + (long long)b * n * RECORD;
    const int maxima = min(n_found[b], capacity);
    // None: constant all over, or a closed ridge of ties. Then any of the highest points is as good: the first.
    const int points = maxima ? maxima : size, wanted = maxima ? n : min(n, 1);
    int taken = 0, last_index = -1;
    real last_value = 0;
    for (int looked_at = 0; looked_at < points && taken < wanted; ++looked_at) {
        real value = 0;
        int index = size;  // none
        for (int e = me; e < points; e += blockDim.x) {
            const int other = maxima ? list[e] : e;
            const real height = score[other];
            const bool left = last_index < 0 || below(height, other, last_value, last_index);
            if (left && (index == size || below(value, index, height, other))) {
                value = height;
                index = other;
            }
        }
        best_value[me] = value;
        best_index[me] = index;
        __syncthreads();
        for (int half = blockDim.x / 2; half > 0; half /= 2) {  // blockDim.x is a power of 2
            if (me < half) {
                const real height = best_value[me + half];
                const int other = best_index[me + half];
                if (other < size && (best_index[me] == size || below(best_value[me], best_index[me], height, other))) {
                    best_value[me] = height;
                    best_index[me] = other;
                }
            }
            __syncthreads();
        }
        last_value = best_value[0];
        last_index = best_index[0];
        if (me == 0) {
            const int j = last_index / (n_alpha * n_alpha), g = last_index / n_alpha % n_alpha, a = last_index % n_alpha;
            double offset[3];
            candidate[12] = vertex(score, n_beta, n_alpha, j, g, a, offset);
            candidate[9] = 2 * PI * (a + offset[2]) / n_alpha;
            candidate[10] = PI * (j + 0.5 + offset[0]) / n_beta;
            candidate[11] = 2 * PI * (g + offset[1]) / n_alpha;
            double sa, ca, sb, cb, sc, cc;
            sincos(candidate[9], &sa, &ca);
            sincos(candidate[10], &sb, &cb);
            sincos(candidate[11], &sc, &cc);
            const double matrix[9] = {ca * cb * cc - sa * sc, -ca * cb * sc - sa * cc, ca * sb,
                                      sa * cb * cc + ca * sc, -sa * cb * sc + ca * cc, sa * sb,
                                      -sb * cc,               sb * sc,                 cb};
            for (int e = 0; e < 9; ++e) candidate[e] = matrix[e];
            clashes = 0;
        }
        __syncthreads();
        for (int i = me; i < taken; i += blockDim.x) {
            double trace = 0;
            for (int e = 0; e < 9; ++e) trace += mine[i * RECORD + e] * candidate[e];
            if (trace > merge_trace) atomicAdd(&clashes, 1);
        }
        __syncthreads();
        if (clashes == 0) {
            for (int e = me; e < RECORD; e += blockDim.x) mine[taken * RECORD + e] = candidate[e];
            ++taken;
        }
        __syncthreads();  // the next round writes `candidate`, `clashes` and the two lists anew
    }
    // The refined heights may order them otherwise than the grid's values did.
    for (int i = me; i < taken; i += blockDim.x) {
        const double height = mine[i * RECORD + 12];
        int rank = 0;
        for (int e = 0; e < taken; ++e) {
            const double other = mine[e * RECORD + 12];
            rank += other > height || (other == height && e < i);
        }
        for (int e = 0; e < 3; ++e) angles[((long long)b * n + rank) * 3 + e] = mine[i * RECORD + 9 + e];
        values[(long long)b * n + rank] = height;
    }
    if (me == 0) count[b] = taken;
}
