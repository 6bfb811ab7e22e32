// Max-pooling and its gradient.
#include "maximum.h"
#include "scatter.h"

// Reads each element of the image as often as windows hold it, from the caches after the first time; writes the pooled
// map and its positions (offsets, indices or neither) once.
EXPORT max_pool2d_fwd(
    const T* x, T* y, uint8_t* offsets, int64_t* indices, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh,
    int64_t ow, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
    int64_t dh, int64_t dw) {
    const Windows g{n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
    const int64_t size = n * c * oh * ow;
    fresh(y, size * sizeof(T)), fresh(offsets, size), fresh(indices, size * sizeof(int64_t));
    const MaxPool pool{g, x, y, offsets, indices};
    parallel_for(g.rows(), grain_of(ow * g.pixel() * kh * kw), [&](int64_t row, int64_t end) {
        for (; row < end; ++row)
            if (g.cells()) pool_cells({g, row}, x, y, offsets, indices);
            else pool(row);
    });
    return 0;
}

// Writes each element of grad_x once. Where windows overlap, a pixel adds up what they give it in row-major order.
EXPORT max_pool2d_bwd(
    const T* grad_y, const uint8_t* offsets, const int64_t* indices, T* grad_x, int64_t n, int64_t c, int64_t h,
    int64_t w, int64_t oh, int64_t ow, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
    int64_t dh, int64_t dw) {
    const Windows g{n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
    fresh(grad_x, n * c * h * w * sizeof(T));
    if (offsets && g.cells())
        parallel_for(g.rows(), grain_of(2 * w * g.pixel()), [&](int64_t row, int64_t end) {
            for (; row < end; ++row) unpool_cells({g, row}, grad_y, offsets, grad_x);
        });
    else add_all({g, offsets, indices}, grad_y, grad_x);
    return 0;
}
