// Tiles of logits (N, C, H, W) in NCHW or channels_last: a tile is TILE pixels with all of their classes, a row of
// pixels for each class. Everything computed is written once, for rows; the layout matters where they are read and
// written alone.
#pragma once

#include "../vector.h"

constexpr int TILE = 64;      // pixels of a tile
constexpr int BLOCK = 1024;   // pixels of a block, whose sums go to one slot: fixed, so that no sum depends on threads
template <typename W> constexpr int VECTORS = TILE / LANES<W>;  // of a row

// Logits or their gradient.
struct Shape {
    int64_t images, classes, pixels;  // pixels of an image
    bool channels_last;

    // The images as one, where their pixels follow each other.
    Shape merged() const { return channels_last ? Shape{1, classes, images * pixels, true} : *this; }
    int64_t all_pixels() const { return images * pixels; }
    int64_t blocks_of_image() const { return (pixels + BLOCK - 1) / BLOCK; }
    int64_t blocks() const { return images * blocks_of_image(); }
};

// Where a tile is: the number of its first pixel in the batch, its image, its first pixel there, how many it has.
struct Place {
    int64_t pixel, image, first;
    int count;
};

// Calls f(block, place) for the tiles of the blocks begin ... end - 1 in order.
template <typename F> static INLINE void for_tiles(const Shape& shape, int64_t begin, int64_t end, const F& f) {
    for (int64_t block = begin; block < end; ++block) {
        int64_t image = block / shape.blocks_of_image(), start = block % shape.blocks_of_image() * BLOCK;
        int64_t stop = start + BLOCK < shape.pixels ? start + BLOCK : shape.pixels;
        for (int64_t first = start; first < stop; first += TILE) {
            int count = int(stop - first < TILE ? stop - first : TILE);
            f(block, Place{image * shape.pixels + first, image, first, count});
        }
    }
}

// Class c's TILE values are at row(c). Those past the tile's count are of no use.
template <typename W> struct Rows {
    const W* data;
    int64_t stride;
    const W* row(int64_t c) const { return data + c * stride; }
};

// --- channels_last: blocks of LANES pixels and classes are transposed ----------------------------------------------------

template <typename T, typename W>
static NOINLINE void gather_rows(const T* from, int64_t classes, int count, int64_t readable, W* rows) {
    constexpr int N = LANES<W>;
    for (int p = 0; p < TILE; p += N) {
        for (int64_t c = 0; c < classes; c += N) {
            Vec<W> block[N];
            // A vector that starts in a pixel's last classes reads on into the next pixel's.
            if ((p + N - 1) * classes + c + N <= readable) {
#pragma GCC unroll 16
                for (int k = 0; k < N; ++k) block[k] = load(from + (p + k) * classes + c);
            } else {
                for (int k = 0; k < N; ++k) {
                    W values[N];
                    for (int j = 0; j < N; ++j) {
                        bool inside = p + k < count && c + j < classes;
                        values[j] = inside ? widen(from[(p + k) * classes + c + j]) : W(0);
                    }
                    block[k] = load(values);
                }
            }
            transpose<W>(block);
            int64_t live = classes - c < N ? classes - c : N;
            for (int64_t k = 0; k < live; ++k) store(rows + (c + k) * TILE + p, block[k]);
        }
    }
}

template <typename T, typename W>
static NOINLINE void scatter_rows(T* to, int64_t classes, int count, const W* rows) {
    constexpr int N = LANES<W>;
    int64_t size = count * classes;  // writable
    for (int p = 0; p < count; p += N) {
        // The last classes first: a vector that starts there writes on into the next pixels' first classes, which are
        // written afterwards.
        for (int64_t c = (classes - 1) / N * N; c >= 0; c -= N) {
            Vec<W> block[N];
            int64_t live = classes - c < N ? classes - c : N;
            for (int64_t k = 0; k < live; ++k) block[k] = load(rows + (c + k) * TILE + p);
            for (int64_t k = live; k < N; ++k) block[k] = Vec<W>{};
            transpose<W>(block);
            for (int k = 0; k < N && p + k < count; ++k) {
                int64_t o = (p + k) * classes + c;
                if (o + N <= size) {
                    store(to + o, block[k]);
                } else {
                    W values[N];
                    store(values, block[k]);
                    for (int64_t j = 0; j < live; ++j) to[o + j] = narrow<T>(values[j]);
                }
            }
        }
    }
}

