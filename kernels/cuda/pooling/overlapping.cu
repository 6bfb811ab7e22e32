#include "../common.cuh"
#include "tiling.cuh"

// Overlapping windows: a thread writes VEC elements of the image y, from the windows that hold them.
//
// An element takes the values in x of the windows whose position is that element: with ADD their sum in row-major order
// (the gradient of max-pooling), else the last of them in that order (unpooling). y is written once. The values and
// positions of a window are read again for each of its pixels, from the cache.
template <typename T, typename Position, typename Index, bool CHANNELS_LAST, int VEC, bool ADD>
__global__ void window_gather(
    const T* x, const Position* positions, T* y, int64 groups, int runs, int height, int width, int pooled_height,
    int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    static_assert(CHANNELS_LAST || VEC == 1, "in NCHW a thread has one pixel");
    // 1. Which pixels, and the first window that can hold them
    int64 number = thread_number();
    if (number >= groups) return;
    auto group = group_of<Index, CHANNELS_LAST, VEC>(Index(number), runs, height, width);
    int h = group.h + padding_h, w = group.w + padding_w;  // in the padded image
    int span_h = (kernel_h - 1) * dilation_h, span_w = (kernel_w - 1) * dilation_w;
    int first_h = h > span_h ? (h - span_h + stride_h - 1) / stride_h : 0;
    int first_w = w > span_w ? (w - span_w + stride_w - 1) / stride_w : 0;

    // 2. The windows that hold the pixels, in row-major order
    Computed<T> sum[VEC];
    for (int k = 0; k < VEC; ++k) sum[k] = 0;
    for (int oh = first_h; oh < pooled_height && oh * stride_h <= h; ++oh) {
        int i = h - oh * stride_h;
        if (i % dilation_h) continue;
        for (int ow = first_w; ow < pooled_width && ow * stride_w <= w; ++ow) {
            int j = w - ow * stride_w;
            if (j % dilation_w) continue;
            Index source =
                offset_of<Index, CHANNELS_LAST, VEC>(group, oh, ow, runs, pooled_height, pooled_width);
            auto position = load<VEC>(positions + source);
            auto value = load<VEC>(x + source);
            auto here =
                position_of<Position>(i / dilation_h * kernel_w + j / dilation_w, group.h, group.w, width);
            for (int k = 0; k < VEC; ++k) {
                if (position.at[k] != here) continue;
                sum[k] = ADD ? sum[k] + widen(value.at[k]) : widen(value.at[k]);
            }
        }
    }

    // 3. Store
    Pack<T, VEC> values;
    for (int k = 0; k < VEC; ++k) narrow(values.at[k], sum[k]);
    store(y + Index(number) * VEC, values);
}

// Finds positions outside their own windows or outside the plane, which window_gather never reads: such an offset is an
// error, such an index sets *out_of_window to 1. A thread checks one position.
template <typename Position, typename Index, bool CHANNELS_LAST>
__global__ void report_out_of_window(
    const Position* positions, int* out_of_window, int64 groups, int runs, int height, int width, int pooled_height,
    int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w) {
    int64 number = thread_number();
    if (number >= groups) return;
    auto group = group_of<Index, CHANNELS_LAST, 1>(Index(number), runs, pooled_height, pooled_width);
    int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
    int64 position = int64(positions[Index(number)]);
    if (Kept<Position>::OFFSETS) {
        int h = top + int(position) / kernel_w, w = left + int(position) % kernel_w;
        if (position >= kernel_h * kernel_w || !within(h, w, height, width))
            fail("max_unpool2d_with_offsets: found an offset outside its window");
        return;
    }
    int64 h = position / width, w = position % width;
    if (position < 0 || h >= height || h < top || h >= top + kernel_h || w < left || w >= left + kernel_w)
        *out_of_window = 1;
}
