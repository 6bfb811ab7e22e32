// Cross-entropy of logits (N, C, H, W): the loss, its gradient, and both from one pass. The formulas are in softmax.h.
//
// A tile's logits are read from memory once and stay in the first-level cache from the maximum to the gradient, which is
// written once. lse is kept in two terms, the maximum and what is above it, for float32 and float64 logits.
//
// LOGITS: the dtype of the logits. TARGET: the dtype of class probabilities; not defined for labels.
#include "softmax.h"

using T = LOGITS;
using W = Computed<T>;
constexpr int K = VECTORS<W>;
constexpr bool SPLIT = sizeof(T) >= 4;  // lse has two terms
#ifdef TARGET
constexpr bool PROBABILITIES = true;
#else
constexpr bool PROBABILITIES = false;
#define TARGET float
#endif

enum Reduction : int64_t { NONE, SUM, COUNT, WEIGHTS, VALID };

struct Problem {
    Shape shape;
    const T* logits;
    Labels labels;
    const TARGET* probabilities;  // in the layout of the logits
    Loss<W, PROBABILITIES> loss;
    int64_t bad;

    Problem(const void* x, const void* targets, const W* weight, int64_t n, int64_t c, int64_t size, int64_t last,
            int64_t label_size, int64_t ignored, double smoothing, double z_loss)
        : shape(Shape{n, c, size, last != 0}.merged()), logits(static_cast<const T*>(x)), labels{targets, label_size, ignored, c, &bad},
          probabilities(static_cast<const TARGET*>(targets)), loss{c, weight, W(smoothing), W(z_loss)}, bad(0) {}
};

// What all kernels take: logits and targets in one layout, weights of the classes or null, and the problem's numbers.
#define PROBLEM problem(logits, targets, weight, n, classes, pixels, last, label_size, ignored, smoothing, z_loss)

// A tile in work.
struct Tile {
    Scratch<W> values, shares;
    Rows<W> rows, target;
    Int<W> label[TILE];
    W factor[TILE];
    Vec<W> highest[K], total[K], others[K], picked[K], mass[K], distance[K], above[K];

    explicit Tile(const Problem& problem)
        : values(problem.shape.classes * TILE), shares(PROBABILITIES ? problem.shape.classes * TILE : 1) {}

    NOINLINE void read(const Problem& problem, const Place& place) {
        rows = read_tile<T, W>(problem.logits, problem.shape, place, values.data);
        target = {shares.data, TILE};
        if constexpr (PROBABILITIES) {
            target = read_tile<TARGET, W>(problem.probabilities, problem.shape, place, shares.data);
            for (int i = 0; i < TILE; ++i) label[i] = i < place.count ? 0 : -1;  // every pixel counts
        } else {
            problem.labels.read(place.pixel, place.count, label);
        }
        problem.loss.read_factors(label, factor);
    }

    // KEEP: the exponentials are left in `values`.
    template <bool KEEP> NOINLINE void softmax(const Problem& problem) {
        find_highest(rows, problem.shape.classes, highest);
        problem.loss.add_shares(rows, target, highest, mass, distance);
        add_exponentials<KEEP>(rows, problem.shape.classes, highest, label, values.data, total, others, picked);
        for (int k = 0; k < K; ++k) above[k] = log_above<W>(total[k]);
    }

    // probability(c, k, below): vector k of the softmax p of class c, and p - 1 if c is the label.
    template <typename F>
    INLINE void write_gradient(const Problem& problem, const Place& place, const Vec<W>* scale, T* gradient,
                               const F& probability) {
        Gradient<W, PROBABILITIES> grad(problem.loss, target, label, factor, scale, mass, highest, above);
        if (problem.loss.spreads()) {
            write_tile<T, W>(gradient, problem.shape, place, values.data, [&](int64_t c, int k) INLINED {
                Vec<W> below, p = probability(c, k, below);
                return grad.template operator()<true>(p, below, c, k);
            });
        } else {
            write_tile<T, W>(gradient, problem.shape, place, values.data, [&](int64_t c, int k) INLINED {
                Vec<W> below, p = probability(c, k, below);
                return grad.template operator()<false>(p, below, c, k);
            });
        }
    }
};

// Predictions, and the numbers of right and of valid pixels, where they are asked for.
struct Predictions {
    void* prediction;
    int64_t size;     // bytes of a prediction: of uint8 or int64
    int64_t* counts;  // null: nothing is asked for

    INLINE void write(const Tile& tile, const Problem& problem, const Place& place, int64_t& right,
                      int64_t& valid) const {
        if (counts == nullptr) return;
        Int<W> found[TILE];
        argmax(tile.rows, problem.shape.classes, found);
        for (int i = 0; i < place.count; ++i) right += found[i] == tile.label[i], valid += tile.label[i] >= 0;
        if (size == 1) {
            uint8_t* to = static_cast<uint8_t*>(prediction) + place.pixel;
            for (int i = 0; i < place.count; ++i) to[i] = uint8_t(found[i]);
        } else {
            int64_t* to = static_cast<int64_t*>(prediction) + place.pixel;
            for (int i = 0; i < place.count; ++i) to[i] = found[i];
        }
    }
    void clear() const {
        if (counts != nullptr) counts[0] = counts[1] = 0;
    }
    void add(int64_t right, int64_t valid) const {
        if (counts == nullptr) return;
        __atomic_fetch_add(counts, right, __ATOMIC_RELAXED);
        __atomic_fetch_add(counts + 1, valid, __ATOMIC_RELAXED);
    }
};

// --- sums over the blocks ------------------------------------------------------------------------------------------------

// Blocks are taken in order by each thread; a block's sums go to its slot.
struct Slots {
    Scratch<double> losses, divisors;
    explicit Slots(int64_t count) : losses(count), divisors(count) {}

    static double sum(const double* slots, int64_t count) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += slots[i];
        return total;
    }
};

// What a pixel adds to the divisor of a mean.
static INLINE void add_divisor(const Tile& tile, int64_t reduction, Vec<double>& divisor) {
    if (reduction == WEIGHTS) return add_row(tile.factor, divisor);
    Int<W> count = 0;
    for (int i = 0; i < TILE; ++i) count += tile.label[i] >= 0;
    divisor[0] += double(count);
}

static int64_t grain(const Problem& problem) { return grain_of(BLOCK * problem.shape.classes); }

// --- kernels -------------------------------------------------------------------------------------------------------------

// Writes loss, lse (terms, pixels) and, for WEIGHTS and VALID, denominator. Returns 0, or the number of the first pixel
// with an out-of-range label plus 1.
EXPORT cross_entropy_fwd(const void* logits, const void* targets, const W* weight, int64_t n, int64_t classes,
                         int64_t pixels, int64_t last, int64_t label_size, int64_t ignored, double smoothing,
                         double z_loss, int64_t reduction, W* loss, W* lse, W* denominator, void* prediction,
                         int64_t prediction_size, int64_t* counts) {
    Problem PROBLEM;
    Predictions predictions{prediction, prediction_size, counts};
    int64_t blocks = problem.shape.blocks(), all_pixels = problem.shape.all_pixels();
    bool divides = reduction == WEIGHTS || reduction == VALID;
    Slots slots(blocks);
    predictions.clear();
    parallel_for(blocks, grain(problem), [&](int64_t begin, int64_t end) {
        Tile tile(problem);
        int64_t right = 0, valid = 0;
        for (int64_t block = begin; block < end; ++block) {
            Vec<double> sum{}, divisor{};
            for_tiles(problem.shape, block, block + 1, [&](int64_t, const Place& place) {
                tile.read(problem, place);
                predictions.write(tile, problem, place, right, valid);
                tile.softmax<false>(problem);
                W losses[TILE], terms[3][TILE];
                problem.loss.losses(tile.highest, tile.above, tile.picked, tile.factor, tile.label, tile.mass,
                                    tile.distance, losses);
                for (int k = 0; k < K; ++k) {
                    Vec<W> first = SPLIT ? tile.highest[k] : tile.highest[k] + tile.above[k];
                    store(terms[0] + k * LANES<W>, first);
                    store(terms[1] + k * LANES<W>, SPLIT ? tile.above[k] : tile.mass[k]);
                    store(terms[2] + k * LANES<W>, tile.mass[k]);
                }
                for (int term = 0; term < 1 + SPLIT + PROBABILITIES; ++term)
                    memcpy(lse + term * all_pixels + place.pixel, terms[term], place.count * sizeof(W));
                if (reduction == NONE) memcpy(loss + place.pixel, losses, place.count * sizeof(W));
                add_row(losses, sum);
                if (divides) add_divisor(tile, reduction, divisor);
            });
            slots.losses.data[block] = sum_of(sum), slots.divisors.data[block] = sum_of(divisor);
        }
        predictions.add(right, valid);
    });
    if (reduction == NONE) return problem.bad;
    double sum = Slots::sum(slots.losses.data, blocks), divisor = 1;
    if (divides) *denominator = W(divisor = Slots::sum(slots.divisors.data, blocks));
    else if (reduction == COUNT) divisor = double(*denominator);
    *loss = W(sum / divisor);  // 0 / 0 = NaN where nothing is valid
    return problem.bad;
}

