// Sums over rows, and one array added to another.

#include "common.cuh"

constexpr int WARPS = 8;
constexpr int PACKS = 2;  // of a thread of add_to

// out[blockIdx.y] = the sum of rows blockIdx.y * each, and so on, `each` of them; x (rows, width).
// A lane has N neighbouring columns; the warps take the rows in turn, and their sums are added in order.
template <typename X, int N>
__device__ inline void sum_chunk(const X* __restrict__ x, A* __restrict__ out, i64 rows, i64 width,
                                 i64 each) {
    __shared__ Pack<A, N> parts[WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 column = (i64(blockIdx.x) * 32 + lane) * N;
    i64 first = blockIdx.y * each, end = first + each < rows ? first + each : rows;
    Pack<A, N> sum = {};
    if (column < width) {
#pragma unroll 4
        for (i64 row = first + warp; row < end; row += WARPS) {
            Pack<A, N> values = read<N>(x + row * width + column);
#pragma unroll
            for (int j = 0; j < N; j++) sum.at[j] += values.at[j];
        }
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    for (int w = 1; w < WARPS; w++)
#pragma unroll
        for (int j = 0; j < N; j++) sum.at[j] += parts[w][lane].at[j];
    store(out + blockIdx.y * width + column, sum);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    sum_rows(const T* x, A* out, i64 rows, i64 width, i64 each) {
    sum_chunk<T, VEC>(x, out, rows, width, each);
}

// One column a lane: such sums are few rows, and want many blocks
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    sum_partials(const A* x, A* out, i64 rows, i64 width, i64 each) {
    sum_chunk<A, 1>(x, out, rows, width, each);
}

// total += x
template <typename X, typename Y>
__device__ inline void add(X* total, const Y* x, i64 packs) {
    Pack<X, VEC> loaded_total[PACKS];
    Pack<Y, VEC> loaded_x[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        loaded_total[k] = load<X, VEC>(total + i * VEC), loaded_x[k] = load<Y, VEC>(x + i * VEC);
    });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> sums = widen(loaded_total[k]), values = widen(loaded_x[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) sums.at[j] += values.at[j];
        write(total + i * VEC, sums);
    });
}

extern "C" __global__ void add_to(T* total, const T* x, i64 packs) { add(total, x, packs); }

extern "C" __global__ void add_narrow(A* total, const T* x, i64 packs) { add(total, x, packs); }

extern "C" __global__ void add_wide(T* total, const A* x, i64 packs) { add(total, x, packs); }
