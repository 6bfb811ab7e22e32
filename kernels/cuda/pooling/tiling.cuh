// Every kernel works on groups: VEC neighboring elements of a map, along W in NCHW and along C in channels_last. The
// elements of a window are its taps, in row-major order. The position of a maximum is an offset, the number of the tap
// (uint8), or torch's index, h * W + w in the plane (int64).

template <typename Index> struct Group {
    Index plane;  // n * C + c in NCHW, n in channels_last
    int h, w;     // of the group's first element
    int run;      // the group's number in its row (NCHW) or in its pixel (channels_last)
};

// Group `number` of a map that has `runs` groups per row (NCHW) or per pixel (channels_last).
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

// The memory offset of the group's elements at (h, w), in a map of the given size.
template <typename Index, bool CHANNELS_LAST, int VEC>
__device__ inline Index offset_of(const Group<Index>& group, int h, int w, int runs, int height, int width) {
    Index pixel = (group.plane * height + h) * width + w;
    return CHANNELS_LAST ? (pixel * runs + group.run) * VEC : pixel;
}

// Whether positions of this type are offsets.
template <typename Position> struct Kept { static constexpr bool OFFSETS = false; };
template <> struct Kept<uint8> { static constexpr bool OFFSETS = true; };

// The position of tap `tap` of a window, which is the pixel (h, w).
template <typename Position> __device__ inline Position position_of(int tap, int h, int w, int width) {
    return Kept<Position>::OFFSETS ? Position(tap) : Position(int64(h) * width + w);
}

__device__ inline bool within(int h, int w, int height, int width) {
    return unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width);
}
