// Cross-entropy of logits (N, C, h, w) resized to the labels' H x W, without storing the large map: the loss, its
// gradient, and both from one pass. The formulas are in softmax.h, the resizing in upsample.h.
//
// An interval's gradients are summed over its rows with the weights of the upper and of the lower tap, then back along
// x, once for all rows; each interval has two rows of sums of its own, which are added up afterwards. So every sum has
// one order.
//
// LOGITS: the dtype of the logits.
#include "softmax.h"
#include "upsample.h"

using T = LOGITS;
using W = Computed<T>;
constexpr int K = VECTORS<W>;
constexpr bool SPLIT = sizeof(T) >= 4;  // lse has two terms

enum Reduction : int64_t { NONE, SUM, COUNT, WEIGHTS, VALID };

struct Problem {
    Resized<T, W> map;
    Labels labels;
    Loss<W, false> loss;
    int64_t reduction;
};

// A tile of an output row in work.
struct Tile {
    Interval<W> interval;
    Scratch<W> values, sums[2];  // of the gradients, with the weights of the upper and of the lower tap
    Int<W> label[TILE];
    W factor[TILE];
    Vec<W> highest[K], total[K], others[K], picked[K], mass[K], distance[K], above[K];

    explicit Tile(const Problem& problem)
        : interval(problem.map), values(problem.map.classes * TILE),
          sums{Scratch<W>(problem.map.classes * TILE), Scratch<W>(problem.map.classes * TILE)} {}

    INLINE Rows<W> rows() const { return {values.data, TILE}; }
    NOINLINE void read(const Problem& problem, int64_t pixel, int count, W behind) {
        interval.mix(problem.map.classes, behind, values.data);
        problem.labels.read(pixel, count, label);
        problem.loss.read_factors(label, factor);
    }
    template <bool KEEP> NOINLINE void softmax(const Problem& problem) {
        find_highest(rows(), problem.map.classes, highest);
        problem.loss.add_shares(rows(), rows(), highest, mass, distance);
        add_exponentials<KEEP>(rows(), problem.map.classes, highest, label, values.data, total, others, picked);
        for (int k = 0; k < K; ++k) above[k] = log_above<W>(total[k]);
    }

    // Adds the gradient of the tile to the sums. probability(c, k, below): vector k of the softmax p of class c, and
    // p - 1 if c is the label.
    template <bool SPREADS, typename F>
    NOINLINE void add_gradient(const Problem& problem, const Vec<W>* scale, W behind, const F& probability) {
        Gradient<W, false> grad(problem.loss, rows(), label, factor, scale, mass, highest, above);
        for (int64_t c = 0; c < problem.map.classes; ++c) {
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                W *upper = sums[0].data + c * TILE + k * LANES<W>, *lower = sums[1].data + c * TILE + k * LANES<W>;
                Vec<W> below, p = probability(c, k, below);
                Vec<W> g = grad.template operator()<SPREADS>(p, below, c, k);
                store(upper, load(upper) + (1 - behind) * g);
                if (behind != 0) store(lower, load(lower) + behind * g);
            }
        }
    }
    void clear_sums(int64_t classes) {
        for (Scratch<W>& sum : sums) __builtin_memset(sum.data, 0, size_t(classes * TILE) * sizeof(W));
    }
};

// Calls work(tile, image, y, start, count) for the tiles of the intervals begin ... end - 1. GRADIENT: `work` adds to the
// tile's sums; they go to `partial`, two rows (w, padded) for each interval.
template <bool GRADIENT, typename F>
static INLINE void for_intervals(const Problem& problem, int64_t begin, int64_t end, W* partial, const F& work) {
    const auto& map = problem.map;
    Tile tile(problem);
    int64_t size = map.w * map.padded();
    for (int64_t unit = begin; unit < end; ++unit) {
        int64_t image = unit / map.h, tap = unit % map.h;
        int64_t top = map.y.start_of(tap), bottom = map.y.start_of(tap + 1);
        W* rows = partial + unit * 2 * size;
        if (GRADIENT) __builtin_memset(rows, 0, size_t(2 * size) * sizeof(W));
        if (top == bottom) continue;
        tile.interval.read(map, image, tap);
        for (int64_t start = 0; start < map.width(); start += TILE) {
            int count = int(map.width() - start < TILE ? map.width() - start : TILE);
            tile.interval.expand(map, start);
            if (GRADIENT) tile.clear_sums(map.classes);
            for (int64_t y = top; y < bottom; ++y) work(tile, unit, (image * map.height() + y) * map.width() + start,
                                                        count, map.y.behind.data[y]);
            for (int k = 0; GRADIENT && k < 2; ++k) map.add_back(start, count, tile.sums[k].data, rows + k * size);
        }
    }
}

