#pragma once
// The arithmetic of batch norm + ReLU for one element, and sums over pixels.
//
//     centered = (x - mean) + shift,   y = relu(centered * scale + beta),   scale = weight / sqrt(var + eps)
//
// Sums over pixels have one slot for each chunk of the map. Chunks follow from the shape alone, and slots are added in
// double in one order, so that the number of threads changes no bit of a result.

#include "../layers.h"

#include <math.h>

// The largest value that T rounds to zero: what is not above it does not pass the ReLU.
template <class E> constexpr C ROUNDS_TO_ZERO = 0;
template <> constexpr C ROUNDS_TO_ZERO<float16> = C(0x1p-25);
template <> constexpr C ROUNDS_TO_ZERO<bfloat16> = C(0x1p-134);

// The statistics and parameters of a call, vectors of c.
struct Norm {
    int64_t c;
    bool relu;
    Scratch<C> memory;
    C *mean, *shift, *scale, *beta, *inverse;

    // shift, weight and bias may be null.
    Norm(
        int64_t c, const C* mean, const C* shift, const C* var, const C* weight, const C* bias, double eps, bool relu)
        : c(c), relu(relu), memory(5 * c), mean(memory), shift(memory + c), scale(memory + 2 * c),
          beta(memory + 3 * c), inverse(memory + 4 * c) {
        for (int64_t k = 0; k < c; ++k) {
            this->mean[k] = mean[k];
            this->shift[k] = shift ? shift[k] : 0;
            inverse[k] = C(1 / sqrt(double(var[k]) + eps));
            scale[k] = C((weight ? double(weight[k]) : 1) / sqrt(double(var[k]) + eps));
            beta[k] = bias ? bias[k] : 0;
        }
    }
};

// A vector of c at L channels from `channel` on, or in NCHW at that one.
template <int L> INLINE Lanes<C, L> at_channel(const C* vector, int64_t channel) {
    return LAST ? raw<L>(vector + channel) : splat<L>(vector[channel]);
}

// What L elements need of a Norm.
template <int L> struct Affine {
    Lanes<C, L> mean, shift, scale, beta;
    C zero, dropped;  // NaN, which nothing is less than, where there is no ReLU

    INLINE Affine(const Norm& norm, int64_t channel)
        : mean(at_channel<L>(norm.mean, channel)), shift(at_channel<L>(norm.shift, channel)),
          scale(at_channel<L>(norm.scale, channel)), beta(at_channel<L>(norm.beta, channel)),
          zero(norm.relu ? 0 : C(__builtin_nan(""))), dropped(norm.relu ? ROUNDS_TO_ZERO<T> : C(__builtin_nan(""))) {}

    INLINE Lanes<C, L> centered(Lanes<C, L> x) const { return (x - mean) + shift; }
    // The output. NaN stays, as in torch's ReLU.
    INLINE Lanes<C, L> output(Lanes<C, L> x) const {
        const Lanes<C, L> y = centered(x) * scale + beta;
        return y <= zero ? Lanes<C, L>{} : y;
    }
    // The gradient before the ReLU, of one after it.
    INLINE Lanes<C, L> passed(Lanes<C, L> centered, Lanes<C, L> grad) const {
        return centered * scale + beta <= dropped ? Lanes<C, L>{} : grad;
    }
};

// The gradient of x. In training x moves the statistics too: means (2, c) are those of grad and of grad * x_hat.
struct Gradient {
    const Norm& norm;
    const C *constant, *slope;  // null where the statistics are constants
    Scratch<C> memory;

    Gradient(const Norm& norm, const C* means) : norm(norm), constant(means), slope(nullptr), memory(norm.c) {
        if (!means) return;
        for (int64_t k = 0; k < norm.c; ++k) memory[k] = means[norm.c + k] * norm.inverse[k];
        slope = memory;
    }
};

template <int L> struct GradientOf {
    Affine<L> affine;
    Lanes<C, L> constant{}, slope{};

    INLINE GradientOf(const Gradient& gradient, int64_t channel) : affine(gradient.norm, channel) {
        if (gradient.slope)
            constant = at_channel<L>(gradient.constant, channel), slope = at_channel<L>(gradient.slope, channel);
    }
    INLINE Lanes<C, L> operator()(Lanes<C, L> x, Lanes<C, L> grad) const {
        const Lanes<C, L> centered = affine.centered(x);
        return affine.scale * (affine.passed(centered, grad) - constant - centered * slope);
    }
};

