// Causal attention without tensor cores, in tiles of queries and keys. Forward goes once over the keys with a
// running maximum and sum; backward makes the probabilities again from the logarithms of these sums (Dao et
// al. 2022, arXiv:2205.14135). A block of 16 x 16 threads has a tile of TILE queries, or in backward also of
// keys; a thread has R x R of every product of two tiles. Nothing is added up by several blocks, so results
// have the same bits each time.
//
// Shapes: q (batch, seq, kv_heads, group, size), k and v (batch, keys, kv_heads, size), each with its strides
// but the last, which is 1; o and its gradient as q, contiguous; lse and dots (batch, kv_heads group, seq).

#include "common.cuh"

#ifndef CHUNKS
#define CHUNKS 1  // of TILE features: a head has at most CHUNKS TILE of them
#endif

constexpr int R = 16 / sizeof(A);
constexpr int TILE = 16 * R;

__device__ inline A lowest() { return log(A(0)); }  // minus infinity

using Run = Pack<A, R>;               // R neighbours: 16 bytes
constexpr int SQUARE = TILE * 16;     // Runs of a tile of TILE x TILE numbers in shared memory
using Product = A[R][R];              // rows R y ... and columns R x ... of thread (x, y)

__device__ inline int thread_x() { return threadIdx.x % 16; }
__device__ inline int thread_y() { return threadIdx.x / 16; }

// Where run number `run` of row k is. Moved by k / R, so that threads that write to the same run of
// different rows meet different banks.
__device__ inline int place(int k, int run) { return k * 16 + (run ^ (k / R)); }

// product[i][j] += sum over k of a[k][R y + i] b[k][R x + j]
__device__ inline void multiply(Product& product, const Run* a, const Run* b) {
#pragma unroll 4
    for (int k = 0; k < TILE; k += R) {
        for (int e = 0; e < R; e++) {
            Run left = a[place(k + e, thread_y())], right = b[place(k + e, thread_x())];
            for (int i = 0; i < R; i++)
                for (int j = 0; j < R; j++) product[i][j] += left.at[i] * right.at[j];
        }
    }
}

// Rows in memory, of which the first `count` exist, each of `size` numbers
struct Rows {
    const T* data;
    i64 stride;
    int count, size;
};

// Features TILE chunk ... of a tile of rows to shared memory, square[row][feature], or FLIPPED
// square[feature][row]; zeros where there are none
template <bool FLIPPED>
__device__ inline void fetch(Run* square, const Rows& rows, int chunk) {
    constexpr int ACROSS = TILE / VEC;  // accesses of a row
    for (int n = threadIdx.x; n < TILE * ACROSS; n += blockDim.x) {
        // a warp reads parts of four rows: its flipped writes then meet different banks
        int row = n % 4 + n / (4 * ACROSS) * 4, feature = n / 4 % ACROSS * VEC;
        bool inside = row < rows.count && chunk * TILE + feature < rows.size;
        Pack<A, VEC> x;
        if (inside)
            x = read<VEC>(rows.data + row * rows.stride + chunk * TILE + feature);
        else
            for (int v = 0; v < VEC; v++) x.at[v] = 0;
        if constexpr (FLIPPED) {
            for (int v = 0; v < VEC; v++) square[place(feature + v, row / R)].at[row % R] = x.at[v];
        } else if constexpr (VEC < R) {
            square[place(row, feature / R)].at[feature % R] = x.at[0];
        } else {
            for (int v = 0; v < VEC; v += R)
                square[place(row, (feature + v) / R)] = load<A, R>(x.at + v);
        }
    }
}

// square[R x + j][R y + i] = values[i][j]: as the left factor of `multiply`
__device__ inline void put(Run* square, const Product& values) {
    __syncthreads();  // the last use of square is over
    for (int j = 0; j < R; j++) {
        Run run;
        for (int i = 0; i < R; i++) run.at[i] = values[i][j];
        square[place(R * thread_x() + j, thread_y())] = run;
    }
}

// product = inner products of the left rows with the right rows
__device__ inline void inner_products(
    Product& product, const Rows& left, const Rows& right, Run* a, Run* b) {
    for (int i = 0; i < R; i++)
        for (int j = 0; j < R; j++) product[i][j] = 0;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        __syncthreads();
        fetch<true>(a, left, chunk);
        fetch<true>(b, right, chunk);
        __syncthreads();
        multiply(product, a, b);
    }
}

// sums += weights times rows, where `put` has left the weights in a
__device__ inline void add_weighted(Product (&sums)[CHUNKS], const Run* a, const Rows& rows, Run* b) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (chunk > 0) __syncthreads();  // b is nobody's since `put`
        fetch<false>(b, rows, chunk);
        __syncthreads();
        multiply(sums[chunk], a, b);
    }
}

