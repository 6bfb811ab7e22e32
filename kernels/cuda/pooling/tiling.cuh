// Pooling windows: VEC neighbouring elements of a map make a group, along W in NCHW, along C in channels_last, and a
// thread has one group. The position of a maximum is an offset, the tap inside its window (uint8), or torch's index
// h * W + w in the plane (int64).

template <typename Index> struct Group {
    Index plane;  // n * C + c in NCHW, n in channels_last
    int h, w;     // of its first element
    int run;      // which group of its row (NCHW), of its pixel (channels_last)
};

template <typename Index, bool CHANNELS_LAST, int VEC>
__device__ inline Group<Index> group_of(Index number, int runs, int height, int width) {
    Group<Index> group;
    group.run = int(number % runs);
    Index rows = number / runs;
    if (CHANNELS_LAST) {
        group.w = int(rows % width);
        rows /= width;
    } else {
        group.w = group.run * VEC;
    }
    group.h = int(rows % height);
    group.plane = rows / height;
    return group;
}

// Where the group's elements at (h, w) lie in maps of the given size.
template <typename Index, bool CHANNELS_LAST, int VEC>
__device__ inline Index offset_of(const Group<Index>& group, int h, int w, int runs, int height, int width) {
    Index pixel = (group.plane * height + h) * width + w;
    return CHANNELS_LAST ? (pixel * runs + group.run) * VEC : pixel;
}

template <typename Position> struct Kept { static constexpr bool OFFSETS = false; };
template <> struct Kept<uint8> { static constexpr bool OFFSETS = true; };

// The position that names tap `tap` of a window, which lies at (h, w).
template <typename Position> __device__ inline Position position_of(int tap, int h, int w, int width) {
    return Kept<Position>::OFFSETS ? Position(tap) : Position(int64(h) * width + w);
}

__device__ inline bool within(int h, int w, int height, int width) {
    return unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width);
}
