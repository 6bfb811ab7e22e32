#include "../common.cuh"
#include "../pooling/tiling.cuh"
#include "common.cuh"

// Batch norm, ReLU and max-pooling in one pass over the map; the ReLU's output is never stored. Windows do not overlap.
// With windows of one pixel and OFFSETS false these kernels are batch norm + ReLU without pooling.
//
// ACROSS, in NCHW: image rows have exactly ACROSS pixels per window, and are read and written whole, VEC windows at a
// time; 0 if they are not. KH and KW: the window's size if its elements (taps) are unrolled, else 0.

// A thread writes its part of the pooled map y, and with OFFSETS the offsets of the maxima. Reads x once. Values are
// rounded to T before they are compared, as if the ReLU's output had been stored.
template <typename T, typename Index, bool CHANNELS_LAST, int VEC, int ACROSS, int KH, int KW, bool OFFSETS>
__global__ void batch_norm_relu_max_pool2d_fwd(
    const T* x, const Computed<T>* folded, T* y, uint8* offsets, int tiles, int64 groups, int64 chunks, int channels,
    int runs, bool relu, int height, int width, int pooled_height, int pooled_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w) {
    using Wide = Computed<T>;
    constexpr int LANES = CHANNELS_LAST ? VEC : 1;
    static_assert(CHANNELS_LAST || ACROSS || VEC == 1, "in NCHW only whole rows are read wide");
    if (KH) kernel_h = KH, kernel_w = KW;

    // 1. Which channels, and their vectors
    int64 number = thread_number();
    if (number >= tiles * chunks) return;
    Part part = part_of<CHANNELS_LAST>(number, tiles, chunks);
    Channels<Wide, LANES> norm(folded, part.tile * LANES, channels);
    for (int64 o = part.chunk; o < groups; o += chunks) {
        // 2. Which windows; if no value is above -inf, the first tap inside the image is the maximum
        auto group =
            group_in<Index, CHANNELS_LAST, VEC>(Index(o), part.tile, channels, runs, pooled_height, pooled_width);
        int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
        int first = (top < 0 ? -top : 0) * kernel_w + (left < 0 ? -left : 0);
        Wide best[VEC];
        int tap[VEC];
        for (int k = 0; k < VEC; ++k) best[k] = -Wide(infinity()), tap[k] = first;

        // 3. Load the windows' elements, normalize them and keep the largest; NaN always replaces
        auto see = [&](int k, T stored, int at) {
            int lane = CHANNELS_LAST ? k : 0;
            Wide value = norm.template normalize<T>(lane, norm.centered(lane, widen(stored)), relu);
            if (larger(value, best[k]) || value != value) best[k] = value, tap[k] = at;
        };
#pragma unroll
        for (int i = 0; i < (KH ? KH : kernel_h); ++i) {
            int h = top + i;
            if (ACROSS) {
                if (unsigned(h) >= unsigned(height)) continue;
                auto row = load<(ACROSS ? ACROSS : 1) * VEC>(x + (group.plane * height + h) * width + left);
                for (int k = 0; k < VEC; ++k)
                    for (int j = 0; j < KW; ++j) see(k, row.at[k * ACROSS + j], i * KW + j);
                continue;
            }
#pragma unroll
            for (int j = 0; j < (KH ? KW : kernel_w); ++j) {
                int w = left + j;
                if (!within(h, w, height, width)) continue;
                auto pixel = load<VEC>(x + offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width));
                for (int k = 0; k < VEC; ++k) see(k, pixel.at[k], i * kernel_w + j);
            }
        }

        // 4. Store
        Index out =
            offset_of<Index, CHANNELS_LAST, VEC>(group, group.h, group.w, runs, pooled_height, pooled_width);
        Pack<T, VEC> values;
        Pack<uint8, VEC> kept;
        for (int k = 0; k < VEC; ++k) narrow(values.at[k], best[k]), kept.at[k] = uint8(tap[k]);
        store(y + out, values);
        if (OFFSETS) store(offsets + out, kept);
    }
}

