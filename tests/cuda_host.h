// What CUDA C++ kernels need to run on a CPU: the words of the language, and a walk over the grid, thread by thread.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>

#define __global__ static
#define __device__
#define __forceinline__ inline

struct Dimension { unsigned x; };
static thread_local Dimension blockIdx, threadIdx, blockDim;

struct half;
static inline float float_of(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned bits_of(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
float widen(half x);
void narrow(half& narrowed, float x);

static const char* failure = nullptr;  // a GPU's assertion stops the launch; here the first one is kept
static inline void fail(const char* message) { if (!failure) failure = message; }

template <typename... P, std::size_t... I>
const char* walk(void (*kernel)(P...), unsigned blocks, unsigned threads, void** args, std::index_sequence<I...>) {
    failure = nullptr;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(*static_cast<P*>(args[I])...);
    return failure;
}

template <typename... P> const char* walk(void (*kernel)(P...), unsigned blocks, unsigned threads, void** args) {
    return walk(kernel, blocks, threads, args, std::index_sequence_for<P...>());
}
