// __half and __nv_bfloat16: 16 bits, rounded to the nearest, ties to even, as on a GPU. Arithmetic is done in
// float and rounded, which gives what the GPU's own instructions give for one operation.

#pragma once

#include "cuda_on_cpu.h"

namespace sim {

// A float with the low bit set if anything was lost: rounding it to fewer bits rounds the double once.
inline float to_odd(double x) {
    float y = float(x);
    if (!(x == x) || double(y) == x || std::isinf(x)) return y;
    uint32_t bits = sim::bits<uint32_t>(y);
    if (fabs(double(y)) > fabs(x)) bits--;  // towards zero; from infinity to the largest number
    return sim::bits<float>(bits | 1);
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits = sim::bits<uint32_t>(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t x) { return sim::bits<float>(uint32_t(x) << 16); }

inline uint16_t to_half(float x) {
    uint32_t bits = sim::bits<uint32_t>(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (bits >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and more
    if (bits < 0x38800000) {  // a subnormal half: in units of 2^-24, rounded by the addition
        float units = sim::bits<float>(bits) * 16777216.0f;
        return uint16_t(sign | uint32_t(nearbyintf(units)));
    }
    bits += 0xfff + (bits >> 13 & 1);  // may carry into the exponent, up to infinity
    return uint16_t(sign | (bits - 0x38000000) >> 13);
}

inline float from_half(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
    float size = exponent == 31  ? sim::bits<float>(0x7f800000 | fraction << 13)
                 : exponent == 0 ? float(fraction) / 16777216.0f
                                 : sim::bits<float>((exponent + 112) << 23 | fraction << 13);
    return sim::bits<float>(sim::bits<uint32_t>(size) | sign);
}

}  // namespace sim

#define SIM_SMALL_FLOAT(Type, to, from)                                                               \
    struct Type {                                                                                     \
        uint16_t raw;                                                                                 \
        Type() = default;                                                                             \
        Type(float x) : raw(to(x)) {}                                                                 \
        Type(double x) : raw(to(sim::to_odd(x))) {}                                                   \
        Type(short x) : raw(to(float(x))) {}                                                          \
        Type(unsigned short x) : raw(to(float(x))) {}                                                 \
        Type(int x) : raw(to(sim::to_odd(double(x)))) {}                                              \
        Type(unsigned x) : raw(to(sim::to_odd(double(x)))) {}                                         \
        Type(long long x) : raw(to(sim::to_odd(double(x)))) {}                                        \
        Type(unsigned long long x) : raw(to(sim::to_odd(double(x)))) {}                               \
        Type(long x) : raw(to(sim::to_odd(double(x)))) {}                                             \
        Type(unsigned long x) : raw(to(sim::to_odd(double(x)))) {}                                    \
        operator float() const { return from(raw); }                                                  \
        Type& operator=(float x) { raw = to(x); return *this; }                                       \
        Type& operator=(double x) { raw = to(sim::to_odd(x)); return *this; }                         \
    };                                                                                                \
    inline Type operator+(Type a, Type b) { return Type(float(a) + float(b)); }                       \
    inline Type operator-(Type a, Type b) { return Type(float(a) - float(b)); }                       \
    inline Type operator*(Type a, Type b) { return Type(float(a) * float(b)); }                       \
    inline Type operator/(Type a, Type b) { return Type(float(a) / float(b)); }                       \
    inline Type operator-(Type a) { return Type(-float(a)); }                                         \
    inline Type& operator+=(Type& a, Type b) { return a = a + b; }                                    \
    inline Type& operator-=(Type& a, Type b) { return a = a - b; }                                    \
    inline Type& operator*=(Type& a, Type b) { return a = a * b; }                                    \
    inline Type& operator/=(Type& a, Type b) { return a = a / b; }                                    \
    inline bool operator==(Type a, Type b) { return float(a) == float(b); }                           \
    inline bool operator!=(Type a, Type b) { return float(a) != float(b); }                           \
    inline bool operator<(Type a, Type b) { return float(a) < float(b); }                             \
    inline bool operator>(Type a, Type b) { return float(a) > float(b); }                             \
    inline bool operator<=(Type a, Type b) { return float(a) <= float(b); }                           \
    inline bool operator>=(Type a, Type b) { return float(a) >= float(b); }                           \
    inline Type __hadd(Type a, Type b) { return a + b; }                                              \
    inline Type __hsub(Type a, Type b) { return a - b; }                                              \
    inline Type __hmul(Type a, Type b) { return a * b; }                                              \
    inline Type __hdiv(Type a, Type b) { return a / b; }                                              \
    inline Type __hneg(Type a) { return -a; }                                                         \
    inline Type __habs(Type a) { return Type(fabsf(float(a))); }                                      \
    inline Type __hfma(Type a, Type b, Type c) {                                                      \
        return Type(double(float(a)) * double(float(b)) + double(float(c)));                          \
    }                                                                                                 \
    inline Type __hmax(Type a, Type b) { return Type(fmaxf(float(a), float(b))); }                    \
    inline Type __hmin(Type a, Type b) { return Type(fminf(float(a), float(b))); }                    \
    inline bool __heq(Type a, Type b) { return a == b; }                                              \
    inline bool __hne(Type a, Type b) { return a != b; }                                              \
    inline bool __hlt(Type a, Type b) { return a < b; }                                               \
    inline bool __hgt(Type a, Type b) { return a > b; }                                               \
    inline bool __hle(Type a, Type b) { return a <= b; }                                              \
    inline bool __hge(Type a, Type b) { return a >= b; }                                              \
    inline bool __hisnan(Type a) { return float(a) != float(a); }                                     \
    inline int __hisinf(Type a) { return std::isinf(float(a)) ? (float(a) > 0 ? 1 : -1) : 0; }        \
    inline Type hexp(Type a) { return Type(exp(double(float(a)))); }                                  \
    inline Type hlog(Type a) { return Type(log(double(float(a)))); }                                  \
    inline Type hsqrt(Type a) { return Type(sqrt(double(float(a)))); }                                \
    inline Type hrsqrt(Type a) { return Type(1.0 / sqrt(double(float(a)))); }

#define SIM_SMALL_PAIR(Type2, Type)                                                                   \
    struct alignas(4) Type2 {                                                                         \
        Type x, y;                                                                                    \
        Type2() = default;                                                                            \
        Type2(Type x, Type y) : x(x), y(y) {}                                                         \
    };                                                                                                \
    inline Type2 operator+(Type2 a, Type2 b) { return {a.x + b.x, a.y + b.y}; }                       \
    inline Type2 operator-(Type2 a, Type2 b) { return {a.x - b.x, a.y - b.y}; }                       \
    inline Type2 operator*(Type2 a, Type2 b) { return {a.x * b.x, a.y * b.y}; }                       \
    inline Type2 __hadd2(Type2 a, Type2 b) { return a + b; }                                          \
    inline Type2 __hsub2(Type2 a, Type2 b) { return a - b; }                                          \
    inline Type2 __hmul2(Type2 a, Type2 b) { return a * b; }                                          \
    inline Type2 __hfma2(Type2 a, Type2 b, Type2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
    inline float __low2float(Type2 a) { return float(a.x); }                                          \
    inline float __high2float(Type2 a) { return float(a.y); }

SIM_SMALL_FLOAT(__half, sim::to_half, sim::from_half)
SIM_SMALL_PAIR(__half2, __half)
using half = __half;
using half2 = __half2;

namespace sim {
template <>
struct Letter<__half> {
    static constexpr char value = 'h';
};
}  // namespace sim

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __double2half(double x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline __half __int2half_rn(int x) { return __half(x); }
inline __half __ushort_as_half(unsigned short x) { return sim::bits<__half>(x); }
inline __half __short_as_half(short x) { return sim::bits<__half>(x); }
inline unsigned short __half_as_ushort(__half x) { return x.raw; }
inline short __half_as_short(__half x) { return short(x.raw); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline float2 __half22float2(__half2 a) { return {float(a.x), float(a.y)}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
