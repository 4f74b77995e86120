// The derivatives of attention, tile by tile, for Hopper: one kernel body for every primitive that
// is a sum over tiles of scores, by compile-time flags (the formulas are in ../formulas.py).
//
// A block of 128 positions stays in shared memory, 64 for each of two consumer warpgroups; tiles of
// the other side stream past it in a ring that one producer warp fills by TMA. A row sweep keeps
// queries and streams keys, and writes what is per query (dq, U, row sums). A column sweep keeps
// keys and streams the queries of every head that the key head serves, and writes what is per key.
// Each recomputes its scores, so no output is summed by two blocks: results are deterministic.
// A fused sweep is a column sweep that adds to what is per query as it goes (exchange.cuh): scores
// are computed once, and the order of sums differs from run to run.
//
// A consumer computes S, X, W and G (wgmma, both operands in shared memory), turns them one by one
// into P, dS, Z and Y in registers, and multiplies each of these, as bf16, from registers as soon
// as it is there. In the column sweep these tiles are transposed: rows are keys.
//
// Rows of the padding have L = +inf, hence weigh nothing; TMA reads zeros beyond the end of a
// sequence and writes nothing there. Keys beyond the end are masked where sums run over keys: a
// large weight times zero would be NaN.
#pragma once

#include "exchange.cuh"
#include "pieces.cuh"

namespace attention {

enum class Sweep { rows, columns, fused };

// Where a fused sweep adds: (B, S, H, d) of zeros.
template <Op OP, int D, int TILE, bool FUSED> struct Added {};
template <Op OP, int D, int TILE> struct Added<OP, D, TILE, true> {
    using Sums = Exchange<OP, D, TILE>;
    using Sum = gl<float, -1, -1, -1, -1, tma::descriptor<typename Sums::Sum, dim::DEPTH>>;
    Sum added[Sums::outputs];
};

template <Op OP, int D, int TILE, Sweep SWEEP>
struct Parameters : Added<OP, D, TILE, SWEEP == Sweep::fused> {
    static constexpr bool COLUMNS = SWEEP != Sweep::rows;
    using P = Parts<OP>;
    static constexpr int held = COLUMNS ? P::keys : P::queries;
    static constexpr int streamed = COLUMNS ? P::queries : P::keys;
    static constexpr int outputs = COLUMNS || OP == Op::adj ? 2 : 1;
    using HeldTile = st_bf<HELD, D>;
    using Tile = st_bf<TILE, D>;
    using Vector = sv_fl<TILE>;
    // Arrays are (B, S, H, d): tiles lie along the second axis.
    using HeldArray = gl<bf16, -1, -1, -1, -1, tma::descriptor<HeldTile, dim::DEPTH>>;
    using Array = gl<bf16, -1, -1, -1, -1, tma::descriptor<Tile, dim::DEPTH>>;
    using Statistic = gl<float, -1, -1, -1, -1, Vector>;

