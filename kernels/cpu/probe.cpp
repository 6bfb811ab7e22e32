// The smallest kernel: whether one can be built, loaded and run on torch's threads is tried with it.
#include "common.h"

// The sum of 0 ... count - 1, each part's added to the total in one step.
EXPORT probe(int64_t count) {
    int64_t total = 0;
    parallel_for(count, 100, [&](int64_t begin, int64_t end) {
        int64_t sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += i;
        __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
    });
    return total;
}

// Converts half-precision numbers to float32 and back, for the tests of common.h.
EXPORT convert_bfloat16(const bfloat16* x, float* wide, bfloat16* back, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(x[i]);
    for (int64_t i = 0; i < count; ++i) back[i] = narrow<bfloat16>(from[i]);
    return 0;
}

EXPORT convert_float16(const float16* x, float* wide, float16* back, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(x[i]);
    for (int64_t i = 0; i < count; ++i) back[i] = narrow<float16>(from[i]);
    return 0;
}
