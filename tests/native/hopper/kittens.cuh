// The part of ThunderKittens that the kernels use, on the CPU: tiles are plain arrays, a thread's
// part of a register tile is laid out as on Hopper. Loads are done at once; products and stores by
// TMA as late as may be, from what their operands hold then.
#pragma once

#include <array>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda_runtime.h"

struct bf16_bits {
    uint16_t bits;
};
struct bf16_pair {
    bf16_bits x, y;
};

inline float widened(bf16_bits x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline bf16_bits rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline bf16_pair __float22bfloat162_rn(float2 x) { return {rounded(x.x), rounded(x.y)}; }

namespace kittens {

using bf16 = bf16_bits;
constexpr int MAX_SHARED_MEMORY = 227 * 1024;
enum class cache_policy { NORMAL };
namespace dim {
constexpr int DEPTH = 1;
}

template <class V, int ROWS, int COLS> struct st {
    static constexpr int rows = ROWS, cols = COLS;
    V data[ROWS * COLS];
};
template <int R, int C> using st_bf = st<bf16, R, C>;
// Of floats the tiles are laid out as on Hopper: side by side 32 columns each, whose rows of 128
// bytes have their parts of 16 bytes permuted.
template <int R, int C> struct st_fl : st<float, R, C> {
    static int place(int row, int column) {
        const int part = column % 32 / 4 ^ row % 8;
        return column / 32 * 32 * R + row * 32 + part * 4 + column % 4;
    }
};
template <int L> struct sv_fl {
    static constexpr int length = L;
    float data[L];
};
template <class PAIR, int ROWS, int COLS> struct rt {
    static_assert(ROWS == 16);
    static constexpr int rows = ROWS, cols = COLS;
    struct {
        PAIR data[4];
    } tiles[1][COLS / 16];
};
template <int R, int C> using rt_fl = rt<float2, R, C>;
template <int R, int C> using rt_bf = rt<bf16_pair, R, C>;

namespace tma {
template <class T, int AXIS> struct descriptor {};
}
template <class V, int, int, int, int, class> struct gl {
    V *raw_ptr;
    int batch, depth, rows, cols;
    gl(V *at, int b, int d, int r, int c) : raw_ptr(at), batch(b), depth(d), rows(r), cols(c) {}
};
template <class T> struct coord {
    int b, d, r, c;
};

struct tma_swizzle_allocator {
    char *at;
    explicit tma_swizzle_allocator(int *memory) : at(reinterpret_cast<char *>(memory)) {}
    template <class T, size_t... N> auto &allocate() {
        using Array = typename Nested<T, N...>::type;
        at = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(at) + 1023) / 1024 * 1024);
        Array &made = *reinterpret_cast<Array *>(at);
        at += sizeof(Array);
        return made;
    }
    template <class T, size_t... N> struct Nested {
        using type = T;
    };
    template <class T, size_t FIRST, size_t... REST> struct Nested<T, FIRST, REST...> {
        using type = typename Nested<T, REST...>::type[FIRST];
    };
};

inline int warpid() { return threadIdx.x / 32; }
inline int laneid() { return threadIdx.x % 32; }

// As an mbarrier: a phase ends when all arrivals and all announced bytes are there.
struct semaphore {
    int expected, pending, phase;
    long bytes;
    void settle() {
        if (pending == 0 && bytes == 0) {
            pending = expected, phase ^= 1;
            emulator::progress = emulator::switches;
        }
    }
};
inline void init_semaphore(semaphore &s, int threads, int transactions) {
    s = {threads + transactions, threads + transactions, 0, 0};
}
inline void wait(semaphore &s, int phase) {
    while (s.phase == phase) emulator::yield();
}
inline void arrive(semaphore &s, int count) { s.pending -= count, s.settle(); }

namespace warp {
template <class T> void zero(T &x) { x = T{}; }
template <class T> void mul(T &x, const T &y, float f) {
    for (int j = 0; j < T::cols / 16; j++)
        for (int k = 0; k < 4; k++)
            x.tiles[0][j].data[k] = {y.tiles[0][j].data[k].x * f, y.tiles[0][j].data[k].y * f};
}
namespace tma {
inline void expect_bytes(semaphore &s, long bytes) {
    if (laneid() == 0) s.bytes += bytes, arrive(s, 1);
}
template <int AXIS, cache_policy, class T, class G>
void load_async(T &x, const G &g, const coord<T> &at, semaphore &s) {
    static_assert(AXIS == dim::DEPTH);
    if (laneid()) return;
    for (int i = 0; i < T::rows; i++)
        for (int c = 0; c < T::cols; c++) {
            const int row = at.d * T::rows + i;
            const size_t from = ((size_t(at.b) * g.depth + row) * g.rows + at.r) * g.cols + c;
            x.data[i * T::cols + c] = row < g.depth ? g.raw_ptr[from] : bf16{0};
        }
    s.bytes -= sizeof(T), s.settle();
}
template <class T, class G> void load_async(T &x, const G &g, const coord<T> &at, semaphore &s) {
    if (laneid()) return;
    for (int i = 0; i < T::length; i++) {
        const int place = at.c * T::length + i;
        const size_t from = ((size_t(at.b) * g.depth + at.d) * g.rows + at.r) * g.cols + place;
        x.data[i] = place < g.cols ? g.raw_ptr[from] : 0.f;
    }
    s.bytes -= sizeof(T), s.settle();
}
// Calls f(element, row, column) for what a tile has in the array, once somebody waits.
template <class G, class T, class F>
void later(const G &g, const coord<T> &at, F f) {
    if (laneid()) return;
    emulator::self().copies.push_back([&g, at, f] {
        for (int i = 0; i < T::rows && at.d * T::rows + i < g.depth; i++)
            for (int c = 0; c < T::cols; c++) {
                const int row = at.d * T::rows + i;
                f(g.raw_ptr[((size_t(at.b) * g.depth + row) * g.rows + at.r) * g.cols + c], i, c);
            }
    });
}
template <int AXIS, cache_policy, class G, class T>
void store_async(const G &g, const T &x, const coord<T> &at) {
    static_assert(AXIS == dim::DEPTH);
    later(g, at, [&x](auto &to, int i, int c) { to = x.data[i * T::cols + c]; });
}
template <int AXIS, cache_policy, class G, class T>
void store_add_async(const G &g, const T &x, const coord<T> &at) {
    static_assert(AXIS == dim::DEPTH);
    later(g, at, [&x](float &to, int i, int c) { atomicAdd(&to, x.data[T::place(i, c)]); });
}
inline void store_async_wait() {
    for (auto &copy : emulator::self().copies) copy();
    emulator::self().copies.clear();
}
inline void store_async_read_wait() { store_async_wait(); }
}  // namespace tma
}  // namespace warp

