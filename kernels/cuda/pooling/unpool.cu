#include "../common.cuh"
#include "tiling.cuh"

// Max-unpooling if no windows overlap: a thread writes VEC cells of the image. A cell is a window and the gap after it.
// The cells tile the image, so each element of y is written once: the window's value at its position, zero elsewhere.
//
// This is also the gradient of max-pooling, with the gradient of the pooled map as x. REPORT: an offset outside its own
// window is an error, an index outside sets *out_of_window to 1. ROWS as in pool.cu, for windows one or two wide.
template <typename T, typename Position, typename Index, bool CHANNELS_LAST, int VEC, bool ROWS, bool REPORT>
__global__ void max_unpool2d_fwd(
    const T* x, const Position* positions, T* y, int* out_of_window, int64 groups, int runs, int cells_down,
    int cells_across, int height, int width, int pooled_height, int pooled_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w) {
    static_assert(CHANNELS_LAST || ROWS || VEC == 1, "in NCHW only whole rows are written wide");

    // 1. Which cells, and the value and position of each one's window, if it has one
    int64 number = thread_number();
    if (number >= groups) return;
    auto group = group_of<Index, CHANNELS_LAST, VEC>(Index(number), runs, cells_down, cells_across);
    int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
    bool pooled = group.h < pooled_height && group.w < pooled_width;
    Pack<T, VEC> value;
    Pack<Position, VEC> position;
    if (pooled) {
        Index source =
            offset_of<Index, CHANNELS_LAST, VEC>(group, group.h, group.w, runs, pooled_height, pooled_width);
        value = load<VEC>(x + source);
        position = load<VEC>(positions + source);
    }
    T zero;
    narrow(zero, Computed<T>(0));
    bool found[VEC];
    for (int k = 0; k < VEC; ++k) found[k] = false;
    auto at_tap = [&](int k, int i, int j, int h, int w) {
        bool hit = pooled && i < kernel_h && j < kernel_w &&
                   position.at[k] == position_of<Position>(i * kernel_w + j, h, w, width);
        found[k] |= hit;
        return hit ? value.at[k] : zero;
    };

    // 2. Store the pixels of each cell
    for (int i = 0; i < stride_h; ++i) {
        int h = top + i;
        if (ROWS) {
            if (unsigned(h) >= unsigned(height)) continue;
            Pack<T, 2 * VEC> row;
            for (int k = 0; k < 2 * VEC; ++k) row.at[k] = at_tap(k / 2, i, k % 2, h, left + k);
            store(y + (group.plane * height + h) * width + left, row);
            continue;
        }
        for (int j = 0; j < stride_w; ++j) {
            int w = left + j;
            if (!within(h, w, height, width)) continue;
            Pack<T, VEC> pixel;
            for (int k = 0; k < VEC; ++k) pixel.at[k] = at_tap(k, i, j, h, w);
            store(y + offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width), pixel);
        }
    }

    // 3. Report windows whose position is none of their pixels
    if (!REPORT || !pooled) return;
    for (int k = 0; k < VEC; ++k) {
        if (found[k]) continue;
        if (Kept<Position>::OFFSETS) fail("max_unpool2d_with_offsets: found an offset outside its window");
        else *out_of_window = 1;
    }
}

// Unpooling from any valid indices; does nothing unless *out_of_window is 1. A thread writes one plane, in order: if
// several pooled elements share an index, the last in row-major order stays, as in torch on a CPU.
//
// y already holds zeros, and the values whose index is in their own window. All values are written again.
template <typename T, bool CHANNELS_LAST>
__global__ void max_unpool2d_scatter(
    const T* x, const int64* indices, T* y, const int* out_of_window, int64 planes, int channels, int64 pixels,
    int64 pooled_pixels) {
    int64 plane = thread_number();
    if (plane >= planes || *out_of_window == 0) return;
    int64 step = CHANNELS_LAST ? channels : 1;
    int64 image = plane / channels * channels;
    int64 from = CHANNELS_LAST ? image * pooled_pixels + plane % channels : plane * pooled_pixels;
    int64 to = CHANNELS_LAST ? image * pixels + plane % channels : plane * pixels;
    for (int64 o = 0; o < pooled_pixels; ++o) {
        int64 index = indices[from + o * step];
        if (index < 0 || index >= pixels) fail("max_unpool2d: found an invalid max index");
        else y[to + index * step] = x[from + o * step];
    }
}

