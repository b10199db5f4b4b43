// CUDA C++ as g++ understands it: enough of the language and of its functions that a kernel's source, as it is
// given to NVRTC, becomes a program for the CPU. emulator.py rewrites the two things that a header cannot
// (__shared__ and the parameters of a launch), launch.h runs blocks and threads.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <type_traits>
#include <utility>

#include "launch.h"

#define SIMULATED_GPU 1
#define __CUDA_ARCH__ 900
#define __CUDACC_RTC__ 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#undef assert
#define assert(condition) \
    ((condition) ? (void)0 : sim::fail("assertion failed: %s, line %d", #condition, __LINE__))

// ---- threads of a block and of a warp --------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { sim::barrier(line, 0); }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return sim::barrier(line, p != 0).count; }
inline int __syncthreads_and(int p, int line = __builtin_LINE()) {
    auto votes = sim::barrier(line, p != 0);
    return votes.count == votes.threads;
}
inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return sim::barrier(line, p != 0).count > 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu) { sim::warp(sim::SYNC, mask, 0, 0); }
inline unsigned __ballot_sync(unsigned mask, int p) {
    return unsigned(sim::warp(sim::BALLOT, mask, p != 0, 0));
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

namespace sim {
template <typename X>
X shuffle(unsigned mask, X x, int source) {
    static_assert(sizeof(X) == 2 || sizeof(X) == 4 || sizeof(X) == 8, "no CUDA shuffle takes this type");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(X));
    bits = warp(SHUFFLE, mask, bits, source);
    X result;
    memcpy(&result, &bits, sizeof(X));
    return result;
}
}  // namespace sim

template <typename X>
X __shfl_sync(unsigned mask, X x, int source, int width = 32) {
    int lane = sim::lane();
    return sim::shuffle(mask, x, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename X>
X __shfl_xor_sync(unsigned mask, X x, int with, int width = 32) {
    int lane = sim::lane(), source = lane ^ with;
    bool later = source >= (lane & ~(width - 1)) + width;  // a lane of a later group: one's own value
    return sim::shuffle(mask, x, later ? lane : source);
}
template <typename X>
X __shfl_down_sync(unsigned mask, X x, unsigned by, int width = 32) {
    int lane = sim::lane(), source = lane + int(by);
    return sim::shuffle(mask, x, (lane & (width - 1)) + int(by) >= width ? lane : source);
}
template <typename X>
X __shfl_up_sync(unsigned mask, X x, unsigned by, int width = 32) {
    int lane = sim::lane(), source = lane - int(by);
    return sim::shuffle(mask, x, (lane & (width - 1)) < int(by) ? lane : source);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { sim::fail("__trap() was called"); }

// ---- memory --------------------------------------------------------------------------------------------

template <typename X> X __ldg(const X* p) { return *p; }
template <typename X> X __ldca(const X* p) { return *p; }
template <typename X> X __ldcg(const X* p) { return *p; }
template <typename X> X __ldcs(const X* p) { return *p; }
template <typename X> X __ldcv(const X* p) { return *p; }
template <typename X> X __ldlu(const X* p) { return *p; }
template <typename X> void __stwb(X* p, X x) { *p = x; }
template <typename X> void __stcg(X* p, X x) { *p = x; }
template <typename X> void __stcs(X* p, X x) { *p = x; }
template <typename X> void __stwt(X* p, X x) { *p = x; }

// one thread runs at a time, and gives way at barriers and shuffles only
template <typename X, typename Y> X atomicAdd(X* p, Y y) { X old = *p; *p = X(old + X(y)); return old; }
template <typename X, typename Y> X atomicSub(X* p, Y y) { X old = *p; *p = X(old - X(y)); return old; }
template <typename X, typename Y> X atomicMax(X* p, Y y) { X old = *p; if (X(y) > old) *p = X(y); return old; }
template <typename X, typename Y> X atomicMin(X* p, Y y) { X old = *p; if (X(y) < old) *p = X(y); return old; }
template <typename X, typename Y> X atomicAnd(X* p, Y y) { X old = *p; *p = old & X(y); return old; }
template <typename X, typename Y> X atomicOr(X* p, Y y) { X old = *p; *p = old | X(y); return old; }
template <typename X, typename Y> X atomicXor(X* p, Y y) { X old = *p; *p = old ^ X(y); return old; }
template <typename X, typename Y> X atomicExch(X* p, Y y) { X old = *p; *p = X(y); return old; }
template <typename X, typename Y, typename Z>
X atomicCAS(X* p, Y compare, Z y) { X old = *p; if (old == X(compare)) *p = X(y); return old; }
inline unsigned atomicInc(unsigned* p, unsigned top) { unsigned old = *p; *p = old >= top ? 0 : old + 1; return old; }
inline unsigned atomicDec(unsigned* p, unsigned top) {
    unsigned old = *p;
    *p = old == 0 || old > top ? top : old - 1;
    return old;
}

// ---- numbers -------------------------------------------------------------------------------------------

namespace sim {
template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace sim

inline int __float_as_int(float x) { return sim::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return sim::bits<unsigned>(x); }
inline float __int_as_float(int x) { return sim::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return sim::bits<float>(x); }
inline long long __double_as_longlong(double x) { return sim::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return sim::bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

#define SIM_LEAST(type)                                             \
    inline type min(type a, type b) { return b < a ? b : a; }       \
    inline type max(type a, type b) { return a < b ? b : a; }
SIM_LEAST(int)
SIM_LEAST(unsigned)
SIM_LEAST(long)
SIM_LEAST(unsigned long)
SIM_LEAST(long long)
SIM_LEAST(unsigned long long)
#define SIM_LEAST_MIXED(signed_, unsigned_)                                                     \
    inline unsigned_ min(signed_ a, unsigned_ b) { return min(unsigned_(a), b); }               \
    inline unsigned_ min(unsigned_ a, signed_ b) { return min(a, unsigned_(b)); }               \
    inline unsigned_ max(signed_ a, unsigned_ b) { return max(unsigned_(a), b); }               \
    inline unsigned_ max(unsigned_ a, signed_ b) { return max(a, unsigned_(b)); }
using sim_i64 = long long;
using sim_u64 = unsigned long long;
SIM_LEAST_MIXED(int, unsigned)
SIM_LEAST_MIXED(sim_i64, sim_u64)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(double(a), b); }
inline double min(double a, float b) { return fmin(a, double(b)); }
inline double max(float a, double b) { return fmax(double(a), b); }
inline double max(double a, float b) { return fmax(a, double(b)); }

inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float rcbrtf(float x) { return 1.0f / cbrtf(x); }
inline double rcbrt(double x) { return 1.0 / cbrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float sinpif(float x) { return float(sin(M_PI * double(x))); }
inline float cospif(float x) { return float(cos(M_PI * double(x))); }
inline double sinpi(double x) { return sin(M_PI * x); }
inline double cospi(double x) { return cos(M_PI * x); }
inline float normcdff(float x) { return float(0.5 * erfc(-double(x) * M_SQRT1_2)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float fdividef(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_ru(float x) { return int(ceilf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline unsigned __float2uint_rn(float x) { return unsigned(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return unsigned(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }
