// Batch norm, ReLU and max-unpooling from offsets. The normalized map is never stored.
#include "../pooling/scatter.h"
#include "cell_sums.h"

// Writes each element of y once, for windows that are cells of 2x2 pixels (Windows::cells). Returns 1 if an offset is
// outside its window; y is then not valid.
EXPORT batch_norm_relu_max_unpool2d_fwd(
    const T* x, const uint8_t* offsets, const C* mean, const C* shift, const C* var, const C* weight, const C* bias,
    double eps, int64_t relu, T* y, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh, int64_t ow) {
    const Windows g{n, c, h, w, oh, ow, 2, 2, 2, 2, 0, 0, 1, 1};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    Flag inside;
    fresh(y, n * c * h * w * sizeof(T));
    parallel_for(g.rows(), grain_of(2 * w * g.pixel()), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            const CellRow row{g, number};
            if (!row.inside(offsets)) inside.lower();
            row.each([&](auto width, int64_t ow, int64_t c) INLINED {
                constexpr int L = decltype(width)::value;
                const auto value = Affine<L>(norm, row.channel() + c).output(load<L>(x + row.pooled(ow, c)));
                row.store_image<L>(y, ow, c, placed<L>(value, row.taps<L>(offsets, ow, c)));
            });
            row.leftovers([&](int64_t start, int64_t count) { memset(y + start, 0, count * sizeof(T)); });
        }
    });
    return !inside;
}

// Writes grads, like x, what reaches the batch norm before the ReLU, and sums (4, c), as batch_norm_relu_sums does.
EXPORT batch_norm_relu_max_unpool2d_sums(
    const T* grad_y, const uint8_t* offsets, const T* x, const C* mean, const C* shift, const C* var, const C* weight,
    const C* bias, double eps, int64_t relu, T* grads, C* sums, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh,
    int64_t ow, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw) {
    const Windows g{n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    const Places places(g, offsets, nullptr);
    fresh(grads, n * c * oh * ow * sizeof(T));
    RowChunks{g}.sum_all(
        norm, n * oh * ow, sums,
        [&](const CellRow& row) {
            if (g.cells()) gather_cells(row, grad_y, offsets, grads);
            else gather_row(places, row.row, grad_y, grads);
        },
        [&](Sums& sums, const CellRow& row, auto width, int64_t ow, int64_t c) INLINED {
            constexpr int L = decltype(width)::value;
            const Affine<L> affine(norm, row.channel() + c);
            const int64_t at = row.pooled(ow, c);
            const auto centered = affine.centered(load<L>(x + at));
            const auto grad = affine.passed(centered, load<L>(grads + at));
            store<L>(grads + at, grad);
            sums.add<L>(c, grad, grad * centered);
        });
    return 0;
}