// A thread sums grad and grad * centered of its channels over its part of the pooled map; grad is the gradient of the
// ReLU's input. Reads grad_y, offsets and the windows of x once. Writes partials (2, chunks, C).
template <typename T, typename Index, bool CHANNELS_LAST, int VEC, int ACROSS, int KH, int KW, bool OFFSETS>
__global__ void batch_norm_relu_max_pool2d_sums(
    const T* grad_y, const uint8* offsets, const T* x, const Computed<T>* folded, Computed<T>* partials, int tiles,
    int64 groups, int64 chunks, int channels, int runs, bool relu, int height, int width, int pooled_height,
    int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w) {
    using Wide = Computed<T>;
    constexpr int LANES = CHANNELS_LAST ? VEC : 1;
    static_assert(CHANNELS_LAST || ACROSS || VEC == 1, "in NCHW only whole rows are read wide");
    if (KH) kernel_h = KH, kernel_w = KW;

    // 1. Which channels, and their vectors
    int64 number = thread_number();
    if (number >= tiles * chunks) return;
    Part part = part_of<CHANNELS_LAST>(number, tiles, chunks);
    Channels<Wide, LANES> norm(folded, part.tile * LANES, channels);
    Wide sum_grad[LANES], sum_grad_x[LANES];
    for (int k = 0; k < LANES; ++k) sum_grad[k] = 0, sum_grad_x[k] = 0;
    for (int64 o = part.chunk; o < groups; o += chunks) {
        // 2. Load the gradients and offsets of the windows, and the maxima
        auto group =
            group_in<Index, CHANNELS_LAST, VEC>(Index(o), part.tile, channels, runs, pooled_height, pooled_width);
        int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
        Index out =
            offset_of<Index, CHANNELS_LAST, VEC>(group, group.h, group.w, runs, pooled_height, pooled_width);
        auto grad = load<VEC>(grad_y + out);
        Pack<uint8, VEC> position;
        for (int k = 0; k < VEC; ++k) position.at[k] = 0;
        if (OFFSETS) position = load<VEC>(offsets + out);
        Pack<T, VEC> value;
        for (int k = 0; k < VEC; ++k) narrow(value.at[k], Wide(0));
#pragma unroll
        for (int i = 0; i < (KH ? KH : kernel_h); ++i) {
            int h = top + i;
            if (ACROSS) {
                if (unsigned(h) >= unsigned(height)) continue;
                auto row = load<(ACROSS ? ACROSS : 1) * VEC>(x + (group.plane * height + h) * width + left);
                for (int k = 0; k < VEC; ++k)
                    for (int j = 0; j < KW; ++j)
                        if (position.at[k] == i * KW + j) value.at[k] = row.at[k * ACROSS + j];
                continue;
            }
#pragma unroll
            for (int j = 0; j < (KH ? KW : kernel_w); ++j) {
                int w = left + j;
                if (!within(h, w, height, width)) continue;
                auto pixel = load<VEC>(x + offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width));
                for (int k = 0; k < VEC; ++k)
                    if (position.at[k] == i * kernel_w + j) value.at[k] = pixel.at[k];
            }
        }

        // 3. Add up
        for (int k = 0; k < VEC; ++k) {
            int lane = CHANNELS_LAST ? k : 0;
            Wide centered = norm.centered(lane, widen(value.at[k]));
            Wide masked = norm.template relu_gradient<T>(lane, centered, widen(grad.at[k]), relu);
            sum_grad[lane] += masked;
            sum_grad_x[lane] += masked * centered;
        }
    }

    // 4. Store
    for (int k = 0; k < LANES; ++k) {
        int64 to = part.chunk * channels + part.tile * LANES + k;
        partials[to] = sum_grad[k];
        partials[chunks * channels + to] = sum_grad_x[k];
    }
}

