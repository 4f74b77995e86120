// A thread block on the CPU: every thread is a fiber that runs until it has to wait for another.
// What a block shares is static memory, since blocks run one after another.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx;
inline dim3 gridDim;

namespace emulator {

constexpr int STACK = 1 << 17;

// A product under way: it is computed when its warpgroup waits for it, from what the operands hold
// then, and its destination holds NaN until then.
struct Product {
    std::function<void()> compute;
    const void *a;  // the thread's part of an operand in registers
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::deque<Product> products;
    int issued = 0, computed = 0;  // `products` holds those from `computed` on, or a few before
    int first = 0;                 // the number of products.front()
    std::vector<std::function<void()>> copies;  // by TMA to global memory, that nobody awaited
    int bits = 0;                  // exchanged between lanes
    bool done = false;
};

struct Meeting {
    int here = 0, round = 0;
};

inline std::vector<Fiber> fibers;
inline std::map<int, Meeting> meetings;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline long switches = 0, progress = 0;

inline Fiber &self() { return fibers[threadIdx.x]; }

inline void yield() {
    Fiber &mine = self();
    if (++switches - progress > 4000000) {
        std::fprintf(stderr, "The block is deadlocked at thread %u.\n", threadIdx.x);
        std::abort();
    }
    swapcontext(&mine.context, &scheduler);
}

// Waits until `count` threads have come to the meeting.
inline void meet(int id, int count) {
    Meeting &m = meetings[id];
    const int round = m.round;
    if (++m.here == count) {
        m.here = 0, m.round++;
        progress = switches;
        return;
    }
    while (m.round == round) yield();
}
inline void meet_warp() { meet(1000 + threadIdx.x / 32, 32); }
inline void meet_warpgroup() { meet(2000 + threadIdx.x / 128, 128); }

inline void enter() {
    body();
    self().done = true;
    swapcontext(&self().context, &scheduler);
}

// Runs one block; fibers take turns in an order that `seed` permutes.
inline void run_block(int threads, unsigned seed) {
    meetings.clear();
    fibers = std::vector<Fiber>(threads);
    for (Fiber &f : fibers) {
        f.stack = std::make_unique<char[]>(STACK);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    progress = switches;
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) order[i] = i;
    for (int i = threads - 1; i > 0; i--) {
        seed = seed * 1664525u + 1013904223u;
        std::swap(order[i], order[seed / 65536 % (i + 1)]);
    }
    for (int left = threads; left;) {
        for (int i : order) {
            if (fibers[i].done) continue;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            left -= fibers[i].done;
        }
    }
}

}  // namespace emulator