__device__ inline void clear(Product (&sums)[CHUNKS]) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
        for (int i = 0; i < R; i++)
            for (int j = 0; j < R; j++) sums[chunk][i][j] = 0;
}

// row R y + i of a tile in memory = factor[i] sums[..][i]
__device__ inline void write_rows(
    T* to, i64 stride, int count, int size, const Product (&sums)[CHUNKS], const A (&factor)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = R * thread_y() + i;
        if (row >= count) continue;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            int feature = chunk * TILE + R * thread_x();
            Pack<T, R> pack;
            for (int j = 0; j < R; j++) pack.at[j] = narrow<T>(sums[chunk][i][j] * factor[i]);
            T* at = to + row * stride + feature;
            if (VEC > 1) {
                if (feature < size) store(at, pack);
            } else {
                for (int j = 0; j < R; j++)
                    if (feature + j < size) at[j] = pack.at[j];
            }
        }
    }
}

// Which probabilities are kept, as cupytron/ops/attention.py says: by global head, token and key
struct Dropout {
    u32 threshold;  // of 16 random bits; 0: all are kept
    A keep;         // what kept ones are multiplied by
    u32 head, token, step, key0, key1;  // token: of query 0

    // 0 or keep for R keys; `key` is a multiple of R
    __device__ Run factors(int query, int key) const {
        Run found;
        for (int e = 0; e < R; e++) found.at[e] = 1;
        if (threshold == 0) return found;
        Words words = philox(key / 8, token + query, step, head + 1, key0, key1);
        for (int e = 0; e < R; e++) {
            int lane = (key + e) % 8;
            u32 word = words.at[0];
            for (int n = 1; n < 4; n++)
                if (lane / 2 == n) word = words.at[n];
            found.at[e] = (word >> (lane % 2 * 16) & 0xffff) >= threshold ? keep : A(0);
        }
        return found;
    }
};

__device__ inline Dropout make_dropout(
    u32 threshold, double keep, u32 key0, u32 key1, const i64* step, const i64* first_token, int head,
    i64 token) {
    if (threshold == 0) return {0, 1, 0, 0, 0, 0, 0};
    return {threshold, A(keep), u32(head), u32(*first_token + token), u32(*step), key0, key1};
}

// Over the 16 threads that have the same rows
template <typename X>
__device__ inline X row_max(X x) {
    for (int offset = 8; offset > 0; offset /= 2) {
        X other = __shfl_xor_sync(ALL_LANES, x, offset);
        x = x > other ? x : other;
    }
    return x;
}

template <typename X>
__device__ inline X row_sum(X x) {
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// Grid (tiles of queries, heads, batch): o and lse. The queries are the last seq of the keys' positions.
extern "C" __global__ void attention_forward(
    const T* q, const T* k, const T* v, T* o, A* lse, int seq, int keys, int group, int size,
    i64 q_batch, i64 q_token, i64 q_kv, i64 q_head, i64 k_batch, i64 k_token, i64 k_kv,
    i64 v_batch, i64 v_token, i64 v_kv,
    u32 threshold, double keep, u32 key0, u32 key1, const i64* step, const i64* first_token,
    int first_head) {
    __shared__ Run a[SQUARE];
    __shared__ Run b[SQUARE];
    i64 batch = blockIdx.z, head = blockIdx.y, heads = gridDim.y, kv = head / group;
    int first = (gridDim.x - 1 - blockIdx.x) * TILE;  // the queries with the most keys start first
    int before = keys - seq;                          // keys that stand before query 0
    Dropout dropout = make_dropout(
        threshold, keep, key0, key1, step, first_token, first_head + head, batch * seq);
    const T* q_tile = q + batch * q_batch + kv * q_kv + head % group * q_head + first * q_token;
    Rows queries = {q_tile, q_token, seq - first, size};
    A scale = 1 / sqrt(A(size));

    Product sums[CHUNKS];
    clear(sums);
    A peak[R], total[R];  // of each row's scores so far: the largest, and the sum of exp(score - peak)
    for (int i = 0; i < R; i++) peak[i] = lowest(), total[i] = 0;

    int end = min(keys, first + TILE + before);
    for (int at = 0; at < end; at += TILE) {
        Rows k_rows = {k + batch * k_batch + kv * k_kv + at * k_token, k_token, keys - at, size};
        Rows v_rows = {v + batch * v_batch + kv * v_kv + at * v_token, v_token, keys - at, size};
        Product p;
        inner_products(p, queries, k_rows, a, b);
#pragma unroll
        for (int i = 0; i < R; i++) {
            int query = first + R * thread_y() + i, key = at + R * thread_x();
            A highest = lowest();
            for (int j = 0; j < R; j++) {
                p[i][j] = key + j <= query + before ? p[i][j] * scale : lowest();
                highest = p[i][j] > highest ? p[i][j] : highest;
            }
            // every query sees key 0, so the peak is finite from the first tile on
            highest = row_max(highest);
            A new_peak = highest > peak[i] ? highest : peak[i];
            A shrink = exp(peak[i] - new_peak);
            peak[i] = new_peak;
            A sum = 0;
            for (int j = 0; j < R; j++) {
                p[i][j] = exp(p[i][j] - new_peak);
                sum += p[i][j];
            }
            total[i] = total[i] * shrink + row_sum(sum);
            Run factors = dropout.factors(query, key);
            for (int j = 0; j < R; j++) p[i][j] *= factors.at[j];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++)
                for (int j = 0; j < R; j++) sums[chunk][i][j] *= shrink;
        }
        put(a, p);
        add_weighted(sums, a, v_rows, b);
    }

    A inverse[R];
    for (int i = 0; i < R; i++) inverse[i] = 1 / total[i];
    T* o_tile = o + ((batch * seq + first) * heads + head) * size;
    write_rows(o_tile, heads * size, seq - first, size, sums, inverse);
    if (thread_x() > 0) return;
#pragma unroll
    for (int i = 0; i < R; i++) {
        int query = first + R * thread_y() + i;
        if (query < seq) lse[(batch * heads + head) * seq + query] = peak[i] + log(total[i]);
    }
}

