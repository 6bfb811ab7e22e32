#include "../common.cuh"
#include "../pooling/tiling.cuh"
#include "common.cuh"

// The statistics of a batch by Welford's algorithm, applied to x minus the channel's first element (the pivot), in each
// lane of a thread separately. Lanes and threads are merged by Chan's rule, in an order that depends only on the shape.

// Count, mean and sum of squared deviations.
template <typename Wide> struct Moments {
    Wide count, mean, squares;

    __device__ void merge(Wide more, Wide other_mean, Wide other_squares) {
        if (more == 0) return;
        Wide total = count + more, delta = other_mean - mean;
        mean += delta * (more / total);
        squares += other_squares + delta * delta * (count * (more / total));
        count = total;
    }
};

// A thread computes the moments of its channels over its part of x. Reads x once. Writes partials (3, chunks, C).
template <typename T, typename Index, bool CHANNELS_LAST, int VEC>
__global__ void batch_norm_stats(
    const T* x, Computed<T>* partials, int tiles, int64 groups, int64 chunks, int channels, int runs, int width) {
    using Wide = Computed<T>;
    constexpr int LANES = CHANNELS_LAST ? VEC : 1;
    constexpr int AT_ONCE = 4;  // loads in flight at a time

    // 1. Which channels, and their pivots
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

    // 2. Update the moments of each lane with one element of each group
    for (int k = 0; k < VEC; ++k) mean[k] = 0, squares[k] = 0;
    auto update = [&](const Pack<T, VEC>& values) {
        count += 1;
        Wide weight = 1 / count;
        for (int k = 0; k < VEC; ++k) {
            Wide value = widen(values.at[k]) - pivot[CHANNELS_LAST ? k : 0], delta = value - mean[k];
            mean[k] += delta * weight;
            squares[k] += delta * (value - mean[k]);
        }
    };
    int64 o = part.chunk;
    for (; o + (AT_ONCE - 1) * chunks < groups; o += AT_ONCE * chunks) {
        Pack<T, VEC> values[AT_ONCE];
        for (int s = 0; s < AT_ONCE; ++s) values[s] = read(o + s * chunks);
        for (int s = 0; s < AT_ONCE; ++s) update(values[s]);
    }
    for (; o < groups; o += chunks) update(read(o));

    // 3. In NCHW all lanes belong to one channel: merge them
    if (!CHANNELS_LAST) {
        Moments<Wide> all{count, mean[0], squares[0]};
        for (int k = 1; k < VEC; ++k) all.merge(count, mean[k], squares[k]);
        count = all.count, mean[0] = all.mean, squares[0] = all.squares;
    }

    // 4. Store
    for (int k = 0; k < LANES; ++k) {
        int64 to = part.chunk * channels + part.tile * LANES + k;
        partials[to] = count;
        partials[chunks * channels + to] = mean[k];
        partials[2 * chunks * channels + to] = squares[k];
    }
}

// Merges moments (3, count, C) into (3, rows, C): thread (row, c) merges those of row, row + rows, ...
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

// A thread writes the mean, shift (the rounding error of the mean) and biased variance of one channel to stats (3, C),
// and updates the running statistics if there are any. The running mean includes input_bias, the bias of the preceding
// convolution, if that has not been added to x.
template <typename T, typename Running>
__global__ void finish_stats(
    const T* x, const Computed<T>* moments, const Computed<T>* input_bias, Computed<T>* stats, Running* running_mean,
    Running* running_var, int64 pivot_stride, int channels, double momentum) {
    using Wide = Computed<T>;
    int64 c = thread_number();
    if (c >= channels) return;
    Wide count = moments[c], mean = moments[channels + c], squares = moments[2 * channels + c];
    Wide pivot = widen(x[c * pivot_stride]), batch_mean = pivot + mean;
    stats[c] = batch_mean;
    stats[channels + c] = (batch_mean - pivot) - mean;
    stats[2 * channels + c] = squares / count;
    if (!running_mean) return;
    if (input_bias) batch_mean += input_bias[c];
    Wide weight = Wide(momentum);
    narrow(running_mean[c], (1 - weight) * widen(running_mean[c]) + weight * batch_mean);
    narrow(running_var[c], (1 - weight) * widen(running_var[c]) + weight * (squares / (count - 1)));
}

// A thread writes the folded vectors of one channel: see common.cuh. shift, weight and bias may be null.
template <typename Wide>
__global__ void fold_norm(
    const Wide* mean, const Wide* shift, const Wide* var, const Wide* weight, const Wide* bias, Wide* folded,
    int channels, double eps) {
    int64 c = thread_number();
    if (c >= channels) return;
    Wide rstd = 1 / root(var[c] + Wide(eps));
    folded[c] = mean[c];
    folded[channels + c] = shift ? shift[c] : Wide(0);
    folded[2 * channels + c] = weight ? rstd * weight[c] : rstd;
    folded[3 * channels + c] = bias ? bias[c] : Wide(0);
    folded[4 * channels + c] = rstd;
}

// Adds up partial sums (2, count, C) into (2, rows, C): thread (row, c) adds those of row, row + rows, ...
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

// A thread writes one channel of sums (4, C): the sums of grad and grad * x_hat, and both divided by `pixels`.
template <typename Wide>
__global__ void finish_sums(const Wide* added, const Wide* folded, Wide* sums, int channels, int64 pixels) {
    int64 c = thread_number();
    if (c >= channels) return;
    Wide sum_grad = added[c], sum_grad_x = added[channels + c] * folded[4 * channels + c];
    sums[c] = sum_grad;
    sums[channels + c] = sum_grad_x;
    sums[2 * channels + c] = sum_grad / Wide(pixels);
    sums[3 * channels + c] = sum_grad_x / Wide(pixels);
}