// --- reading and writing a tile ----------------------------------------------------------------------------------------

// The rows of a tile, in place where they are TILE numbers of the computed type, else copied to `rows` (classes, TILE).
template <typename T, typename W>
static NOINLINE Rows<W> read_tile(const T* data, const Shape& shape, const Place& place, W* rows) {
    int64_t classes = shape.classes;
    if (shape.channels_last) {
        int64_t readable = (shape.all_pixels() - place.pixel) * classes;
        gather_rows<T, W>(data + place.pixel * classes, classes, place.count, readable, rows);
        return {rows, TILE};
    }
    const T* from = data + place.image * classes * shape.pixels + place.first;
    if (place.count == TILE) {
        if constexpr (sizeof(T) == sizeof(W)) return {from, shape.pixels};
        for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 4
            for (int k = 0; k < VECTORS<W>; ++k)
                store(rows + c * TILE + k * LANES<W>, load(from + c * shape.pixels + k * LANES<W>));
        }
    } else {
        for (int64_t c = 0; c < classes; ++c)
            for (int i = 0; i < TILE; ++i)
                rows[c * TILE + i] = i < place.count ? widen(from[c * shape.pixels + i]) : W(0);
    }
    return {rows, TILE};
}

// Writes a tile by calls of value(c, k), which returns vector k of class c's row. rows: scratch (classes, TILE), from
// whose row c value(c, k) may read.
template <typename T, typename W, typename F>
static INLINE void write_tile(T* data, const Shape& shape, const Place& place, W* rows, const F& value) {
    int64_t classes = shape.classes;
    T* to = data + place.image * classes * shape.pixels + place.first;
    if (!shape.channels_last && place.count == TILE) {
        for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 4
            for (int k = 0; k < VECTORS<W>; ++k) store(to + c * shape.pixels + k * LANES<W>, value(c, k));
        }
        return;
    }
    for (int64_t c = 0; c < classes; ++c) {
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS<W>; ++k) store(rows + c * TILE + k * LANES<W>, value(c, k));
    }
    if (shape.channels_last) {
        scatter_rows<T, W>(data + place.pixel * classes, classes, place.count, rows);
    } else {
        for (int64_t c = 0; c < classes; ++c)
            for (int i = 0; i < place.count; ++i) to[c * shape.pixels + i] = narrow<T>(rows[c * TILE + i]);
    }
}

// --- labels --------------------------------------------------------------------------------------------------------------

// Labels of any of the four dtypes, by the size of one: uint8 (1), int16, int32, int64.
struct Labels {
    const void* data;
    int64_t size, ignored, classes;
    int64_t* bad;  // receives the least number of an out-of-range label, plus 1
    bool ignores = true;

    template <typename L, typename I> INLINE bool convert(const L* from, int count, I* label) const {
        Int<float> strange = 0;
        for (int i = 0; i < count; ++i) {
            int64_t value = from[i];
            bool inside = uint64_t(value) < uint64_t(classes), kept = !ignores || value != ignored;
            label[i] = inside && kept ? I(value) : I(-1);
            strange |= kept && !inside;
        }
        return strange != 0;
    }

    template <typename L, typename I> INLINE void read_as(int64_t first, int count, I* label) const {
        const L* from = static_cast<const L*>(data) + first;
        bool strange = count == TILE ? convert(from, TILE, label) : convert(from, count, label);
        for (int i = count; i < TILE; ++i) label[i] = I(-1);
        for (int i = 0; strange && i < count; ++i) {
            int64_t value = from[i];
            if ((!ignores || value != ignored) && uint64_t(value) >= uint64_t(classes)) report(first + i + 1);
        }
    }

    // Atomically the least of all reports, so that it does not depend on threads.
    void report(int64_t number) const {
        int64_t seen = __atomic_load_n(bad, __ATOMIC_RELAXED);
        while ((seen == 0 || number < seen) &&
               !__atomic_compare_exchange_n(bad, &seen, number, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }

    // The classes of `count` pixels from number `first` on, -1 where a pixel is ignored, out of range or past the count.
    template <typename I> NOINLINE void read(int64_t first, int count, I* label) const {
        switch (size) {
            case 1: return read_as<uint8_t>(first, count, label);
            case 2: return read_as<int16_t>(first, count, label);
            case 4: return read_as<int32_t>(first, count, label);
            default: return read_as<int64_t>(first, count, label);
        }
    }
};
