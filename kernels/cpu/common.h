// What every CPU kernel shares: half-precision types, torch's parallel loop, and memory advice for new outputs.
//
// The code is written in loops that g++ and clang++ vectorize: one written array per inner loop, no branches in it, and
// comparisons in which a NaN takes the branch that keeps it. It uses no C++ runtime library, no exceptions, and nothing
// of torch but torch_parallel_for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default"))) int64_t
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
#define NOINLINE __attribute__((noinline))  // a copy in each caller would only cost compile time

// --- threads ---------------------------------------------------------------------------------------------------------

using Body = void (*)(int64_t begin, int64_t end, void* context);
static int32_t (*torch_pool)(int64_t begin, int64_t end, int64_t grain, Body body, void* context) = nullptr;

// Called at load with the address of torch_parallel_for, and with null in a forked child, which runs on one thread.
extern "C" __attribute__((visibility("default"))) void fastseg_set_pool(void* address) {
    torch_pool = reinterpret_cast<decltype(torch_pool)>(address);
}

// Runs f(begin, end) over parts of [0, count) on torch's threads, at least `grain` iterations per part. A sum over the
// iterations must go through slots whose number depends on the shape alone, so that its bits do not depend on threads.
template <typename F>
static void parallel_for(int64_t count, int64_t grain, const F& f) {
    if (count <= 0) return;
    if (torch_pool == nullptr || count <= grain) {
        f(int64_t(0), count);
        return;
    }
    Body body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    torch_pool(0, count, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
}

// Iterations per part, such that a part has some 32 thousand elements: smaller parts cost more than they save.
static INLINE int64_t grain_of(int64_t elements_per_iteration) {
    int64_t each = elements_per_iteration < 1 ? 1 : elements_per_iteration;
    return each >= 32768 ? 1 : 32768 / each;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Asks for huge pages for the memory of a new, large output before it is written. Its first touch costs 1.9 times a copy
// of the tensor in 4 KiB pages, and 0.4 times in pages of 2 MiB. Advice only: memory that is in use already stays as it is.
[[maybe_unused]] static void fresh(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t PAGE = 4096, LEAST = 8 << 20;
    if (memory == nullptr || bytes < LEAST) return;
    int64_t start = (reinterpret_cast<int64_t>(memory) + PAGE - 1) / PAGE * PAGE;
    int64_t end = (reinterpret_cast<int64_t>(memory) + bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(start), size_t(end - start), MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Memory for the time of a call, of `count` elements, on the boundary of a line of the cache.
template <typename E> struct Scratch {
    void* memory;
    E* data;
    explicit Scratch(int64_t count) : memory(__builtin_malloc(size_t(count) * sizeof(E) + 64)) {
        if (memory == nullptr) __builtin_trap();
        data = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { __builtin_free(memory); }
    operator E*() const { return data; }
};

// --- dtypes ----------------------------------------------------------------------------------------------------------

// Half-precision numbers as they are in memory. Conversions are integer operations that vectorize on any processor.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <typename To, typename From> static INLINE To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

template <typename T> struct ComputedOf { using type = float; };
template <> struct ComputedOf<double> { using type = double; };
// The type that values of T are computed in.
template <typename T> using Computed = typename ComputedOf<T>::type;

static INLINE float widen(float x) { return x; }
static INLINE double widen(double x) { return x; }
static INLINE float widen(bfloat16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
static INLINE float widen(float16 x) {
    uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
    uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);  // infinity and NaN
    uint32_t small = bits_of<uint32_t>(float(int32_t(magnitude)) * 5.9604644775390625e-8f);    // below 2^-14
    return bits_of<float>(sign | (magnitude < 0x400u ? small : normal));
}

template <typename T> static INLINE T narrow(Computed<T> x);
template <> INLINE float narrow<float>(float x) { return x; }
template <> INLINE double narrow<double>(double x) { return x; }
// Rounds to nearest, ties to even; a NaN stays one.
template <> INLINE bfloat16 narrow<bfloat16>(float x) {
    uint32_t bits = bits_of<uint32_t>(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t(x != x ? 0x7fc0u : rounded)};
}
template <> INLINE float16 narrow<float16>(float x) {
    uint32_t bits = bits_of<uint32_t>(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 moves the digits that are kept, multiples of 2^-24, to the end of the number, rounded.
    uint32_t small = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t value = magnitude < 0x38800000u ? small : normal;
    value = magnitude >= 0x477ff000u ? 0x7c00u : value;  // rounds past the largest number
    value = magnitude > 0x7f800000u ? 0x7e00u : value;
    return {uint16_t(sign | value)};
}
