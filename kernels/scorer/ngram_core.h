// The text scorer without Python: hashed n-grams, the sum of their table rows, the head.
//
//   row g of a window's n-grams -> table (2^bits, D) int8 | float16 | float32
//   mean[d] = sum_g table[row_g][d] * scale[d] / number of present n-grams
//   score   = bias + sum_d skip[d] mean[d]
//             [ + sum_h relu(hidden_bias[h] + sum_d mean[d] hidden_kernel[d][h]) output_kernel[h] ]
//
// A score is the same on every machine, bit for bit, whatever its batch, thread or instruction set,
// because each sum has one order (ngram_reference.py is the same definition in numpy):
//   - int8 sums are exact in 32 bits;
//   - float sums are float32; n-gram g goes to partial sum g % 16 where D = 1 and g % 2 elsewhere,
//     an absent n-gram adds 0.0 in its place, and the partial sums are added in order;
//   - the head is double; products over columns or hidden units go to partial sum i % 8.
// Products and sums are never fused: compile with -ffp-contract=off and without -ffast-math.
//
// Cost: about 2T table reads per window of T tokens; the next window is hashed before this one is
// summed, so that its rows can be prefetched.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define NGRAM_X86 1
#else
#define NGRAM_X86 0
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ngram {

constexpr int MAX_BITS = 24;
constexpr int MAX_ORDERS = 3;
constexpr std::size_t MAX_LENGTH = std::size_t{1} << 22;  // 3 * 2^22 int8 values fit 32 bits
constexpr std::uint32_t UNIGRAM = 0x9E3779B1u;
constexpr std::uint32_t FIRST = 0x85EBCA77u;
constexpr std::uint32_t SECOND = 0xC2B2AE3Du;
constexpr std::uint32_t THIRD = 0x165667B1u;
constexpr std::uint32_t BIGRAM_SEED = 0x27D4EB2Fu;
constexpr std::uint32_t TRIGRAM_SEED = 0x94D049BBu;

constexpr std::size_t SLACK = 64;  // rows after a window's own: the zero row, or the next window's
constexpr std::size_t AHEAD = 24;  // rows between a prefetch and its use
constexpr std::size_t ROW_PARTIALS = 2;
constexpr std::size_t BAD_IDS = std::numeric_limits<std::size_t>::max();
static_assert(AHEAD + 2 < SLACK, "the last row of the slack stays the zero row");

typedef std::int8_t Bytes16 __attribute__((vector_size(16)));
typedef std::int16_t Shorts16 __attribute__((vector_size(32)));

enum class Dtype { int8, float16, float32 };

inline std::size_t size_of(Dtype dtype) {
  return dtype == Dtype::int8 ? 1 : dtype == Dtype::float16 ? 2 : 4;
}

struct Padding {
  bool given;
  std::int32_t id;
};

inline std::size_t count_ngrams(std::size_t length, int orders) {
  std::size_t total = 0;
  for (std::size_t n = 0; n < static_cast<std::size_t>(orders) && n < length; ++n) {
    total += length - n;
  }
  return total;
}

inline std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Exact.
inline float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const std::uint32_t bits =
      sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Zeroed memory aligned to 64 bytes; blocks of half a MiB and more ask for 2 MiB pages, which random
// reads of a table gain a tenth (4 MiB) to a third (beyond the caches) from. Such blocks are mapped,
// not allocated: tables come and go with scorer versions, and aligned blocks of that size leave holes
// in the heap that grow from version to version.
class Memory {
 public:
  explicit Memory(std::size_t bytes) {
#if defined(__linux__)
    if (bytes >= LARGE) {
      const std::size_t rounded = round_up(bytes, PAGE);
      mapped_ = rounded + PAGE;
      base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base_ == MAP_FAILED) throw std::bad_alloc();
      const auto start = reinterpret_cast<std::uintptr_t>(base_);
      data_ = static_cast<char*>(base_) + (round_up(start, PAGE) - start);
#if defined(MADV_HUGEPAGE)
      // Advice only; where it is refused the table works from small pages.
      (void)madvise(data_, rounded, MADV_HUGEPAGE);
#endif
      return;
    }
#endif
    const std::size_t rounded = round_up(bytes, 64);
    if (posix_memalign(&data_, 64, rounded) != 0) throw std::bad_alloc();
    std::memset(data_, 0, rounded);
  }
  ~Memory() {
#if defined(__linux__)
    if (mapped_ != 0) {
      munmap(base_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  static constexpr std::size_t LARGE = std::size_t{1} << 19, PAGE = std::size_t{2} << 20;
  void* data_ = nullptr;
#if defined(__linux__)
  void* base_ = nullptr;
  std::size_t mapped_ = 0;
#endif
};

// What a scorer is made of, as its owner holds it; nothing is kept beyond the constructor of Model.
struct Description {
  std::int64_t vocab_size;
  std::uint32_t hash_seed;
  int bits;
  int orders;
  Dtype dtype;
  std::size_t width;
  const void* table;             // (2^bits, width)
  const float* scale;            // (width,)
  const float* skip;             // (width,)
  std::size_t hidden;            // 0: no hidden part
  const float* hidden_kernel;    // (width, hidden)
  const float* hidden_bias;      // (hidden,)
  const float* output_kernel;    // (hidden,)
  double bias;
};

// The same in the layout of the loops: padded with zeros, the table followed by a row of zeros.
struct Model {
  std::int64_t vocab_size;
  std::uint32_t hash_seed;
  int bits;
  int orders;
  Dtype dtype;
  std::size_t width;
  std::size_t stride;  // elements from row to row: 1, or a multiple of 16
  Memory memory;
  const void* table;
  std::vector<double> scale, skip, hidden_kernel, hidden_bias, output_kernel;
  double bias;

  explicit Model(const Description& from)
      : vocab_size(std::min<std::int64_t>(from.vocab_size,
                                          std::numeric_limits<std::int32_t>::max())),
        hash_seed(from.hash_seed),
        bits(checked(from).bits),
        orders(from.orders),
        dtype(from.dtype),
        width(from.width),
        stride(width == 1 ? 1 : round_up(width, 16)),
        // 64 more bytes: a gather of four bytes may start at the last weight.
        memory(((std::size_t{1} << bits) + 1) * stride * size_of(dtype) + 64),
        table(memory.get()),
        scale(from.scale, from.scale + width),
        skip(from.skip, from.skip + width),
        bias(from.bias) {
    const std::size_t row = width * size_of(dtype), step = stride * size_of(dtype);
    const std::size_t rows = std::size_t{1} << bits;
    auto* to = static_cast<char*>(memory.get());
    const auto* source = static_cast<const char*>(from.table);
    if (row == step) {
      std::memcpy(to, source, rows * row);
    } else {
      for (std::size_t r = 0; r < rows; ++r) std::memcpy(to + r * step, source + r * row, row);
    }
    skip.resize(round_up(width, 8), 0.0);
    const std::size_t units = round_up(from.hidden, 8);
    hidden_kernel.assign(width * units, 0.0);
    hidden_bias.assign(units, 0.0);
    output_kernel.assign(units, 0.0);
    for (std::size_t h = 0; h < from.hidden; ++h) {
      hidden_bias[h] = from.hidden_bias[h];
      output_kernel[h] = from.output_kernel[h];
      for (std::size_t d = 0; d < width; ++d) {
        hidden_kernel[d * units + h] = from.hidden_kernel[d * from.hidden + h];
      }
    }
  }

 private:
  static const Description& checked(const Description& from) {
    if (from.bits < 1 || from.bits > MAX_BITS) {
      throw std::invalid_argument("bits must lie in [1, 24]");
    }
    if (from.orders < 1 || from.orders > MAX_ORDERS) {
      throw std::invalid_argument("orders must lie in [1, 3]");
    }
    if (from.vocab_size < 1) throw std::invalid_argument("vocab_size must be positive");
    if (from.width < 1) throw std::invalid_argument("the table needs at least one column");
    return from;
  }
};

}  // namespace ngram

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
// GCC 12's own intrinsics initialise a register with itself.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define NGRAM_LOOP __attribute__((noinline)) NGRAM_FN
namespace ngram {
#define NGRAM_ISA portable
#define NGRAM_LEVEL 0
#define NGRAM_BYTES 16
#define NGRAM_FN static
#include "ngram_kernels.h"
#if NGRAM_X86
#define NGRAM_ISA avx2
#define NGRAM_LEVEL 2
#define NGRAM_BYTES 32
#define NGRAM_FN __attribute__((target("avx2,f16c"))) static
#include "ngram_kernels.h"
#define NGRAM_ISA avx512
#define NGRAM_LEVEL 5
#define NGRAM_BYTES 64
#define NGRAM_FN \
  __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl"))) static
#include "ngram_kernels.h"
#endif
}  // namespace ngram
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace ngram {

using Score = std::size_t (*)(const Model&, const Padding&, const std::int32_t*, std::size_t,
                              std::size_t, float*);

struct Isa {
  const char* name;
  Score score;
};

// What this processor can run, the fastest first.
inline std::vector<Isa> available_isas() {
  std::vector<Isa> found;
#if NGRAM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &avx512::score});
  }
  if (avx2) found.push_back({"avx2", &avx2::score});
#endif
  found.push_back({"portable", &portable::score});
  return found;
}

// Index in `windows` of the first id that `score` refused, given the window that it returned.
inline std::size_t bad_position(const Model& model, const Padding& padding,
                                const std::int32_t* windows, std::size_t window,
                                std::size_t length) {
  const auto bad = [&](std::int32_t id) {
    return (id < 0 || id >= model.vocab_size) && !(padding.given && id == padding.id);
  };
  const std::int32_t* begin = windows + window * length;
  return static_cast<std::size_t>(std::find_if(begin, begin + length, bad) - windows);
}

}  // namespace ngram
