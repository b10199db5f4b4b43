// LayerNorm and RMSNorm, forward (alone, or with the sum before it) and backward.
//
// A team of threads has one row. It reads the row once and keeps it in registers, PACKS packs a thread, so
// that the variance can be taken from centred values; PACKS = 0 is for rows that are too wide for that, and
// reads them again.

#include "common.cuh"

#ifndef TEAM
#define TEAM 32  // threads of a row: a warp, or else a whole block
#define PACKS 1
#endif

constexpr int THREADS = TEAM == 32 ? 256 : TEAM;
constexpr int TEAMS = THREADS / TEAM;        // rows that a block has at once
constexpr int KEPT = PACKS > 0 ? PACKS : 1;  // packs in registers
// of backward on a multiprocessor, which norm.py launches: they may have all of its registers
constexpr int BLOCKS = THREADS < 512 ? 512 / THREADS : 1;
using Loaded = Pack<T, VEC>;
using Values = Pack<A, VEC>;

// body(offset in the row, which of the kept packs) for each of this thread's packs
template <typename Body>
__device__ inline void for_packs(int width, Body body) {
    int first = (threadIdx.x % TEAM) * VEC;
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            int at = first + k * TEAM * VEC;
            if (at < width) body(at, k);
        }
    } else {
        for (int at = first; at < width; at += TEAM * VEC) body(at, 0);
    }
}

// The same after fetch(offset, which). Where packs are kept, all are fetched before body computes with the
// first: one by one, each would wait for memory.
template <typename Fetch, typename Body>
__device__ inline void fetch_packs(int width, Fetch fetch, Body body) {
    if constexpr (PACKS > 0) {
        for_packs(width, fetch);
        for_packs(width, body);
    } else {
        for_packs(width, [&](int at, int k) { fetch(at, k), body(at, k); });
    }
}

__device__ inline A team_sum(A x, A* scratch) {
    if constexpr (TEAM == 32) return warp_sum(x);
    return block_sum(x, scratch);
}

// Two at once, with the barriers of one; scratch is for 64 values
__device__ inline void team_sums(A& a, A& b, A* scratch) {
    a = warp_sum(a), b = warp_sum(b);
    if constexpr (TEAM > 32) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        __syncthreads();  // the last use of scratch is over
        if (lane == 0) scratch[warp] = a, scratch[32 + warp] = b;
        __syncthreads();
        a = warp_sum(lane < TEAM / 32 ? scratch[lane] : A(0));
        b = warp_sum(lane < TEAM / 32 ? scratch[32 + lane] : A(0));
    }
}

