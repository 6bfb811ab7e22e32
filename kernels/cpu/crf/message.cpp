// What each pixel hears from its neighbours, weighted by a Gaussian of position and colour:
//
//     message_i = sum over j with |p_i - p_j|^2 <= FARTHEST of exp(-|p_i - p_j|^2 / (2 sigma^2) - |c_i - c_j|^2 / 2) * q_j
//
// A tile is P pixels of a row, one per lane of two vectors. For each row of neighbours the weights between the tile and
// some neighbours are computed into a block that stays in the first cache, P for each neighbour, and then multiplied with
// the values of these neighbours, KB classes at a time in registers: a matrix product that computes each weight once for
// all classes. The spatial part of the weights comes from a table.
//
// VALUES: the dtype of the values.
#include "../vector.h"

using T = VALUES;
using W = Computed<T>;
constexpr int L = LANES<W>, P = 2 * L;
constexpr int KB = VECTOR_BYTES == 64 ? 12 : 6;  // classes at a time: two sums each, and three registers for the rest
constexpr int NEIGHBOURS = 128;                  // in a block of weights

// While it lives, x86 takes numbers below the smallest normal one as 0. It would else compute with them in microcode,
// which makes the product several times slower: weights and probabilities that small are frequent.
struct FlushedToZero {
#if defined(__SSE__)
    const unsigned saved = __builtin_ia32_stmxcsr();
    FlushedToZero() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
    ~FlushedToZero() { __builtin_ia32_ldmxcsr(saved); }
#else
    ~FlushedToZero() {}
#endif
};

struct Image {
    int64_t classes, height, width, farthest;
    bool self;
    const W *values, *colours;  // values (H, W, K), colours (3, H, W) or null
    const W* falloff;           // exp(-d^2 / (2 sigma^2)) for the distances d along one axis

    int64_t pixels() const { return height * width; }
};

// The largest d with d * d <= square.
static int64_t whole_root(int64_t square) {
    int64_t root = int64_t(__builtin_sqrt(double(square)));
    while (root * root > square) --root;
    while ((root + 1) * (root + 1) <= square) ++root;
    return root;
}

// exp2(x) of x <= 0, to 3e-8 of itself (in double to 2e-15); at -126 (-1022) and below, and for NaN, next to nothing.
template <typename W> static INLINE Vec<W> exp2_below(Vec<W> x) {
    constexpr bool SINGLE = sizeof(W) == 4;
    constexpr W ROUNDER = SINGLE ? W(12582912.0) : W(6755399441055744.0), LOWEST = SINGLE ? W(-126) : W(-1022);
    constexpr int TERMS = SINGLE ? 7 : 13;
    // The powers of log(2) over the factorials.
    constexpr W SERIES[] = {W(1), W(0.69314718055994530942), W(0.24022650695910071233), W(0.055504108664821579953),
                            W(0.0096181291076284771620), W(0.0013333558146428443423), W(1.5403530393381609954e-4),
                            W(1.5252733804059840280e-5), W(1.3215486790144309488e-6), W(1.0178086009239699728e-7),
                            W(7.0549116208011233299e-9), W(4.4455382718708114976e-10), W(2.5678435993488205142e-11)};
    x = larger<W>(x, all(LOWEST));
    Vec<W> t = x + ROUNDER, r = x - (t - ROUNDER), p = all(SERIES[TERMS - 1]);
#pragma GCC unroll 12
    for (int i = TERMS - 2; i >= 0; --i) p = p * r + SERIES[i];
    constexpr int MANTISSA = SINGLE ? 23 : 52;
    return Vec<W>(IntVec<W>(p) + (IntVec<W>(t) << MANTISSA));  // the integer part is in the last digits of t
}

struct Tile {
    const Image& image;
    const int64_t reach;
    int64_t y, x, live;  // the first pixel, and how many of the P exist
    Scratch<W> sums, weights, spatial, own;

    explicit Tile(const Image& image)
        : image(image), reach(whole_root(image.farthest)), sums(image.classes * P), weights(NEIGHBOURS * P),
          spatial(2 * (reach + P) + 1), own(3 * P) {}

    void start(int64_t row, int64_t column) {
        y = row, x = column, live = image.width - x < P ? image.width - x : P;
        __builtin_memset(sums.data, 0, size_t(image.classes * P) * sizeof(W));
        if (image.colours == nullptr) return;
        __builtin_memset(own.data, 0, size_t(3 * P) * sizeof(W));
        for (int c = 0; c < 3; ++c)
            __builtin_memcpy(own.data + c * P, image.colours + c * image.pixels() + y * image.width + x,
                             size_t(live) * sizeof(W));
    }

    // The spatial weights of a row of neighbours: spatial[reach + P + d] for d columns between pixel and neighbour.
    int64_t set_row(int64_t other) {
        int64_t down = other < y ? y - other : other - y, most = whole_root(image.farthest - down * down);
        W* middle = spatial.data + reach + P;
        for (int64_t d = 0; d < reach + P; ++d)
            middle[d] = middle[-d] = d <= most ? image.falloff[down] * image.falloff[d] : W(0);
        if (!image.self && down == 0) *middle = 0;
        return most;
    }

