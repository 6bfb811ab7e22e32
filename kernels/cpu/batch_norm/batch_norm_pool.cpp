// Batch norm, ReLU and max-pooling in one pass over the map, for windows that are cells of 2x2 pixels: Windows::cells.
// The map between is never stored: pixels of a cell are normalized as they are read.
#include "cell_sums.h"

// Writes y and, if not null, the offsets of the maxima. Values are compared as the map between would hold them.
EXPORT batch_norm_relu_max_pool2d_fwd(
    const T* x, const C* mean, const C* shift, const C* var, const C* weight, const C* bias, double eps, int64_t relu,
    T* y, uint8_t* offsets, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh, int64_t ow) {
    const Windows g{n, c, h, w, oh, ow, 2, 2, 2, 2, 0, 0, 1, 1};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    fresh(y, n * c * oh * ow * sizeof(T)), fresh(offsets, n * c * oh * ow);
    parallel_for(g.rows(), grain_of(2 * w * g.pixel()), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            const CellRow row{g, number};
            row.each([&](auto width, int64_t ow, int64_t c) INLINED {
                constexpr int L = decltype(width)::value;
                const Affine<L> affine(norm, row.channel() + c);
                Four<L> cell = row.load_image<L>(x, ow, c);
                for (Lanes<C, L>& value : cell.tap) value = rounded<L>(affine.output(value));
                const Largest<L> largest(cell);
                store<L>(y + row.pooled(ow, c), largest.value);
                if (offsets) store_offsets<L>(offsets + row.pooled(ow, c), largest.tap);
            });
        }
    });
    return 0;
}

// Writes sums (4, c), as batch_norm_relu_sums does, of the gradient that the maxima get.
EXPORT batch_norm_relu_max_pool2d_sums(
    const T* grad_y, const uint8_t* offsets, const T* x, const C* mean, const C* shift, const C* var, const C* weight,
    const C* bias, double eps, int64_t relu, C* sums, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh,
    int64_t ow) {
    const Windows g{n, c, h, w, oh, ow, 2, 2, 2, 2, 0, 0, 1, 1};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    RowChunks{g}.sum_all(
        norm, n * h * w, sums, [](const CellRow&) {},
        [&](Sums& sums, const CellRow& row, auto width, int64_t ow, int64_t c) INLINED {
            constexpr int L = decltype(width)::value;
            const Affine<L> affine(norm, row.channel() + c);
            const auto value = chosen<L>(row.load_image<L>(x, ow, c), row.taps<L>(offsets, ow, c));
            const auto centered = affine.centered(value);
            const auto grad = affine.passed(centered, load<L>(grad_y + row.pooled(ow, c)));
            sums.add<L>(c, grad, grad * centered);
        });
    return 0;
}

// Writes grad_x, beside and below the cells too; means as in batch_norm_relu_bwd.
EXPORT batch_norm_relu_max_pool2d_bwd(
    const T* grad_y, const uint8_t* offsets, const T* x, const C* mean, const C* shift, const C* var, const C* weight,
    const C* bias, double eps, int64_t relu, const C* means, T* grad_x, int64_t n, int64_t c, int64_t h, int64_t w,
    int64_t oh, int64_t ow) {
    const Windows g{n, c, h, w, oh, ow, 2, 2, 2, 2, 0, 0, 1, 1};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    const Gradient gradient(norm, means);
    fresh(grad_x, n * c * h * w * sizeof(T));
    parallel_for(g.rows(), grain_of(2 * w * g.pixel()), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            const CellRow row{g, number};
            row.each([&](auto width, int64_t ow, int64_t c) INLINED {
                constexpr int L = decltype(width)::value;
                const GradientOf<L> of(gradient, row.channel() + c);
                const Four<L> cell = row.load_image<L>(x, ow, c);
                Four<L> grad = placed<L>(load<L>(grad_y + row.pooled(ow, c)), row.taps<L>(offsets, ow, c));
                for (int t = 0; t < 4; ++t) grad.tap[t] = of(cell.tap[t], grad.tap[t]);
                row.store_image<L>(grad_x, ow, c, grad);
            });
            row.leftovers([&](int64_t start, int64_t count) {
                const int64_t run = LAST ? c : count;  // of one channel, or of all channels of a pixel
                for (int64_t from = start; from < start + count; from += run)
                    in_blocks<true>(run, [&](auto width, int64_t k) INLINED {
                        constexpr int L = decltype(width)::value;
                        const GradientOf<L> of(gradient, LAST ? k : row.channel());
                        store<L>(grad_x + from + k, of(load<L>(x + from + k), Lanes<C, L>{}));
                    });
            });
        }
    });
    return 0;
}
