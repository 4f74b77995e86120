// Attention itself, o and L = logsumexp of the scores, for Hopper: a row sweep with a running
// maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867; Dao, 2024, arXiv:2307.08691). Blocks,
// ring, masks and padding as in sweep.cuh.
#pragma once

#include "pieces.cuh"

namespace attention {

template <int D, int TILE> struct ForwardParameters {
    using HeldTile = st_bf<HELD, D>;
    using Tile = st_bf<TILE, D>;
    using HeldArray = gl<bf16, -1, -1, -1, -1, tma::descriptor<HeldTile, dim::DEPTH>>;
    using Array = gl<bf16, -1, -1, -1, -1, tma::descriptor<Tile, dim::DEPTH>>;

    HeldArray q, o;
    Array k, v;
    float *norm;                      // (B, H, S)
    const int *ids;                   // these three as in Parameters
    const int2 *spans, *reach;
    int queries, keys, padded, groups;
    Band band;
    float scale2;
};

template <int D, int TILE, int STAGES>
constexpr int forward_bytes = CONSUMERS * sizeof(st_bf<HELD, D>) +
                              2 * STAGES * sizeof(st_bf<TILE, D>) + 1024;

template <int D, int TILE, int STAGES>
__global__ __launch_bounds__(THREADS, 1) void forward(
    const __grid_constant__ ForwardParameters<D, TILE> g) {
    using HeldTile = st_bf<HELD, D>;
    using Tile = st_bf<TILE, D>;
    DYNAMIC_SHARED int memory[];
    tma_swizzle_allocator allocator(&memory[0]);
    HeldTile(&q)[CONSUMERS] = allocator.template allocate<HeldTile, CONSUMERS>();
    Tile(&k)[STAGES] = allocator.template allocate<Tile, STAGES>();
    Tile(&v)[STAGES] = allocator.template allocate<Tile, STAGES>();
    __shared__ semaphore arrived, full[STAGES], empty[STAGES];

    const int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const int warp = __shfl_sync(0xffffffff, warpid(), 0), group = warp / 4;
    Range tiles = keys_seen(g.band, block * BLOCK, BLOCK, g.queries, g.keys, TILE);
    if (g.ids != nullptr) {
        const int2 shared = g.reach[batch * gridDim.x + block];
        tiles = both(tiles, Range{shared.x, shared.y});
    }
    if (threadIdx.x == 0) {
        init_semaphore(arrived, 0, 1);
        for (int i = 0; i < STAGES; i++) {
            init_semaphore(full[i], 0, 1);
            init_semaphore(empty[i], CONSUMERS * 4, 0);
        }
    }
    __syncthreads();

    if (group == CONSUMERS) {
        warpgroup::decrease_registers<24>();
        if (warp == CONSUMERS * 4) {
            warp::tma::expect_bytes(arrived, CONSUMERS * sizeof(HeldTile));
            for (int w = 0; w < CONSUMERS; w++) {
                const coord<HeldTile> at = {batch, block * CONSUMERS + w, head, 0};
                warp::tma::load_async<dim::DEPTH, cache_policy::NORMAL>(q[w], g.q, at, arrived);
            }
            int stage = 0, phase = 1;  // the first round finds every stage empty
            for (int i = tiles.first; i < tiles.last; i++) {
                wait(empty[stage], phase);
                warp::tma::expect_bytes(full[stage], 2 * sizeof(Tile));
                const coord<Tile> at = {batch, i, head / g.groups, 0};
                warp::tma::load_async<dim::DEPTH, cache_policy::NORMAL>(k[stage], g.k, at,
                                                                        full[stage]);
                warp::tma::load_async<dim::DEPTH, cache_policy::NORMAL>(v[stage], g.v, at,
                                                                        full[stage]);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
    } else {
        warpgroup::increase_registers<240>();
        using Accumulator = rt_fl<16, D>;
        using Scores = rt_fl<16, TILE>;
        Accumulator sum;
        warp::zero(sum);
        const int mine = block * BLOCK + group * HELD;
        const int position = mine + (warp % 4) * 16 + laneid() / 4;
        // Finite, so that a row that has seen nothing yet does not subtract inf from inf.
        float top[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
        Segments<TILE> segments(g.ids, g.spans, size_t(batch) * g.padded, mine);
        wait(arrived, 0);
        int turn = 0;
        for (int i = tiles.first; i < tiles.last; i++) {
            const int stage = turn < STAGES ? turn : turn - STAGES, phase = turn >= STAGES;
            const bool masked = !all_seen(g.band, mine, HELD, i * TILE, TILE) ||
                                (i + 1) * TILE > g.keys;
            const bool mixed = segments.mixed(g.ids, g.spans, size_t(batch) * g.padded, i);
            wait(full[stage], phase);
            if (!none_seen(g.band, mine, HELD, i * TILE, TILE)) {
                Scores S;
                rt_bf<16, TILE> p;
                fence();
                outer<0>(S, q[group], k[stage]);
                warpgroup::mma_async_wait<0>();
                each<TILE>([&](int j, int n, int) {
                    S.tiles[0][j].data[n] = S.tiles[0][j].data[n] * g.scale2;
                });
                if (masked) hide_band<false>(S, -INFINITY, g.band, position, i * TILE, g.keys);
                if (mixed)
                    hide_others(S, -INFINITY, g.ids + size_t(batch) * g.padded, position, i * TILE);
                float higher[2] = {top[0], top[1]};
                each<TILE>([&](int j, int n, int) {
                    const float2 x = S.tiles[0][j].data[n];
                    higher[n & 1] = fmaxf(higher[n & 1], fmaxf(x.x, x.y));
                });
                float fade[2];
                #pragma unroll
                for (int n = 0; n < 2; n++) {
                    higher[n] = fmaxf(higher[n], __shfl_xor_sync(0xffffffff, higher[n], 1));
                    higher[n] = fmaxf(higher[n], __shfl_xor_sync(0xffffffff, higher[n], 2));
                    fade[n] = exp2f(top[n] - higher[n]);
                    top[n] = higher[n];
                    total[n] *= fade[n];
                }
                each<TILE>([&](int j, int n, int) {
                    float2 x = S.tiles[0][j].data[n];
                    x = {exp2f(x.x - top[n & 1]), exp2f(x.y - top[n & 1])};
                    total[n & 1] += x.x + x.y;
                    p.tiles[0][j].data[n] = __float22bfloat162_rn(x);
                });
                each<D>([&](int j, int n, int) {
                    sum.tiles[0][j].data[n] = sum.tiles[0][j].data[n] * fade[n & 1];
                });
                add(sum, p, v[stage]);
                warpgroup::mma_async_wait<0>();
            }
            if (laneid() == 0) arrive(empty[stage], 1);
            if (++turn == 2 * STAGES) turn = 0;
        }

        float share[2];
        #pragma unroll
        for (int n = 0; n < 2; n++) {
            total[n] = quad_sum(total[n]);
            share[n] = total[n] > 0.f ? 1.f / total[n] : 0.f;
            const int row = position + 8 * n;
            if (laneid() % 4 == 0 && row < g.queries) {
                const size_t at = size_t(batch * gridDim.y + head) * g.queries + row;
                g.norm[at] =
                    total[n] > 0.f ? (top[n] + log2f(total[n])) * 0.69314718056f : INFINITY;
            }
        }
        each<D>([&](int j, int n, int) {
            sum.tiles[0][j].data[n] = sum.tiles[0][j].data[n] * share[n & 1];
        });
        warpgroup::sync(group + 1);  // q is read no more
        warpgroup::store(q[group], sum);
        publish();
        warpgroup::sync(group + 1);
        if (warp % 4 == 0) {
            const coord<HeldTile> at = {batch, block * CONSUMERS + group, head, 0};
            warp::tma::store_async<dim::DEPTH, cache_policy::NORMAL>(g.o, q[group], at);
            warp::tma::store_async_wait();
        }
    }
}

}  // namespace attention
