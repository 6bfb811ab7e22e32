// Batch norm with the ReLU after it: statistics, output, sums and gradient, each in one pass over the map.
#include "norm.h"

// A map of n images, c channels and `size` pixels in chunks: runs of a plane in NCHW, of pixels in channels_last.
struct Map {
    static constexpr int64_t ELEMENTS = 8192, PIXELS = 128;  // a chunk fits in the first-level cache, or the second
    int64_t n, c, size;

    int64_t length() const { return LAST ? PIXELS : ELEMENTS; }
    int64_t pixels() const { return LAST ? n * size : size; }  // of which chunks are made
    int64_t chunks() const { return (pixels() + length() - 1) / length(); }
    int64_t grain() const { return grain_of(length() * (LAST ? c : 1)); }
    int64_t count() const { return LAST ? chunks() : n * c * chunks(); }
    int64_t channel(int64_t number) const { return LAST ? 0 : number / chunks() % c; }
    int64_t first(int64_t number) const {  // element of chunk `number`
        return LAST ? number * length() * c : number / chunks() * size + number % chunks() * length();
    }
    int64_t pixels(int64_t number) const { return smaller(length(), pixels() - number % chunks() * length()); }

    // Calls f(width, element, channel) for all elements of a chunk, in blocks of lanes; OVERLAP as in in_blocks. Calls
    // end_run() after each run of Sums::RUN blocks of an element.
    template <bool OVERLAP, class F, class G> INLINE void blocks(int64_t number, F f, G end_run) const {
        const int64_t start = first(number), end = start + pixels(number) * (LAST ? c : 1);
        const int64_t run = Sums::RUN * (LAST ? c : FULL);
        for (int64_t from = start; from < end; from += run) {
            const int64_t to = smaller(from + run, end);
#if CHANNELS_LAST
            for (int64_t pixel = from; pixel < to; pixel += c)
                in_blocks<OVERLAP>(c, [&](auto width, int64_t k) INLINED { f(width, pixel + k, k); });
#else
            const int64_t k = channel(number);
            in_blocks<OVERLAP>(to - from, [&](auto width, int64_t i) INLINED { f(width, from + i, k); });
#endif
            end_run();
        }
    }
    template <class F> INLINE void each(int64_t number, F f) const {
        blocks<true>(number, f, [] {});
    }
    template <class F> INLINE void sum(int64_t number, Sums& sums, F f) const {
        blocks<false>(number, f, [&]() INLINED { sums.end_run(); });
    }
};

// Writes stats (3, c), mean, shift (the rounding error of the mean) and biased variance, and updates the running
// statistics. For each chunk it computes the mean first, and then the squared deviations from it, out of the cache;
// chunks are merged by Chan's rule.
EXPORT batch_norm_stats(
    const T* x, const C* input_bias, C* running_mean, C* running_var, double momentum, C* stats, int64_t n, int64_t c,
    int64_t size) {
    const Map map{n, c, size};
    const int64_t chunks = map.chunks(), per_slot = LAST ? c : 1;
    Scratch<C> means(map.count() * per_slot);
    const Slots slots(n, c, chunks);  // sums of x - mean and its square
    parallel_for(map.count(), map.grain(), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            C* mean = means + number * per_slot;
            slots.fill(number, [&](Sums& sums) {
                map.sum(number, sums, [&](auto width, int64_t i, int64_t k) INLINED {
                    constexpr int L = decltype(width)::value;
                    sums.add<L>(k, load<L>(x + i), Lanes<C, L>{});
                });
            });
            const C* totals = slots.memory + 2 * number * per_slot;
            for (int64_t k = 0; k < per_slot; ++k) mean[k] = totals[k] / C(map.pixels(number));
            slots.fill(number, [&](Sums& sums) {
                map.sum(number, sums, [&](auto width, int64_t i, int64_t k) INLINED {
                    constexpr int L = decltype(width)::value;
                    const auto apart = load<L>(x + i) - (LAST ? raw<L>(mean + k) : splat<L>(mean[0]));
                    sums.add<L>(k, apart, apart * apart);
                });
            });
        }
    });
    // Calls f(channel, pixels, their mean, sum of squares about it) for every chunk.
    auto each = [&](auto f) {
        for (int64_t number = 0; number < map.count(); ++number)
            for (int64_t k = 0; k < per_slot; ++k) {
                const C* slot = slots.memory + 2 * number * per_slot + k;
                const double pixels = double(map.pixels(number)), first = double(slot[0]);
                f(map.channel(number) + k, pixels, double(means[number * per_slot + k]) + first / pixels,
                  double(slot[per_slot]) - first * first / pixels);
            }
    };
    const double count = double(n) * double(size);
    Scratch<double> mean(2 * c);
    double* squares = mean + c;
    for (int64_t k = 0; k < 2 * c; ++k) mean[k] = 0;
    each([&](int64_t k, double pixels, double of_chunk, double) { mean[k] += pixels / count * of_chunk; });
    each([&](int64_t k, double pixels, double of_chunk, double about) {
        squares[k] += about + pixels * (of_chunk - mean[k]) * (of_chunk - mean[k]);
    });
    for (int64_t k = 0; k < c; ++k) {
        stats[k] = C(mean[k]), stats[c + k] = C(double(C(mean[k])) - mean[k]), stats[2 * c + k] = C(squares[k] / count);
        if (!running_mean) continue;
        const double whole = mean[k] + (input_bias ? double(input_bias[k]) : 0);
        running_mean[k] = C((1 - momentum) * double(running_mean[k]) + momentum * whole);
        running_var[k] = C((1 - momentum) * double(running_var[k]) + momentum * (squares[k] / (count - 1)));
    }
    return 0;
}