// Writes the gradient of the logits. grad_loss: of each pixel's loss for NONE, else one number.
EXPORT cross_entropy_bwd(const W* grad_loss, const void* logits, const void* targets, const W* weight, int64_t n,
                         int64_t classes, int64_t pixels, int64_t last, int64_t label_size, int64_t ignored,
                         double smoothing, double z_loss, const W* lse, const W* denominator, int64_t reduction,
                         T* gradient) {
    Problem PROBLEM;
    int64_t all_pixels = problem.shape.all_pixels();
    fresh(gradient, all_pixels * classes * int64_t(sizeof(T)));
    W one = reduction == NONE ? W(0) : reduction == SUM ? *grad_loss : *grad_loss / *denominator;
    W smoothed = 0;  // the mass that label smoothing adds
    for (int64_t c = 0; !PROBABILITIES && c < classes; ++c)
        smoothed += problem.loss.smoothing / W(classes) * (weight == nullptr ? W(1) : weight[c]);
    parallel_for(problem.shape.blocks(), grain(problem), [&](int64_t begin, int64_t end) {
        Tile tile(problem);
        for_tiles(problem.shape, begin, end, [&](int64_t, const Place& place) {
            W terms[3][TILE] = {}, scales[TILE] = {};
            for (int term = 0; term < 1 + SPLIT + PROBABILITIES; ++term)
                memcpy(terms[term], lse + term * all_pixels + place.pixel, place.count * sizeof(W));
            if (reduction == NONE) memcpy(scales, grad_loss + place.pixel, place.count * sizeof(W));
            tile.read(problem, place);
            Vec<W> scale[K];
            for (int k = 0; k < K; ++k) {
                int o = k * LANES<W>;
                tile.highest[k] = load(terms[0] + o), tile.above[k] = SPLIT ? load(terms[1] + o) : Vec<W>{};
                tile.mass[k] = PROBABILITIES ? load(terms[1 + SPLIT] + o) : all(smoothed);
                scale[k] = reduction == NONE ? load(scales + o) : all(one);
            }
            tile.write_gradient(problem, place, scale, gradient, [&](int64_t c, int k, Vec<W>& below) INLINED {
                Vec<W> p = exp_below((row_vector(tile.rows, c, k) - tile.highest[k]) - tile.above[k]);
                below = p - W(1);
                return p;
            });
        });
    });
    return 0;
}

// Writes the gradient of `factor` times the sum of the losses, and returns that sum where `predictions` is given.
static double one_pass(Problem& problem, W factor, T* gradient, const Predictions* predictions) {
    int64_t blocks = problem.shape.blocks();
    Slots slots(blocks);
    parallel_for(blocks, grain(problem), [&](int64_t begin, int64_t end) {
        Tile tile(problem);
        int64_t right = 0, valid = 0;
        Vec<W> scale[K], inverse[K], missing[K];
        for (int k = 0; k < K; ++k) scale[k] = all(factor);
        for (int64_t block = begin; block < end; ++block) {
            Vec<double> sum{};
            for_tiles(problem.shape, block, block + 1, [&](int64_t, const Place& place) {
                tile.read(problem, place);
                if (predictions != nullptr) predictions->write(tile, problem, place, right, valid);
                tile.softmax<true>(problem);
                W losses[TILE];
                problem.loss.losses(tile.highest, tile.above, tile.picked, tile.factor, tile.label, tile.mass,
                                    tile.distance, losses);
                add_row(losses, sum);
                for (int k = 0; k < K; ++k) {
                    inverse[k] = W(1) / tile.total[k];
                    missing[k] = -tile.others[k] * inverse[k];
                }
                auto probability = [&](int64_t c, int k, Vec<W>& below) INLINED {
                    below = missing[k];
                    return load(tile.values.data + c * TILE + k * LANES<W>) * inverse[k];
                };
                tile.write_gradient(problem, place, scale, gradient, probability);
            });
            slots.losses.data[block] = sum_of(sum);
        }
        if (predictions != nullptr) predictions->add(right, valid);
    });
    return Slots::sum(slots.losses.data, blocks);
}

