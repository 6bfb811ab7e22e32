#include "../common.cuh"

// Cross-entropy of logits (N, C, H, W) and labels (N, H, W), in two passes.
//
// With lse = log(sum_c exp(x_c)), p = softmax(x), the label smoothing e, the class weights w and the weight z of the
// z-loss, a pixel of class k has
//
//     loss       = (1 - e) * w_k * (lse - x_k) + e / C * sum_c w_c * (lse - x_c) + z * lse^2
//     dloss/dx_c = (1 - e) * w_k * (p_c - [c = k]) + (e / C * sum_c w_c + 2 * z * lse) * p_c - e / C * w_c
//
// Everything is computed in float (double for double). For float and double, lse is stored in two terms, the maximum
// `highest` and `above` = lse - highest, because their sum would lose digits. A label is part of an address only if it
// is a class. Sums over pixels are partial sums of the threads, added up in a fixed order.

enum Reduction { NONE, SUM, WEIGHTS, VALID };  // the denominators of the last two are sums over the pixels

template <typename T> __device__ inline T exponential(T x) { return exp2f(x * 1.4426950408889634f); }
template <> __device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// The class of a label, -1 for an ignored or out-of-range label.
template <typename Label> __device__ inline int class_of(Label label, int classes, int64 ignore_index) {
    int64 number = int64(label);
    if (number == ignore_index) return -1;
    if (number >= 0 && number < classes) return int(number);
    fail("cross_entropy: a target is neither a class nor ignore_index");
    return -1;
}

template <typename Wide, typename Weight> __device__ inline Wide weight_of(const Weight* weight, int label) {
    return label < 0 ? Wide(0) : Wide(widen(weight[label]));
}
template <typename Wide> __device__ inline Wide weight_of(const nothing*, int label) { return label < 0 ? 0 : 1; }

// A thread computes lse and loss of VEC neighbouring pixels in NCHW, of one pixel, VEC classes at a time, in
// channels_last.
//
// Reads their logits and labels once. Writes lse, and for NONE the losses, else the thread's sums of the losses and of
// the denominator's terms. SHARED: with label smoothing; share is e / C.
template <typename T, typename Label, typename Weight, typename Index, bool CHANNELS_LAST, int VEC, int REDUCTION,
          bool SHARED>