// Adds up the intervals' rows into a gradient of any strides.
template <typename To>
static void write_rows(const Problem& problem, const W* partial, To* gradient, int64_t stride_n, int64_t stride_c,
                       int64_t stride_h, int64_t stride_w) {
    const auto& map = problem.map;
    int64_t size = map.w * map.padded();
    parallel_for(map.units(), grain_of(size), [&](int64_t begin, int64_t end) {
        Scratch<W> sum(size);
        for (int64_t unit = begin; unit < end; ++unit) {
            int64_t image = unit / map.h, row = unit % map.h;
            const W* own = partial + unit * 2 * size;
            // The lower tap of the interval above is this row; below the last row it is the last row itself.
            const W* above = row > 0 ? own - size : nullptr;
            const W* last = row == map.h - 1 ? own + size : nullptr;
            for (int64_t i = 0; i < size; ++i) sum.data[i] = own[i];
            for (int64_t i = 0; above && i < size; ++i) sum.data[i] += above[i];
            for (int64_t i = 0; last && i < size; ++i) sum.data[i] += last[i];
            To* to = gradient + image * stride_n + row * stride_h;
            for (int64_t c = 0; c < map.classes; ++c)
                for (int64_t column = 0; column < map.w; ++column)
                    to[c * stride_c + column * stride_w] = narrow<To>(sum.data[column * map.padded() + c]);
        }
    });
}

// The sums of each interval.
struct Slots {
    Scratch<double> losses, divisors;
    explicit Slots(int64_t count) : losses(count), divisors(count) {
        for (int64_t i = 0; i < count; ++i) losses.data[i] = divisors.data[i] = 0;
    }
    static double sum(const Scratch<double>& slots, int64_t count) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += slots.data[i];
        return total;
    }
};

// GRADIENT: the gradient of the sum of the losses goes to `partial`. lse: where it is wanted, or null.
template <bool GRADIENT>
static void forward(const Problem& problem, W* partial, Slots& slots, W* loss, W* lse, void* prediction,
                    int64_t prediction_size, int64_t* counts) {
    int64_t all_pixels = problem.map.n * problem.map.height() * problem.map.width(), classes = problem.map.classes;
    parallel_for(problem.map.units(), grain_of(problem.map.elements_of_unit()), [&](int64_t begin, int64_t end) {
        int64_t right = 0, valid = 0;
        auto work = [&](Tile& tile, int64_t unit, int64_t pixel, int count, W behind) INLINED {
            tile.read(problem, pixel, count, behind);
            if (counts != nullptr) {
                Int<W> best[TILE];
                argmax(tile.rows(), classes, best);
                for (int i = 0; i < count; ++i) right += best[i] == tile.label[i], valid += tile.label[i] >= 0;
                for (int i = 0; prediction_size == 1 && i < count; ++i)
                    static_cast<uint8_t*>(prediction)[pixel + i] = uint8_t(best[i]);
                for (int i = 0; prediction_size == 8 && i < count; ++i)
                    static_cast<int64_t*>(prediction)[pixel + i] = best[i];
            }
            tile.softmax<GRADIENT>(problem);
            W losses[TILE], terms[2][TILE];
            problem.loss.losses(tile.highest, tile.above, tile.picked, tile.factor, tile.label, tile.mass,
                                tile.distance, losses);
            if (problem.reduction == NONE) memcpy(loss + pixel, losses, count * sizeof(W));
            Vec<double> sum{}, divisor{};
            add_row(losses, sum);
            slots.losses.data[unit] += sum_of(sum);
            if (problem.reduction == WEIGHTS) add_row(tile.factor, divisor);
            for (int i = 0; problem.reduction == VALID && i < TILE; ++i) divisor[0] += tile.label[i] >= 0;
            slots.divisors.data[unit] += sum_of(divisor);
            for (int k = 0; k < K; ++k) {
                Vec<W> first = SPLIT ? tile.highest[k] : tile.highest[k] + tile.above[k];
                store(terms[0] + k * LANES<W>, first), store(terms[1] + k * LANES<W>, tile.above[k]);
            }
            for (int term = 0; lse != nullptr && term < 1 + SPLIT; ++term)
                memcpy(lse + term * all_pixels + pixel, terms[term], count * sizeof(W));
            if constexpr (GRADIENT) {
                Vec<W> scale[K], inverse[K], missing[K];
                for (int k = 0; k < K; ++k) {
                    scale[k] = all(W(1)), inverse[k] = W(1) / tile.total[k];
                    missing[k] = -tile.others[k] * inverse[k];
                }
                auto probability = [&](int64_t c, int k, Vec<W>& below) INLINED {
                    below = missing[k];
                    return load(tile.values.data + c * TILE + k * LANES<W>) * inverse[k];
                };
                if (problem.loss.spreads()) tile.add_gradient<true>(problem, scale, behind, probability);
                else tile.add_gradient<false>(problem, scale, behind, probability);
            }
        };
        for_intervals<GRADIENT>(problem, begin, end, partial, work);
        if (counts == nullptr) return;
        __atomic_fetch_add(counts, right, __ATOMIC_RELAXED);
        __atomic_fetch_add(counts + 1, valid, __ATOMIC_RELAXED);
    });
}

