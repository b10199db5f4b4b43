// Rotary position embedding, in place.

#include "common.cuh"

// Turns the pairs (x[i], x[i + half]) by their position's angle. x: (batches, length, outer, inner,
// 2 half), the last dim contiguous, the others with a stride each; cos, sin: (length, half). A thread has
// VEC neighbouring pairs, and threads beside it others of the same position: cos and sin are in the cache.
extern "C" __global__ void rotary(T* x, const A* __restrict__ cos, const A* __restrict__ sin, u64 threads,
                                  u64 length, u64 outer, u64 inner, u64 half, i64 batch_stride,
                                  i64 position_stride, i64 outer_stride, i64 inner_stride) {
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    u64 packs = half / VEC;
    u64 feature = i % packs * VEC;
    i /= packs;
    i64 within = i64(i % inner) * inner_stride;
    i /= inner;
    within += i64(i % outer) * outer_stride;
    i /= outer;
    u64 position = i % length;
    T* a = x + i64(i / length) * batch_stride + i64(position) * position_stride + within + feature;
    T* b = a + half;

    Pack<A, VEC> first = read<VEC>(a), second = read<VEC>(b);
    u64 angle = position * half + feature;
    Pack<A, VEC> c = read<VEC>(cos + angle), s = read<VEC>(sin + angle);
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        A turned = first.at[j] * c.at[j] - second.at[j] * s.at[j];
        second.at[j] = second.at[j] * c.at[j] + first.at[j] * s.at[j];
        first.at[j] = turned;
    }
    write(a, first);
    write(b, second);
}
