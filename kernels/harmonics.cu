// Spherical harmonics at given points. Twin: faml_gpu/ops/harmonics.py, which says what the arrays are.
#include "common.cuh"

// table (n, 2, L, n_l): Re and -Im of Y_lm, axes [m, l], 0 where l < m. One thread a point; step 2 keeps the even degrees
// only. In double: the recurrence runs over up to L degrees. factors (L, L, 2), axes [m, l]: of the recurrence, the same
// for all points; all threads of a warp read the same ones at a time.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    harmonics(const double* __restrict__ points, const double* __restrict__ factors, int n, int bandwidth, int step,
              float* __restrict__ table) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n) return;
    double x = points[3LL * j], y = points[3LL * j + 1], z = points[3LL * j + 2];
    const double length = sqrt(x * x + y * y + z * z);
    x /= length;
    y /= length;
    z /= length;
    const int degrees = (bandwidth + step - 1) / step;
    float* re = table + 2LL * j * bandwidth * degrees;
    float* im = re + bandwidth * degrees;
    double top_re = factors[0], top_im = 0;  // Y_00
    for (int m = 0; m < bandwidth; ++m) {
        if (m) {  // Y_mm from Y_m-1,m-1: x + i y = sin(theta) exp(i phi)
            const double f = factors[2 * (m * bandwidth + m)], old = top_re;
            top_re = f * (x * old - y * top_im);
            top_im = f * (x * top_im + y * old);
        }
        double before = 0, now = 1;  // what is left of Y_lm is a polynomial in z
        for (int l = 0; l < bandwidth; ++l) {
            if (l > m) {
                const double* __restrict__ f = factors + 2 * (m * bandwidth + l);
                const double next = f[0] * (z * now - f[1] * before);
                before = now;
                now = next;
            }
            if (l % step == 0) {
                re[m * degrees + l / step] = l < m ? 0.f : float(now * top_re);
                im[m * degrees + l / step] = l < m ? 0.f : -float(now * top_im);
            }
        }
    }
}
