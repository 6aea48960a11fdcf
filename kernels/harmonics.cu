// Spherical harmonics at given points. Twin: faml_gpu/ops/harmonics.py, which says what the arrays are.
#include "common.cuh"

// table (n, 2, L, n_l): Re and -Im of Y_lm, axes [m, l], 0 where l < m. One thread a point; step 2 keeps the even degrees
// only. In double: the recurrence runs over up to L degrees.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    harmonics(const double* __restrict__ points, int n, int bandwidth, int step, float* __restrict__ table) {
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
    double top_re = 0.28209479177387814, top_im = 0;  // Y_00 = 1 / sqrt(4 pi)
    for (int m = 0; m < bandwidth; ++m) {
        if (m) {  // Y_mm from Y_m-1,m-1: x + i y = sin(theta) exp(i phi)
            const double f = -sqrt((2.0 * m + 1) / (2.0 * m)), old = top_re;
            top_re = f * (x * old - y * top_im);
            top_im = f * (x * top_im + y * old);
        }
        double before_re = 0, before_im = 0, now_re = top_re, now_im = top_im;
        for (int l = 0; l < bandwidth; ++l) {
            if (l > m) {
                const double squared = double(l) * l, a = sqrt((4 * squared - 1) / (squared - double(m) * m));
                const double less = double(l - 1) * (l - 1);
                const double b = l > 1 ? sqrt((less - double(m) * m) / (4 * less - 1)) : 0;
                const double next_re = a * (z * now_re - b * before_re), next_im = a * (z * now_im - b * before_im);
                before_re = now_re;
                before_im = now_im;
                now_re = next_re;
                now_im = next_im;
            }
            if (l % step == 0) {
                re[m * degrees + l / step] = l < m ? 0.f : float(now_re);
                im[m * degrees + l / step] = l < m ? 0.f : -float(now_im);
            }
        }
    }
}