    // The weights of `count` neighbours in a row, from column `first` on.
    template <bool COLOURED> NOINLINE void weigh(int64_t other, int64_t first, int64_t count) {
        const W* near = spatial.data + (x - first + reach + P);
        const W *mine = own.data, *colour = image.colours + other * image.width + first;
        const int64_t pixels = image.pixels();
        W* to = weights.data;
        for (int64_t n = 0; n < count; ++n) {
            Vec<W> w[2] = {load(near - n), load(near - n + L)};
            if constexpr (COLOURED) {
                Vec<W> e[2] = {};
                for (int c = 0; c < 3; ++c) {
                    W theirs = colour[c * pixels + n];
                    for (int v = 0; v < 2; ++v) {
                        Vec<W> step = load(mine + c * P + v * L) - theirs;
                        e[v] -= step * step;
                    }
                }
                // exp(-d / 2) = exp2(-d * log2(e) / 2)
                for (int v = 0; v < 2; ++v) w[v] *= exp2_below<W>(e[v] * W(0.72134752044448170368));
            }
            store(to + n * P, w[0]), store(to + n * P + L, w[1]);
        }
    }

    // Adds the values (count, K) of B classes, from class k on, times the weights.
    template <int B> NOINLINE void add(const W* values, int64_t count, int64_t k) {
        W* sum = sums.data + k * P;
        const W* weight = weights.data;
        const int64_t classes = image.classes;
        Vec<W> total[B][2] = {};  // from zero: short sums lose fewer digits than one long sum
        for (int64_t n = 0; n < count; ++n) {
            Vec<W> left = load(weight + n * P), right = load(weight + n * P + L);
            const W* said = values + n * classes + k;
#pragma GCC unroll 12
            for (int b = 0; b < B; ++b) total[b][0] += left * said[b], total[b][1] += right * said[b];
        }
#pragma GCC unroll 12
        for (int b = 0; b < B; ++b) {
            store(sum + b * P, load(sum + b * P) + total[b][0]);
            store(sum + b * P + L, load(sum + b * P + L) + total[b][1]);
        }
    }
    // The same for the last classes, fewer than KB.
    template <int B> INLINE void add_last(const W* values, int64_t count, int64_t k) {
        if (image.classes - k == B) return add<B>(values, count, k);
        if constexpr (B > 1) add_last<B - 1>(values, count, k);
    }

    void hear() {
        int64_t above = y - reach < 0 ? 0 : y - reach;
        int64_t below = y + reach + 1 < image.height ? y + reach + 1 : image.height;
        for (int64_t other = above; other < below; ++other) {
            int64_t most = set_row(other), left = x - most < 0 ? 0 : x - most;
            int64_t right = x + live + most < image.width ? x + live + most : image.width;
            for (int64_t first = left; first < right; first += NEIGHBOURS) {
                int64_t count = first + NEIGHBOURS < right ? NEIGHBOURS : right - first, k = 0;
                image.colours == nullptr ? weigh<false>(other, first, count) : weigh<true>(other, first, count);
                const W* values = image.values + (other * image.width + first) * image.classes;
                for (; k + KB <= image.classes; k += KB) add<KB>(values, count, k);
                if (k < image.classes) add_last<KB - 1>(values, count, k);
            }
        }
    }
};

// Writes the messages of values (N, K, H, W), which are channels_last if `last`, to out. Returns 0.
EXPORT mean_field_message(const T* values, const W* colours, int64_t n, int64_t classes, int64_t height, int64_t width,
                          int64_t last, int64_t farthest, double sigma, int64_t self, T* out) {
    int64_t pixels = height * width, of_class = last ? 1 : pixels, of_pixel = last ? classes : 1;
    int64_t sides = height > width ? height : width, tiles = (width + P - 1) / P;
    Scratch<W> copy(pixels * classes), falloff(2 * sides + P + 1);
    // In double, each from its own distance: a product of roundings would lose digits far from the pixel.
    for (int64_t d = 0; d < 2 * sides + P + 1; ++d) {
        double exponent = -0.5 * double(d) * double(d) / (sigma * sigma);
        falloff.data[d] = W(exponent < -700 ? 0.0 : __builtin_exp(exponent));
    }
    fresh(out, n * classes * pixels * int64_t(sizeof(T)));
    for (int64_t number = 0; number < n; ++number) {
        const T* from = values + number * classes * pixels;
        T* to = out + number * classes * pixels;
        parallel_for(pixels, grain_of(classes), [&](int64_t begin, int64_t end) {
            for (int64_t k = 0; k < classes; ++k)
                for (int64_t p = begin; p < end; ++p)
                    copy.data[p * classes + k] = widen(from[k * of_class + p * of_pixel]);
        });
        const W* colour = colours == nullptr ? nullptr : colours + number * 3 * pixels;
        Image image{classes, height, width, farthest, self != 0, copy.data, colour, falloff.data};
        parallel_for(height * tiles, 1, [&](int64_t begin, int64_t end) {
            FlushedToZero flushed;
            Tile tile(image);
            for (int64_t at = begin; at < end; ++at) {
                tile.start(at / tiles, at % tiles * P);
                tile.hear();
                for (int64_t k = 0; k < classes; ++k)
                    for (int64_t p = 0; p < tile.live; ++p)
                        to[k * of_class + (tile.y * width + tile.x + p) * of_pixel] = narrow<T>(tile.sums.data[k * P + p]);
            }
        });
    }
    return 0;
}