namespace warpgroup {

template <int> void decrease_registers() {}
template <int> void increase_registers() {}
inline int laneid() { return threadIdx.x % 128; }
inline void sync(int id) { emulator::meet(id, 128); }

// Calls f(element, row, column) for a thread's elements; rows within the warpgroup's 64.
template <class T, class F> void elements(T &x, F f) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int j = 0; j < T::cols / 16; j++)
        for (int k = 0; k < 4; k++) {
            auto &pair = x.tiles[0][j].data[k];
            const int c = j * 16 + (k / 2) * 8 + (lane % 4) * 2;
            f(pair.x, row + (k & 1) * 8, c), f(pair.y, row + (k & 1) * 8, c + 1);
        }
}

template <class T, class F> void issue(T &x, bool accumulate, const void *a, F compute) {
    if (!accumulate)
        elements(x, [](float &e, int, int) { e = std::numeric_limits<float>::quiet_NaN(); });
    emulator::self().products.push_back({compute, a});
    emulator::self().issued++;
}

template <class T, class A, class B, int FENCE, int ACCUMULATE>
void mma_ABt(T &x, const A &a, const B &b) {
    static_assert(A::rows == 64 && A::cols == B::cols && B::rows == T::cols);
    issue(x, ACCUMULATE, nullptr, [&x, &a, &b] {
        elements(x, [&](float &e, int row, int column) {
            float sum = ACCUMULATE ? e : 0.f;
            for (int c = 0; c < A::cols; c++)
                sum += widened(a.data[row * A::cols + c]) * widened(b.data[column * B::cols + c]);
            e = sum;
        });
    });
}

template <class T, class A, class B, int FENCE, int ACCUMULATE>
void mma_AB(T &x, const A &a, const B &b) {
    static_assert(A::cols == B::rows && B::cols == T::cols);
    const int number = emulator::self().issued, thread = threadIdx.x;
    issue(x, ACCUMULATE, &a, [&x, &b, number, thread] {
        float row[2][A::cols];  // the thread's two rows of a, which four lanes hold
        for (int lane = thread / 4 * 4; lane < thread / 4 * 4 + 4; lane++) {
            const emulator::Fiber &f = emulator::fibers[lane];
            const A &part = *static_cast<const A *>(f.products[number - f.first].a);
            for (int j = 0; j < A::cols / 16; j++)
                for (int k = 0; k < 4; k++) {
                    const int c = j * 16 + (k / 2) * 8 + (lane % 4) * 2;
                    row[k & 1][c] = widened(part.tiles[0][j].data[k].x);
                    row[k & 1][c + 1] = widened(part.tiles[0][j].data[k].y);
                }
        }
        const int first = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        elements(x, [&](float &e, int r, int column) {
            float sum = ACCUMULATE ? e : 0.f;
            for (int c = 0; c < A::cols; c++)
                sum += row[r != first][c] * widened(b.data[c * B::cols + column]);
            e = sum;
        });
    });
}

template <class T, class A, class B, int FENCE, int ACCUMULATE>
void mma_AtB(T &x, const A &a, const B &b) {
    static_assert(A::cols == 64 && A::rows == B::rows && B::cols == T::cols);
    issue(x, ACCUMULATE, nullptr, [&x, &a, &b] {
        elements(x, [&](float &e, int row, int column) {
            float sum = ACCUMULATE ? e : 0.f;
            for (int c = 0; c < A::rows; c++)
                sum += widened(a.data[c * A::cols + row]) * widened(b.data[c * B::cols + column]);
            e = sum;
        });
    });
}

template <int N = 0> void mma_async_wait() {
    emulator::meet_warpgroup();  // all threads have issued the same products
    emulator::Fiber &f = emulator::self();
    for (; f.computed < f.issued - N; f.computed++) f.products[f.computed - f.first].compute();
    emulator::meet_warpgroup();  // nobody's operands are needed any more
    for (; f.first < f.computed; f.first++) f.products.pop_front();
}

template <class T, class S> void put(T &to, S x) { to = x; }
inline void put(bf16 &to, float x) { to = rounded(x); }
template <class S, class T> void store(S &to, const T &x) {
    elements(x, [&](auto &e, int row, int column) { put(to.data[row * S::cols + column], e); });
}
template <int R, int C, class T> void store(st_fl<R, C> &to, const T &x) {
    elements(x, [&](auto &e, int row, int column) { to.data[to.place(row, column)] = e; });
}
template <class S> void one(S &to) {
    for (int i = laneid(); i < S::rows * S::cols; i += 128) to.data[i] = rounded(1.f);
}

}  // namespace warpgroup

template <int WARPS> struct group {
    static void sync(int id) { emulator::meet(id, WARPS * 32); }
};

}  // namespace kittens
