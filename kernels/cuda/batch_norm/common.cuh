// Batch norm + ReLU: centered = (x - mean) + shift and y = relu(centered * scale + bias), where scale = weight /
// sqrt(var + eps). `folded` holds five vectors of C: mean, shift, scale, bias and 1 / sqrt(var + eps).
//
// A thread owns a tile of channels (VEC neighbors in channels_last, one channel in NCHW) and every chunks-th group of
// the tile's part of the map. A thread therefore loads its channels' vectors only once.

struct Part {
    int tile;
    int64 chunk;
};

template <bool CHANNELS_LAST> __device__ inline Part part_of(int64 number, int tiles, int64 chunks) {
    if (CHANNELS_LAST) return {int(number % tiles), number / tiles};
    return {int(number / chunks), number % chunks};
}

// Group `number` of a tile's part of the map.
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

// The vectors of a tile's channels, and the arithmetic of one element of channel k of the tile.
template <typename Wide, int LANES> struct Channels {
    Pack<Wide, LANES> mean, shift, scale, bias;

    __device__ Channels(const Wide* folded, int first, int channels) {
        mean = load<LANES>(folded + first);
        shift = load<LANES>(folded + channels + first);
        scale = load<LANES>(folded + 2 * channels + first);
        bias = load<LANES>(folded + 3 * channels + first);
    }

    __device__ Wide centered(int k, Wide x) const { return (x - mean.at[k]) + shift.at[k]; }

    // The output, rounded to T, the type that it is stored in. NaN stays NaN, as in torch's ReLU.
    template <typename T> __device__ Wide normalize(int k, Wide centered, bool relu) const {
        T stored;
        narrow(stored, fused(centered, scale.at[k], bias.at[k]));
        Wide y = widen(stored);
        return relu && y <= 0 ? Wide(0) : y;
    }

    // The gradient of the ReLU's input. The ReLU's mask is recomputed from x.
    template <typename T> __device__ Wide relu_gradient(int k, Wide centered, Wide grad, bool relu) const {
        return relu && normalize<T>(k, centered, false) <= 0 ? Wide(0) : grad;
    }
};
