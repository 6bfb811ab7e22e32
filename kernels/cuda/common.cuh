// What the kernels share: element types, wide accesses, and the number of a thread.
//
// No system header is included, so that NVRTC needs none. Half-precision types are for storage alone; arithmetic is in
// float. launch.source pastes this text into each .cu file.

using int64 = long long;
using uint8 = unsigned char;

struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };
struct nothing {};  // the type of the positions of a pool that stores none

template <typename T> struct ComputedIn { using type = float; };
template <> struct ComputedIn<double> { using type = double; };
template <typename T> using Computed = typename ComputedIn<T>::type;

#ifdef __CUDA_ARCH__
__device__ inline float widen(half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
__device__ inline void narrow(half& narrowed, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
}
__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(unsigned bits) { return __uint_as_float(bits); }
// CuPy compiles with -ftz=true, under which a C++ comparison treats a float below 2^-126 as 0.
__device__ inline bool larger(float a, float b) {
    int is;
    asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; selp.s32 %0, 1, 0, p; }" : "=r"(is) : "f"(a), "f"(b));
    return is;
}
extern "C" __device__ void __assertfail(const char*, const char*, unsigned, const char*, decltype(sizeof 0));
__device__ inline void fail(const char* message) { __assertfail(message, "fastseg", 0, "", 1); }
#endif

__device__ inline bool larger(double a, double b) { return a > b; }

__device__ inline float widen(bfloat16 x) { return float_of(unsigned(x.bits) << 16); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline void narrow(bfloat16& narrowed, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
#else  // round to nearest, ties to even; a NaN keeps its upper bits and stays NaN
    unsigned bits = bits_of(x);
    unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    narrowed.bits = (unsigned short)((x == x ? rounded : bits | 0x400000u) >> 16);
#endif
}
__device__ inline void narrow(float& narrowed, float x) { narrowed = x; }
__device__ inline void narrow(double& narrowed, double x) { narrowed = x; }

// Multiply and add with one rounding in every kernel, so that a value recomputed by another kernel is the same.
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

__device__ inline float infinity() { return float_of(0x7f800000u); }

// N neighboring elements, loaded and stored in accesses of up to 16 bytes, to which the address is aligned.
template <typename T, int N> struct Pack { T at[N]; };

template <int BYTES> struct Word;
template <> struct Word<1> { unsigned char part; };
template <> struct Word<2> { unsigned short part; };
template <> struct Word<4> { unsigned part; };
template <> struct alignas(8) Word<8> { unsigned part[2]; };
template <> struct alignas(16) Word<16> { unsigned part[4]; };

template <typename T, int N> struct Words {
    static constexpr int BYTES = int(sizeof(T)) * N < 16 ? int(sizeof(T)) * N : 16;
    static constexpr int COUNT = int(sizeof(T)) * N / BYTES;
    Word<BYTES> at[COUNT];
};

template <int N, typename T> __device__ inline Pack<T, N> load(const T* from) {
    Words<T, N> words;
    Pack<T, N> pack;
    for (int k = 0; k < Words<T, N>::COUNT; ++k)
        words.at[k] = reinterpret_cast<const Word<Words<T, N>::BYTES>*>(from)[k];
    memcpy(&pack, &words, sizeof(pack));
    return pack;
}

template <typename T, int N> __device__ inline void store(T* to, const Pack<T, N>& pack) {
    Words<T, N> words;
    memcpy(&words, &pack, sizeof(pack));
    for (int k = 0; k < Words<T, N>::COUNT; ++k)
        reinterpret_cast<Word<Words<T, N>::BYTES>*>(to)[k] = words.at[k];
}

__device__ inline int64 thread_number() { return int64(blockIdx.x) * blockDim.x + threadIdx.x; }