__global__ void cross_entropy_fwd(
    const T* logits, const Label* labels, const Weight* weight, Computed<T>* loss, Computed<T>* lse,
    Computed<T>* partials, int64 groups, int64 pixels, int classes, int64 ignore_index, double smoothing,
    double share, double z_loss) {
    using Wide = Computed<T>;
    constexpr int PIXELS = CHANNELS_LAST ? 1 : VEC;
    constexpr int STEP = CHANNELS_LAST && VEC > 4 ? VEC : 4;  // classes that are read at a time
    const Wide lowest = -Wide(infinity());
    int64 number = thread_number();
    if (number >= groups) return;

    // 1. Which pixels. `pixels`: those of an image in NCHW, of the batch in channels_last
    Index pixel = Index(number) * PIXELS;
    Index image = CHANNELS_LAST ? 0 : pixel / Index(pixels);
    Index first = CHANNELS_LAST ? pixel * classes : image * classes * Index(pixels) + (pixel - image * Index(pixels));

    // 2. Load the labels
    auto named = load<PIXELS>(labels + pixel);
    int label[PIXELS];
    Wide highest[PIXELS], total[PIXELS], picked[PIXELS], mass[PIXELS], distance[PIXELS];
    for (int k = 0; k < PIXELS; ++k) {
        label[k] = class_of(named.at[k], classes, ignore_index);
        highest[k] = lowest, total[k] = 0, picked[k] = 0, mass[k] = 0, distance[k] = 0;
    }

    // 3. Load the logits, and accumulate the softmax sums over the classes
    for (int start = 0; start < classes; start += STEP) {
        Wide value[STEP][PIXELS];
        if (CHANNELS_LAST && VEC > 1) {  // classes is a multiple of VEC
            for (int s = 0; s < STEP; s += VEC) {
                if (start + s < classes) {
                    auto run = load<VEC>(logits + first + start + s);
                    for (int k = 0; k < VEC; ++k) value[s + k][0] = widen(run.at[k]);
                } else {
                    for (int k = 0; k < VEC; ++k) value[s + k][0] = lowest;
                }
            }
        } else {
            for (int s = 0; s < STEP; ++s) {
                int c = start + s;
                if (c < classes) {
                    auto run = load<PIXELS>(logits + first + (CHANNELS_LAST ? Index(c) : Index(c) * Index(pixels)));
                    for (int k = 0; k < PIXELS; ++k) value[s][k] = widen(run.at[k]);
                } else {
                    for (int k = 0; k < PIXELS; ++k) value[s][k] = lowest;
                }
            }
        }
        for (int k = 0; k < PIXELS; ++k) {
            Wide peak = highest[k];
            for (int s = 0; s < STEP; ++s) peak = value[s][k] > peak ? value[s][k] : peak;
            // While the maximum is -inf, 0 takes its place in differences, because -inf - -inf is NaN.
            Wide shift = peak == lowest ? Wide(0) : peak;
            Wide before = highest[k] == lowest ? Wide(0) : highest[k];
            total[k] *= exponential(highest[k] - shift);
            if (SHARED) distance[k] += mass[k] * (shift - before);
            for (int s = 0; s < STEP; ++s) {
                total[k] += exponential(value[s][k] - shift);
                if (start + s == label[k]) picked[k] = value[s][k];
                if (SHARED && start + s < classes) {
                    Wide own = Wide(share) * weight_of<Wide>(weight, start + s);
                    mass[k] += own;
                    distance[k] += own * (shift - value[s][k]);
                }
            }
            highest[k] = peak;
        }
    }

    // 4. The losses, lse and the thread's sums
    Index terms = CHANNELS_LAST ? Index(pixels) : Index(groups) * PIXELS;  // pixels of the batch
    Pack<Wide, PIXELS> maximum, above, losses;
    Wide sum = 0, divisor = 0;
    for (int k = 0; k < PIXELS; ++k) {
        Wide factor = weight_of<Wide>(weight, label[k]);
        maximum.at[k] = highest[k], above.at[k] = logarithm(total[k]);
        Wide value = (1 - Wide(smoothing)) * factor * ((highest[k] - picked[k]) + above.at[k]);
        if (SHARED) value += distance[k] + mass[k] * above.at[k];
        Wide both = highest[k] + above.at[k];
        if (z_loss != 0) value += Wide(z_loss) * both * both;
        losses.at[k] = label[k] < 0 ? Wide(0) : value;
        sum += losses.at[k];
        divisor += REDUCTION == WEIGHTS ? factor : Wide(label[k] >= 0);
        if (sizeof(T) < 4) maximum.at[k] = both;
    }

    // 5. Store
    store(lse + pixel, maximum);
    if (sizeof(T) >= 4) store(lse + int64(terms) + pixel, above);
    if (REDUCTION == NONE) store(loss + pixel, losses);
    else partials[number] = sum;
    if (REDUCTION == WEIGHTS || REDUCTION == VALID) partials[groups + number] = divisor;
}

// Thread t of `rows` adds up the partials t, t + rows, t + 2 * rows, ...; with SUMMED also those of the denominator.
template <typename Wide, bool SUMMED>
__global__ void add_partials(const Wide* partials, Wide* sums, int64 count, int64 rows) {
    int64 number = thread_number();
    if (number >= rows) return;
    for (int row = 0; row < (SUMMED ? 2 : 1); ++row) {
        Wide sum = 0;
        for (int64 o = number; o < count; o += rows) sum += partials[row * count + o];
        sums[row * rows + number] = sum;
    }
}

// One thread adds up the last partials and divides for a mean. SUMMED: the denominator is a sum of partials too, and is
// written; else it is read, if there is one. If all pixels are ignored, the mean is 0 / 0 = NaN and the sum 0.
template <typename Wide, bool SUMMED>
__global__ void cross_entropy_total(const Wide* partials, Wide* loss, Wide* denominator, int64 count) {
    if (thread_number() > 0) return;
    Wide sum = 0, divisor = 0;
    for (int64 o = 0; o < count; ++o) {
        sum += partials[o];
        if (SUMMED) divisor += partials[count + o];
    }
    if (SUMMED) *denominator = divisor;
    else divisor = denominator ? *denominator : Wide(1);
    *loss = sum / divisor;
}