// The gradient of unpooling: a thread gathers VEC pooled elements, each from the pixel at its position.
//
// WINDOWS: reads whole windows of size KH x KW, because one element alone also costs a 32-byte sector; in channels_last
// and with ROWS in accesses of 16 bytes. Without it, and for an index outside its own window, each position is read by
// itself. A position outside the plane gets the gradient zero and is never read.
template <typename T, typename Position, typename Index, bool CHANNELS_LAST, int VEC, bool ROWS, bool WINDOWS, int KH,
          int KW>
__global__ void max_unpool2d_bwd(
    const T* grad_y, const Position* positions, T* grad_x, int64 groups, int runs, int height, int width,
    int pooled_height, int pooled_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h,
    int padding_w) {
    static_assert(CHANNELS_LAST || ROWS || VEC == 1, "in NCHW only whole rows are read wide");

    // 1. Which windows, and their positions
    int64 number = thread_number();
    if (number >= groups) return;
    auto group = group_of<Index, CHANNELS_LAST, VEC>(Index(number), runs, pooled_height, pooled_width);
    int top = group.h * stride_h - padding_h, left = group.w * stride_w - padding_w;
    Index out = Index(number) * VEC;
    auto position = load<VEC>(positions + out);
    Pack<T, VEC> grad;
    bool found[VEC];
    for (int k = 0; k < VEC; ++k) narrow(grad.at[k], Computed<T>(0)), found[k] = false;
    auto see = [&](int k, T value, int i, int j, int h, int w) {
        if (position.at[k] == position_of<Position>(i * KW + j, h, w, width)) grad.at[k] = value, found[k] = true;
    };

    // 2. Pick from the whole windows
    if (WINDOWS) {
#pragma unroll
        for (int i = 0; i < KH; ++i) {
            int h = top + i;
            if (ROWS) {
                if (unsigned(h) >= unsigned(height)) continue;
                auto row = load<2 * VEC>(grad_y + (group.plane * height + h) * width + left);
                for (int k = 0; k < 2 * VEC; ++k)
                    if (k % 2 < KW) see(k / 2, row.at[k], i, k % 2, h, left + k);
                continue;
            }
#pragma unroll
            for (int j = 0; j < KW; ++j) {
                int w = left + j;
                if (!within(h, w, height, width)) continue;
                auto pixel =
                    load<VEC>(grad_y + offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width));
                for (int k = 0; k < VEC; ++k) see(k, pixel.at[k], i, j, h, w);
            }
        }
    }

    // 3. Read single elements at the remaining positions
    for (int k = 0; k < VEC; ++k) {
        if (found[k] || (WINDOWS && Kept<Position>::OFFSETS)) continue;
        int h, w;
        if (Kept<Position>::OFFSETS) {
            int tap = int(position.at[k]);
            h = top + tap / kernel_w, w = left + tap % kernel_w + (CHANNELS_LAST ? 0 : k * stride_w);
            if (tap >= kernel_h * kernel_w || !within(h, w, height, width)) continue;
        } else {
            int64 index = int64(position.at[k]);
            if (index < 0 || index >= int64(height) * width) continue;
            h = int(index / width), w = int(index % width);
        }
        grad.at[k] = grad_y[offset_of<Index, CHANNELS_LAST, VEC>(group, h, w, runs, height, width) +
                            (CHANNELS_LAST ? k : 0)];
    }

    // 4. Store
    store(grad_x + out, grad);
}
