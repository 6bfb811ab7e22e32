#pragma once
// Unpooling and gathering for windows of any geometry, which may overlap, and for indices that may point anywhere.

#include "windows.h"

#include <stdlib.h>

// A flag that any thread may lower.
struct Flag {
    int up = 1;
    void lower() { __atomic_store_n(&up, 0, __ATOMIC_RELAXED); }
    explicit operator bool() const { return __atomic_load_n(&up, __ATOMIC_RELAXED) != 0; }
};

// The place h * W + w in its plane that the position of window (oh, ow) names, or -1 for a position outside the window
// or the plane.
struct Places {
    const Windows& g;
    const uint8_t* offsets;  // one of the two
    const int64_t* indices;
    int64_t down[256], across[256];  // of the taps

    Places(const Windows& g, const uint8_t* offsets, const int64_t* indices)
        : g(g), offsets(offsets), indices(indices) {
        for (int64_t tap = 0; tap < 256; ++tap) {
            const bool exists = tap < g.kh * g.kw;
            down[tap] = exists ? tap / g.kw * g.dh : g.h + g.ph;  // a tap that does not exist is below every image
            across[tap] = exists ? tap % g.kw * g.dw : 0;
        }
    }
    INLINE int64_t operator()(int64_t at, int64_t oh, int64_t ow) const {
        if (indices) {
            const int64_t index = indices[at];
            return uint64_t(index) < uint64_t(g.h * g.w) ? index : -1;
        }
        const int64_t tap = offsets[at];
        const int64_t h = oh * g.sh - g.ph + down[tap], w = ow * g.sw - g.pw + across[tap];
        return uint64_t(h) < uint64_t(g.h) && uint64_t(w) < uint64_t(g.w) ? h * g.w + w : -1;
    }
};

// Rows of the image that one thread writes: of one plane in NCHW, of all channels in channels_last. They fit in the
// second-level cache.
struct Band {
    static constexpr int64_t ELEMENTS = 1 << 17;
    int64_t plane;
    Range rows;

    // far: positions may lie outside their windows, so that a band is a whole image.
    static int64_t height(const Windows& g, bool far) { return far ? g.h : larger(1, ELEMENTS / (g.w * g.pixel())); }
    static int64_t per_plane(const Windows& g, bool far) { return ceil_div(g.h, height(g, far)); }
    Band(const Windows& g, int64_t number, bool far) {
        const int64_t bands = per_plane(g, far), first = number % bands * height(g, far);
        plane = number / bands;
        rows = {first, smaller(first + height(g, far), g.h)};
    }
    // The rows of windows that hold pixels of the band.
    Range windows(const Windows& g, bool far) const {
        if (far) return {0, g.oh};
        const int64_t above = rows.first + g.ph - (g.kh - 1) * g.dh;
        return {larger(0, ceil_div(above, g.sh)), smaller(g.oh, (rows.end - 1 + g.ph) / g.sh + 1)};
    }
};

