// Batch norm with the ReLU behind it: centred = (x - mean) + shift, y = relu(centred * scale + beta), with
// scale = weight / sqrt(var + eps). `folded` holds five vectors of C: mean, shift, scale, beta, 1 / sqrt(var + eps).
//
// A thread has some channels, VEC neighbours in channels_last and one in NCHW (a tile), and every chunks-th group of
// their map. So what belongs to channels is read once a thread.

struct Part {
    int tile;
    int64 chunk;
};

template <bool CHANNELS_LAST> __device__ inline Part part_of(int64 number, int tiles, int64 chunks) {
    if (CHANNELS_LAST) return {int(number % tiles), number / tiles};
    return {int(number / chunks), number % chunks};
}

// Group `number` of a tile's part of a map.
template <typename Index, bool CHANNELS_LAST, int VEC>
__device__ inline Group<Index> group_in(Index number, int tile, int channels, int runs, int height, int width) {
    Group<Index> group;
    if (CHANNELS_LAST) {
        group.run = tile;
        group.w = int(number % width);
        number /= width;
    } else {
        group.run = int(number % runs);
        group.w = group.run * VEC;
        number /= runs;
    }
    group.h = int(number % height);
    number /= height;
    group.plane = CHANNELS_LAST ? number : number * channels + tile;
    return group;
}

template <typename Wide, int LANES> struct Channels {
    Pack<Wide, LANES> centre, low, scale, beta;

    __device__ Channels(const Wide* folded, int first, int channels) {
        centre = load<LANES>(folded + first);
        low = load<LANES>(folded + channels + first);
        scale = load<LANES>(folded + 2 * channels + first);
        beta = load<LANES>(folded + 3 * channels + first);
    }

    __device__ Wide centred(int k, Wide x) const { return (x - centre.at[k]) + low.at[k]; }

    // The output with the digits that T stores. NaN stays, as in torch's ReLU.
    template <typename T> __device__ Wide normalised(int k, Wide centred, bool relu) const {
        T stored;
        narrow(stored, fused(centred, scale.at[k], beta.at[k]));
        Wide y = widen(stored);
        return relu && y <= 0 ? Wide(0) : y;
    }

    // The gradient behind the ReLU, at an element that it let through.
    template <typename T> __device__ Wide masked(int k, Wide centred, Wide grad, bool relu) const {
        return relu && normalised<T>(k, centred, false) <= 0 ? Wide(0) : grad;
    }
};
