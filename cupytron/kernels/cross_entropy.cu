// Softmax cross-entropy: a block has a token's row of logits. It goes over the row twice: for the largest
// logit together with the sum of exponentials relative to it (Milakov & Gimelshein 2018, arXiv:1805.02867,
// algorithm 3), and, backwards, to write the gradient over the logits: what has been read last may still be
// in the cache.

#include "common.cuh"

constexpr i64 IGNORE = -1;  // a target that does not count
constexpr int AHEAD = 2;    // packs of a thread that are on their way at once
// of up to 1024 threads on a multiprocessor: while one waits, another computes. More would be more rows
// than the cache has room for.
constexpr int BLOCKS = sizeof(A) == 4 ? 2 : 1;

__device__ inline A exponential(A x) {
    // exp2f is the cheaper one; the argument's rounding is far below that of a 16-bit result
    if constexpr (sizeof(T) == 2) return exp2f(x * 1.44269504f);
    return exp(x);
}

struct Peak {
    A peak, sum;  // the largest logit; sum of exp(logit - peak)
};

__device__ inline Peak nothing() { return {log(A(0)), 0}; }  // minus infinity

// What exponents are relative to: the peak, unless no logit is above minus infinity
__device__ inline A base(A peak) { return peak == log(A(0)) ? A(0) : peak; }

__device__ inline Peak join(Peak x, Peak y) {
    A peak = x.peak > y.peak ? x.peak : y.peak;
    A x_part = x.sum * exponential(x.peak - base(peak));
    return {peak, x_part + y.sum * exponential(y.peak - base(peak))};
}

// Of a row, the same in all threads of the block
__device__ inline Peak peak_of(const T* row, int width) {
    __shared__ A peaks[32];
    __shared__ A sums[32];
    Peak mine = nothing();
    int step = blockDim.x * VEC;
    for (int at = threadIdx.x * VEC; at < width; at += AHEAD * step) {
        Pack<T, VEC> loaded[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (at + k * step < width) loaded[k] = load<T, VEC>(row + at + k * step);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (at + k * step >= width) break;
            Pack<A, VEC> x = widen(loaded[k]);
            A peak = mine.peak;
#pragma unroll
            for (int e = 0; e < VEC; e++) peak = max(peak, x.at[e]);
            A sum = mine.sum * exponential(mine.peak - base(peak));
#pragma unroll
            for (int e = 0; e < VEC; e++) sum += exponential(x.at[e] - base(peak));
            mine = {peak, sum};
        }
    }
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int stage = 0; stage < 2; stage++) {  // over a warp; then, in every warp, over the warps
        for (int offset = 16; offset > 0; offset /= 2) {
            Peak other;
            other.peak = __shfl_xor_sync(ALL_LANES, mine.peak, offset);
            other.sum = __shfl_xor_sync(ALL_LANES, mine.sum, offset);
            // in one order, since two lanes have to get the same bits
            mine = lane & offset ? join(other, mine) : join(mine, other);
        }
        if (stage == 1) break;
        if (lane == 0) peaks[warp] = mine.peak, sums[warp] = mine.sum;
        __syncthreads();
        mine = lane < warps ? Peak{peaks[lane], sums[lane]} : nothing();
    }
    return mine;
}

// change(pack, column of its first number) for a row's packs, from the end of the row to its beginning
template <typename Change>
__device__ inline void rewrite(T* row, int width, Change change) {
    int step = blockDim.x * VEC;
    for (int at = (width - 1) / step * step + threadIdx.x * VEC; at >= 0; at -= step) {
        if (at >= width) continue;
        Pack<A, VEC> x = read<VEC>(row + at);
        change(x, at);
        write<VEC>(row + at, x);
    }
}

// change(number) for the one in `column`, if it is in the pack that begins at `at`: few packs have it
template <typename Change>
__device__ inline void change_one(Pack<A, VEC>& x, int at, int column, Change change) {
    if (u32(column) - u32(at) >= VEC) return;
#pragma unroll
    for (int e = 0; e < VEC; e++)
        if (at + e == column) change(x.at[e]);
}

__device__ inline void clear(T* row, int width) {
    Pack<A, VEC> zeros;
    for (int e = 0; e < VEC; e++) zeros.at[e] = 0;
    for (int at = threadIdx.x * VEC; at < width; at += blockDim.x * VEC) write<VEC>(row + at, zeros);
}

