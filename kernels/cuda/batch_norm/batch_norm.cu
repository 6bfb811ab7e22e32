#include "../common.cuh"
#include "../pooling/tiling.cuh"
#include "common.cuh"

// Statistics of a batch: Welford's, of x minus the channel's first element, each lane of a thread for itself. Threads
// are merged by Chan's rule, in an order that depends on the shape alone.

template <typename Wide> struct Moments {
    Wide count, mean, squares;

    __device__ void merge(Wide more, Wide other_mean, Wide other_squares) {
        if (more == 0) return;
        Wide whole = count + more, apart = other_mean - mean;
        mean += apart * (more / whole);
        squares += other_squares + apart * apart * (count * (more / whole));
        count = whole;
    }
};

// A thread takes the moments of its channels over its part of x. Reads x once. partials: (3, chunks, C).
template <typename T, typename Index, bool CHANNELS_LAST, int VEC>
__global__ void batch_norm_stats(
    const T* x, Computed<T>* partials, int tiles, int64 groups, int64 chunks, int channels, int runs, int width) {
    using Wide = Computed<T>;
    constexpr int LANES = CHANNELS_LAST ? VEC : 1;
    constexpr int AT_ONCE = 4;  // loads that are in flight together
    int64 number = thread_number();
    if (number >= tiles * chunks) return;
    Part part = part_of<CHANNELS_LAST>(number, tiles, chunks);
    auto read = [&](int64 o) {
        auto group = group_in<Index, CHANNELS_LAST, VEC>(Index(o), part.tile, channels, runs, 1, width);
        return load<VEC>(x + offset_of<Index, CHANNELS_LAST, VEC>(group, 0, group.w, runs, 1, width));
    };
    Wide pivot[LANES], mean[VEC], squares[VEC], count = 0;
    for (int k = 0; k < LANES; ++k)
        pivot[k] = widen(x[CHANNELS_LAST ? int64(part.tile) * VEC + k : int64(part.tile) * width]);
    for (int k = 0; k < VEC; ++k) mean[k] = 0, squares[k] = 0;
    auto see = [&](const Pack<T, VEC>& values) {
        count += 1;
        Wide share = 1 / count;
        for (int k = 0; k < VEC; ++k) {
            Wide value = widen(values.at[k]) - pivot[CHANNELS_LAST ? k : 0], apart = value - mean[k];
            mean[k] += apart * share;
            squares[k] += apart * (value - mean[k]);
        }
    };
    int64 o = part.chunk;
    for (; o + (AT_ONCE - 1) * chunks < groups; o += AT_ONCE * chunks) {
        Pack<T, VEC> values[AT_ONCE];
        for (int s = 0; s < AT_ONCE; ++s) values[s] = read(o + s * chunks);
        for (int s = 0; s < AT_ONCE; ++s) see(values[s]);
    }
    for (; o < groups; o += chunks) see(read(o));

    if (!CHANNELS_LAST) {  // the lanes are of one channel
        Moments<Wide> all{count, mean[0], squares[0]};
        for (int k = 1; k < VEC; ++k) all.merge(count, mean[k], squares[k]);
        count = all.count, mean[0] = all.mean, squares[0] = all.squares;
    }
    for (int k = 0; k < LANES; ++k) {
        int64 to = part.chunk * channels + part.tile * LANES + k;
        partials[to] = count;
        partials[chunks * channels + to] = mean[k];
        partials[2 * chunks * channels + to] = squares[k];
    }
}

// Merges (3, count, C) moments into (3, rows, C): thread (row, c) takes those of row, row + rows, ...
template <typename Wide>
__global__ void merge_moments(const Wide* partials, Wide* merged, int64 count, int64 rows, int channels) {
    int64 number = thread_number();
    if (number >= rows * channels) return;
    Moments<Wide> all{0, 0, 0};
    for (int64 row = number / channels; row < count; row += rows) {
        const Wide* from = partials + row * channels + number % channels;
        all.merge(from[0], from[count * channels], from[2 * count * channels]);
    }
    merged[number] = all.count;
    merged[rows * channels + number] = all.mean;
    merged[2 * rows * channels + number] = all.squares;
}

// A thread writes a channel's mean, shift (what rounding took from the mean) and biased variance, (3, C), and moves
// the running ones. A running mean counts in the bias of the convolution before, which nobody has added.
template <typename T, typename Running>
__global__ void finish_stats(
    const T* x, const Computed<T>* moments, const Computed<T>* input_bias, Computed<T>* stats, Running* running_mean,
    Running* running_var, int64 pivot_stride, int channels, double momentum) {
    using Wide = Computed<T>;
    int64 c = thread_number();
    if (c >= channels) return;
    Wide count = moments[c], mean = moments[channels + c], squares = moments[2 * channels + c];
    Wide pivot = widen(x[c * pivot_stride]), whole = pivot + mean;
    stats[c] = whole;
    stats[channels + c] = (whole - pivot) - mean;
    stats[2 * channels + c] = squares / count;
    if (!running_mean) return;
    if (input_bias) whole += input_bias[c];
    Wide share = Wide(momentum);
    narrow(running_mean[c], (1 - share) * widen(running_mean[c]) + share * whole);
    narrow(running_var[c], (1 - share) * widen(running_var[c]) + share * (squares / (count - 1)));
}

// A thread folds the vectors of one channel: see norm.cuh. shift, weight and bias may be missing.
template <typename Wide>
__global__ void fold_norm(
    const Wide* mean, const Wide* shift, const Wide* var, const Wide* weight, const Wide* bias, Wide* folded,
    int channels, double eps) {
    int64 c = thread_number();
    if (c >= channels) return;
    Wide inverse = 1 / root(var[c] + Wide(eps));
    folded[c] = mean[c];
    folded[channels + c] = shift ? shift[c] : Wide(0);
    folded[2 * channels + c] = weight ? inverse * weight[c] : inverse;
    folded[3 * channels + c] = bias ? bias[c] : Wide(0);
    folded[4 * channels + c] = inverse;
}

// Adds up (2, count, C) partial sums into (2, rows, C): thread (row, c) takes those of row, row + rows, ...
template <typename Wide>
__global__ void add_sums(const Wide* partials, Wide* added, int64 count, int64 rows, int channels) {
    int64 number = thread_number();
    if (number >= rows * channels) return;
    for (int which = 0; which < 2; ++which) {
        Wide sum = 0;
        for (int64 row = number / channels; row < count; row += rows)
            sum += partials[(which * count + row) * channels + number % channels];
        added[which * rows * channels + number] = sum;
    }
}

// A thread writes a channel's sums of grad and of grad * x_hat, and both over the number of pixels: (4, C).
template <typename Wide>
__global__ void finish_sums(const Wide* added, const Wide* folded, Wide* sums, int channels, int64 pixels) {
    int64 c = thread_number();
    if (c >= channels) return;
    Wide grads = added[c], products = added[channels + c] * folded[4 * channels + c];
    sums[c] = grads;
    sums[channels + c] = products;
    sums[2 * channels + c] = grads / Wide(pixels);
    sums[3 * channels + c] = products / Wide(pixels);
}
