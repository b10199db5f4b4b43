// Activation functions and their gradients, from x in both directions: reading x again costs what reading a
// saved slope would, and x need not be stored twice.

#include "common.cuh"

constexpr int PACKS = 2;  // of a thread, all of them read before the first is written

// 16-bit results have no use for the last bits of these, which cost more than all other arithmetic here
__device__ inline A exp_of(A x) {
    if constexpr (sizeof(T) == 2) return __expf(x);
    return exp(x);
}

__device__ inline A inverse(A x) {
    if constexpr (sizeof(T) == 2) return __fdividef(1, x);
    return 1 / x;
}

__device__ inline A sigmoid(A x) { return inverse(1 + exp_of(-x)); }

// x/2 (1 + tanh(u)) = x cdf, cdf = sigmoid(2u), u = SCALE (x + CUBIC x^3): nothing cancels where x < 0
struct Gelu {
    static constexpr A SCALE = 0.79788456080286535588, CUBIC = 0.044715;  // sqrt(2 / pi)

    // x within bounds beyond which cdf is 0 or 1: x^3 would overflow
    __device__ static A bounded(A x, A most) { return x < -most ? -most : x > most ? most : x; }
    __device__ static A twice_u(A x) { return 2 * SCALE * x * (1 + CUBIC * x * x); }

    __device__ static A value(A x) { return x * sigmoid(twice_u(bounded(x, 16))); }
    __device__ static A slope(A x) {
        x = bounded(x, 10);  // exp(-2u) is finite there, and makes 1 - cdf without cancellation
        A e = exp_of(-twice_u(x)), cdf = inverse(1 + e);
        return cdf + cdf * (e * cdf) * 2 * SCALE * x * (1 + 3 * CUBIC * x * x);
    }
};

struct GeluExact {
    static constexpr A ROOT_HALF = 0.70710678118654752440, DENSITY = 0.39894228040143267794;

    __device__ static A cdf(A x) { return A(0.5) * erfc(-x * ROOT_HALF); }
    __device__ static A value(A x) { return x * cdf(x); }
    __device__ static A slope(A x) { return cdf(x) + x * DENSITY * exp_of(A(-0.5) * x * x); }
};

struct Relu {
    __device__ static A value(A x) { return x <= 0 ? A(0) : x; }  // not a number stays one
    __device__ static A slope(A x) { return x > 0 ? A(1) : A(0); }
};

// y = F(x)
template <typename F>
__device__ inline void forward(const T* __restrict__ x, T* __restrict__ y, i64 packs) {
    Pack<T, VEC> loaded[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) { loaded[k] = load<T, VEC>(x + i * VEC); });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> values = widen(loaded[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) values.at[j] = F::value(values.at[j]);
        write(y + i * VEC, values);
    });
}

// dx = dy F'(x); dx may be dy's memory
template <typename F>
__device__ inline void backward(const T* dy, const T* __restrict__ x, T* dx, i64 packs) {
    Pack<T, VEC> loaded_x[PACKS], loaded_dy[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        loaded_x[k] = load<T, VEC>(x + i * VEC), loaded_dy[k] = load<T, VEC>(dy + i * VEC);
    });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> values = widen(loaded_x[k]), gradients = widen(loaded_dy[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) gradients.at[j] *= F::slope(values.at[j]);
        write(dx + i * VEC, gradients);
    });
}

extern "C" __global__ void gelu(const T* x, T* y, i64 packs) { forward<Gelu>(x, y, packs); }

extern "C" __global__ void gelu_backward(const T* dy, const T* x, T* dx, i64 packs) {
    backward<Gelu>(dy, x, dx, packs);
}

extern "C" __global__ void gelu_exact(const T* x, T* y, i64 packs) { forward<GeluExact>(x, y, packs); }

extern "C" __global__ void gelu_exact_backward(const T* dy, const T* x, T* dx, i64 packs) {
    backward<GeluExact>(dy, x, dx, packs);
}

extern "C" __global__ void relu(const T* x, T* y, i64 packs) { forward<Relu>(x, y, packs); }

extern "C" __global__ void relu_backward(const T* dy, const T* x, T* dx, i64 packs) {
    backward<Relu>(dy, x, dx, packs);
}

// Where pack i of an array (rows, width) begins if a row begins `stride` after the one before
__device__ inline i64 offset(u64 i, u64 packs_of_row, i64 stride) {
    return i64(i / packs_of_row) * stride + i64(i % packs_of_row) * VEC;
}

// y = silu(gate) * up, silu(g) = g sigmoid(g); y is contiguous, gate and up may be columns of one array
extern "C" __global__ void swiglu(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y,
                                  i64 packs, i64 packs_of_row, i64 gate_stride, i64 up_stride) {
    Pack<T, VEC> loaded_gate[PACKS], loaded_up[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        loaded_gate[k] = load<T, VEC>(gate + offset(i, packs_of_row, gate_stride));
        loaded_up[k] = load<T, VEC>(up + offset(i, packs_of_row, up_stride));
    });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> g = widen(loaded_gate[k]), u = widen(loaded_up[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) u.at[j] *= g.at[j] * sigmoid(g.at[j]);
        write(y + i * VEC, u);
    });
}

// dup = dy * silu(gate), dgate = dy * up * silu'(gate), silu' = sigmoid + silu (1 - sigmoid)
extern "C" __global__ void swiglu_backward(const T* __restrict__ dy, const T* __restrict__ gate,
                                           const T* __restrict__ up, T* __restrict__ dgate,
                                           T* __restrict__ dup, i64 packs, i64 packs_of_row,
                                           i64 gate_stride, i64 up_stride) {
    Pack<T, VEC> loaded_gate[PACKS], loaded_up[PACKS], loaded_dy[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        loaded_gate[k] = load<T, VEC>(gate + offset(i, packs_of_row, gate_stride));
        loaded_up[k] = load<T, VEC>(up + offset(i, packs_of_row, up_stride));
        loaded_dy[k] = load<T, VEC>(dy + i * VEC);
    });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> g = widen(loaded_gate[k]), u = widen(loaded_up[k]), d = widen(loaded_dy[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            A s = sigmoid(g.at[j]), silu = g.at[j] * s;
            g.at[j] = d.at[j] * u.at[j] * (s + silu * (1 - s));
            u.at[j] = d.at[j] * silu;
        }
        write(dgate + i * VEC, g);
        write(dup + i * VEC, u);
    });
}