// logits (T, width) become the gradient, scale (softmax - target); losses (T,), without the scale. A target
// outside of the vocabulary makes its loss NaN.
extern "C" __global__ void __launch_bounds__(1024, BLOCKS) cross_entropy(
    T* logits, const i64* targets, const double* scale, double* losses, int width) {
    i64 token = blockIdx.x, target = targets[token];
    T* row = logits + token * width;
    if (target == IGNORE) {
        clear(row, width);
        if (threadIdx.x == 0) losses[token] = 0;
        return;
    }
    bool exists = target >= 0 && target < width;
    A at_target = exists ? A(widen(row[target])) : A(nanf(""));
    Peak all = peak_of(row, width);  // waits for all threads
    if (threadIdx.x == 0) {
        losses[token] = log(double(all.sum)) + (double(all.peak) - double(at_target));
    }
    int column = int(target);
    A less = *scale, factor = less / all.sum;
    rewrite(row, width, [=](Pack<A, VEC>& x, int at) {
#pragma unroll
        for (int e = 0; e < VEC; e++) x.at[e] = exponential(x.at[e] - all.peak) * factor;
        change_one(x, at, column, [=](A& number) { number -= less; });
    });
}

// A shard of the vocabulary: logits (T, width) become exp(logit - peak); own (3, T): the peak, the sum of the
// exponentials, the target's logit if it is one of the ids first ... first + width - 1, and else -infinity
extern "C" __global__ void __launch_bounds__(1024, BLOCKS) shard_exponentials(
    T* logits, const i64* targets, double* own, i64 first, int width) {
    i64 token = blockIdx.x, tokens = gridDim.x, column = targets[token] - first;
    bool here = column >= 0 && column < width;  // never for IGNORE
    T* row = logits + token * width;
    A at_target = here ? A(widen(row[column])) : A(log(0.0));
    Peak all = peak_of(row, width);
    if (threadIdx.x == 0) {
        own[token] = all.peak;
        own[tokens + token] = all.sum;
        own[2 * tokens + token] = at_target;
    }
    rewrite(row, width, [=](Pack<A, VEC>& x, int) {
#pragma unroll
        for (int e = 0; e < VEC; e++) x.at[e] = exponential(x.at[e] - base(all.peak));
    });
}

// From everyone (shards, 3, tokens) to losses (tokens,) without the scale, and to what makes the gradient of
// this shard: factors (2, tokens), by which exponentials are multiplied, and the gradient at the target. A
// thread for each token.
extern "C" __global__ void shard_losses(
    const i64* targets, const double* own, const double* everyone, const double* scale, double* losses,
    double* factors, int shards, i64 tokens) {
    i64 token = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    if (targets[token] == IGNORE) {
        losses[token] = 0;
        return;
    }
    double peak = log(0.0), total = 0, at_target = log(0.0);
    for (int n = 0; n < shards; n++) peak = max(peak, everyone[3 * n * tokens + token]);
    for (int n = 0; n < shards; n++) {
        const double* theirs = everyone + 3 * n * tokens + token;
        total += theirs[tokens] * exp(theirs[0] - peak);
        at_target = max(at_target, theirs[2 * tokens]);
    }
    losses[token] = log(total) + (peak - at_target);
    factors[token] = *scale * exp(own[token] - peak) / total;
    // from the logit itself, and not from its rounded exponential
    factors[tokens + token] = *scale * (exp(at_target - peak) / total - 1);
}

// exponentials (T, width) become the gradient
extern "C" __global__ void shard_gradient(
    T* exponentials, const i64* targets, const double* factors, i64 first, int width) {
    i64 token = blockIdx.x, tokens = gridDim.x, target = targets[token];
    T* row = exponentials + token * width;
    if (target == IGNORE) return clear(row, width);
    int column = int(target - first);  // none, unless the target is here
    A factor = factors[token], at_target = factors[tokens + token];
    rewrite(row, width, [=](Pack<A, VEC>& x, int at) {
#pragma unroll
        for (int e = 0; e < VEC; e++) x.at[e] *= factor;
        change_one(x, at, column, [=](A& number) { number = at_target; });
    });
}

// loss = scale * sum of losses (count,), by one block
extern "C" __global__ void sum_losses(
    const double* losses, const double* scale, double* loss, int count) {
    __shared__ double scratch[32];
    double sum = 0;
#pragma unroll 8
    for (int at = threadIdx.x; at < count; at += blockDim.x) sum += losses[at];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *loss = sum * *scale;
}
