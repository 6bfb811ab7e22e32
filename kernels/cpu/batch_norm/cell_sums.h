#pragma once
// Sums over the pooled map, by chunks of its rows.
#include "../pooling/cells.h"
#include "norm.h"

struct RowChunks {
    static constexpr int64_t WINDOWS = LAST ? 128 : 2048;  // at least, of a chunk
    const Windows& g;

    int64_t rows() const { return larger(1, WINDOWS / g.ow); }
    int64_t per_plane() const { return (g.oh + rows() - 1) / rows(); }
    int64_t count() const { return g.n * (LAST ? 1 : g.c) * per_plane(); }

    // Calls f(row) for each row of a chunk.
    template <class F> void each(int64_t number, F f) const {
        const int64_t first = number % per_plane() * rows(), end = smaller(first + rows(), g.oh);
        for (int64_t oh = first; oh < end; ++oh) f(CellRow{g, number / per_plane() * g.oh + oh});
    }

    // Calls before(row) and then f(sums, row, width, window, channel) for all elements of a chunk, in blocks of lanes.
    template <class G, class F> INLINE void sum(const Slots& slots, int64_t number, G before, F f) const {
        slots.fill(number, [&](Sums& sums) INLINED {
            each(number, [&](const CellRow& row) INLINED {
                before(row);
                const int64_t run = Sums::RUN * (LAST ? 1 : FULL);
                for (int64_t first = 0; first < g.ow; first += run) {
                    row.blocks<false>({first, smaller(first + run, g.ow)},
                        [&](auto width, int64_t ow, int64_t c) INLINED { f(sums, row, width, ow, c); });
                    sums.end_run();
                }
            });
        });
    }

    // Writes sums (4, c) by f(sums, row, width, window, channel).
    template <class G, class F> INLINE void sum_all(const Norm& norm, int64_t pixels, C* sums, G before, F f) const {
        const Slots slots(g.n, g.c, per_plane() * (LAST ? g.n : 1));
        parallel_for(count(), grain_of(rows() * g.ow * g.pixel() * 4), [&](int64_t number, int64_t end) {
            for (; number < end; ++number) sum(slots, number, before, f);
        });
        slots.finish(norm, pixels, sums);
    }
};
