#pragma once
// Windows of 2x2 that divide the image into cells (Windows::cells). L lanes are neighbouring cells of a row in NCHW and
// neighbouring channels of one cell in channels_last, so that one kernel serves both memory formats.

#include "windows.h"

// The four pixels of L cells, row-major.
template <int L> struct Four {
    Lanes<C, L> tap[4];
};

// One row of cells.
struct CellRow {
    const Windows& g;
    int64_t row;

    int64_t channel() const { return LAST ? 0 : row / g.oh % g.c; }
    int64_t image(int64_t ow, int64_t c) const {
        return ((row / g.oh * g.h + row % g.oh * 2) * g.w + ow * 2) * g.pixel() + c;
    }
    int64_t pooled(int64_t ow, int64_t c) const { return (row * g.ow + ow) * g.pixel() + c; }

    // Calls f(width, window, channel) for the cells of these windows, in blocks of lanes; OVERLAP as in in_blocks.
    template <bool OVERLAP, class F> INLINE void blocks(Range windows, F f) const {
#if CHANNELS_LAST
        for (int64_t ow = windows.first; ow < windows.end; ++ow)
            in_blocks<OVERLAP>(g.c, [&](auto width, int64_t c) INLINED { f(width, ow, c); });
#else
        in_blocks<OVERLAP>(windows.end - windows.first, [&](auto width, int64_t k) INLINED {
            f(width, windows.first + k, int64_t(0));
        });
#endif
    }
    template <class F> INLINE void each(F f) const { blocks<true>({0, g.ow}, f); }

    template <int L> INLINE Four<L> load_image(const T* x, int64_t ow, int64_t c) const {
        const T *upper = x + image(ow, c), *lower = upper + g.w * g.pixel();
        if (LAST) return {load<L>(upper), load<L>(upper + g.c), load<L>(lower), load<L>(lower + g.c)};
        const auto a = load<L>(upper), b = load<L>(upper + L), d = load<L>(lower), e = load<L>(lower + L);
        return {every_second<0, L>(a, b), every_second<1, L>(a, b), every_second<0, L>(d, e), every_second<1, L>(d, e)};
    }

    template <int L> INLINE void store_image(T* y, int64_t ow, int64_t c, const Four<L>& value) const {
        T *upper = y + image(ow, c), *lower = upper + g.w * g.pixel();
        const Lanes<C, L>* tap = value.tap;
        if (LAST) {
            store<L>(upper, tap[0]), store<L>(upper + g.c, tap[1]);
            store<L>(lower, tap[2]), store<L>(lower + g.c, tap[3]);
        } else {
            store<L>(upper, alternating<0, L>(tap[0], tap[1])), store<L>(upper + L, alternating<1, L>(tap[0], tap[1]));
            store<L>(lower, alternating<0, L>(tap[2], tap[3])), store<L>(lower + L, alternating<1, L>(tap[2], tap[3]));
        }
    }

    template <int L> INLINE Lanes<I, L> taps(const uint8_t* offsets, int64_t ow, int64_t c) const {
        return converted<I, L>(raw<L>(offsets + pooled(ow, c)));
    }

    // Whether the offsets of the row name one of four taps each.
    bool inside(const uint8_t* offsets) const {
        int over = 0;
        for (int64_t at = pooled(0, 0), end = at + g.ow * g.pixel(); at < end; ++at) over |= offsets[at] & ~3;
        return over == 0;
    }

    // Calls f(start, count) for the runs of elements beside this row of cells and below the last one, in no cell.
    template <class F> void leftovers(F f) const {
        const int64_t right = g.w - 2 * g.ow, below = g.h - 2 * g.oh;
        for (int64_t i = 0; right && i < 2; ++i) f(image(g.ow, 0) + i * g.w * g.pixel(), right * g.pixel());
        if (below && row % g.oh == g.oh - 1) f(image(0, 0) + 2 * g.w * g.pixel(), below * g.w * g.pixel());
    }
};

