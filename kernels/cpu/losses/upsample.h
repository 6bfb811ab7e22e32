// Resizing (N, C, h, w) logits to H x W as a part of a kernel, nearest or bilinear, without storing the large map.
//
// The unit of work is an interval: the output rows whose upper tap is one row of the small map, so that they all mix the
// same two rows. A tile of TILE output columns takes those two rows expanded along x, once for all rows of the interval.
#pragma once

#include "tile.h"

// The taps of one side: output position i reads positions first[i] and next[i] of the small side, the latter with
// weight behind[i].
template <typename W> struct Taps {
    Scratch<int32_t> first, next;
    Scratch<W> behind;
    int64_t size;

    // ratio: source positions per output position. Nearest: in float32, as torch rounds.
    Taps(int64_t small, int64_t large, double ratio, bool nearest, bool align_corners)
        : first(large + TILE), next(large + TILE), behind(large + TILE), size(large) {
        for (int64_t i = 0; i < large + TILE; ++i) {  // a tile reads past the end
            int64_t position = i < large ? i : large - 1;
            double at = align_corners ? double(position) * ratio : (double(position) + 0.5) * ratio - 0.5;
            if (nearest) at = double(float(position) * float(ratio));
            if (at < 0) at = 0;
            int64_t tap = int64_t(at) < small ? int64_t(at) : small - 1;
            double weight = at - double(tap) < 1 ? at - double(tap) : 1;
            first.data[i] = int32_t(tap);
            next.data[i] = int32_t(tap + 1 < small && !nearest ? tap + 1 : tap);
            behind.data[i] = nearest ? W(0) : W(weight);
        }
    }

    // The first output position whose upper tap is `tap` or later.
    int64_t start_of(int64_t tap) const {
        int64_t low = 0, high = size;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (first.data[middle] < tap) low = middle + 1;
            else high = middle;
        }
        return low;
    }
};

// The small map, of any strides, and how it is resized.
template <typename T, typename W> struct Resized {
    const T* data;
    int64_t n, classes, h, w, stride_n, stride_c, stride_h, stride_w;
    Taps<W> y, x;

    int64_t height() const { return y.size; }
    int64_t width() const { return x.size; }
    int64_t units() const { return n * h; }  // intervals of all images
    int64_t tiles() const { return (width() + TILE - 1) / TILE; }
    int64_t row_length() const { return w + LANES<W>; }  // a vector may be read from any column
    int64_t padded() const { return (classes + LANES<W> - 1) / LANES<W> * LANES<W>; }
    int64_t elements_of_unit() const { return classes * width() * (height() / h + 1); }

    // Copies row `tap` of an image to `row` (classes, row_length).
    void read_row(int64_t image, int64_t tap, W* row) const {
        const T* from = data + image * stride_n + tap * stride_h;
        if (stride_c == 1) {
            for (int64_t column = 0; column < w; ++column)
                for (int64_t c = 0; c < classes; ++c) row[c * row_length() + column] = widen(from[column * stride_w + c]);
        } else {
            for (int64_t c = 0; c < classes; ++c)
                for (int64_t column = 0; column < w; ++column)
                    row[c * row_length() + column] = widen(from[c * stride_c + column * stride_w]);
        }
        for (int64_t c = 0; c < classes; ++c)
            for (int64_t column = w; column < row_length(); ++column) row[c * row_length() + column] = W(0);
    }

    // An infinite value of weight 0 must not make a NaN.
    static INLINE Vec<W> mixed(Vec<W> a, Vec<W> b, Vec<W> behind) {
        return select<W>(behind == W(0), a, (1 - behind) * a + behind * b);
    }

    // Expands a row along x for the tile that begins at output column `start`, to `wide` (classes, TILE).
    NOINLINE void expand(const W* row, int64_t start, W* wide) const {
        constexpr int L = LANES<W>;
        for (int o = 0; o < TILE; o += L) {
            const int32_t *first = x.first.data + start + o, *next = x.next.data + start + o;
            Vec<W> behind = load(x.behind.data + start + o);
#if !defined(__clang__)
            if (next[L - 1] - first[0] < L) {  // all taps are in one vector
                Int<W> from[L], to[L];
                for (int i = 0; i < L; ++i) from[i] = first[i] - first[0], to[i] = next[i] - first[0];
                IntVec<W> one = load_integers<W>(from), two = load_integers<W>(to);
                for (int64_t c = 0; c < classes; ++c) {
                    Vec<W> values = load(row + c * row_length() + first[0]);
                    Vec<W> a = __builtin_shuffle(values, one), b = __builtin_shuffle(values, two);
                    store(wide + c * TILE + o, mixed(a, b, behind));
                }
                continue;
            }
#endif
            for (int64_t c = 0; c < classes; ++c) {
                W a[L], b[L];
                const W* values = row + c * row_length();
                for (int i = 0; i < L; ++i) a[i] = values[first[i]];
                for (int i = 0; i < L; ++i) b[i] = values[next[i]];
                store(wide + c * TILE + o, mixed(load(a), load(b), behind));
            }
        }
    }

    // The transpose of `expand`: adds what `wide` (classes, TILE; overwritten) contributes to a row (w, padded()).
    NOINLINE void add_back(int64_t start, int count, const W* wide, W* row) const {
        constexpr int L = LANES<W>;
        for (int64_t c = 0; c < classes; c += L) {
            for (int o = 0; o < count; o += L) {
                Vec<W> block[L];
                for (int k = 0; k < L; ++k) block[k] = c + k < classes ? load(wide + (c + k) * TILE + o) : Vec<W>{};
                transpose<W>(block);
                for (int k = 0; k < L && o + k < count; ++k) {
                    W behind = x.behind.data[start + o + k];
                    W* a = row + x.first.data[start + o + k] * padded() + c;
                    W* b = row + x.next.data[start + o + k] * padded() + c;
                    store(a, load(a) + (1 - behind) * block[k]);
                    if (behind != 0) store(b, load(b) + behind * block[k]);
                }
            }
        }
    }
};

// What a thread needs for an interval: its two rows of the small map, and a tile of each expanded along x.
template <typename W> struct Interval {
    Scratch<W> row[2], wide[2];
    template <typename T>
    explicit Interval(const Resized<T, W>& map)
        : row{Scratch<W>(map.classes * map.row_length()), Scratch<W>(map.classes * map.row_length())},
          wide{Scratch<W>(map.classes * TILE), Scratch<W>(map.classes * TILE)} {}

    template <typename T> void read(const Resized<T, W>& map, int64_t image, int64_t tap) {
        for (int k = 0; k < 2; ++k) map.read_row(image, tap + k < map.h ? tap + k : map.h - 1, row[k].data);
    }
    template <typename T> INLINE void expand(const Resized<T, W>& map, int64_t start) {
        for (int k = 0; k < 2; ++k) map.expand(row[k].data, start, wide[k].data);
    }
    // Writes a tile of an output row, whose lower tap has the weight `behind`.
    NOINLINE void mix(int64_t classes, W behind, W* values) const {
        if (behind == 0) {
            memcpy(values, wide[0].data, size_t(classes * TILE) * sizeof(W));
            return;
        }
        for (int64_t i = 0; i < classes * TILE; i += LANES<W>)
            store(values + i, (1 - behind) * load(wide[0].data + i) + behind * load(wide[1].data + i));
    }
};

#define MAP_ARGUMENTS \
    low, n, classes, h, w, stride_n, stride_c, stride_h, stride_w, {h, height, ratio_h, nearest != 0, corners != 0}, \
        {w, width, ratio_w, nearest != 0, corners != 0}