#define PROBLEM                                                                                  \
    problem {                                                                                    \
        {MAP_ARGUMENTS}, {target, label_size, ignored, classes, &bad},                            \
            {classes, weight, W(smoothing), W(z_loss)}, reduction                                 \
    }

// Writes loss, and denominator for WEIGHTS and VALID; lse (terms, pixels) unless it is null; the gradient of the sum of
// the losses, in the computed dtype and of the given strides, unless it is null. Returns 0, or the number of the first
// pixel with an out-of-range label plus 1.
EXPORT upsample_cross_entropy_fwd(const T* low, int64_t n, int64_t classes, int64_t h, int64_t w, int64_t stride_n,
                                  int64_t stride_c, int64_t stride_h, int64_t stride_w, int64_t height, int64_t width,
                                  int64_t nearest, int64_t corners, double ratio_h, double ratio_w, const void* target,
                                  int64_t label_size, int64_t ignored, const W* weight, double smoothing,
                                  double z_loss, int64_t reduction, W* loss, W* lse, W* denominator, void* prediction,
                                  int64_t prediction_size, int64_t* counts, W* gradient, int64_t grad_n,
                                  int64_t grad_c, int64_t grad_h, int64_t grad_w) {
    int64_t bad = 0;
    Problem PROBLEM;
    int64_t units = problem.map.units();
    Slots slots(units);
    if (counts != nullptr) counts[0] = counts[1] = 0;
    if (gradient == nullptr) {
        forward<false>(problem, nullptr, slots, loss, lse, prediction, prediction_size, counts);
    } else {
        Scratch<W> partial(units * 2 * w * problem.map.padded());
        forward<true>(problem, partial.data, slots, loss, lse, prediction, prediction_size, counts);
        write_rows(problem, partial.data, gradient, grad_n, grad_c, grad_h, grad_w);
    }
    if (reduction == NONE) return bad;
    double sum = Slots::sum(slots.losses, units), divisor = 1;
    if (reduction == WEIGHTS || reduction == VALID) *denominator = W(divisor = Slots::sum(slots.divisors, units));
    else if (reduction == COUNT) divisor = double(*denominator);
    *loss = W(sum / divisor);  // 0 / 0 = NaN where nothing is valid
    return bad;
}

// Writes the gradient of the logits, of the given strides. grad_loss: of each pixel's loss for NONE, else one number.
EXPORT upsample_cross_entropy_bwd(const W* grad_loss, const T* low, int64_t n, int64_t classes, int64_t h, int64_t w,
                                  int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w,
                                  int64_t height, int64_t width, int64_t nearest, int64_t corners, double ratio_h,
                                  double ratio_w, const void* target, int64_t label_size, int64_t ignored,
                                  const W* weight, double smoothing, double z_loss, int64_t reduction, const W* lse,
                                  const W* denominator, T* gradient, int64_t grad_n, int64_t grad_c, int64_t grad_h,
                                  int64_t grad_w) {
    int64_t bad = 0;
    Problem PROBLEM;
    int64_t all_pixels = n * height * width;
    W one = reduction == NONE ? W(0) : reduction == SUM ? *grad_loss : *grad_loss / *denominator, smoothed = 0;
    for (int64_t c = 0; c < classes; ++c)
        smoothed += problem.loss.smoothing / W(classes) * (weight == nullptr ? W(1) : weight[c]);
    Scratch<W> partial(problem.map.units() * 2 * w * problem.map.padded());
    parallel_for(problem.map.units(), grain_of(problem.map.elements_of_unit()), [&](int64_t begin, int64_t end) {
        for_intervals<true>(problem, begin, end, partial.data,
                            [&](Tile& tile, int64_t, int64_t pixel, int count, W behind) INLINED {
            W terms[2][TILE] = {}, scales[TILE] = {};
            for (int term = 0; term < 1 + SPLIT; ++term)
                memcpy(terms[term], lse + term * all_pixels + pixel, count * sizeof(W));
            if (reduction == NONE) memcpy(scales, grad_loss + pixel, count * sizeof(W));
            tile.read(problem, pixel, count, behind);
            Vec<W> scale[K];
            for (int k = 0; k < K; ++k) {
                tile.highest[k] = load(terms[0] + k * LANES<W>), tile.above[k] = load(terms[1] + k * LANES<W>);
                tile.mass[k] = all(smoothed);
                scale[k] = reduction == NONE ? load(scales + k * LANES<W>) : all(one);
            }
            tile.add_gradient<true>(problem, scale, behind, [&](int64_t c, int k, Vec<W>& below) INLINED {
                Vec<W> p = exp_below((row_vector(tile.rows(), c, k) - tile.highest[k]) - tile.above[k]);
                below = p - W(1);
                return p;
            });
        });
    });
    write_rows(problem, partial.data, gradient, grad_n, grad_c, grad_h, grad_w);
    return 0;
}
