// What all kernels share. A file is compiled for one type T of activations, and one VEC: how many of them
// an access moves (see loader.py). Numbers are read as T, computed as A and rounded once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using T = ACTIVATION;

template <typename X>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};
using A = Accumulator<T>::type;  // statistics, sums and the gradients of parameters

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename X>
__device__ inline X narrow(A x) {
    return X(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(A x) {
    return __float2bfloat16(float(x));
}
template <>
__device__ inline __half narrow<__half>(A x) {
    return __float2half(float(x));
}

// N neighbours, moved by accesses of up to 16 bytes; the launch sees to it that they are aligned
template <typename X, int N>
struct alignas(sizeof(X) * N < 16 ? sizeof(X) * N : 16) Pack {
    X at[N];
};

template <typename X, int N>
__device__ inline Pack<X, N> load(const X* from) {
    return *reinterpret_cast<const Pack<X, N>*>(from);
}

template <typename X, int N>
__device__ inline void store(X* to, const Pack<X, N>& values) {
    *reinterpret_cast<Pack<X, N>*>(to) = values;
}

// N neighbours, widened to be computed with, or rounded
template <typename X, int N>
__device__ inline Pack<A, N> widen(const Pack<X, N>& packed) {
    Pack<A, N> wide;
#pragma unroll
    for (int j = 0; j < N; j++) wide.at[j] = widen(packed.at[j]);
    return wide;
}

// A bfloat16 is the upper half of a float32. In pairs: the compiler takes two instructions for a word's
// second number, unless it is shown that one is enough
template <int N>
__device__ inline Pack<A, N> widen(const Pack<__nv_bfloat16, N>& packed) {
    Pack<A, N> wide;
    if constexpr (N % 2 == 0) {
        Pack<u32, N / 2> words;
        memcpy(&words, &packed, sizeof(words));
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            wide.at[j] = __uint_as_float(words.at[j / 2] << 16);
            wide.at[j + 1] = __uint_as_float(words.at[j / 2] & 0xffff0000u);
        }
    } else {
        static_assert(N == 1, "packs are pairs");
        wide.at[0] = widen(packed.at[0]);
    }
    return wide;
}

template <typename X, int N>
__device__ inline Pack<X, N> narrow(const Pack<A, N>& wide) {
    Pack<X, N> rounded;
#pragma unroll
    for (int j = 0; j < N; j++) rounded.at[j] = narrow<X>(wide.at[j]);
    return rounded;
}

// Only where nothing else is to be loaded before the numbers are computed with: under a condition, as at
// the end of an array, the compiler widens them at once, and the next load waits until these have come
template <int N, typename X>
__device__ inline Pack<A, N> read(const X* from) {
    return widen(load<X, N>(from));
}

template <int N, typename X>
__device__ inline void write(X* to, const Pack<A, N>& wide) {
    store(to, narrow<X>(wide));
}

// body(pack, k) for the packs of a flat array that this thread has, COUNT at most. A kernel goes through
// them twice, first loading and nothing else, then computing: so all loads are on their way at once.
template <int COUNT, typename Body>
__device__ inline void flat_packs(i64 packs, Body body) {
    i64 first = i64(blockIdx.x) * blockDim.x * COUNT + threadIdx.x;
#pragma unroll
    for (int k = 0; k < COUNT; k++)
        if (first + k * blockDim.x < packs) body(first + k * blockDim.x, k);
}

constexpr u32 ALL_LANES = 0xffffffffu;

template <typename X>
__device__ inline X warp_sum(X x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

template <typename X>
__device__ inline X warp_max(X x) {
    for (int offset = 16; offset > 0; offset /= 2) {
        X other = __shfl_xor_sync(ALL_LANES, x, offset);
        x = x > other ? x : other;
    }
    return x;
}

// The sum over a block of whole warps, in every thread and in the same order each time; `scratch` has room
// for 32 values, and may be used again after the next __syncthreads.
template <typename X>
__device__ inline X block_sum(X x, X* scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();  // the last use of scratch is over
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : X(0));
}

// Philox-4x32-10 (Salmon et al. 2011), the same words as cupytron/ops/philox.py
struct Words {
    u32 at[4];
};

__device__ inline Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
    for (int round = 0; round < 10; round++) {
        u64 p0 = u64(c0) * 0xD2511F53u, p1 = u64(c2) * 0xCD9E8D57u;
        u32 n0 = u32(p1 >> 32) ^ c1 ^ k0, n2 = u32(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = u32(p1), c2 = n2, c3 = u32(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}
