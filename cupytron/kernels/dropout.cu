// Dropout with the masks of ops/philox.py: eight neighbouring features share a Philox block, 16 bits each.

#include "common.cuh"

constexpr int GROUP = 8;
constexpr int PACKS = 2;  // of a thread of the backward

// One thread a group of features; VEC > 1 only for widths that are whole groups
extern "C" __global__ void dropout(const T* __restrict__ x, T* __restrict__ y, bool* __restrict__ mask,
                                   const i64* __restrict__ step, const i64* __restrict__ first_token,
                                   u32 key0, u32 key1, u32 threshold, A scale, i64 rows, i64 width) {
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    u64 groups = (width + GROUP - 1) / GROUP;
    u64 row = i / groups, group = i % groups;
    if (row >= rows) return;
    // the same, but the compiler sees that it is a multiple of VEC: else it stores 4 bytes at once
    i64 at = VEC > 1 ? i64(i) * GROUP : i64(row * width + group * GROUP);
    Words words = philox(u32(group), u32(*first_token + row), u32(*step), 0, key0, key1);
    Pack<bool, GROUP> keep;
#pragma unroll
    for (int j = 0; j < GROUP; j++) keep.at[j] = (words.at[j / 2] >> 16 * (j % 2) & 0xffff) >= threshold;
    if constexpr (VEC > 1) {
        Pack<A, VEC> values[GROUP / VEC];
#pragma unroll
        for (int k = 0; k < GROUP / VEC; k++) values[k] = read<VEC>(x + at + k * VEC);
#pragma unroll
        for (int k = 0; k < GROUP / VEC; k++) {
#pragma unroll
            for (int j = 0; j < VEC; j++) values[k].at[j] *= keep.at[k * VEC + j] ? scale : A(0);
            write(y + at + k * VEC, values[k]);
        }
        store(mask + at, keep);
    } else {
        for (int j = 0; j < GROUP && group * GROUP + j < width; j++) {
            y[at + j] = narrow<T>(widen(x[at + j]) * (keep.at[j] ? scale : A(0)));
            mask[at + j] = keep.at[j];
        }
    }
}

// Where another library's random numbers begin: a seed, and 16 bytes on an offset that no other micro-batch has
extern "C" __global__ void dropout_address(const i64* __restrict__ step, const i64* __restrict__ first_token,
                                           u64 seed, i64* __restrict__ address) {
    address[0] = i64(seed);
    address[2] = (*step << 40) + (*first_token << 6);
}

extern "C" __global__ void dropout_backward(const T* __restrict__ dy, const bool* __restrict__ mask,
                                            T* __restrict__ dx, A scale, i64 packs) {
    Pack<T, VEC> loaded[PACKS];
    Pack<bool, VEC> keep[PACKS];
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        loaded[k] = load<T, VEC>(dy + i * VEC), keep[k] = load<bool, VEC>(mask + i * VEC);
    });
    flat_packs<PACKS>(packs, [&](i64 i, int k) {
        Pack<A, VEC> values = widen(loaded[k]);
#pragma unroll
        for (int j = 0; j < VEC; j++) values.at[j] *= keep[k].at[j] ? scale : A(0);
        write(dx + i * VEC, values);
    });
}