// What the gradient of a pixel depends on, apart from its logits.
template <typename Wide> struct Pixel {
    int label;
    Wide highest, above, gain, spread, scale;

    __device__ Wide gradient(Wide value, int c, Wide own) const {
        Wide p = exponential((value - highest) - above);
        Wide grad = gain * (p - Wide(c == label)) + spread * p - scale * own;
        return label < 0 ? Wide(0) : grad;  // exactly 0, also if the logits are not finite
    }
};

template <typename T, int REDUCTION, typename Label, typename Weight>
__device__ inline Pixel<Computed<T>> read_pixel(
    int64 pixel, int64 all_pixels, const Computed<T>* grad_loss, const Label* labels, const Weight* weight,
    const Computed<T>* lse, const Computed<T>* denominator, Computed<T> mass, int classes, int64 ignore_index,
    double smoothing, double z_loss) {
    Pixel<Computed<T>> read;
    read.label = class_of(labels[pixel], classes, ignore_index);
    read.highest = lse[pixel];
    read.above = sizeof(T) < 4 ? Computed<T>(0) : lse[all_pixels + pixel];
    read.scale = REDUCTION == NONE ? grad_loss[pixel] : *grad_loss;
    if (REDUCTION != NONE && denominator) read.scale /= *denominator;
    read.gain = read.scale * weight_of<Computed<T>>(weight, read.label) * (1 - Computed<T>(smoothing));
    read.spread = read.scale * (mass + 2 * Computed<T>(z_loss) * (read.highest + read.above));
    return read;
}

// A thread writes the gradient of VEC neighbouring pixels in NCHW, of VEC neighbouring elements in channels_last, which
// are classes of one pixel, or of one pixel and the next. Reads their logits once. mass: e / C * sum_c w_c; without
// class weights no tensor, and e takes its place.
template <typename T, typename Label, typename Weight, typename Index, bool CHANNELS_LAST, int VEC, int REDUCTION,
          bool SHARED>
__global__ void cross_entropy_bwd(
    const Computed<T>* grad_loss, const T* logits, const Label* labels, const Weight* weight, const Computed<T>* lse,
    const Computed<T>* denominator, const Computed<T>* mass, T* grad_logits, int64 groups, int64 pixels,
    int64 all_pixels, int classes, int64 ignore_index, double smoothing, double share, double z_loss) {
    using Wide = Computed<T>;
    int64 number = thread_number();
    if (number >= groups) return;
    Wide smoothed = mass ? *mass : Wide(smoothing);
    auto read = [&](int64 pixel) {
        return read_pixel<T, REDUCTION>(pixel, all_pixels, grad_loss, labels, weight, lse, denominator, smoothed,
                                        classes, ignore_index, smoothing, z_loss);
    };
    auto own = [&](int c) { return SHARED ? Wide(share) * weight_of<Wide>(weight, c) : Wide(0); };
    if (CHANNELS_LAST) {
        Index first = Index(number) * VEC, elements = Index(all_pixels) * classes;
        Index pixel = first / classes;
        int c = int(first - pixel * classes), count = elements - first < VEC ? int(elements - first) : VEC;
        Pack<T, VEC> values;
        if (count == VEC) values = load<VEC>(logits + first);
        else
            for (int k = 0; k < VEC; ++k) values.at[k] = logits[first + (k < count ? k : 0)];
        auto at = read(pixel);
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            if (c == classes && k < count) at = read(++pixel), c = 0;
            narrow(values.at[k], at.gradient(widen(values.at[k]), c, own(c < classes ? c : 0)));
            ++c;
        }
        if (count == VEC) store(grad_logits + first, values);
        else
            for (int k = 0; k < VEC; ++k)  // a constant number of steps keeps `values` in registers
                if (k < count) grad_logits[first + k] = values.at[k];
        return;
    }
    Index pixel = Index(number) * VEC;
    Index image = pixel / Index(pixels);
    Index first = image * classes * Index(pixels) + (pixel - image * Index(pixels));
    Pixel<Wide> at[VEC];
    for (int k = 0; k < VEC; ++k) at[k] = read(pixel + k);
    for (int c = 0; c < classes; ++c) {
        Index o = first + Index(c) * Index(pixels);
        auto values = load<VEC>(logits + o);
        for (int k = 0; k < VEC; ++k) narrow(values.at[k], at[k].gradient(widen(values.at[k]), c, own(c)));
        store(grad_logits + o, values);
    }
}