// `value` at one tap of each cell and zero at the others.
template <int L> INLINE Four<L> placed(Lanes<C, L> value, Lanes<I, L> tap) {
    const Lanes<C, L> zero{};
    return {tap == 0 ? value : zero, tap == 1 ? value : zero, tap == 2 ? value : zero, tap == 3 ? value : zero};
}

// Of four pixels the one at `tap`; zero where there is none.
template <int L> INLINE Lanes<C, L> chosen(const Four<L>& four, Lanes<I, L> tap) {
    Lanes<C, L> value = tap == 0 ? four.tap[0] : Lanes<C, L>{};
    for (int t = 1; t < 4; ++t) value = tap == t ? four.tap[t] : value;
    return value;
}

// The largest of four pixels and its tap, by torch's rule: a strictly larger value wins, so the first of equal values
// stays, and NaN always wins.
template <int L> struct Largest {
    Lanes<C, L> value;
    Lanes<I, L> tap{};

    INLINE explicit Largest(const Four<L>& four) : value(four.tap[0]) {
        for (int t = 1; t < 4; ++t) {
            const Lanes<C, L> other = four.tap[t];
            const auto wins = (other > value) | (other != other);
            value = wins ? other : value;
            tap = wins ? splat<L>(I(t)) : tap;
        }
    }
};

template <int L> INLINE void store_offsets(uint8_t* address, Lanes<I, L> tap) {
    const auto stored = converted<uint8_t, L>(tap);
    memcpy(address, &stored, sizeof stored);
}

// base: the index of the first lane's tap (0, 0); step: how many elements further the next lane's is.
template <int L> INLINE void store_indices(int64_t* address, Lanes<I, L> ahead, int64_t base, int64_t step) {
    const auto stored = converted<int64_t, L>(ahead) + base + numbered<L>(step);
    memcpy(address, &stored, sizeof stored);
}

// Pools one row of cells; positions go to offsets or to indices, or nowhere if both are null.
static inline void pool_cells(const CellRow& row, const T* x, T* y, uint8_t* offsets, int64_t* indices) {
    const int64_t w = row.g.w, start = row.row % row.g.oh * 2 * w;
    row.each([&](auto width, int64_t ow, int64_t c) INLINED {
        constexpr int L = decltype(width)::value;
        const Largest<L> largest(row.load_image<L>(x, ow, c));
        const int64_t to = row.pooled(ow, c);
        store<L>(y + to, largest.value);
        if (offsets) store_offsets<L>(offsets + to, largest.tap);
        if (!indices) return;
        const Lanes<I, L> ahead = (largest.tap >= 2 ? splat<L>(I(w)) : Lanes<I, L>{}) + (largest.tap & 1);
        store_indices<L>(indices + to, ahead, start + ow * 2, LAST ? 0 : 2);
    });
}

// Writes the image under one row of cells: each value goes to the tap that its offset names, all else is zero.
static inline void unpool_cells(const CellRow& row, const T* x, const uint8_t* offsets, T* y) {
    row.each([&](auto width, int64_t ow, int64_t c) INLINED {
        constexpr int L = decltype(width)::value;
        row.store_image<L>(y, ow, c, placed<L>(load<L>(x + row.pooled(ow, c)), row.taps<L>(offsets, ow, c)));
    });
    row.leftovers([&](int64_t start, int64_t count) { memset(y + start, 0, count * sizeof(T)); });
}

// Takes from the image under one row of cells the pixels that the offsets name.
static inline void gather_cells(const CellRow& row, const T* image, const uint8_t* offsets, T* pooled) {
    row.each([&](auto width, int64_t ow, int64_t c) INLINED {
        constexpr int L = decltype(width)::value;
        const auto taps = row.taps<L>(offsets, ow, c);
        store<L>(pooled + row.pooled(ow, c), chosen<L>(row.load_image<L>(image, ow, c), taps));
    });
}
