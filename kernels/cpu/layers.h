#pragma once
// What the kernels of layers share: they are compiled for one dtype (DTYPE) and one memory format (CHANNELS_LAST), and
// read rows in blocks of lanes.

#include "vector.h"

#include <utility>

using T = DTYPE;
using C = Computed<T>;  // what values are computed in
using I = Int<C>;
constexpr bool LAST = CHANNELS_LAST;
constexpr int FULL = LANES<C>;  // lanes of a register

static INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// 0, step, 2 * step, ...
template <int L> INLINE Lanes<int64_t, L> numbered(int64_t step) {
    Lanes<int64_t, L> value{};
    if constexpr (L > 1)
        for (int k = 0; k < L; ++k) value[k] = k * step;
    return value;
}

// The value with the digits that T keeps.
template <int L> INLINE Lanes<C, L> rounded(Lanes<C, L> value) { return widen<L>(narrow<L>(value, T{}), T{}); }

#if defined(__clang__)
template <int FIRST, int STEP, int JUMP, class V, int... K>
INLINE V shuffled(V left, V right, std::integer_sequence<int, K...>) {
    return __builtin_shufflevector(left, right, (FIRST + K / JUMP * STEP + K % JUMP * int(sizeof...(K)))...);
}
#endif

// Of two vectors in a row the elements of even (ODD 0) or odd number.
template <int ODD, int L> INLINE Lanes<C, L> every_second(Lanes<C, L> left, Lanes<C, L> right) {
    if constexpr (L == 1) return ODD ? right : left;
    else {
#if defined(__clang__)
        return shuffled<ODD, 2, 1>(left, right, std::make_integer_sequence<int, L>{});
#else
        Lanes<I, L> from;
        for (int k = 0; k < L; ++k) from[k] = 2 * k + ODD;
        return __builtin_shuffle(left, right, from);
#endif
    }
}

// The first (SECOND 0) or second half of even[0], odd[0], even[1], odd[1], ...
template <int SECOND, int L> INLINE Lanes<C, L> alternating(Lanes<C, L> even, Lanes<C, L> odd) {
    if constexpr (L == 1) return SECOND ? odd : even;
    else {
#if defined(__clang__)
        return shuffled<SECOND * L / 2, 1, 2>(even, odd, std::make_integer_sequence<int, L>{});
#else
        Lanes<I, L> from;
        for (int k = 0; k < L; ++k) from[k] = SECOND * L / 2 + k / 2 + k % 2 * L;
        return __builtin_shuffle(even, odd, from);
#endif
    }
}

// Lanes of elements that are STEP (0: `step`) apart. Of two apart it reads 2 * L whole.
template <int L, int STEP> INLINE Lanes<C, L> load_apart(const T* address, int64_t step) {
    if constexpr (STEP == 1 || L == 1) return load<L>(address);
    else if constexpr (STEP == 2) return every_second<0, L>(load<L>(address), load<L>(address + L));
    else {
        Lanes<Stored<T>, L> value;
        for (int k = 0; k < L; ++k) value[k] = bits_of<Stored<T>>(address[k * step]);
        return widen<L>(value, T{});
    }
}

// Calls f(width, start) over [0, count) in blocks of a full register, then of 4, then single elements. With OVERLAP the
// last block of a width may begin inside the one before it: for what gives the same if done twice.
template <bool OVERLAP, class F> INLINE void in_blocks(int64_t count, F f) {
    int64_t start = 0;
    for (; start + FULL <= count; start += FULL) f(Width<FULL>{}, start);
    if (OVERLAP && start < count && count >= FULL) return f(Width<FULL>{}, count - FULL);
    if (FULL > 4) {
        for (; start + 4 <= count; start += 4) f(Width<4>{}, start);
        if (OVERLAP && start < count && count >= 4) return f(Width<4>{}, count - 4);
    }
    for (; start < count; ++start) f(Width<1>{}, start);
}