// Scatters the windows of a band in row-major order. If a pixel gets several values, the last one stays, or with ADD
// their sum.
// `to` is the band's first row. Returns whether every position was inside.
template <bool ADD, class To>
static inline bool scatter(const Places& places, const T* x, const Band& band, bool far, To* to) {
    const Windows& g = places.g;
    const Range windows = band.windows(g, far), whole = whole_windows(g);
    const int64_t pixel = g.pixel(), start = band.rows.first * g.w, size = (band.rows.end - band.rows.first) * g.w;
    memset(to, 0, size * pixel * sizeof(To));
    auto give = [&](To* pixel, int64_t at) INLINED {
        if constexpr (ADD) *pixel += widen(x[at]);
        else *pixel = x[at];
    };
    bool inside = true;
    auto checked = [&](int64_t oh, int64_t ow, int64_t end) {
        for (int64_t at = ((band.plane * g.oh + oh) * g.ow + ow) * pixel; ow < end; ++ow)
            for (int64_t c = 0; c < pixel; ++c, ++at) {
                const int64_t place = places(at, oh, ow);
                if (place < 0) inside = false;
                if (uint64_t(place - start) < uint64_t(size)) give(to + (place - start) * pixel + c, at);
            }
    };
    // Windows whose columns are all inside need only a check of the tap: its distance from the window's first column in
    // the band's first row, or a negative number if it is not in the band.
    constexpr int64_t OUTSIDE = -1, IN_ANOTHER_BAND = -2;
    int64_t steps[256];
    for (int64_t& step : steps) step = OUTSIDE;
    To nowhere[1];
    for (int64_t oh = windows.first; oh < windows.end; ++oh) {
        if (places.indices) {
            checked(oh, 0, g.ow);
            continue;
        }
        for (int64_t tap = 0; tap < g.kh * g.kw; ++tap) {
            const int64_t h = oh * g.sh - g.ph + places.down[tap];
            const bool in_band = h >= band.rows.first && h < band.rows.end;
            steps[tap] = (h - band.rows.first) * g.w + places.across[tap];
            if (!in_band) steps[tap] = h < 0 || h >= g.h ? OUTSIDE : IN_ANOTHER_BAND;
        }
        checked(oh, 0, whole.first);
        int64_t at = ((band.plane * g.oh + oh) * g.ow + whole.first) * pixel;
        bool outside = false;
        for (int64_t ow = whole.first; ow < whole.end; ++ow)
            for (int64_t c = 0; c < pixel; ++c, ++at) {
                const int64_t step = steps[places.offsets[at]];
                outside |= step == OUTSIDE;
                give(step < 0 ? nowhere : to + (ow * g.sw - g.pw + step) * pixel + c, at);
            }
        inside &= !outside;
        checked(oh, whole.end, g.ow);
    }
    return inside;
}

// Unpools x into y, each element of which is written. Returns whether all positions were inside; where they were not, y
// is of no use.
static inline bool scatter_all(const Places& places, const T* x, T* y) {
    const Windows& g = places.g;
    const bool far = places.indices != nullptr;
    const int64_t bands = Band::per_plane(g, far), planes = LAST ? g.n : g.n * g.c;
    Flag inside;
    parallel_for(planes * bands, grain_of(g.h * g.w * g.pixel() / bands), [&](int64_t number, int64_t end) {
        for (; number < end; ++number) {
            const Band band(g, number, far);
            T* to = y + (band.plane * g.h + band.rows.first) * g.w * g.pixel();
            if (!scatter<false>(places, x, band, far, to)) inside.lower();
        }
    });
    return bool(inside);
}

// The gradient of a pool: each pixel sums what its windows contribute in row-major order, in float32 for half
// precision.
static inline void add_all(const Places& places, const T* x, T* y) {
    const Windows& g = places.g;
    const int64_t bands = Band::per_plane(g, false), planes = LAST ? g.n : g.n * g.c;
    const int64_t row = g.w * g.pixel();
    parallel_for(planes * bands, grain_of(g.h * row / bands), [&](int64_t number, int64_t end) {
        constexpr bool WIDER = sizeof(C) > sizeof(T);
        C* sums = WIDER ? static_cast<C*>(malloc(smaller(Band::height(g, false), g.h) * row * sizeof(C))) : nullptr;
        for (; number < end; ++number) {
            const Band band(g, number, false);
            T* to = y + (band.plane * g.h + band.rows.first) * row;
            scatter<true>(places, x, band, false, WIDER ? sums : reinterpret_cast<C*>(to));
            if (!WIDER) continue;
            const int64_t size = (band.rows.end - band.rows.first) * row;
            for (int64_t k = 0; k < size; ++k) to[k] = narrow<T>(sums[k]);
        }
        free(sums);
    });
}

// One row of windows, each of which takes the pixel of the image at its position; zero for a position outside.
static inline void gather_row(const Places& places, int64_t row, const T* image, T* pooled) {
    const Windows& g = places.g;
    const T* plane = image + row / g.oh * g.h * g.w * g.pixel();
    for (int64_t ow = 0, at = row * g.ow * g.pixel(); ow < g.ow; ++ow)
        for (int64_t c = 0; c < g.pixel(); ++c, ++at) {
            const int64_t place = places(at, row % g.oh, ow);
            pooled[at] = place < 0 ? T{} : plane[place * g.pixel() + c];
        }
}