// A thread writes its part of grad_x, cell by cell. A cell is a window and the gap after it; the cells tile the image,
// so every element is written once. Reads every input once. means (2, C): those of grad and grad * x_hat, which the
// gradient loses because x also moves the batch statistics; null if the statistics are constants.
template <typename T, typename Index, bool CHANNELS_LAST, int VEC, int ACROSS, bool OFFSETS>
__global__ void batch_norm_relu_max_pool2d_bwd(
    const T* grad_y, const uint8* offsets, const T* x, const Computed<T>* folded, const Computed<T>* means, T* grad_x,
    int tiles, int64 groups, int64 chunks, int channels, int runs, bool relu, int cells_down, int cells_across,
    int height, int width, int pooled_height, int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w,
    int padding_h, int padding_w) {
    using Wide = Computed<T>;
    constexpr int LANES = CHANNELS_LAST ? VEC : 1;
    static_assert(CHANNELS_LAST || ACROSS || VEC == 1, "in NCHW only whole rows are written wide");

    // 1. Which channels, and their vectors
    int64 number = thread_number();
    if (number >= tiles * chunks) return;
    Part part = part_of<CHANNELS_LAST>(number, tiles, chunks);
    Channels<Wide, LANES> norm(folded, part.tile * LANES, channels);
    Wide mean_grad[LANES], slope[LANES];
    for (int k = 0; k < LANES; ++k) {
        int c = part.tile * LANES + k;
        mean_grad[k] = means ? means[c] : Wide(0);
        slope[k] = means ? means[channels + c] * folded[4 * channels + c] : Wide(0);
    }
    for (int64 o = part.chunk; o < groups; o += chunks) {
        // 2. Which cells, and the gradient and offset of each one's window, if it has one
        auto group =
            group_in<Index, CHANNELS_LAST, VEC>(Index(o), part.tile, channels, runs, cells_down, cells_across);
        int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
        bool pooled = group.h < pooled_height && group.w < pooled_width;
        Pack<T, VEC> grad;
        Pack<uint8, VEC> position;
        for (int k = 0; k < VEC; ++k) position.at[k] = 0;
        if (pooled) {
            Index source =
                offset_of<Index, CHANNELS_LAST, VEC>(group, group.h, group.w, runs, pooled_height, pooled_width);
            grad = load<VEC>(grad_y + source);
            if (OFFSETS) position = load<VEC>(offsets + source);
        }

        // 3. Load each pixel of the cells, and store its gradient
        auto gradient = [&](int k, T& value, int i, int j) {
            int lane = CHANNELS_LAST ? k : 0;
            Wide centered = norm.centered(lane, widen(value)), masked = 0;
            if (pooled && i < kernel_h && j < kernel_w && position.at[k] == i * kernel_w + j)
                masked = norm.template relu_gradient<T>(lane, centered, widen(grad.at[k]), relu);
            narrow(value, norm.scale.at[lane] * (masked - mean_grad[lane] - centered * slope[lane]));
        };
        for (int i = 0; i < stride_h; ++i) {
            int h = top + i;
            if (ACROSS) {
                if (unsigned(h) >= unsigned(height)) continue;
                constexpr int STEP = ACROSS ? ACROSS : 1;
                Index from = (group.plane * height + h) * width + left;
                auto row = load<STEP * VEC>(x + from);
                for (int k = 0; k < STEP * VEC; ++k) gradient(k / STEP, row.at[k], i, k % STEP);
                store(grad_x + from, row);
                continue;
            }
            for (int j = 0; j < stride_w; ++j) {
                int w = left + j;
                if (!within(h, w, height, width)) continue;
                Index from = offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width);
                auto pixel = load<VEC>(x + from);
                for (int k = 0; k < VEC; ++k) gradient(k, pixel.at[k], i, j);
                store(grad_x + from, pixel);
            }
        }
    }
}
