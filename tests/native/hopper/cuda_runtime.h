// The part of the CUDA runtime that the plugin uses, on the CPU.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.h"
#include "xla/ffi/api/ffi.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};
struct int2 {
    int x, y;
};
struct Stream;
using cudaStream_t = Stream *;
enum cudaError_t { cudaSuccess, cudaFailed };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
template <class F> cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaFailed;
}
inline const char *cudaGetErrorString(cudaError_t) { return "the emulator refused"; }

// What was set to zero since the last kernel: memory that one may add to.
inline std::vector<std::pair<char *, size_t>> zeroed;

inline cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    zeroed.push_back({static_cast<char *>(at), bytes});
    return cudaSuccess;
}
inline float atomicAdd(float *at, float x) {
    const char *place = reinterpret_cast<char *>(at);
    bool set = false;
    for (auto [begin, bytes] : zeroed) set |= place >= begin && place < begin + bytes;
    return *at += set ? x : NAN;
}

namespace attention {
alignas(1024) inline int memory[227 * 256];
}

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void **arguments, size_t bytes,
                             cudaStream_t) {
    const P &parameters = *static_cast<P *>(arguments[0]);
    gridDim = grid;
    unsigned seed = 1;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                for (size_t i = 0; i < bytes / 4; i++) attention::memory[i] = 0x7fc07fc0;  // NaN
                emulator::body = [&] { kernel(parameters); };
                emulator::run_block(block.x, seed++);
            }
    zeroed.clear();
    return cudaSuccess;
}

inline void __syncthreads() { emulator::meet(0, emulator::fibers.size()); }

template <class T> T from_lane(T x, int lane) {
    static_assert(sizeof(T) == 4);
    std::memcpy(&emulator::self().bits, &x, 4);
    emulator::meet_warp();
    std::memcpy(&x, &emulator::fibers[threadIdx.x / 32 * 32 + lane].bits, 4);
    emulator::meet_warp();
    return x;
}
template <class T> T __shfl_sync(unsigned, T x, int lane) { return from_lane(x, lane); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return from_lane(x, threadIdx.x % 32 ^ mask);
}

// Where a host program would name a stream of the CPU's, there is none.
template <> struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
    using Type = cudaStream_t;
    static std::optional<Type> Decode(const XLA_FFI_Api *, XLA_FFI_ExecutionContext *,
                                      DiagnosticEngine &) {
        return nullptr;
    }
};
