// Vectors ("lanes") in the vector types of g++ and clang++, which become registers of whatever processor a file is
// compiled for. With them the speed of a kernel does not depend on what a compiler vectorizes by itself. float16 and
// bfloat16 are computed in float32.
#pragma once

#include "common.h"

#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: every function that takes one is inlined

template <class E, int L> struct LanesOf {
    typedef E type __attribute__((vector_size(sizeof(E) * L)));
};
template <class E> struct LanesOf<E, 1> {
    typedef E type;
};
template <class E, int L> using Lanes = typename LanesOf<E, L>::type;
template <int L> using Width = std::integral_constant<int, L>;

// As wide as W: comparisons of W give it.
template <typename W> using Int = std::conditional_t<std::is_same<W, double>::value, int64_t, int32_t>;
template <class E> using Stored = std::conditional_t<sizeof(E) == 2, uint16_t, E>;  // what vectors of E are in memory

// A whole register of float or double, the types that are computed in.
template <typename W> constexpr int LANES = VECTOR_BYTES / int(sizeof(W));
template <typename W> using Vec = Lanes<W, LANES<W>>;
template <typename W> using IntVec = Lanes<Int<W>, LANES<W>>;

template <int L, class E> INLINE Lanes<E, L> splat(E value) { return value - Lanes<E, L>{}; }

template <typename W> static INLINE Vec<W> all(W x) { return splat<LANES<W>>(x); }
template <typename W> static INLINE Vec<W> select(IntVec<W> mask, Vec<W> yes, Vec<W> no) { return mask ? yes : no; }
// A NaN in x is passed over; one in `low` stays.
template <typename W> static INLINE Vec<W> larger(Vec<W> x, Vec<W> low) { return x > low ? x : low; }

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

// --- loads and stores ------------------------------------------------------------------------------------------------

template <int L, class E> INLINE Lanes<E, L> raw(const E* address) {
    Lanes<E, L> value;
    memcpy(&value, address, sizeof value);
    return value;
}

template <int L, class E> INLINE Lanes<Computed<E>, L> load(const E* address) {
    return widen<L>(raw<L>(reinterpret_cast<const Stored<E>*>(address)), E{});
}
template <int L, class E> INLINE void store(E* address, Lanes<Computed<E>, L> value) {
    const auto stored = narrow<L>(value, E{});
    memcpy(address, &stored, sizeof stored);
}

template <class E> static INLINE Vec<Computed<E>> load(const E* address) { return load<LANES<Computed<E>>>(address); }
template <class E> static INLINE void store(E* address, Vec<Computed<E>> value) {
    store<LANES<Computed<E>>, E>(address, value);
}
template <typename W> static INLINE IntVec<W> load_integers(const Int<W>* address) { return raw<LANES<W>>(address); }

// --- functions -------------------------------------------------------------------------------------------------------

// exp(x) of x <= 0, to 1e-7 of itself; 0 below -87 and for -infinity; NaN for NaN.
static INLINE Vec<float> exp_below(Vec<float> x) {
    constexpr float LOWEST = -87.0f, ROUNDER = 12582912.0f;
    Vec<float> lowest = all(LOWEST);
    Vec<float> y = x < lowest ? lowest : x;
    Vec<float> t = y * 1.442695041f + ROUNDER;  // the integer nearest to x / log(2) is in its last digits
    Vec<float> n = t - ROUNDER;
    Vec<float> r = y - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vec<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    Vec<float> power = Vec<float>((IntVec<float>(t) << 23) + 0x3F800000);
    Vec<float> e = (p * (r * r) + r + 1.0f) * power;
    return x < lowest ? Vec<float>{} : e;
}

