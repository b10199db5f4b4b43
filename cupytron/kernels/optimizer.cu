// The update on flat arrays, and what decides about it, without the host: norm, clipping, loss scale, learning
// rate and step stand in a vector in the device's memory. T is the type of the copy that layers read (the
// weights' own where there is none); weights, gradients and state are A, VEC of them in 16 bytes.

#include "common.cuh"

// Slots of the vector `control`; optimizer.py has the same and says what they mean
enum Control {
    LR, STEP, MULTIPLIER, APPLY, NORM, LOSS_SCALE, GOOD_STEPS, SKIPPED, FAILED, LOSS, CLIP
};

constexpr int GROUP = 16 / sizeof(A);  // elements that a thread takes at once, whatever VEC is
constexpr i64 PART = 1 << 15;          // elements of a part of a chunk
constexpr int AHEAD = 4;               // loads of a thread of sum_parts that are on their way at once

// Grid (parts, chunks): partial sums of squares of gradient (chunks, length), parts by chunk. The order of a
// chunk's sum depends on its length only.
extern "C" __global__ void sum_parts(const A* gradient, double* partial, i64 length) {
    __shared__ double scratch[32];
    const A* chunk = gradient + blockIdx.y * length;
    i64 end = min(length, (blockIdx.x + 1) * PART);
    double sum = 0;
    i64 at = blockIdx.x * PART + threadIdx.x * GROUP, step = blockDim.x * GROUP;
    if constexpr (VEC > 1) {
        for (; at + (AHEAD - 1) * step + GROUP <= end; at += AHEAD * step) {
            Pack<A, GROUP> x[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) x[k] = load<A, GROUP>(chunk + at + k * step);
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                for (A number : x[k].at) sum += double(number) * double(number);
        }
    }
    for (; at < end; at += step) {
        for (int e = 0; e < GROUP && at + e < end; e++) {
            double x = chunk[at + e];
            sum += x * x;
        }
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[i64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// Grid (chunks): the sum of each chunk's parts
extern "C" __global__ void sum_chunks(const double* partial, double* sums, int parts) {
    __shared__ double scratch[32];
    double sum = 0;
    for (int n = threadIdx.x; n < parts; n += blockDim.x) sum += partial[i64(blockIdx.x) * parts + n];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The following three have one thread

extern "C" __global__ void begin(double* control) { control[LOSS] = 0; }

extern "C" __global__ void add_loss(double* control, const double* loss) {
    control[LOSS] += *loss / control[LOSS_SCALE];
}

extern "C" __global__ void decide(
    double* control, const double* total, int scaling, int growth_interval) {
    double norm = sqrt(*total) / control[LOSS_SCALE], clip = control[CLIP], apply = 1;
    control[NORM] = norm;
    // before the loss scale changes: gradients have been made with this one
    control[MULTIPLIER] = (clip > 0 && norm > clip ? clip / norm : 1) / control[LOSS_SCALE];
    bool overflow = !isfinite(norm), helps = scaling && control[LOSS_SCALE] > 1;
    // a smaller scale mends gradients, not the loss, which is added up without one. STEP stays from then on,
    // and FAILED with it
    if (!isfinite(control[LOSS]) || (overflow && !helps)) control[FAILED] = control[STEP] + 1;
    if (control[FAILED] != 0) {
        apply = 0;
    } else if (overflow) {
        apply = 0;
        control[LOSS_SCALE] = max(control[LOSS_SCALE] / 2, 1.0);
        control[GOOD_STEPS] = 0;
        control[SKIPPED] += 1;
    } else if (scaling && (control[GOOD_STEPS] += 1) >= growth_interval) {
        control[LOSS_SCALE] = min(control[LOSS_SCALE] * 2, double(1 << 24));
        control[GOOD_STEPS] = 0;
    }
    control[APPLY] = apply;
}

extern "C" __global__ void finish(double* control) { control[STEP] += control[APPLY]; }

// body(offset, count) for packs of VEC of `length` elements, the last one perhaps not full
template <typename Body>
__device__ inline void for_packs(i64 length, Body body) {
    i64 step = i64(gridDim.x) * blockDim.x * VEC;
    for (i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; at < length; at += step) {
        body(at, int(min(i64(VEC), length - at)));
    }
}

template <typename X>
__device__ inline Pack<A, VEC> get(const X* from, int count) {
    if (count == VEC) return read<VEC>(from);
    Pack<A, VEC> pack;
#pragma unroll
    for (int e = 0; e < VEC; e++) pack.at[e] = e < count ? A(widen(from[e])) : A(0);
    return pack;
}

template <typename X>
__device__ inline void put(X* to, const Pack<A, VEC>& pack, int count) {
    if (count == VEC) return write<VEC>(to, pack);
#pragma unroll
    for (int e = 0; e < VEC; e++)
        if (e < count) to[e] = narrow<X>(pack.at[e]);
}

// The gradient of a step that is not taken is cleared, and that is all
__device__ inline void skip(A* gradient, i64 length) {
    Pack<A, VEC> zeros;
    for (int e = 0; e < VEC; e++) zeros.at[e] = 0;
    for_packs(length, [=](i64 at, int count) { put(gradient + at, zeros, count); });
}

// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
// w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), t = steps taken before + 1
extern "C" __global__ void adamw(
    A* weights, T* copy, A* gradient, A* exp_avg, A* exp_avg_sq, i64 length, i64 decayed,
    const double* control, double beta1, double beta2, double eps, double weight_decay) {
    if (control[APPLY] == 0) return skip(gradient, length);
    __shared__ double corrections[2];
    if (threadIdx.x % 32 == 0 && threadIdx.x < 64) {  // of two warps: powers take their time
        corrections[threadIdx.x / 32] = 1 - pow(threadIdx.x == 0 ? beta1 : beta2, control[STEP] + 1);
    }
    __syncthreads();
    double lr = control[LR];
    A rate = lr / corrections[0], second = 1 / corrections[1], multiplier = control[MULTIPLIER];
    A keep = 1 - lr * weight_decay, small = eps;
    A b1 = beta1, new1 = 1 - beta1, b2 = beta2, new2 = 1 - beta2;
    for_packs(length, [=](i64 at, int count) {
        Pack<A, VEC> g = get(gradient + at, count), w = get(weights + at, count);
        Pack<A, VEC> m = get(exp_avg + at, count), v = get(exp_avg_sq + at, count);
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            A x = g.at[e] * multiplier;
            m.at[e] = b1 * m.at[e] + new1 * x;
            v.at[e] = b2 * v.at[e] + new2 * (x * x);
            A move = rate * (m.at[e] / (sqrt(v.at[e] * second) + small));
            w.at[e] = (at + e < decayed ? w.at[e] * keep : w.at[e]) - move;
            g.at[e] = 0;
        }
        put(weights + at, w, count);
        put(exp_avg + at, m, count);
        put(exp_avg_sq + at, v, count);
        put(gradient + at, g, count);
        if (copy) put(copy + at, w, count);
    });
}

// u = momentum u + g;  w = w (1 - lr decay) - lr u
extern "C" __global__ void sgd(
    A* weights, T* copy, A* gradient, A* momentum, i64 length, i64 decayed, const double* control,
    double momentum_factor, double weight_decay) {
    if (control[APPLY] == 0) return skip(gradient, length);
    double lr = control[LR];
    A rate = lr, multiplier = control[MULTIPLIER], keep = 1 - lr * weight_decay, factor = momentum_factor;
    for_packs(length, [=](i64 at, int count) {
        Pack<A, VEC> g = get(gradient + at, count), w = get(weights + at, count);
        Pack<A, VEC> u = get(momentum + at, count);
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            u.at[e] = factor * u.at[e] + g.at[e] * multiplier;
            w.at[e] = (at + e < decayed ? w.at[e] * keep : w.at[e]) - rate * u.at[e];
            g.at[e] = 0;
        }
        put(weights + at, w, count);
        put(momentum + at, u, count);
        put(gradient + at, g, count);
        if (copy) put(copy + at, w, count);
    });
}

extern "C" __global__ void copy_weights(const A* weights, T* copy, i64 length) {
    for_packs(length, [=](i64 at, int count) { put(copy + at, get(weights + at, count), count); });
}