    HeldArray r[held], o[outputs];
    Array s[streamed];
    Statistic v[P::statistics];  // (B, H, padded): L in units of log 2, D, tL, tD
    float *sums[2];              // (B, H, S): lin R; adj -rowsum Y, -rowsum Z (fused: adds to 0)
    const int *ids;              // (B, padded) segment ids, or null
    const int2 *spans;           // (B, padded / TILE) least and greatest id of each streamed tile
    const int2 *reach;           // (B, blocks) first and last + 1 tile with an id of a block
    int queries, keys, padded, groups;
    Band band;
    float scale, scale2;         // of scores; times log2 e
};

template <Op OP, int D, int TILE, int STAGES, Sweep SWEEP>
constexpr int sweep_bytes = [] {
    using G = Parameters<OP, D, TILE, SWEEP>;
    int exchange = 0;
    if constexpr (SWEEP == Sweep::fused) exchange = Exchange<OP, D, TILE>::bytes;
    return int(G::held * CONSUMERS * sizeof(typename G::HeldTile) +
               G::streamed * STAGES * sizeof(typename G::Tile) + 1024) + exchange;
}();

template <Op OP, int D, int TILE, int STAGES, Sweep SWEEP>
__global__ __launch_bounds__(THREADS, 1) void sweep(
    const __grid_constant__ Parameters<OP, D, TILE, SWEEP> g) {
    using Globals = Parameters<OP, D, TILE, SWEEP>;
    using P = Parts<OP>;
    constexpr bool COLUMNS = Globals::COLUMNS, FUSED = SWEEP == Sweep::fused;
    using HeldTile = typename Globals::HeldTile;
    using Tile = typename Globals::Tile;
    using Vector = typename Globals::Vector;
    constexpr int NR = Globals::held, NS = Globals::streamed, NV = COLUMNS ? P::statistics : 0;
    constexpr int DO = P::DO, A = P::A, TDO = P::TDO, K = P::K, V = P::V, B = P::B, C = P::C;

    DYNAMIC_SHARED int memory[];
    tma_swizzle_allocator allocator(&memory[0]);
    HeldTile(&r)[NR][CONSUMERS] = allocator.template allocate<HeldTile, NR, CONSUMERS>();
    Tile(&s)[NS][STAGES] = allocator.template allocate<Tile, NS, STAGES>();
    __shared__ semaphore arrived, full[STAGES], empty[STAGES];
    // Statistics of the queries that stream, and of those that stay; in static memory, where the
    // compiler knows that a pointer points.
    alignas(128) __shared__ Vector v[NV ? NV : 1][STAGES];
    __shared__ float rows[COLUMNS ? 1 : CONSUMERS][P::statistics][HELD];

    // The longest blocks first: in a causal row sweep these are the last ones.
    const int block = COLUMNS ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int head = blockIdx.y, batch = blockIdx.z;
    // Read from one lane, so that the compiler knows that the whole warp agrees.
    const int warp = __shfl_sync(0xffffffff, warpid(), 0), group = warp / 4;
    const int groups = COLUMNS ? g.groups : 1;
    const int stream_head = COLUMNS ? head * g.groups : head / g.groups;
    Range tiles = COLUMNS ? queries_seeing(g.band, block * BLOCK, BLOCK, g.queries, g.keys, TILE)
                          : keys_seen(g.band, block * BLOCK, BLOCK, g.queries, g.keys, TILE);
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
            warp::tma::expect_bytes(arrived, NR * CONSUMERS * sizeof(HeldTile));
            for (int w = 0; w < CONSUMERS; w++) {
                const coord<HeldTile> at = {batch, block * CONSUMERS + w, head, 0};
                #pragma unroll
                for (int n = 0; n < NR; n++) {
                    warp::tma::load_async<dim::DEPTH, cache_policy::NORMAL>(r[n][w], g.r[n], at,
                                                                            arrived);
                }
            }
            int stage = 0, phase = 1;  // the first round finds every stage empty
            for (int other = 0; other < groups; other++) {
                for (int i = tiles.first; i < tiles.last; i++) {
                    wait(empty[stage], phase);
                    warp::tma::expect_bytes(full[stage],
                                            NS * sizeof(Tile) + NV * TILE * sizeof(float));
                    const coord<Tile> at = {batch, i, stream_head + other, 0};
                    #pragma unroll
                    for (int n = 0; n < NS; n++) {
                        warp::tma::load_async<dim::DEPTH, cache_policy::NORMAL>(
                            s[n][stage], g.s[n], at, full[stage]);
                    }
                    #pragma unroll
                    for (int n = 0; n < NV; n++) {
                        const coord<Vector> from = {batch, stream_head + other, 0, i};
                        warp::tma::load_async(v[n][stage], g.v[n], from, full[stage]);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        warpgroup::increase_registers<240>();
        using Accumulator = rt_fl<16, D>;
        using Scores = rt_fl<16, TILE>;
        using Operand = rt_bf<16, TILE>;
        Accumulator first, second;
        warp::zero(first);
        warp::zero(second);
        const int mine = block * BLOCK + group * HELD;               // of the warpgroup
        // The thread's first position, the other is 8 further; computed anew where it is needed,
        // for want of registers.
        auto position = [&]() -> int { return mine + (threadIdx.x / 32 % 4) * 16 + laneid() / 4; };
        float total_y[2] = {0.f, 0.f}, total_z[2] = {0.f, 0.f};
        if constexpr (!COLUMNS) {
            const size_t at = size_t(batch * gridDim.y + head) * g.padded + mine;
            for (int n = 0; n < P::statistics; n++) {
                for (int k = warpgroup::laneid(); k < HELD; k += 128) {
                    rows[group][n][k] = g.v[n].raw_ptr[at + k];
                }
            }
            warpgroup::sync(group + 1);
        }
        Segments<TILE> segments(g.ids, g.spans, size_t(batch) * g.padded, mine);
        // Calls f with a function that gives a statistic of the two queries of a pair.
        auto statistic = [&](int n, int stage, auto f) {
            if constexpr (COLUMNS) {
                f([&](int, int column) -> float2 {
                    return *reinterpret_cast<const float2 *>(&v[n][stage].data[column]);
                });
            } else {
                const float *mine = &rows[group][n][position() % HELD];
                const float pair[2] = {mine[0], mine[8]};
                f([&](int k, int) -> float2 { return {pair[k & 1], pair[k & 1]}; });
            }
        };
        // Only a fused sweep has what this stands for.
        auto exchange = [&] {
            if constexpr (FUSED) return Exchange<OP, D, TILE>(allocator, group);
            else return 0;
        }();
        wait(arrived, 0);
        int turn = 0;
        // For the heads of the queries one after another, and the tiles of each.
        for (int other = 0; other < groups; other++)
        for (int i = tiles.first; i < tiles.last; i++) {
            const int stage = turn < STAGES ? turn : turn - STAGES, phase = turn >= STAGES;
            const int row = COLUMNS ? i * TILE : mine, column = COLUMNS ? mine : i * TILE;
            constexpr int height = COLUMNS ? TILE : HELD, width = COLUMNS ? HELD : TILE;
            bool masked = !all_seen(g.band, row, height, column, width);
            if constexpr (!COLUMNS || FUSED) masked |= column + width > g.keys;
            const bool last = other + 1 == groups && i + 1 == tiles.last;
            const bool mixed = segments.mixed(g.ids, g.spans, size_t(batch) * g.padded, i);
            wait(full[stage], phase);
            // In a fused sweep the warpgroups wait for each other anyway.
            if (FUSED || !none_seen(g.band, row, height, column, width)) {
                Scores S, X, W, H;
                Operand p, ds, z, y;
                // One product too many under way does not fit the registers of this variant.
                constexpr bool late = P::tangent && COLUMNS && TILE == 64;
                constexpr int G = late ? 0 : P::G + P::tangent;
                constexpr int N = 1 + P::X + 2 * P::W + G;  // groups of products under way
                auto issue = [&] {
                    outer<0>(H, r[COLUMNS ? C : DO][group], s[COLUMNS ? DO : C][stage]);
                    if constexpr (P::tangent)
                        outer<1>(H, r[COLUMNS ? V : TDO][group], s[COLUMNS ? TDO : V][stage]);
                };
                fence();
                outer<0>(S, r[0][group], s[0][stage]);
                if constexpr (P::X) outer<0>(X, r[1][group], s[1][stage]);
                if constexpr (P::W) {
                    outer<0>(W, r[COLUMNS ? K : A][group], s[COLUMNS ? A : K][stage]);
                    outer<1>(W, r[COLUMNS ? B : 0][group], s[COLUMNS ? 0 : B][stage]);
                }
                if constexpr (P::G && !late) issue();

                warpgroup::mma_async_wait<N - 1>();
                statistic(0, stage, [&](auto norm) {
                    each<TILE>([&](int j, int k, int at) {
                        float2 &x = S.tiles[0][j].data[k];
                        const float2 l = norm(k, at);
                        x = {exp2f(x.x * g.scale2 - l.x), exp2f(x.y * g.scale2 - l.y)};
                    });
                });
                if (masked) hide_band<COLUMNS>(S, 0.f, g.band, position(), i * TILE, g.keys);
                if (mixed)
                    hide_others(S, 0.f, g.ids + size_t(batch) * g.padded, position(), i * TILE);

                if constexpr (P::X) {
                    warpgroup::mma_async_wait<N - 2>();
                    statistic(1, stage, [&](auto d) {
                        each<TILE>([&](int j, int k, int at) {
                            float2 &x = X.tiles[0][j].data[k];
                            x = x - d(k, at);
                            const float2 t = x * S.tiles[0][j].data[k];
                            ds.tiles[0][j].data[k] = __float22bfloat162_rn(t);
                        });
                    });
                }
                if constexpr (P::W) {
                    warpgroup::mma_async_wait<G>();
                    auto weigh = [&](int j, int k, float2 tangent) {
                        float2 &w = W.tiles[0][j].data[k];
                        const float2 weight = S.tiles[0][j].data[k];
                        w = w * g.scale - tangent;
                        const float2 t = w * weight;
                        z.tiles[0][j].data[k] = __float22bfloat162_rn(t);
                        if constexpr (!COLUMNS && !P::tangent) total_z[k & 1] += t.x + t.y;
                        if constexpr (P::X) w = t * X.tiles[0][j].data[k];
                    };
                    if constexpr (P::tangent) statistic(2, stage, [&](auto norm) {
                        each<TILE>([&](int j, int k, int at) { weigh(j, k, norm(k, at)); });
                    });
                    else each<TILE>([&](int j, int k, int) { weigh(j, k, {0.f, 0.f}); });
                }
                constexpr bool early = FUSED && late;
                if constexpr (early) {  // frees the registers of dS and Z
                    exchange.await(turn);
                    exchange.give(turn % exchange.slots, 1, ds);
                    add(first, ds, s[A][stage]);
                    add(second, z, s[DO][stage]);
                    warpgroup::mma_async_wait<0>();
                }
                if constexpr (late) fence(), issue();
                if constexpr (P::G) {
                    warpgroup::mma_async_wait<0>();
                    auto blend = [&](int j, int k, float2 tangent) {
                        const float2 h = H.tiles[0][j].data[k] - tangent;
                        const float2 t = h * S.tiles[0][j].data[k] + W.tiles[0][j].data[k];
                        y.tiles[0][j].data[k] = __float22bfloat162_rn(t);
                        if constexpr (!COLUMNS && !P::tangent) total_y[k & 1] += t.x + t.y;
                    };
                    if constexpr (P::tangent) statistic(3, stage, [&](auto d) {
                        each<TILE>([&](int j, int k, int at) { blend(j, k, d(k, at)); });
                    });
                    else each<TILE>([&](int j, int k, int) { blend(j, k, {0.f, 0.f}); });
                }

                constexpr bool weights = FUSED || (COLUMNS ? !P::G || P::tangent
                                                           : P::W && !P::tangent);
                if constexpr (weights) each<TILE>([&](int j, int k, int) {
                    p.tiles[0][j].data[k] = __float22bfloat162_rn(S.tiles[0][j].data[k]);
                });

                if constexpr (FUSED) {
                    if constexpr (!early) exchange.await(turn);
                    const int slot = turn % exchange.slots;
                    if constexpr (P::G) exchange.give(slot, 0, y);
                    if constexpr (!early) exchange.give(slot, P::G, ds);
                    if constexpr (OP == Op::adj) {
                        exchange.give(1, 0, z);
                        exchange.give(1, 1, p);
                    }
                    publish();
                }
                if constexpr (COLUMNS) {  // first: of k; second: of v
                    if constexpr (P::X && !P::G) add(first, ds, s[0][stage]);
                    if constexpr (P::G && !early) add(first, ds, s[A][stage]);
                    if constexpr (P::G) add(first, y, s[0][stage]);
                    if constexpr (P::W && !early) add(second, z, s[DO][stage]);
                    if constexpr (!P::W) add(second, p, s[DO][stage]);
                    if constexpr (P::tangent) add(second, p, s[TDO][stage]);
                } else if constexpr (OP == Op::lin) {  // first: U
                    add(first, z, s[V][stage]), add(first, p, s[C][stage]);
                } else {  // first: of q; second: U
                    if constexpr (!P::G) add(first, ds, s[K][stage]);
                    if constexpr (P::G) add(first, ds, s[B][stage]), add(first, y, s[K][stage]);
                    if constexpr (OP == Op::adj)
                        add(second, z, s[V][stage]), add(second, p, s[C][stage]);
                }
                if constexpr (FUSED) {
                    if (exchange.complete(turn, last)) both_consumers();
                    if (exchange.due(turn, last)) exchange.multiply(r);
                }
                warpgroup::mma_async_wait<0>();
            }
            if (laneid() == 0) arrive(empty[stage], 1);
            if constexpr (FUSED) {
                if (exchange.due(turn, last)) {
                    // Of two tiles, the first warpgroup has the one before this.
                    const bool before = exchange.slots > 1 && turn % 2 > group;
                    const bool turned = before && i == tiles.first;
                    const int tile = turned ? tiles.last - 1 : i - before;
                    exchange.add(g, batch, tile, stream_head + other - turned);
                }
            }
            if (++turn == 2 * STAGES) turn = 0;
        }

        if constexpr (P::X) warp::mul(first, first, g.scale);
        // The tiles that the results go through are read no more.
        if constexpr (FUSED) both_consumers();
        else warpgroup::sync(group + 1);
        warpgroup::store(r[0][group], first);
        if constexpr (Globals::outputs > 1) warpgroup::store(r[1][group], second);
        publish();
        warpgroup::sync(group + 1);
        if (warp % 4 == 0) {
            const coord<HeldTile> at = {batch, block * CONSUMERS + group, head, 0};
            #pragma unroll
            for (int n = 0; n < Globals::outputs; n++) {
                warp::tma::store_async<dim::DEPTH, cache_policy::NORMAL>(g.o[n], r[n][group], at);
            }
            warp::tma::store_async_wait();
        }
        if constexpr (!COLUMNS && P::W && !P::tangent) {
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                total_y[k] = quad_sum(total_y[k]);
                total_z[k] = quad_sum(total_z[k]);
                const int row = position() + 8 * k;
                if (laneid() % 4 == 0 && row < g.queries) {
                    const size_t at = size_t(batch * gridDim.y + head) * g.queries + row;
                    if constexpr (OP == Op::adj) {
                        g.sums[0][at] = -total_y[k];
                        g.sums[1][at] = -total_z[k];
                    } else {
                        g.sums[0][at] = total_z[k];
                    }
                }
            }
        }
    }
}

}  // namespace attention