EXPORT batch_norm_relu_fwd(
    const T* x, const C* mean, const C* shift, const C* var, const C* weight, const C* bias, double eps, int64_t relu,
    T* y, int64_t n, int64_t c, int64_t size) {
    const Map map{n, c, size};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    fresh(y, n * c * size * sizeof(T));
    parallel_for(map.count(), map.grain(), [&](int64_t number, int64_t end) {
        for (; number < end; ++number)
            map.each(number, [&](auto width, int64_t i, int64_t k) INLINED {
                constexpr int L = decltype(width)::value;
                store<L>(y + i, Affine<L>(norm, k).output(load<L>(x + i)));
            });
    });
    return 0;
}

// Writes sums (4, c): of grad and grad * x_hat over the pixels, where grad is before the ReLU, and their means.
EXPORT batch_norm_relu_sums(
    const T* grad_y, const T* x, const C* mean, const C* shift, const C* var, const C* weight, const C* bias,
    double eps, int64_t relu, C* sums, int64_t n, int64_t c, int64_t size) {
    const Map map{n, c, size};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    const Slots slots(n, c, map.chunks());
    parallel_for(map.count(), map.grain(), [&](int64_t number, int64_t end) {
        for (; number < end; ++number)
            slots.fill(number, [&](Sums& sums) {
                map.sum(number, sums, [&](auto width, int64_t i, int64_t k) INLINED {
                    constexpr int L = decltype(width)::value;
                    const Affine<L> affine(norm, k);
                    const auto centered = affine.centered(load<L>(x + i));
                    const auto grad = affine.passed(centered, load<L>(grad_y + i));
                    sums.add<L>(k, grad, grad * centered);
                });
            });
    });
    slots.finish(norm, n * size, sums);
    return 0;
}

// Writes grad_x; means (2, c): of grad and grad * x_hat, or null where the statistics are constants.
EXPORT batch_norm_relu_bwd(
    const T* grad_y, const T* x, const C* mean, const C* shift, const C* var, const C* weight, const C* bias,
    double eps, int64_t relu, const C* means, T* grad_x, int64_t n, int64_t c, int64_t size) {
    const Map map{n, c, size};
    const Norm norm(c, mean, shift, var, weight, bias, eps, relu);
    const Gradient gradient(norm, means);
    fresh(grad_x, n * c * size * sizeof(T));
    parallel_for(map.count(), map.grain(), [&](int64_t number, int64_t end) {
        for (; number < end; ++number)
            map.each(number, [&](auto width, int64_t i, int64_t k) INLINED {
                constexpr int L = decltype(width)::value;
                store<L>(grad_x + i, GradientOf<L>(gradient, k)(load<L>(x + i), load<L>(grad_y + i)));
            });
    });
    return 0;
}
