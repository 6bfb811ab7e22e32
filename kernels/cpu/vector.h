// Vectors of the processor's width through the vector extensions of g++ and clang++, for kernels whose speed must not
// depend on what a compiler vectorizes by itself: loads and stores with conversion, exp, log and transposition.
#pragma once

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: every function that takes one is inlined

// W: float or double, the type that is computed in.
template <typename W> struct VectorOf;
template <> struct VectorOf<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    using integer = int32_t;
};
template <> struct VectorOf<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t integers __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint64_t bits __attribute__((vector_size(VECTOR_BYTES)));
    using integer = int64_t;
};
template <typename W> using Vec = typename VectorOf<W>::type;
template <typename W> using IntVec = typename VectorOf<W>::integers;
template <typename W> using Int = typename VectorOf<W>::integer;  // as wide as W
template <typename W> constexpr int LANES = VECTOR_BYTES / int(sizeof(W));

template <typename W> static INLINE Vec<W> all(W x) { return x - Vec<W>{}; }
template <typename W> static INLINE Vec<W> select(IntVec<W> mask, Vec<W> yes, Vec<W> no) { return mask ? yes : no; }
// A NaN in x is passed over; one in `low` stays.
template <typename W> static INLINE Vec<W> larger(Vec<W> x, Vec<W> low) { return x > low ? x : low; }

// Scratch memory of one thread, on the boundary of a line of the cache.
template <typename W> struct Scratch {
    void* memory;
    W* data;
    explicit Scratch(int64_t count) : memory(__builtin_malloc(size_t(count) * sizeof(W) + 64)) {
        if (memory == nullptr) __builtin_trap();
        data = reinterpret_cast<W*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { __builtin_free(memory); }
};

// --- loads and stores ------------------------------------------------------------------------------------------------

static INLINE Vec<float> load(const float* from) {
    Vec<float> x;
    memcpy(&x, from, sizeof(x));
    return x;
}
static INLINE Vec<double> load(const double* from) {
    Vec<double> x;
    memcpy(&x, from, sizeof(x));
    return x;
}
template <typename W> static INLINE IntVec<W> load_integers(const Int<W>* from) {
    IntVec<W> x;
    memcpy(&x, from, sizeof(x));
    return x;
}
static INLINE Vec<float> load(const bfloat16* from) {
    VectorOf<float>::halves x;
    memcpy(&x, from, sizeof(x));
    return Vec<float>(__builtin_convertvector(x, VectorOf<float>::bits) << 16);
}
static INLINE Vec<float> load(const float16* from) {  // as widen(float16)
    using Bits = VectorOf<float>::bits;
    VectorOf<float>::halves x;
    memcpy(&x, from, sizeof(x));
    Bits half = __builtin_convertvector(x, Bits), magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    Bits high = Bits{} + 0x70000000u, low = Bits{} + 0x38000000u;
    Bits normal = (magnitude << 13) + (magnitude >= 0x7c00u ? high : low);
    Bits small = Bits(__builtin_convertvector(IntVec<float>(magnitude), Vec<float>) * 5.9604644775390625e-8f);
    return Vec<float>(sign | (magnitude < 0x400u ? small : normal));
}

static INLINE void store(float* to, Vec<float> x) { memcpy(to, &x, sizeof(x)); }
static INLINE void store(double* to, Vec<double> x) { memcpy(to, &x, sizeof(x)); }
static INLINE void store(bfloat16* to, Vec<float> x) {  // as narrow<bfloat16>
    using Bits = VectorOf<float>::bits;
    Bits bits = Bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = Bits{} + 0x7fc0u;
    auto halves = __builtin_convertvector(x != x ? nan : rounded, VectorOf<float>::halves);
    memcpy(to, &halves, sizeof(halves));
}
static INLINE void store(float16* to, Vec<float> x) {  // as narrow<float16>
    using Bits = VectorOf<float>::bits;
    Bits bits = Bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    Bits infinite = Bits{} + 0x7c00u, nan = Bits{} + 0x7e00u;
    Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    Bits small = Bits(Vec<float>(magnitude) + 0.5f) - 0x3f000000u;
    Bits value = magnitude < 0x38800000u ? small : normal;
    value = magnitude >= 0x477ff000u ? infinite : value;
    value = magnitude > 0x7f800000u ? nan : value;
    auto halves = __builtin_convertvector(sign | value, VectorOf<float>::halves);
    memcpy(to, &halves, sizeof(halves));
}

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
