// Max-unpooling and its gradient.
#include "cells.h"
#include "scatter.h"

// Writes each element of the image once, zeros and all. Returns 1 where a position lies outside its window (an offset)
// or outside the plane (an index); y is then of no use.
EXPORT max_unpool2d_fwd(
    const T* x, const uint8_t* offsets, const int64_t* indices, T* y, int64_t n, int64_t c, int64_t h, int64_t w,
    int64_t oh, int64_t ow, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
    int64_t dh, int64_t dw) {
    const Windows g{n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
    fresh(y, n * c * h * w * sizeof(T));
    if (!offsets || !g.cells()) return !scatter_all({g, offsets, indices}, x, y);
    Flag inside;
    parallel_for(g.rows(), grain_of(2 * w * g.pixel()), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            const CellRow row{g, number};
            if (!row.inside(offsets)) inside.lower();
            unpool_cells(row, x, offsets, y);
        }
    });
    return !inside;
}

// Gathers the image's gradient at the positions.
EXPORT max_unpool2d_bwd(
    const T* grad_y, const uint8_t* offsets, const int64_t* indices, T* grad_x, int64_t n, int64_t c, int64_t h,
    int64_t w, int64_t oh, int64_t ow, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
    int64_t dh, int64_t dw) {
    const Windows g{n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
    const Places places{g, offsets, indices};
    fresh(grad_x, n * c * oh * ow * sizeof(T));
    parallel_for(g.rows(), grain_of(2 * ow * g.pixel()), [&](int64_t row, int64_t end) {
        for (; row < end; ++row)
            if (offsets && g.cells()) gather_cells({g, row}, grad_y, offsets, grad_x);
            else gather_row(places, row, grad_y, grad_x);
    });
    return 0;
}
