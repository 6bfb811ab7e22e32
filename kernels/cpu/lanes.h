#pragma once
// Vectors of neighbouring elements ("lanes") in the compilers' own vector types, which become registers of whatever
// processor the file is compiled for. float16 and bfloat16 are computed in float32.
//
// A file that includes this is compiled for one dtype (DTYPE) and one memory format (CHANNELS_LAST).

#include "common.h"

#include <type_traits>

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

using T = DTYPE;
using C = Computed<T>;  // what values are computed in
using I = std::conditional_t<std::is_same<T, double>::value, int64_t, int32_t>;  // as wide as C: comparisons give it
using Stored = std::conditional_t<sizeof(T) == 2, uint16_t, T>;  // what vectors of T consist of in memory
constexpr bool LAST = CHANNELS_LAST;
constexpr int FULL = REGISTER / sizeof(C);  // lanes of a register

#define INLINED __attribute__((always_inline))  // of a lambda

template <class E, int L> struct LanesOf {
    typedef E type __attribute__((vector_size(sizeof(E) * L)));
};
template <class E> struct LanesOf<E, 1> {
    typedef E type;
};
template <class E, int L> using Lanes = typename LanesOf<E, L>::type;
template <int L> using Width = std::integral_constant<int, L>;

static INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <int L, class E> INLINE Lanes<E, L> splat(E value) { return value - Lanes<E, L>{}; }

// 0, step, 2 * step, ...
template <int L> INLINE Lanes<int64_t, L> numbered(int64_t step) {
    Lanes<int64_t, L> value{};
    if constexpr (L > 1)
        for (int k = 0; k < L; ++k) value[k] = k * step;
    return value;
}

template <class E, int L, class V> INLINE Lanes<E, L> converted(V value) {
    if constexpr (L == 1) return E(value);
    else return __builtin_convertvector(value, Lanes<E, L>);
}

// --- conversions, as those of single numbers in common.h -------------------------------------------------------------

template <int L> INLINE Lanes<float, L> widen(Lanes<float, L> x, float) { return x; }
template <int L> INLINE Lanes<double, L> widen(Lanes<double, L> x, double) { return x; }

template <int L> INLINE Lanes<float, L> widen(Lanes<uint16_t, L> x, bfloat16) {
    return bits_of<Lanes<float, L>>(converted<uint32_t, L>(x) << 16);
}

template <int L> INLINE Lanes<float, L> widen(Lanes<uint16_t, L> x, float16) {
    using Bits = Lanes<int32_t, L>;
    const Bits all = converted<int32_t, L>(x), magnitude = all & 0x7fff;
    const Bits normal = (magnitude << 13) + (112 << 23), special = (magnitude << 13) | 0x7f800000;
    const Bits small = bits_of<Bits>(converted<float, L>(magnitude) * 0x1p-24f);
    const Bits value = magnitude < 0x400 ? small : (magnitude >= 0x7c00 ? special : normal);
    return bits_of<Lanes<float, L>>(value | ((all & 0x8000) << 16));
}

template <int L> INLINE Lanes<float, L> narrow(Lanes<float, L> x, float) { return x; }
template <int L> INLINE Lanes<double, L> narrow(Lanes<double, L> x, double) { return x; }

template <int L> INLINE Lanes<uint16_t, L> narrow(Lanes<float, L> x, bfloat16) {
    using Bits = Lanes<uint32_t, L>;
    const Bits bits = bits_of<Bits>(x);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Lanes<int32_t, L> is_number = x == x;
    return converted<uint16_t, L>(is_number ? rounded : Bits{} + 0x7fc0);
}

template <int L> INLINE Lanes<uint16_t, L> narrow(Lanes<float, L> x, float16) {
    using Bits = Lanes<int32_t, L>;
    const Bits all = bits_of<Bits>(x), magnitude = all & 0x7fffffff;
    const Bits normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits small = bits_of<Bits>(bits_of<Lanes<float, L>>(magnitude) + 0.5f) - 0x3f000000;
    Bits value = magnitude < 0x38800000 ? small : normal;
    value = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : value;
    value = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : value;
    return converted<uint16_t, L>(value | ((all >> 16) & 0x8000));
}

// --- memory ----------------------------------------------------------------------------------------------------------

template <int L, class E> INLINE Lanes<E, L> raw(const E* address) {
    Lanes<E, L> value;
    memcpy(&value, address, sizeof value);
    return value;
}

template <int L> INLINE Lanes<C, L> load(const T* address) {
    return widen<L>(raw<L>(reinterpret_cast<const Stored*>(address)), T{});
}

template <int L> INLINE void store(T* address, Lanes<C, L> value) {
    const auto stored = narrow<L>(value, T{});
    memcpy(address, &stored, sizeof stored);
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
        Lanes<Stored, L> value;
        for (int k = 0; k < L; ++k) value[k] = bits_of<Stored>(address[k * step]);
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
