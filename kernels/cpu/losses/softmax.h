// Softmax of a tile, and the loss of its pixels.
//
// With p = softmax(x), lse = log(sum_c exp(x_c)), e the label smoothing, w the weights of the classes, z the weight of
// the z-loss, and q_c = w_c * ((1 - e) * [c = label] + e / C):
//
//     loss     = sum_c q_c * (lse - x_c) + z * lse^2
//     gradient = (sum_k q_k + 2 * z * lse) * p_c - q_c
//
// The label's own part is kept apart as gain * (p_c - [c = label]), gain = (1 - e) * w_label, where p - 1 is the sum of
// the other classes' p: a confident pixel's gradient keeps its digits. What else multiplies p_c is `spread`. For class
// probabilities q_c = w_c * ((1 - e) * target_c + e / C), and there is no part of a label.
#pragma once

#include "tile.h"

template <typename W> static INLINE Vec<W> row_vector(const Rows<W>& rows, int64_t c, int k) {
    return load(rows.row(c) + k * LANES<W>);
}

// --- sums over the classes, a vector for each LANES pixels --------------------------------------------------------------

// The maximum of each pixel's logits; a NaN is passed over.
template <typename W> static NOINLINE void find_highest(const Rows<W>& rows, int64_t classes, Vec<W>* result) {
    constexpr int K = VECTORS<W>;
    Vec<W> highest[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) highest[k] = all(W(-__builtin_inf()));
    for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) highest[k] = larger<W>(row_vector(rows, c, k), highest[k]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) result[k] = highest[k];
}

// total = sum_c exp(x_c - highest), at least 1, or NaN where a logit is NaN or infinite; others = the same without the
// label's class; picked = the label's logit. KEEP: the exponentials are left in `values` (classes, TILE), which may be
// the rows themselves.
template <bool KEEP, typename W>
static NOINLINE void add_exponentials(const Rows<W>& rows, int64_t classes, const Vec<W>* maximum, const Int<W>* label,
                                      W* values, Vec<W>* total, Vec<W>* others, Vec<W>* picked) {
    constexpr int K = VECTORS<W>;
    Vec<W> highest[K], sum[K], of_label[K], found[K];
    IntVec<W> own[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
        highest[k] = maximum[k], sum[k] = of_label[k] = found[k] = Vec<W>{};
        own[k] = load_integers<W>(label + k * LANES<W>);
    }
    for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            Vec<W> x = row_vector(rows, c, k);
            IntVec<W> hit = own[k] == Int<W>(c);
            found[k] = select<W>(hit, x, found[k]);
            Vec<W> e = exp_below(x - highest[k]);
            of_label[k] = select<W>(hit, e, of_label[k]);
            sum[k] += select<W>(hit, Vec<W>{}, e);
            if (KEEP) store(values + c * TILE + k * LANES<W>, e);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) total[k] = sum[k] + of_label[k], others[k] = sum[k], picked[k] = found[k];
}

// The class of each pixel's largest logit: the first of equal ones, and a NaN before any number, as torch.argmax.
template <typename W> static NOINLINE void argmax(const Rows<W>& rows, int64_t classes, Int<W>* result) {
    constexpr int K = VECTORS<W>;
    Vec<W> most[K];
    IntVec<W> best[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) most[k] = row_vector(rows, 0, k), best[k] = IntVec<W>{};
    for (int64_t c = 1; c < classes; ++c) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            Vec<W> x = row_vector(rows, c, k);
            IntVec<W> wins = (x > most[k]) | ((x != x) & (most[k] == most[k]));
            best[k] = wins ? IntVec<W>{} + Int<W>(c) : best[k];
            most[k] = select<W>(wins, x, most[k]);
        }
    }
    memcpy(result, best, sizeof(best));
}

// Adds a row of TILE numbers to `sum` in double, in a fixed order.
template <typename W> static INLINE void add_row(const W* row, Vec<double>& sum) {
    typedef W Part __attribute__((vector_size(VECTOR_BYTES / 8 * sizeof(W))));  // as many as a vector has doubles
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i += LANES<double>) {
        Part part;
        memcpy(&part, row + i, sizeof(part));
        sum += __builtin_convertvector(part, Vec<double>);
    }
}

// --- the loss of a pixel -------------------------------------------------------------------------------------------------

