#include "../common.cuh"
#include "tiling.cuh"

// Max-pooling: a thread writes VEC pooled elements and, unless Position is `nothing`, their positions.
//
// Reads each element of the input once; if windows overlap, once for each window that holds it, from the cache. Of
// equal maxima the first stays, NaN always replaces, and taps outside the image are -inf. ROWS, in NCHW: windows are two
// wide with stride two, the image is twice as wide as the pooled map, and the image rows of a group are read whole. KH
// and KW: the window's size if its taps are unrolled, else 0.
template <typename T, typename Position, typename Index, bool CHANNELS_LAST, int VEC, bool ROWS, int KH, int KW>
__global__ void max_pool2d_fwd(
    const T* x, T* y, Position* positions, int64 groups, int runs, int height, int width, int pooled_height,
    int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    static_assert(CHANNELS_LAST || ROWS || VEC == 1, "in NCHW only whole rows are read wide");
    if (KH) kernel_h = KH, kernel_w = KW;

    // 1. Which windows
    int64 number = thread_number();
    if (number >= groups) return;
    auto group = group_of<Index, CHANNELS_LAST, VEC>(Index(number), runs, pooled_height, pooled_width);
    int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;

    // 2. The maximum of each window; if no value is above -inf, the first tap inside the image
    int first = (top < 0 ? (dilation_h - 1 - top) / dilation_h : 0) * kernel_w +
                (left < 0 ? (dilation_w - 1 - left) / dilation_w : 0);
    Computed<T> best[VEC];
    int tap[VEC];
    for (int k = 0; k < VEC; ++k) best[k] = -infinity(), tap[k] = first;
    auto see = [&](int k, Computed<T> value, int at) {
        if (larger(value, best[k]) || value != value) best[k] = value, tap[k] = at;
    };

#pragma unroll
    for (int i = 0; i < (KH ? KH : kernel_h); ++i) {
        int h = top + i * dilation_h;
        if (ROWS) {
            if (unsigned(h) >= unsigned(height)) continue;
            auto row = load<2 * VEC>(x + (group.plane * height + h) * width + left);
            for (int k = 0; k < VEC; ++k) {
                see(k, widen(row.at[2 * k]), 2 * i);
                see(k, widen(row.at[2 * k + 1]), 2 * i + 1);
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < (KH ? KW : kernel_w); ++j) {
            int w = left + j * dilation_w;
            if (!within(h, w, height, width)) continue;
            auto pixel = load<VEC>(x + offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width));
            for (int k = 0; k < VEC; ++k) see(k, widen(pixel.at[k]), i * kernel_w + j);
        }
    }

    // 3. Store
    Index out = Index(number) * VEC;
    Pack<T, VEC> values;
    for (int k = 0; k < VEC; ++k) narrow(values.at[k], best[k]);
    store(y + out, values);
    if constexpr (sizeof(Position) == sizeof(nothing) && !Kept<Position>::OFFSETS) return;
    else {
        Pack<Position, VEC> kept;
        for (int k = 0; k < VEC; ++k) {
            int h = top + tap[k] / kernel_w * dilation_h, w = left + tap[k] % kernel_w * dilation_w;
            kept.at[k] = position_of<Position>(tap[k], h, CHANNELS_LAST ? w : w + k * stride_w, width);
        }
        store(positions + out, kept);
    }
}
