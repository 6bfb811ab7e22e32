// Sums for soft Dice and cross-entropy in one read of the logits, and their gradient in one read and one write.
//
// With p = softmax(x), t the label of a pixel that is not ignored, w the weights of the classes:
//
//     overlap_c = sum p_c * [c = t]     predicted_c = sum p_c     labelled_c = sum [c = t]       of each image
//     loss = sum w_t * (log(sum_c exp(x_c)) - x_t)                weights = sum w_t              of the batch
//
// With the gradients a_c, b_c and g of overlap_c, predicted_c and loss, and u_c = a_c * [c = t] + b_c, a pixel's is
//
//     dx_c = p_c * (u_c - sum_k p_k * u_k) + g * w_t * (p_c - [c = t])
//
// The backward recomputes the softmax: nothing but the logits is kept.
//
// LOGITS: the dtype of the logits.
#include "softmax.h"

using T = LOGITS;
using W = Computed<T>;
constexpr int K = VECTORS<W>, L = LANES<W>;

struct Tile {
    const Shape shape;
    const Labels labels;
    const Loss<W, false> loss;
    Scratch<W> values;
    Rows<W> rows;
    Int<W> label[TILE];
    W factor[TILE];
    Vec<W> highest[K], total[K], others[K], picked[K], inverse[K];

    Tile(const Shape& size, const Labels& target, const W* weight)
        : shape(size), labels(target), loss{size.classes, weight, 0, 0}, values(size.classes * TILE) {}

    // Reads a tile, and leaves its exponentials in `values`.
    NOINLINE void read(const T* logits, const Place& place) {
        rows = read_tile<T, W>(logits, shape, place, values.data);
        labels.read(place.pixel, place.count, label);
        loss.read_factors(label, factor);
        find_highest(rows, shape.classes, highest);
        add_exponentials<true>(rows, shape.classes, highest, label, values.data, total, others, picked);
        for (int k = 0; k < K; ++k) inverse[k] = W(1) / total[k];
    }
    INLINE Vec<W> power(int64_t c, int k) const { return load(values.data + c * TILE + k * L); }
    INLINE IntVec<W> own(int k) const { return load_integers<W>(label + k * L); }

    // Adds the tile to `sums` (3, C), a vector for each sum.
    NOINLINE void add(W* sums) const {
        int64_t classes = shape.classes;
        for (int64_t c = 0; c < classes; ++c) {
            Vec<W> overlap{}, predicted{}, labelled{}, one = all(W(1));
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                IntVec<W> hit = own(k) == Int<W>(c);
                Vec<W> p = select<W>(own(k) < 0, Vec<W>{}, power(c, k) * inverse[k]);
                predicted += p;
                overlap += select<W>(hit, p, Vec<W>{});
                labelled += select<W>(hit, one, Vec<W>{});
            }
            Vec<W> added[3] = {overlap, predicted, labelled};
            for (int i = 0; i < 3; ++i) {
                W* sum = sums + (i * classes + c) * L;
                store(sum, load(sum) + added[i]);
            }
        }
    }
};

