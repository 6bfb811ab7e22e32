// What CUDA C++ kernels need to run on a CPU: the keywords and functions of CUDA that they use, and a loop over the
// threads of a grid. No header is included, because parsing the standard library would take most of the compile time.
extern "C" {
float exp2f(float), logf(float), sqrtf(float), fmaf(float, float, float);
double exp(double), log(double), sqrt(double), fma(double, double, double);
void* memcpy(void*, const void*, decltype(sizeof 0));
}

#define __global__ static
#define __device__
#define __forceinline__ inline

struct Dimension { unsigned x; };
static thread_local Dimension blockIdx, threadIdx, blockDim;

struct half;
static inline bool larger(float a, float b) { return a > b; }
static inline float float_of(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned bits_of(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
float widen(half x);
void narrow(half& narrowed, float x);

static const char* failure = nullptr;  // on a GPU an assertion stops the launch; here the first message is returned
static inline void fail(const char* message) { if (!failure) failure = message; }

template <int... I> struct Indices {};
template <int N, int... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I> struct UpTo<0, I...> { using Type = Indices<I...>; };

template <typename... P, int... I>
const char* walk(void (*kernel)(P...), unsigned blocks, unsigned threads, void** args, bool reversed, Indices<I...>) {
    failure = nullptr;
    blockDim.x = threads;
    for (unsigned block = 0; block < blocks; ++block)
        for (unsigned thread = 0; thread < threads; ++thread) {
            blockIdx.x = reversed ? blocks - 1 - block : block;
            threadIdx.x = reversed ? threads - 1 - thread : thread;
            kernel(*static_cast<P*>(args[I])...);
        }
    return failure;
}

template <typename... P>
const char* walk(void (*kernel)(P...), unsigned blocks, unsigned threads, void** args, bool reversed) {
    return walk(kernel, blocks, threads, args, reversed, typename UpTo<sizeof...(P)>::Type());
}