// Two sums over one chunk: in NCHW of all its elements, which belong to one channel; in channels_last of each channel.
// They are added up in two levels, because every addition to one number rounds: runs of at most RUN blocks, and the
// runs.
struct Sums {
    static constexpr int64_t RUN = 16;
#if CHANNELS_LAST
    int64_t c;
    C* run;   // vectors of c: two sums of a run,
    C* slot;  // and of the chunk

    template <int L> INLINE void add(int64_t channel, Lanes<C, L> a, Lanes<C, L> b) {
        const Lanes<C, L> x = raw<L>(run + channel) + a, y = raw<L>(run + c + channel) + b;
        memcpy(run + channel, &x, sizeof x), memcpy(run + c + channel, &y, sizeof y);
    }
    void end_run() {
        for (int64_t k = 0; k < 2 * c; ++k) slot[k] += run[k], run[k] = 0;
    }
#else
    Lanes<C, FULL> run[2]{}, lanes[2]{};
    Lanes<C, 4> four[2]{};
    C one[2]{};

    template <int L> INLINE void add(int64_t, Lanes<C, L> a, Lanes<C, L> b) {
        if constexpr (L == FULL) run[0] += a, run[1] += b;
        else if constexpr (L == 4) four[0] += a, four[1] += b;
        else one[0] += a, one[1] += b;
    }
    void end_run() {
        for (int k = 0; k < 2; ++k) lanes[k] += run[k], run[k] = Lanes<C, FULL>{};
    }
    C total(int sum) const {
        double total = double(one[sum]);
        for (int k = 0; k < 4; ++k) total += double(four[sum][k]);
        for (int k = 0; k < FULL; ++k) total += double(lanes[sum][k]);
        return C(total);
    }
#endif
};

// The slots of a call: both sums of each of `chunks` chunks of a plane (NCHW), or of the batch (channels_last, where a
// sum is a vector of c).
struct Slots {
    int64_t n, c, chunks;
    Scratch<C> memory;

    Slots(int64_t n, int64_t c, int64_t chunks)
        : n(n), c(c), chunks(chunks), memory(2 * chunks * (LAST ? c : n * c)) {}

    // Calls add(sums), which adds up chunk `number`.
    template <class F> void fill(int64_t number, F add) const {
#if CHANNELS_LAST
        Scratch<C> run(2 * c);
        Sums sums{c, run, memory + 2 * number * c};
        for (int64_t k = 0; k < 2 * c; ++k) sums.run[k] = sums.slot[k] = 0;
        add(sums);
        sums.end_run();
#else
        Sums sums;
        add(sums);
        sums.end_run();
        memory[2 * number] = sums.total(0), memory[2 * number + 1] = sums.total(1);
#endif
    }

    // Adds up both sums over the chunks into totals (2, c).
    void merge(double* totals) const {
        for (int64_t k = 0; k < 2 * c; ++k) totals[k] = 0;
        for (int64_t image = 0; image < (LAST ? 1 : n); ++image)
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                for (int64_t k = 0; k < c; ++k)
                    for (int64_t sum = 0; sum < 2; ++sum)
                        totals[sum * c + k] += double(
                            LAST ? memory[(2 * chunk + sum) * c + k]
                                 : memory[2 * ((image * c + k) * chunks + chunk) + sum]);
    }

    // Writes sums (4, c) of a backward: of grad and of grad * x_hat, then both over `pixels`.
    void finish(const Norm& norm, int64_t pixels, C* sums) const {
        Scratch<double> totals(2 * c);
        merge(totals);
        for (int64_t k = 0; k < c; ++k) {
            const double product = totals[c + k] * double(norm.inverse[k]);
            sums[k] = C(totals[k]), sums[c + k] = C(product);
            sums[2 * c + k] = C(totals[k] / double(pixels)), sums[3 * c + k] = C(product / double(pixels));
        }
    }
};
