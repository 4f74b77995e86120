// What the sweeps and the forward pass share: sizes, elementwise access to tiles, masks.
#pragma once

#include "kittens.cuh"
#include "tiles.cuh"

namespace attention {

using namespace kittens;

#ifdef __CUDACC__
#define DYNAMIC_SHARED extern __shared__
#else
#define DYNAMIC_SHARED extern  // the test that runs these files on a CPU
#endif

constexpr int CONSUMERS = 2;        // warpgroups
constexpr int HELD = 64;            // positions of the resident side for each of them
constexpr int BLOCK = CONSUMERS * HELD;
constexpr int THREADS = (CONSUMERS + 1) * 128;

// Products of the tensor cores. A fence orders the products that follow after what threads have
// written to registers; shared memory needs none, since only TMA writes the operands there. `add`
// has ThunderKittens' own, which fences memory as well: without it the compiler puts conversions
// off and runs out of registers.
__device__ inline void fence() {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

template <int ACCUMULATE, class T, class A, class B>
__device__ inline void outer(T &x, const A &a, const B &b) {  // x (+)= a b^T
    warpgroup::mma_ABt<T, A, B, 0, ACCUMULATE>(x, a, b);
}

template <int ACCUMULATE, class T, class A, class B>
__device__ inline void inner(T &x, const A &a, const B &b) {  // x (+)= a^T b
    warpgroup::mma_AtB<T, A, B, 0, ACCUMULATE>(x, a, b);
}

template <class T, class A, class B>
__device__ inline void add(T &x, const A &a, const B &b) {  // x += a b, a in registers
    warpgroup::mma_AB<T, A, B, 1, 1>(x, a, b);
}

// Writes to shared memory, which the compiler does not know `at` to point to.
__device__ inline void write(void *at, float2 x) {
#ifdef __CUDA_ARCH__
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(uint32_t(__cvta_generic_to_shared(at))),
                 "f"(x.x), "f"(x.y)
                 : "memory");
#else
    *static_cast<float2 *>(at) = x;
#endif
}

// Makes ordinary writes to shared memory visible to TMA.
__device__ inline void publish() {
#ifdef __CUDA_ARCH__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Waits for the other consumers; warpgroups have barriers 1 and 2 to themselves.
__device__ inline void both_consumers() { group<CONSUMERS * 4>::sync(CONSUMERS + 1); }

// The sum over the four lanes that hold a row.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ inline float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
__device__ inline float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ inline float2 operator*(float2 a, float b) { return {a.x * b, a.y * b}; }

// Calls f(x, j, k, column) for each pair of a thread's elements: x selects the pair of a tile, and
// `column` is that of its first element; its row is the thread's own, plus 8 where k is odd.
template <int WIDTH, class F> __device__ inline void each(F f) {
    const int lane = laneid();
    #pragma unroll
    for (int j = 0; j < WIDTH / 16; j++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) f(j, k, j * 16 + (k / 2) * 8 + (lane % 4) * 2);
    }
}

// Replaces scores outside of the band and of keys beyond the end. `held` is the thread's first
// resident position, `other` the first streamed one of the tile.
template <bool COLUMNS, class T>
__device__ inline void hide_band(T &scores, float value, Band band, int held, int other, int keys) {
    each<T::cols>([&](int j, int k, int at) {
        float2 &x = scores.tiles[0][j].data[k];
        const int mine = held + (k & 1) * 8, theirs = other + at;
        const bool a = COLUMNS ? sees(band, theirs, mine) && mine < keys
                               : sees(band, mine, theirs) && theirs < keys;
        const bool b = COLUMNS ? sees(band, theirs + 1, mine) && mine < keys
                               : sees(band, mine, theirs + 1) && theirs + 1 < keys;
        x = {a ? x.x : value, b ? x.y : value};
    });
}

// Replaces scores between positions whose segment ids differ.
template <class T>
__device__ inline void hide_others(T &scores, float value, const int *ids, int held, int other) {
    const int mine[2] = {ids[held], ids[held + 8]};
    each<T::cols>([&](int j, int k, int at) {
        float2 &x = scores.tiles[0][j].data[k];
        const int2 theirs = *reinterpret_cast<const int2 *>(&ids[other + at]);
        x = {theirs.x == mine[k & 1] ? x.x : value, theirs.y == mine[k & 1] ? x.y : value};
    });
}

// Which streamed tiles need their segment ids compared: all but those of the one document that the
// warpgroup's positions belong to. `offset` is where the ids of the batch entry begin.
template <int TILE> struct Segments {
    int own = 0;
    bool one = true;

    __device__ inline Segments(const int *ids, const int2 *spans, size_t offset, int mine) {
        if (ids == nullptr) return;
        spans += (offset + mine / TILE * TILE) / TILE;
        own = spans[0].x;
        for (int n = 0; n < (HELD + TILE - 1) / TILE; n++) {
            one = one && spans[n].x == own && spans[n].y == own;
        }
    }
    __device__ inline bool mixed(const int *ids, const int2 *spans, size_t offset, int tile) const {
        if (ids == nullptr) return false;
        const int2 theirs = spans[offset / TILE + tile];
        return !one || theirs.x != own || theirs.y != own;
    }
};

}  // namespace attention
