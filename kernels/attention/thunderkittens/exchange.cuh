// How a fused column sweep makes what is per query: the two warpgroups put their tiles of scores
// (rows are keys) side by side in shared memory, and each multiplies the tiles of both, transposed,
// by what the block holds. The product over the 128 keys of the block is added to global memory by
// TMA, in float32; half as much traffic as if each warpgroup added its own.
//
// adj has two outputs, dq = Y^T k + dS^T b and U = Z^T v + P^T c: a warpgroup makes one of them.
// bwd and hess have one: warpgroups take turns, so they multiply after every second tile.
// Row sums are products with ones: the tiles are in shared memory, their rows spread over warps.
#pragma once

#include "pieces.cuh"

namespace attention {

enum class Op { lin, bwd, hess, adj };

// What a primitive reads and computes. Tensors of queries: q, then do, a, tdo where it has them; of
// keys: k, v, then b, c. Statistics of queries: L, then D, then tL and tD.
template <Op OP> struct Parts {
    static constexpr bool X = OP != Op::lin;        // do v^T - D, and dS
    static constexpr bool W = OP != Op::bwd;        // a k^T + q b^T, and G (not of lin)
    static constexpr bool G = W && X;               // do c^T (+ tdo v^T)
    static constexpr bool tangent = OP == Op::hess;
    static constexpr int queries = 1 + X + W + tangent, keys = W ? 4 : 2;
    static constexpr int statistics = tangent ? 4 : X ? 2 : 1;
    static constexpr int DO = 1, A = X ? 2 : 1, TDO = 3, K = 0, V = 1, B = 2, C = 3;
};

template <Op OP, int D, int TILE> struct Exchange {
    using Scores = st_bf<HELD, TILE>;
    using Ones = st_bf<HELD, 16>;
    using Sum = st_fl<TILE, D>;
    static constexpr bool sums = OP == Op::adj;
    static constexpr int outputs = OP == Op::adj ? 2 : 1, slots = CONSUMERS / outputs;
    static constexpr int terms = Parts<OP>::G ? 2 : 1;
    static constexpr int bytes = CONSUMERS * terms * CONSUMERS * sizeof(Scores) +
                                 (sums ? sizeof(Ones) : 0);
    // A sum goes out from where the tiles lay that only its own warpgroup has read.
    static_assert(sizeof(Sum) == CONSUMERS * sizeof(Scores));
    static_assert(TILE == 64, "a product of the tensor cores has 64 rows: the queries of a tile");

    // By the warpgroup that multiplies them, the product, and the warpgroup that they are from.
    Scores (&tiles)[CONSUMERS][terms][CONSUMERS];
    Ones *ones = nullptr;
    const int group;
    rt_fl<16, D> sum;
    rt_fl<16, 16> total;

    __device__ inline Exchange(tma_swizzle_allocator &allocator, int group)
        : tiles(allocator.template allocate<Scores, CONSUMERS, terms, CONSUMERS>()), group(group) {
        if constexpr (sums) {
            ones = &allocator.template allocate<Ones>();
            if (group == 0) warpgroup::one(*ones);
            publish();
        }
    }

    // Waits until the tiles of the last round may be overwritten.
    __device__ inline void await(int turn) {
        if (turn % slots) return;
        if (warpid() % 4 == 0) warp::tma::store_async_read_wait();
        both_consumers();
    }

    template <class T> __device__ inline void give(int to, int term, const T &scores) {
        warpgroup::store(tiles[to][term][group], scores);
    }

    // Whether a round is complete with this tile, and this warpgroup multiplies.
    __device__ inline bool complete(int turn, bool last) const {
        return turn % slots + 1 == slots || last;
    }
    __device__ inline bool due(int turn, bool last) const {
        return complete(turn, last) && (outputs == CONSUMERS || group <= turn % slots);
    }

    // Starts the products; `held` is what the block holds.
    template <class H> __device__ inline void multiply(const H &held) {
        const int output = outputs == CONSUMERS ? group : 0;
        fence();
        inner<0>(sum, tiles[group][0][0], held[output][0]);
        inner<1>(sum, tiles[group][0][1], held[output][1]);
        if constexpr (terms == 2) {
            inner<1>(sum, tiles[group][1][0], held[2 + output][0]);
            inner<1>(sum, tiles[group][1][1], held[2 + output][1]);
        }
        if constexpr (sums) {
            inner<0>(total, tiles[group][0][0], *ones);
            inner<1>(total, tiles[group][0][1], *ones);
        }
    }

    // As ThunderKittens' store, in fewer instructions: in its layout (32 columns side by side,
    // their parts of 16 bytes permuted by row) a thread's addresses are one that is computed,
    // with a bit or two turned, and constants. Odd rows take columns of 16 in another order than
    // even ones, so that lanes meet in no bank.
    __device__ inline void put(Sum &out) const {
        const int lane = laneid(), odd = lane / 4 & 1;
        const int row = warpid() % 4 * 16 + lane / 4;
        const int first = row * 128 + ((lane % 4 * 8) ^ (lane / 4 * 16));
        char *const at = reinterpret_cast<char *>(out.data);
        #pragma unroll
        for (int j = 0; j < D / 16; j++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 even = sum.tiles[0][j].data[k], other = sum.tiles[0][j ^ 1].data[k];
                const int turned = (first ^ odd * 64) ^ (j % 2 * 64 + k / 2 * 32);
                const int to = j / 2 * TILE * 128 + k % 2 * 8 * 128;
                write(at + turned + to, {odd ? other.x : even.x, odd ? other.y : even.y});
            }
        }
    }

    // Adds what they have come to.
    template <class G>
    __device__ inline void add(const G &g, int batch, int tile, int head) {
        Sum &out = reinterpret_cast<Sum &>(tiles[group][0]);
        warpgroup::sync(group + 1);  // the other warps may still read it
        put(out);
        publish();
        warpgroup::sync(group + 1);
        if (warpid() % 4 == 0) {
            const coord<Sum> at = {batch, tile, head, 0};
            warp::tma::store_add_async<dim::DEPTH, cache_policy::NORMAL>(
                g.added[outputs == CONSUMERS ? group : 0], out, at);
        }
        if constexpr (sums) {
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                const int row = tile * TILE + warpid() % 4 * 16 + laneid() / 4 + 8 * k;
                if (laneid() % 4 == 0 && row < g.queries) {
                    const size_t at = size_t(batch * gridDim.y * g.groups + head) * g.queries + row;
                    atomicAdd(&g.sums[group][at], -total.tiles[0][0].data[k].x);
                }
            }
        }
    }
};

}  // namespace attention
