#pragma once
// Pooling windows. The position of a maximum is an offset, the tap inside its window (uint8), or torch's index
// h * W + w in the plane (int64).

#include "../layers.h"

// The image is (n, c, h, w), the pooled map (n, c, oh, ow).
struct Windows {
    int64_t n, c, h, w, oh, ow;
    int64_t kh, kw, sh, sw, ph, pw, dh, dw;

    // Rows of the pooled map, each of ow windows (of c channels in channels_last): the unit of work. Number `row` is of
    // plane row / oh, which is n * C + c in NCHW and n in channels_last.
    int64_t rows() const { return n * oh * (LAST ? 1 : c); }
    int64_t pixel() const { return LAST ? c : 1; }  // elements of a pixel that are neighbours in memory

    // Whether the windows are the 2x2 pixels of a cell each, all of them inside the image: see cells.h.
    bool cells() const {
        const bool square = kh == 2 && kw == 2 && sh == 2 && sw == 2 && dh == 1 && dw == 1;
        return square && !ph && !pw && 2 * oh <= h && 2 * ow <= w;
    }
};

struct Range {
    int64_t first, end;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// The taps of a window along one side that lie inside the image.
static inline Range taps_inside(int64_t start, int64_t taps, int64_t dilation, int64_t size) {
    const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
    return {first, larger(first, smaller(taps, ceil_div(size - start, dilation)))};
}

static inline Range rows_inside(const Windows& g, int64_t oh) { return taps_inside(oh * g.sh - g.ph, g.kh, g.dh, g.h); }
static inline Range columns_inside(const Windows& g, int64_t ow) {
    return taps_inside(ow * g.sw - g.pw, g.kw, g.dw, g.w);
}

// The windows of a row whose columns all lie inside the image.
static inline Range whole_windows(const Windows& g) {
    const int64_t first = smaller((g.pw + g.sw - 1) / g.sw, g.ow);
    const int64_t last = g.w + g.pw - (g.kw - 1) * g.dw - 1;
    return {first, larger(first, last < 0 ? 0 : smaller(last / g.sw + 1, g.ow))};
}
