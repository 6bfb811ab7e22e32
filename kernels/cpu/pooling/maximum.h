#pragma once
// Max-pooling of windows of any geometry, row by row of the pooled map, by torch's rule (see Largest). If no value of a
// window is larger than -inf, its position is the first tap inside the image.

#include "cells.h"

struct MaxPool {
    const Windows& g;
    const T* x;
    T* y;
    uint8_t* offsets;  // where positions are stored: one of the two, or neither
    int64_t* indices;

    // The code of tap (i, j): its offset, or its index counted from that of tap (0, 0).
    int64_t code(int64_t i, int64_t j) const {
        return indices ? i * g.dh * g.w + j * g.dw : i * g.kw + j;
    }

    // L windows from `ow` on (NCHW), or L channels from `c` on of window `ow`. STEP: the distance of two lanes, 0 for
    // g.sw.
    template <int L, int STEP>
    INLINE void block(int64_t row, int64_t ow, int64_t c, Range rows, Range columns) const {
        const int64_t h0 = row % g.oh * g.sh - g.ph, w0 = ow * g.sw - g.pw, pixel = g.pixel();
        const T* corner = x + ((row / g.oh * g.h + h0) * g.w + w0) * pixel + c;
        Lanes<C, L> best = splat<L>(C(-__builtin_inf()));
        Lanes<I, L> at = splat<L>(I(code(rows.first, columns.first)));
        auto see = [&](int64_t i, int64_t j) INLINED {
            const auto value = load_apart<L, STEP>(corner + (i * g.dh * g.w + j * g.dw) * pixel, g.sw);
            const auto wins = (value > best) | (value != value);
            best = wins ? value : best;
            at = wins ? splat<L>(I(code(i, j))) : at;
        };
        for (int64_t i = rows.first; i < rows.end; ++i)
            for (int64_t j = columns.first; j < columns.end; ++j) see(i, j);
        const int64_t to = (row * g.ow + ow) * pixel + c;
        store<L>(y + to, best);
        if (offsets) store_offsets<L>(offsets + to, at);
        if (indices) store_indices<L>(indices + to, at, h0 * g.w + w0, LAST ? 0 : g.sw);
    }

    template <int STEP> void row_of_windows(int64_t row) const {
        const Range rows = rows_inside(g, row % g.oh);
        const Range whole = whole_windows(g);
        auto singles = [&](int64_t ow, int64_t end) {
            for (; ow < end; ++ow) block<1, STEP>(row, ow, 0, rows, columns_inside(g, ow));
        };
        // Lanes that are two apart are loaded with the element behind the last of them, which must be there.
        const bool beyond = STEP == 2 && (whole.end - 1) * g.sw - g.pw + (g.kw - 1) * g.dw + 1 >= g.w;
        const int64_t end = larger(whole.first, whole.end - beyond);
        singles(0, whole.first);
        in_blocks<true>(end - whole.first, [&](auto width, int64_t k) INLINED {
            block<decltype(width)::value, STEP>(row, whole.first + k, 0, rows, {0, g.kw});
        });
        singles(end, g.ow);
    }

    void row_of_pixels(int64_t row) const {
        const Range rows = rows_inside(g, row % g.oh);
        for (int64_t ow = 0; ow < g.ow; ++ow) {
            const Range columns = columns_inside(g, ow);
            in_blocks<true>(g.c, [&](auto width, int64_t c) INLINED {
                block<decltype(width)::value, 1>(row, ow, c, rows, columns);
            });
        }
    }

    // Pools one row of windows.
    void operator()(int64_t row) const {
#if CHANNELS_LAST
        row_of_pixels(row);
#else
        if (g.sw == 1) row_of_windows<1>(row);
        else if (g.sw == 2) row_of_windows<2>(row);
        else row_of_windows<0>(row);
#endif
    }
};