// total = x + delta where ADD, which may be delta's memory; y = (total - mean) * rstd * weight + bias, the
// mean only where CENTRED; stats: mean and rstd of each row
template <bool CENTRED, bool ADD>
__device__ inline void norm(const T* __restrict__ x, const T* delta, T* total,
                            const T* __restrict__ weight, const T* __restrict__ bias, T* y, A* stats,
                            A eps, i64 rows, int width) {
    __shared__ A scratch[32];
    i64 row = i64(blockIdx.x) * TEAMS + threadIdx.x / TEAM;
    if (row >= rows) return;  // a whole warp; a block that is one team always has a row
    x += row * width, y += row * width;
    if constexpr (ADD) delta += row * width, total += row * width;

    Loaded loaded[KEPT], added[KEPT];
    Values kept[KEPT];
    A sum = 0;
    auto fetch = [&](int at, int k) {
        loaded[k] = load<T, VEC>(x + at);
        if constexpr (ADD) added[k] = load<T, VEC>(delta + at);
    };
    fetch_packs(width, fetch, [&](int at, int k) {
        Values values = widen(loaded[k]);
        if constexpr (ADD) {
            Values more = widen(added[k]);
#pragma unroll
            for (int j = 0; j < VEC; j++) values.at[j] += more.at[j];
            loaded[k] = narrow<T>(values);
            store(total + at, loaded[k]);
            values = widen(loaded[k]);  // rounded as total is: backward sees no other
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += values.at[j];
        kept[k] = values;
    });
    auto value = [&](int at, int k) {
        if constexpr (PACKS == 0) return read<VEC>(ADD ? total + at : x + at);
        return kept[k];
    };

    A mean = 0;
    if constexpr (CENTRED) mean = team_sum(sum, scratch) / width;
    A squares = 0;
    for_packs(width, [&](int at, int k) {
        Values values = value(at, k);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            squares += (values.at[j] - mean) * (values.at[j] - mean);
    });
    A rstd = A(1) / sqrt(team_sum(squares, scratch) / width + eps);

    for_packs(width, [&](int at, int k) {
        Values values = value(at, k), scale = read<VEC>(weight + at), shift = {};
        if (bias) shift = read<VEC>(bias + at);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            values.at[j] = (values.at[j] - mean) * rstd * scale.at[j] + shift.at[j];
        write(y + at, values);
    });
    if (threadIdx.x % TEAM == 0) stats[2 * row] = mean, stats[2 * row + 1] = rstd;
}

// The same parameters for all four: what one of them does not have is null
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm(const T* x, const T* delta, T* total, const T* weight, const T* bias, T* y,
               A* stats, A eps, i64 rows, int width) {
    norm<true, false>(x, delta, total, weight, bias, y, stats, eps, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_layer_norm(const T* x, const T* delta, T* total, const T* weight, const T* bias, T* y,
                   A* stats, A eps, i64 rows, int width) {
    norm<true, true>(x, delta, total, weight, bias, y, stats, eps, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const T* x, const T* delta, T* total, const T* weight, const T* bias, T* y,
             A* stats, A eps, i64 rows, int width) {
    norm<false, false>(x, delta, total, weight, bias, y, stats, eps, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(const T* x, const T* delta, T* total, const T* weight, const T* bias, T* y,
                 A* stats, A eps, i64 rows, int width) {
    norm<false, true>(x, delta, total, weight, bias, y, stats, eps, rows, width);
}

// Sums of the block's teams, in their order, for one of a thread's packs
__device__ inline void add_teams(const Values& mine, int k, A* out, int width) {
    __shared__ Values parts[TEAMS][TEAM];
    int team = threadIdx.x / TEAM, rank = threadIdx.x % TEAM;
    __syncthreads();  // the last use of parts is over
    parts[team][rank] = mine;
    __syncthreads();
    for (int column = threadIdx.x; column < TEAM * VEC; column += THREADS) {
        A sum = 0;
        for (int t = 0; t < TEAMS; t++) sum += parts[t][column / VEC].at[column % VEC];
        if (k * TEAM * VEC + column < width) out[k * TEAM * VEC + column] = sum;
    }
}

// With xhat = (x - mean) * rstd and dxhat = dy * weight:
// dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) + residual, the first mean only where
// CENTRED. A block takes every gridDim.x-th group of rows, and writes its sums of dy * xhat and dy to
// partial[blockIdx.x], (2, width).
template <bool CENTRED>
__device__ inline void norm_backward(const T* __restrict__ dy, const T* __restrict__ x,
                                     const A* __restrict__ stats, const T* __restrict__ weight,
                                     const T* __restrict__ residual, T* __restrict__ dx,
                                     A* __restrict__ partial, i64 rows, int width) {
    __shared__ A scratch[64];
    A* own_weight = partial + i64(blockIdx.x) * 2 * width;
    A* own_bias = own_weight + width;
    Values dweight[KEPT] = {}, dbias[KEPT] = {};
    if constexpr (PACKS == 0) for_packs(width, [&](int at, int k) {
            store(own_weight + at, dweight[k]);
            store(own_bias + at, dbias[k]);
        });

    i64 first = i64(blockIdx.x) * TEAMS + threadIdx.x / TEAM;
    for (i64 row = first; row < rows; row += i64(gridDim.x) * TEAMS) {
        i64 start = row * width;
        A mean = stats[2 * row], rstd = stats[2 * row + 1];
        // as they were read: fewer registers than xhat and dxhat
        Loaded kept_dy[KEPT], kept_x[KEPT], kept_residual[KEPT];
        auto fetch = [&](int at, int k) {
            kept_dy[k] = load<T, VEC>(dy + start + at), kept_x[k] = load<T, VEC>(x + start + at);
        };
        auto fetch_residual = [&](int at, int k) {
            if (residual) kept_residual[k] = load<T, VEC>(residual + start + at);
        };
        if constexpr (PACKS > 0) {
            for_packs(width, fetch);
            for_packs(width, fetch_residual);
        }

        Values gradient, xhat, dxhat;
        // these three for a pack
        auto make = [&](int at, int k) {
            Values scale = read<VEC>(weight + at), row_of_x = widen(kept_x[k]);
            gradient = widen(kept_dy[k]);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                xhat.at[j] = (row_of_x.at[j] - mean) * rstd;
                dxhat.at[j] = gradient.at[j] * scale.at[j];
            }
        };

        A along_ones = 0, along_xhat = 0;
        for_packs(width, [&](int at, int k) {
            if constexpr (PACKS == 0) {
                fetch(at, k);
                dweight[k] = read<VEC>(own_weight + at), dbias[k] = read<VEC>(own_bias + at);
            }
            make(at, k);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                dweight[k].at[j] += gradient.at[j] * xhat.at[j];
                dbias[k].at[j] += gradient.at[j];
                along_ones += dxhat.at[j];
                along_xhat += dxhat.at[j] * xhat.at[j];
            }
            if constexpr (PACKS == 0)
                store(own_weight + at, dweight[k]), store(own_bias + at, dbias[k]);
        });

        team_sums(along_ones, along_xhat, scratch);
        A mean_ones = CENTRED ? along_ones / width : A(0), mean_xhat = along_xhat / width;
        for_packs(width, [&](int at, int k) {
            if constexpr (PACKS == 0) {
                fetch(at, k);
                fetch_residual(at, k);
            }
            make(at, k);
            Values result = {};
            if (residual) result = widen(kept_residual[k]);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                result.at[j] += rstd * (dxhat.at[j] - mean_ones - xhat.at[j] * mean_xhat);
            write(dx + start + at, result);
        });
    }

    if constexpr (TEAMS > 1) {
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            add_teams(dweight[k], k, own_weight, width);
            add_teams(dbias[k], k, own_bias, width);
        }
    } else if constexpr (PACKS > 0) {
        for_packs(width, [&](int at, int k) {
            store(own_weight + at, dweight[k]);
            store(own_bias + at, dbias[k]);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    layer_norm_backward(const T* dy, const T* x, const A* stats, const T* weight, const T* residual, T* dx,
                        A* partial, i64 rows, int width) {
    norm_backward<true>(dy, x, stats, weight, residual, dx, partial, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    rms_norm_backward(const T* dy, const T* x, const A* stats, const T* weight, const T* residual, T* dx,
                      A* partial, i64 rows, int width) {
    norm_backward<false>(dy, x, stats, weight, residual, dx, partial, rows, width);
}