// PROBABILITIES: the targets are class probabilities.
template <typename W, bool PROBABILITIES> struct Loss {
    int64_t classes;
    const W* weight;  // of the classes, or null
    W smoothing, z_loss;

    bool shared() const { return PROBABILITIES || smoothing != 0; }   // there is a share of every class
    bool spreads() const { return shared() || z_loss != 0; }

    // q_c without the label's own part. target: the row of probabilities.
    INLINE Vec<W> share(const Rows<W>& target, int64_t c, int k) const {
        W factor = weight == nullptr ? W(1) : weight[c];
        W even = smoothing / W(classes);
        if constexpr (PROBABILITIES) return (row_vector(target, c, k) * (1 - smoothing) + even) * factor;
        return all(even * factor);
    }

    // mass = sum_c q_c and distance = sum_c q_c * (highest - x_c), without the label's own part.
    NOINLINE void add_shares(const Rows<W>& rows, const Rows<W>& target, const Vec<W>* highest, Vec<W>* mass,
                           Vec<W>* distance) const {
        for (int k = 0; k < VECTORS<W>; ++k) mass[k] = distance[k] = Vec<W>{};
        for (int64_t c = 0; shared() && c < classes; ++c) {
            for (int k = 0; k < VECTORS<W>; ++k) {
                Vec<W> q = share(target, c, k);
                mass[k] += q;
                distance[k] += q * (highest[k] - row_vector(rows, c, k));
            }
        }
    }

    // The weight of each pixel's label: 0 where there is none, 1 for probabilities.
    NOINLINE void read_factors(const Int<W>* label, W* factor) const {
        if (weight == nullptr || PROBABILITIES) {
            for (int i = 0; i < TILE; ++i) factor[i] = label[i] < 0 ? W(0) : W(1);
        } else {
            for (int i = 0; i < TILE; ++i) factor[i] = label[i] < 0 ? W(0) : weight[label[i]];
        }
    }

    // The losses of a tile's pixels, 0 where there is no label. above = log(total).
    NOINLINE void losses(const Vec<W>* highest, const Vec<W>* above, const Vec<W>* picked, const W* factor,
                       const Int<W>* label, const Vec<W>* mass, const Vec<W>* distance, W* result) const {
        for (int k = 0; k < VECTORS<W>; ++k) {
            Vec<W> loss{};
            if constexpr (!PROBABILITIES)
                loss = (1 - smoothing) * load(factor + k * LANES<W>) * ((highest[k] - picked[k]) + above[k]);
            if (shared()) loss += distance[k] + mass[k] * above[k];
            if (z_loss != 0) loss += z_loss * (highest[k] + above[k]) * (highest[k] + above[k]);
            IntVec<W> none = load_integers<W>(label + k * LANES<W>) < 0;
            store(result + k * LANES<W>, select<W>(none, Vec<W>{}, loss));
        }
    }
};

// What the gradient of a tile is made of. scales: the gradient of each pixel's loss.
template <typename W, bool PROBABILITIES> struct Gradient {
    const Loss<W, PROBABILITIES>& loss;
    Rows<W> target;
    IntVec<W> own[VECTORS<W>];
    Vec<W> gain[VECTORS<W>], spread[VECTORS<W>], scale[VECTORS<W>];

    INLINE Gradient(const Loss<W, PROBABILITIES>& of, const Rows<W>& rows, const Int<W>* label, const W* factor,
                    const Vec<W>* scales, const Vec<W>* mass, const Vec<W>* highest, const Vec<W>* above)
        : loss(of), target(rows) {
        for (int k = 0; k < VECTORS<W>; ++k) {
            own[k] = load_integers<W>(label + k * LANES<W>);
            scale[k] = scales[k];
            gain[k] = scale[k] * load(factor + k * LANES<W>) * (PROBABILITIES ? W(0) : 1 - loss.smoothing);
            spread[k] = mass[k] + 2 * loss.z_loss * (highest[k] + above[k]);
        }
    }

    // Of class c, whose softmax is p, and p - 1 is `below`: exactly 0 where there is no label. SPREADS: loss.spreads().
    template <bool SPREADS> INLINE Vec<W> operator()(Vec<W> p, Vec<W> below, int64_t c, int k) const {
        Vec<W> grad = gain[k] * select<W>(own[k] == Int<W>(c), below, p);
        if constexpr (SPREADS) {
            Vec<W> rest = spread[k] * p;
            if (loss.shared()) rest -= loss.share(target, c, k);
            grad += scale[k] * rest;
        }
        return select<W>(own[k] < 0, Vec<W>{}, grad);
    }
};