// Writes loss (2,): of the pixels and their weights, and sums (N, 3, C). Returns 0, or the number of the first pixel with
// an out-of-range label plus 1.
EXPORT dice_cross_entropy_fwd(const T* logits, const void* targets, const W* weight, int64_t n, int64_t classes,
                              int64_t pixels, int64_t last, int64_t label_size, int64_t ignored, W* loss, W* sums) {
    int64_t bad = 0;
    Shape shape{n, classes, pixels, last != 0};
    Labels labels{targets, label_size, ignored, classes, &bad};
    int64_t blocks = shape.blocks(), size = 3 * classes;
    Scratch<double> slots(blocks * (size + 2));
    parallel_for(blocks, grain_of(BLOCK * classes), [&](int64_t begin, int64_t end) {
        Tile tile(shape, labels, weight);
        Scratch<W> partial(size * L);
        for (int64_t block = begin; block < end; ++block) {
            Vec<double> losses{}, weights{};
            __builtin_memset(partial.data, 0, size_t(size * L) * sizeof(W));
            for_tiles(shape, block, block + 1, [&](int64_t, const Place& place) {
                tile.read(logits, place);
                tile.add(partial.data);
                Vec<W> above[K];
                W row[TILE];
                for (int k = 0; k < K; ++k) above[k] = log_above<W>(tile.total[k]);
                tile.loss.losses(tile.highest, above, tile.picked, tile.factor, tile.label, nullptr, nullptr, row);
                add_row(row, losses);
                add_row(tile.factor, weights);
            });
            double* slot = slots.data + block * (size + 2);
            for (int64_t i = 0; i < size; ++i) {
                slot[i] = 0;
                for (int lane = 0; lane < L; ++lane) slot[i] += double(partial.data[i * L + lane]);
            }
            slot[size] = sum_of(losses), slot[size + 1] = sum_of(weights);
        }
    });
    double totals[2] = {0, 0};
    for (int64_t block = 0; block < blocks; ++block)
        for (int i = 0; i < 2; ++i) totals[i] += slots.data[block * (size + 2) + size + i];
    loss[0] = W(totals[0]), loss[1] = W(totals[1]);
    int64_t of_image = shape.blocks_of_image();
    for (int64_t image = 0; image < n; ++image) {
        for (int64_t i = 0; i < size; ++i) {
            double sum = 0;
            for (int64_t block = 0; block < of_image; ++block)
                sum += slots.data[(image * of_image + block) * (size + 2) + i];
            sums[image * size + i] = W(sum);
        }
    }
    return bad;
}

// Writes the gradient of the logits for that of loss[0] and of sums.
EXPORT dice_cross_entropy_bwd(const W* grad_loss, const W* grad_sums, const T* logits, const void* targets,
                              const W* weight, int64_t n, int64_t classes, int64_t pixels, int64_t last,
                              int64_t label_size, int64_t ignored, T* gradient) {
    int64_t bad = 0;
    Shape shape{n, classes, pixels, last != 0};
    Labels labels{targets, label_size, ignored, classes, &bad};
    fresh(gradient, shape.all_pixels() * classes * int64_t(sizeof(T)));
    parallel_for(shape.blocks(), grain_of(BLOCK * classes), [&](int64_t begin, int64_t end) {
        Tile tile(shape, labels, weight);
        for_tiles(shape, begin, end, [&](int64_t, const Place& place) {
            const W *overlap = grad_sums + place.image * 3 * classes, *predicted = overlap + classes;
            tile.read(logits, place);
            Vec<W> mean[K], scale[K];
            IntVec<W> own[K];
            for (int k = 0; k < K; ++k) {
                mean[k] = Vec<W>{}, scale[k] = *grad_loss * load(tile.factor + k * L), own[k] = tile.own(k);
            }
            for (int64_t c = 0; c < classes; ++c) {
                for (int k = 0; k < K; ++k) {
                    Vec<W> wanted = select<W>(own[k] == Int<W>(c), all(overlap[c] + predicted[c]), all(predicted[c]));
                    mean[k] += tile.power(c, k) * wanted;
                }
            }
            for (int k = 0; k < K; ++k) mean[k] *= tile.inverse[k];
            write_tile<T, W>(gradient, shape, place, tile.values.data, [&](int64_t c, int k) INLINED {
                IntVec<W> hit = own[k] == Int<W>(c);
                Vec<W> p = tile.power(c, k) * tile.inverse[k];
                Vec<W> wanted = select<W>(hit, all(overlap[c] + predicted[c]), all(predicted[c]));
                Vec<W> grad = p * (wanted - mean[k]) + scale[k] * select<W>(hit, -tile.others[k] * tile.inverse[k], p);
                return select<W>(own[k] < 0, Vec<W>{}, grad);
            });
        });
    });
    return 0;
}