// Writes the labels in one byte or two, all bits set where there is none, and returns the sum of their weights or, for
// VALID, their number.
template <typename P> static double pack(const Problem& problem, int64_t reduction, P* packed) {
    Shape shape{1, 1, problem.shape.all_pixels(), true};
    Slots slots(shape.blocks());
    parallel_for(shape.blocks(), grain_of(BLOCK), [&](int64_t begin, int64_t end) {
        Int<W> label[TILE];
        W factor[TILE];
        for (int64_t block = begin; block < end; ++block) {
            Vec<double> sum{};
            Int<W> count = 0;
            for_tiles(shape, block, block + 1, [&](int64_t, const Place& place) {
                problem.labels.read(place.pixel, place.count, label);
                for (int i = 0; i < place.count; ++i) packed[place.pixel + i] = P(label[i]);
                if (reduction == WEIGHTS && problem.loss.weight != nullptr) {
                    problem.loss.read_factors(label, factor);
                    add_row(factor, sum);
                } else {
                    for (int i = 0; i < TILE; ++i) count += label[i] >= 0;
                }
            });
            slots.losses.data[block] = sum_of(sum) + double(count);
        }
    });
    return Slots::sum(slots.losses.data, shape.blocks());
}

// Writes loss and the gradient of the logits for a gradient of the loss that is 1. packed: for WEIGHTS and VALID the
// labels in one byte or two (packed_size). Returns as cross_entropy_fwd; with a bad label in `packed` nothing else is
// written.
EXPORT cross_entropy_one_pass(const void* logits, const void* targets, const W* weight, int64_t n, int64_t classes,
                              int64_t pixels, int64_t last, int64_t label_size, int64_t ignored, double smoothing,
                              double z_loss, int64_t reduction, W* loss, T* gradient, void* packed,
                              int64_t packed_size, W* denominator, void* prediction, int64_t prediction_size,
                              int64_t* counts) {
    Problem PROBLEM;
    Predictions predictions{prediction, prediction_size, counts};
    fresh(gradient, problem.shape.all_pixels() * classes * int64_t(sizeof(T)));
    predictions.clear();
    double divisor = 1;
    if (reduction == WEIGHTS || reduction == VALID) {
        divisor = packed_size == 1 ? pack(problem, reduction, static_cast<uint8_t*>(packed))
                                   : pack(problem, reduction, static_cast<int16_t*>(packed));
        if (problem.bad != 0) return problem.bad;
        *denominator = W(divisor);
        problem.labels = {packed, packed_size, packed_size == 1 ? 255 : -1, classes, &problem.bad};
    } else if (reduction == COUNT) {
        divisor = double(*denominator);
    }
    double sum = one_pass(problem, W(1 / divisor), gradient, &predictions);
    *loss = W(sum / divisor);
    return problem.bad;
}

// Writes the gradient again for this gradient of the loss, unless it is 1.
EXPORT cross_entropy_one_pass_bwd(const W* grad_loss, const void* logits, const void* targets, const W* weight,
                                  int64_t n, int64_t classes, int64_t pixels, int64_t last, int64_t label_size,
                                  int64_t ignored, double smoothing, double z_loss, int64_t reduction,
                                  const W* denominator, T* gradient) {
    if (*grad_loss == W(1)) return 0;
    Problem PROBLEM;
    one_pass(problem, reduction == SUM ? *grad_loss : *grad_loss / *denominator, gradient, nullptr);
    return 0;
}