// dots = sum over a head's features of gradient times output: what the softmax's Jacobian takes away from
// the gradient of every probability. A warp for each row of (rows, size); row = (sequence, query, head).
extern "C" __global__ void attention_dots(
    const T* d_out, const T* o, A* dots, i64 rows, int seq, int heads, int size) {
    i64 row = blockIdx.x * i64(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp
    A sum = 0;
    for (int at = threadIdx.x % 32 * VEC; at < size; at += 32 * VEC) {
        auto x = load<T, VEC>(d_out + row * size + at);
        auto y = load<T, VEC>(o + row * size + at);
        for (int e = 0; e < VEC; e++) sum += widen(x.at[e]) * widen(y.at[e]);
    }
    sum = warp_sum(sum);
    i64 head = row % heads, query = row / heads % seq, batch = row / heads / seq;
    if (threadIdx.x % 32 == 0) dots[(batch * heads + head) * seq + query] = sum;
}

// Probabilities and their gradients from scores s and dp: s becomes the probabilities after dropout, dp the
// gradient of the scores
__device__ inline void differentiate(
    A& s, A& dp, bool seen, A scale, A lse, A dots, A factor) {
    A p = seen ? exp(s * scale - lse) : A(0);
    s = p * factor;
    dp = p * (dp * factor - dots) * scale;
}

// Grid as forward's, keys = seq: dq
extern "C" __global__ void attention_backward_queries(
    const T* q, const T* k, const T* v, const T* d_out, const A* lse, const A* dots, T* dq,
    int seq, int group, int size,
    i64 q_batch, i64 q_token, i64 q_kv, i64 q_head, i64 k_batch, i64 k_token, i64 k_kv,
    i64 v_batch, i64 v_token, i64 v_kv, i64 dq_batch, i64 dq_token, i64 dq_kv, i64 dq_head,
    u32 threshold, double keep, u32 key0, u32 key1, const i64* step, const i64* first_token,
    int first_head) {
    __shared__ Run a[SQUARE];
    __shared__ Run b[SQUARE];
    i64 batch = blockIdx.z, head = blockIdx.y, heads = gridDim.y, kv = head / group;
    int first = (gridDim.x - 1 - blockIdx.x) * TILE, count = seq - first;
    Dropout dropout = make_dropout(
        threshold, keep, key0, key1, step, first_token, first_head + head, batch * seq);
    const T* q_tile = q + batch * q_batch + kv * q_kv + head % group * q_head + first * q_token;
    const T* d_tile = d_out + ((batch * seq + first) * heads + head) * size;
    Rows queries = {q_tile, q_token, count, size}, gradients = {d_tile, heads * size, count, size};
    A scale = 1 / sqrt(A(size));

    A my_lse[R], my_dots[R], ones[R];
    for (int i = 0; i < R; i++) {
        i64 at = (batch * heads + head) * seq + first + R * thread_y() + i;
        bool exists = R * thread_y() + i < count;
        my_lse[i] = exists ? lse[at] : A(0);
        my_dots[i] = exists ? dots[at] : A(0);
        ones[i] = 1;
    }
    Product sums[CHUNKS];
    clear(sums);
    for (int at = 0; at < min(seq, first + TILE); at += TILE) {
        Rows k_rows = {k + batch * k_batch + kv * k_kv + at * k_token, k_token, seq - at, size};
        Rows v_rows = {v + batch * v_batch + kv * v_kv + at * v_token, v_token, seq - at, size};
        Product s, dp;
        inner_products(s, queries, k_rows, a, b);
        inner_products(dp, gradients, v_rows, a, b);
#pragma unroll
        for (int i = 0; i < R; i++) {
            int query = first + R * thread_y() + i, key = at + R * thread_x();
            Run factors = dropout.factors(query, key);
            for (int j = 0; j < R; j++) {
                bool seen = key + j <= query;
                differentiate(
                    s[i][j], dp[i][j], seen, scale, my_lse[i], my_dots[i], factors.at[j]);
            }
        }
        put(a, dp);
        add_weighted(sums, a, k_rows, b);
    }
    T* to = dq + batch * dq_batch + kv * dq_kv + head % group * dq_head + first * dq_token;
    write_rows(to, dq_token, count, size, sums, ones);
}

// Grid (tiles of keys, KV heads, batch): dk and dv, sums over the group's heads and the queries from the
// tile on
extern "C" __global__ void __launch_bounds__(256, CHUNKS == 1 ? 2 : 1) attention_backward_keys(
    const T* q, const T* k, const T* v, const T* d_out, const A* lse, const A* dots, T* dk, T* dv,
    int seq, int group, int size,
    i64 q_batch, i64 q_token, i64 q_kv, i64 q_head, i64 k_batch, i64 k_token, i64 k_kv,
    i64 v_batch, i64 v_token, i64 v_kv,
    i64 dk_batch, i64 dk_token, i64 dk_kv, i64 dv_batch, i64 dv_token, i64 dv_kv,
    u32 threshold, double keep, u32 key0, u32 key1, const i64* step, const i64* first_token,
    int first_head) {
    __shared__ Run a[SQUARE];
    __shared__ Run b[SQUARE];
    i64 batch = blockIdx.z, kv = blockIdx.y, heads = i64(gridDim.y) * group;
    int first = blockIdx.x * TILE, count = seq - first;
    const T* k_tile = k + batch * k_batch + kv * k_kv + first * k_token;
    const T* v_tile = v + batch * v_batch + kv * v_kv + first * v_token;
    Rows k_rows = {k_tile, k_token, count, size}, v_rows = {v_tile, v_token, count, size};
    A scale = 1 / sqrt(A(size));

    Product k_sums[CHUNKS], v_sums[CHUNKS];
    clear(k_sums);
    clear(v_sums);
    for (int g = 0; g < group; g++) {
        i64 head = kv * group + g, row = (batch * heads + head) * seq;
        Dropout dropout = make_dropout(
            threshold, keep, key0, key1, step, first_token, first_head + head, batch * seq);
        for (int at = first; at < seq; at += TILE) {
            const T* q_tile = q + batch * q_batch + kv * q_kv + g * q_head + at * q_token;
            const T* d_tile = d_out + ((batch * seq + at) * heads + head) * size;
            Rows queries = {q_tile, q_token, seq - at, size};
            Rows gradients = {d_tile, heads * size, seq - at, size};
            Product s, dp;  // here a row is a key, a column a query
            inner_products(s, k_rows, queries, a, b);
            inner_products(dp, v_rows, gradients, a, b);
#pragma unroll
            for (int j = 0; j < R; j++) {
                int query = at + R * thread_x() + j, key = first + R * thread_y();
                bool exists = query < seq;  // what does not exist is zeros, and adds nothing
                A my_lse = exists ? lse[row + query] : A(0), my_dots = exists ? dots[row + query] : A(0);
                Run factors = dropout.factors(query, key);
                for (int i = 0; i < R; i++) {
                    bool seen = key + i <= query;
                    differentiate(s[i][j], dp[i][j], seen, scale, my_lse, my_dots, factors.at[i]);
                }
            }
            put(a, s);
            add_weighted(v_sums, a, gradients, b);
            put(a, dp);
            add_weighted(k_sums, a, queries, b);
        }
    }
    A ones[R];
    for (int i = 0; i < R; i++) ones[i] = 1;
    write_rows(dk + batch * dk_batch + kv * dk_kv + first * dk_token, dk_token, count, size, k_sums, ones);
    write_rows(dv + batch * dv_batch + kv * dv_kv + first * dv_token, dv_token, count, size, v_sums, ones);
}
