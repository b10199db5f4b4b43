// Rows of a table by token id, and the gradient of the table: without atomics and without sorting, each
// row's sum in an order that depends on the ids alone.
//
// The gradient takes three launches. `link_tokens` finds for each token the next and the last one with the
// same id. `sum_segments` adds up dy over the tokens of an id within CHUNK tokens, where the first of them
// stands; so that also for an id that is everywhere many threads add. `add_segments` adds these sums to the
// table's row.

#include "common.cuh"

constexpr int WARPS = 8;
constexpr int CHUNK = 128;
constexpr int AHEAD = 4;    // rows that are on their way at once while a warp adds
constexpr int TOKENS = 32;  // of a block of link_tokens, one a lane
constexpr int TILE = 1024;  // ids that such a block compares with at once

// The table's row of an id; -1: not here
__device__ inline int row_of(i64 id, i64 first, i64 rows) {
    i64 row = id - first;
    return row >= 0 && row < rows ? int(row) : -1;
}

// y[t] = table[ids[t] - first]. An id that the table lacks gives zeros in a shard; in a whole table it is a
// mistake, and gives what nobody can take for a result.
extern "C" __global__ void embedding(const i64* __restrict__ ids, const T* __restrict__ table,
                                     T* __restrict__ y, i64 first, i64 rows, bool shard, u64 packs,
                                     u64 packs_of_row) {
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    int row = row_of(ids[i / packs_of_row], first, rows);
    Pack<T, VEC> values;
    if (row >= 0) {
        values = load<T, VEC>(table + (row * packs_of_row + i % packs_of_row) * VEC);
    } else {
#pragma unroll
        for (int j = 0; j < VEC; j++) values.at[j] = narrow<T>(shard ? A(0) : A(nanf("")));
    }
    store(y + i * VEC, values);
}

// next[t]: the next token with the id of t; `tokens`: there is none. last[t]: the one before it; -1, as the
// caller has filled it: there is none. The warps of a block have the same 32 tokens, and share out the
// tokens behind these, until each has found its next.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    link_tokens(const i64* __restrict__ ids, i64 first, i64 rows, int tokens, int* next, int* last) {
    __shared__ int tile[TILE];
    __shared__ int found[WARPS][TOKENS], done[TOKENS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int start = blockIdx.x * TOKENS, token = start + lane;
    int mine = token < tokens ? row_of(ids[token], first, rows) : -1, at = tokens;
    for (int i = TOKENS - 1; i > 0; i--) {  // backwards: the nearest is seen last
        int other = __shfl_sync(ALL_LANES, mine, i);
        if (i > lane && other == mine && mine >= 0) at = start + i;
    }
    if (warp == 0) done[lane] = mine < 0 || at < tokens;

    for (start += TOKENS; start < tokens; start += TILE) {
        for (int i = threadIdx.x; i < TILE; i += 32 * WARPS)
            tile[i] = start + i < tokens ? row_of(ids[start + i], first, rows) : -1;
        __syncthreads();
        if (mine >= 0 && at == tokens) {
            const int* share = tile + warp * (TILE / WARPS);
            int nearest = -1;
#pragma unroll 16
            for (int i = TILE / WARPS - 1; i >= 0; i--)
                if (share[i] == mine) nearest = i;
            if (nearest >= 0) {
                at = start + warp * (TILE / WARPS) + nearest;
                done[lane] = 1;  // whichever warp: the same value
            }
        }
        __syncthreads();
        if (__all_sync(ALL_LANES, done[lane])) break;  // in all warps: `done` waits for a barrier
    }

    found[warp][lane] = at;
    __syncthreads();
    if (warp > 0 || token >= tokens) return;
    for (int w = 1; w < WARPS; w++) at = min(at, found[w][lane]);
    next[token] = at;
    if (at < tokens) last[at] = token;
}

// The sum of the rows t, follow[t], ... of x before `end`, at one pack; t: where it stopped
template <typename X>
__device__ inline Pack<A, VEC> sum_list(const X* __restrict__ x, const int* __restrict__ follow, int& t,
                                        int end, i64 width) {
    Pack<A, VEC> sum = {};
    while (t < end) {
        Pack<X, VEC> loaded[AHEAD];
        int from[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            from[k] = t;
            if (t < end) loaded[k] = load<X, VEC>(x + t * width), t = follow[t];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (from[k] >= end) break;
            Pack<A, VEC> values = widen(loaded[k]);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum.at[j] += values.at[j];
        }
    }
    return sum;
}

__device__ inline void add_row(A* to, const Pack<A, VEC>& values) {
    Pack<A, VEC> sum = read<VEC>(to);
#pragma unroll
    for (int j = 0; j < VEC; j++) sum.at[j] += values.at[j];
    write(to, sum);
}

// A warp has 32 packs of a token. segment[t]: the sum of dy over t and the tokens of its id that follow in
// its chunk, where t is the first of them; behind[t]: the first one after the chunk. A segment that is all
// there is of its id goes into the table at once.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    sum_segments(const T* __restrict__ dy, const i64* __restrict__ ids, const int* __restrict__ next,
                 const int* __restrict__ last, A* __restrict__ segment, int* __restrict__ behind,
                 A* __restrict__ dtable, i64 first, i64 rows, int tokens, i64 width) {
    int token = blockIdx.x * WARPS + threadIdx.x / 32;
    i64 column = (i64(blockIdx.y) * 32 + threadIdx.x % 32) * VEC;
    if (token >= tokens || column >= width) return;
    int start = token / CHUNK * CHUNK, row = row_of(ids[token], first, rows);
    if (last[token] >= start || row < 0) return;
    int t = token, end = min(start + CHUNK, tokens);
    Pack<A, VEC> sum = sum_list(dy + column, next, t, end, width);
    if (column == 0) behind[token] = t;
    if (last[token] < 0 && t == tokens)
        add_row(dtable + row * width + column, sum);
    else
        store(segment + token * width + column, sum);
}

// The segments of an id into its row, by the warps that have its first token
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    add_segments(const i64* __restrict__ ids, const int* __restrict__ last,
                 const A* __restrict__ segment, const int* __restrict__ behind, A* __restrict__ dtable,
                 i64 first, i64 rows, int tokens, i64 width) {
    int token = blockIdx.x * WARPS + threadIdx.x / 32;
    i64 column = (i64(blockIdx.y) * 32 + threadIdx.x % 32) * VEC;
    if (token >= tokens || column >= width || last[token] >= 0) return;
    int row = row_of(ids[token], first, rows), t = token;
    if (row < 0 || behind[token] == tokens) return;
    add_row(dtable + row * width + column, sum_list(segment + column, behind, t, tokens, width));
}