// exp(x) of x <= 0, to 3e-16 of itself; 0 below -708.
static INLINE Vec<double> exp_below(Vec<double> x) {
    constexpr double LOWEST = -708.0, ROUNDER = 6755399441055744.0;
    Vec<double> lowest = all(LOWEST);
    Vec<double> y = x < lowest ? lowest : x;
    Vec<double> t = y * 1.4426950408889634 + ROUNDER;
    Vec<double> n = t - ROUNDER;
    Vec<double> r = y - n * 0.693147180369123816490;
    r = r - n * 1.90821492927058770002e-10;
    Vec<double> p = all(1.0 / 6227020800.0);
    constexpr double FACTORIALS[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                     720.0,       120.0,      24.0,      6.0,      2.0,     1.0};
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) p = p * r + 1.0 / FACTORIALS[i];
    p = p * r + 1.0;
    Vec<double> power = Vec<double>((IntVec<double>(t) << 52) + 0x3FF0000000000000);
    return x < lowest ? Vec<double>{} : p * power;
}

// log(x) of a finite x >= 1, to 2 units in the last place; NaN for NaN.
template <typename W> static INLINE Vec<W> log_above(Vec<W> x) {
    constexpr bool SINGLE = sizeof(W) == 4;
    constexpr Int<W> MANTISSA = SINGLE ? 23 : 52, TERMS = SINGLE ? 5 : 11;
    constexpr Int<W> HALF_ROOT = SINGLE ? Int<W>(0x3F3504F3) : Int<W>(0x3FE6A09E667F3BCD);
    constexpr Int<W> MASK = (Int<W>(1) << MANTISSA) - 1;
    constexpr W HIGH = SINGLE ? W(0.693359375) : W(0.693147180369123816490);
    constexpr W LOW = SINGLE ? W(-2.12194440e-4) : W(1.90821492927058770002e-10);
    IntVec<W> b = IntVec<W>(x) - HALF_ROOT;
    Vec<W> n = __builtin_convertvector(b >> MANTISSA, Vec<W>);
    Vec<W> m = Vec<W>((b & MASK) + HALF_ROOT);  // x = m * 2^n, m from sqrt(1/2) to sqrt(2)
    Vec<W> s = (m - W(1)) / (m + W(1)), z = s * s;
    Vec<W> p = all(W(1) / W(2 * TERMS - 1));
#pragma GCC unroll 11
    for (int i = TERMS - 2; i >= 0; --i) p = p * z + W(1) / W(2 * i + 1);
    Vec<W> log = n * HIGH + (n * LOW + W(2) * s * p);  // log(m) = 2 * (s + s^3 / 3 + s^5 / 5 + ...)
    return x != x ? x : log;
}

// The sum of the lanes, in a fixed order, in double.
static INLINE double sum_of(Vec<double> x) {
    double sum = 0;
    for (int i = 0; i < LANES<double>; ++i) sum += x[i];
    return sum;
}

// --- transposition ---------------------------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(W, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(W, a, b, ...) __builtin_shuffle(a, b, IntVec<W>{__VA_ARGS__})
#endif

// (a0 b0 a1 b1 ...), of the lower or the upper halves of a and b.
template <bool UPPER, typename W> static INLINE Vec<W> interleave(Vec<W> a, Vec<W> b) {
    if constexpr (LANES<W> == 16) {
        return UPPER ? SHUFFLE(W, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                     : SHUFFLE(W, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    } else if constexpr (LANES<W> == 8) {
        return UPPER ? SHUFFLE(W, a, b, 4, 12, 5, 13, 6, 14, 7, 15) : SHUFFLE(W, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    } else if constexpr (LANES<W> == 4) {
        return UPPER ? SHUFFLE(W, a, b, 2, 6, 3, 7) : SHUFFLE(W, a, b, 0, 4, 1, 5);
    } else {
        return UPPER ? SHUFFLE(W, a, b, 1, 3) : SHUFFLE(W, a, b, 0, 2);
    }
}

// Transposes a square block, a vector in each row: log2(LANES) perfect shuffles of its rows.
template <typename W> static INLINE void transpose(Vec<W>* rows) {
    constexpr int N = LANES<W>;
#pragma GCC unroll 4
    for (int stage = 1; stage < N; stage *= 2) {
        Vec<W> next[N];
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; ++i) {
            next[2 * i] = interleave<false, W>(rows[i], rows[i + N / 2]);
            next[2 * i + 1] = interleave<true, W>(rows[i], rows[i + N / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = next[i];
    }
}
