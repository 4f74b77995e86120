// Statistics of multivariate time series windows, and the head that scores them.
//
//   input   windows (N, T, C) float32; NaN and inf count as missing
//   output  statistics (N, C, STATISTICS) float32, or scores (N,) float32; bit-identical to
//           metagrad_filter/kernels/scorer/series.py, which says what each statistic is
//   cost    some six sweeps over each series, which stays in the L1 or L2 cache
//
// Sums are float64 and sequential in time. Speed comes from W series that advance side by side in
// one vector register (other channels, other windows), never from reordering one series' sum, so
// the instruction set, the batch and the number of threads cannot change a bit. Compile with
// -ffp-contract=off: a fused multiply-add rounds once where the definition rounds twice.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Vectors never cross a function that is not inlined, so their calling convention is moot.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define MGF_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define MGF_X86 1
#define MGF_TARGET(isa) __attribute__((target(isa)))
#else
#define MGF_X86 0
#endif

namespace series {

constexpr std::size_t STATISTICS = 26;
constexpr std::size_t SCALES = 6;   // Haar details at 1, 2, ..., 32 steps
constexpr std::size_t BLOCKS = 8;   // equal stretches of time that bursts are looked for in
constexpr std::size_t PAD = 8;      // rows of zeros before the first step: the longest lag
constexpr std::size_t MAX_LANES = 8;
constexpr std::size_t GROUP = 4;    // windows that the head takes at a time
constexpr double FLOOR = 0x1p-20;       // shares below this count as this
constexpr double SMALLEST = 0x1p-149;   // the smallest float32
constexpr double CLIP = 8.0;            // standardised statistics are cut here

template <int W>
struct Lanes {
  typedef float Narrow __attribute__((vector_size(W * 4), may_alias));
  typedef double Real __attribute__((vector_size(W * 8), may_alias));
  typedef std::int64_t Mask __attribute__((vector_size(W * 8), may_alias));
};
template <int W>
using Real = typename Lanes<W>::Real;
template <int W>
using Mask = typename Lanes<W>::Mask;

// Memory of one call, reused for every group of series.
class Scratch {
 public:
  explicit Scratch(std::size_t length)
      : rows_((length + PAD) * MAX_LANES),
        tree_(std::max<std::size_t>(length / 2, 1) * MAX_LANES),
        memory_(2 * rows_ + tree_ + ALIGN) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    const std::size_t bytes = ALIGN * sizeof(double);
    base_ = memory_.data() + (bytes - address % bytes) % bytes / sizeof(double);
  }

  // Row t of W lanes; rows -PAD .. -1 are zero and missing.
  template <int W>
  Real<W>* values() {
    return reinterpret_cast<Real<W>*>(base_) + PAD;
  }
  template <int W>
  Real<W>* seen() {
    return reinterpret_cast<Real<W>*>(base_ + rows_) + PAD;
  }
  template <int W>
  Real<W>* tree() {
    return reinterpret_cast<Real<W>*>(base_ + 2 * rows_);
  }

 private:
  static constexpr std::size_t ALIGN = 8;  // doubles in a cache line
  std::size_t rows_, tree_;
  std::vector<double> memory_;
  double* base_;
};

template <int W>
MGF_INLINE Real<W> splat(double value) {
  return Real<W>{} + value;
}
template <int W>
MGF_INLINE Real<W> unaligned(const double* from) {
  Real<W> out{};
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <int W>
MGF_INLINE Real<W> larger(const Real<W>& a, const Real<W>& b) {
  return a > b ? a : b;
}
template <int W>
MGF_INLINE Real<W> smaller(const Real<W>& a, const Real<W>& b) {
  return a < b ? a : b;
}
template <int W>
MGF_INLINE Real<W> clip(const Real<W>& a, const Real<W>& low, const Real<W>& high) {
  return smaller<W>(larger<W>(a, low), high);
}
template <int W>
MGF_INLINE Real<W> magnitude(const Real<W>& a) {
  return (Real<W>)((Mask<W>)a & std::numeric_limits<std::int64_t>::max());
}
template <int W>
MGF_INLINE Real<W> root(const Real<W>& a) {
  Real<W> out{};
  for (int lane = 0; lane < W; ++lane) out[lane] = std::sqrt(a[lane]);
  return out;
}
// a / b, and 0 where b is not positive.
template <int W>
MGF_INLINE Real<W> ratio(const Real<W>& a, const Real<W>& b) {
  const auto positive = b > 0.0;
  return positive ? a / (positive ? b : splat<W>(1.0)) : Real<W>{};
}
// Exponent plus linear mantissa: log2 at powers of two, straight between them. `a` is normal.
template <int W>
MGF_INLINE Real<W> log2_linear(const Real<W>& a) {
  constexpr std::int64_t mantissa = 0x000FFFFFFFFFFFFF, one = 0x3FF0000000000000;
  constexpr std::int64_t magic = 0x4330000000000000;  // 2^52, whose ulp is 1
  const Mask<W> bits = (Mask<W>)a;
  const Real<W> exponent = (Real<W>)((bits >> 52) | magic) - (0x1p52 + 1023.0);
  return exponent + ((Real<W>)((bits & mantissa) | one) - 1.0);
}

// Loads W series into scratch, missing values as 0, and what is seen as 1 or 0; `lane_base[l]` is
// the first value of lane l. Returns whether every value is finite.
template <int W>
MGF_INLINE bool load(const float* const* lane_base, std::size_t stride, std::size_t length,
                     bool adjacent, Real<W>* x, Real<W>* seen) {
  using Narrow = typename Lanes<W>::Narrow;
  const Real<W> limit = splat<W>(std::numeric_limits<float>::max());
  const Real<W> one = splat<W>(1.0);
  Real<W> all = one;
  for (std::size_t t = 0; t < length; ++t) {
    Narrow raw{};
    if (adjacent) {
      std::memcpy(&raw, lane_base[0] + t * stride, sizeof raw);
    } else {
      for (int lane = 0; lane < W; ++lane) raw[lane] = lane_base[lane][t * stride];
    }
    // Adding zero turns -0 into 0, so that equal values are equal bits.
    const Real<W> value = __builtin_convertvector(raw, Real<W>) + 0.0;
    const auto finite = magnitude<W>(value) <= limit;
    x[t] = finite ? value : Real<W>{};
    seen[t] = finite ? one : Real<W>{};
    all = smaller<W>(all, seen[t]);
  }
  for (int lane = 0; lane < W; ++lane) {
    if (all[lane] == 0.0) return false;
  }
  return true;
}

// How many pairs of observed steps are `lag` apart.
template <int W, bool Complete>
MGF_INLINE Real<W> pairs(const Real<W>* seen, std::size_t length, std::size_t lag) {
  if (Complete) return splat<W>(length > lag ? static_cast<double>(length - lag) : 0.0);
  Real<W> count{};
  for (std::size_t t = lag; t < length; ++t) count += seen[t] * seen[t - lag];
  return count;
}

// The statistics of W loaded series, (STATISTICS, W); leaves deviations from the mean in `x`.
// Missing steps are left out by products with 0 and 1, which are exact.
template <int W, bool Complete>
MGF_INLINE void describe(Real<W>* x, const Real<W>* seen, Real<W>* tree, std::size_t length,
                         Real<W>* out) {
  using R = Real<W>;
  const R zero{}, one = splat<W>(1.0), floor = splat<W>(FLOOR);
  const R huge = splat<W>(std::numeric_limits<double>::max());

  // Level and extremes.
  R sum{}, lowest = huge, highest = -huge, times{}, squared_times{};
  for (std::size_t t = 0; t < length; ++t) {
    const double time = static_cast<double>(t);
    const R value = x[t];
    sum += value;
    if (Complete) {
      lowest = smaller<W>(lowest, value);
      highest = larger<W>(highest, value);
      times += time;
      squared_times += time * time;
    } else {
      const R away = (1.0 - seen[t]) * huge;
      lowest = smaller<W>(lowest, value + away);
      highest = larger<W>(highest, value - away);
      times += time * seen[t];
      squared_times += time * time * seen[t];
    }
  }
  const R observed = pairs<W, Complete>(seen, length, 0);
  const R count = larger<W>(observed, one);
  const R mean = sum / count;
  out[0] = observed / static_cast<double>(length);
  out[1] = mean;
  out[3] = observed > 0.0 ? lowest : zero;
  out[4] = observed > 0.0 ? highest : zero;

  // First differences between neighbours that are both observed.
  R path{}, step{}, run{}, longest{}, still_count{};
  for (std::size_t t = 1; t < length; ++t) {
    R size = magnitude<W>(x[t] - x[t - 1]), still = size == 0.0 ? one : zero;
    if (!Complete) {
      const R both = seen[t] * seen[t - 1];
      size *= both;
      still *= both;
    }
    path += size;
    step = larger<W>(step, size);
    still_count += still;
    run = (run + 1.0) * still;
    longest = larger<W>(longest, run);
  }
  const R neighbours = pairs<W, Complete>(seen, length, 1);
  const R roughness = path / larger<W>(neighbours, one);
  out[7] = log2_linear<W>(larger<W>(ratio<W>(step, roughness), one));
  out[8] = still_count / larger<W>(neighbours, one);
  out[9] = longest / std::max(static_cast<double>(length) - 1.0, 1.0);

  // Moments and autocorrelation of the deviations, block by block.
  R energy{}, loudest{}, lopsided{}, fourth{}, drift{}, lag1{}, lag2{}, lag4{}, lag8{};
  for (std::size_t block = 0; block < BLOCKS; ++block) {
    R here{};
    for (std::size_t t = block * length / BLOCKS; t < (block + 1) * length / BLOCKS; ++t) {
      R d = x[t] - mean;
      if (!Complete) d *= seen[t];
      x[t] = d;
      const R square = d * d;
      energy += square;
      here += square;
      lopsided += d * magnitude<W>(d);
      fourth += square * square;
      drift += static_cast<double>(t) * d;
      const R* past = x + t;
      lag1 += d * past[-1];
      lag2 += d * past[-2];
      lag4 += d * past[-4];
      lag8 += d * past[-8];
    }
    loudest = larger<W>(loudest, here);
  }
  const R variance = energy / count;
  const R deviation = root<W>(variance);
  const R time_energy = squared_times - times * times / count;
  out[5] = log2_linear<W>(larger<W>(deviation, splat<W>(SMALLEST)));
  out[6] = log2_linear<W>(larger<W>(ratio<W>(roughness, deviation), floor));
  out[10] = ratio<W>(lopsided, energy);
  out[11] = log2_linear<W>(larger<W>(ratio<W>(fourth / count, variance * variance), one));
  out[12] = ratio<W>(loudest, energy);
  const R joint = root<W>(larger<W>(energy * time_energy, zero));
  out[13] = clip<W>(ratio<W>(drift, joint), -one, one);
  const R products[4] = {lag1, lag2, lag4, lag8};
  for (std::size_t i = 0; i < 4; ++i) {
    const R together = larger<W>(pairs<W, Complete>(seen, length, std::size_t{1} << i), one);
    out[14 + i] = clip<W>(ratio<W>(products[i] / together, variance), -one, one);
  }

  // Haar details: at each scale the differences of neighbouring sums.
  const R* parents = x;
  std::size_t rows = length;
  double weight = 1.0;
  for (std::size_t scale = 0; scale < SCALES; ++scale) {
    rows /= 2;
    weight *= 0.5;
    R detail{};
    for (std::size_t i = 0; i < rows; ++i) {
      const R first = parents[2 * i], second = parents[2 * i + 1];
      const R difference = second - first;
      detail += difference * difference;
      tree[i] = first + second;
    }
    parents = tree;
    out[18 + scale] = log2_linear<W>(larger<W>(ratio<W>(detail * weight, energy), floor));
  }

  // What two steps of memory do not predict, and the mean of values cut at one deviation.
  const R r1 = out[14], r2 = out[15];
  const R second = clip<W>(ratio<W>(r2 - r1 * r1, 1.0 - r1 * r1), -one, one);
  const R first = r1 * (1.0 - second);
  R cut{}, residual{}, worst{}, predicted{};
  for (std::size_t t = 0; t < length; ++t) {
    const R d = x[t];
    cut += clip<W>(d, -deviation, deviation);
    if (t < 2) continue;
    const R error = d - first * x[t - 1] - second * x[t - 2];
    R square = error * error;
    if (!Complete) {
      const R all = seen[t] * seen[t - 1] * seen[t - 2];
      square *= all;
      predicted += all;
    }
    residual += square;
    worst = larger<W>(worst, square);
  }
  const R triples = Complete ? pairs<W, true>(seen, length, 2) : predicted;
  const R unexplained = residual / larger<W>(triples, one);
  out[2] = mean + cut / count;
  out[24] = log2_linear<W>(larger<W>(ratio<W>(unexplained, variance), floor));
  const R usual = larger<W>(unexplained, variance * FLOOR);
  out[25] = log2_linear<W>(larger<W>(ratio<W>(worst, usual), one));
}

// windows (count, length, channels) -> out (count, channels, STATISTICS).
template <int W>
MGF_INLINE void statistics_of(const float* windows, std::size_t count, std::size_t length,
                              std::size_t channels, Scratch& scratch, float* out) {
  Real<W>* x = scratch.values<W>();
  Real<W>* seen = scratch.seen<W>();
  for (std::size_t row = 1; row <= PAD; ++row) {
    *(x - row) = Real<W>{};
    *(seen - row) = Real<W>{};
  }
  const std::size_t total = count * channels;
  for (std::size_t first = 0; first < total; first += W) {
    const std::size_t lanes = std::min<std::size_t>(W, total - first);
    const float* base[W];
    for (std::size_t lane = 0; lane < W; ++lane) {
      const std::size_t s = first + (lane < lanes ? lane : 0);
      base[lane] = windows + s / channels * length * channels + s % channels;
    }
    const bool adjacent = first % channels + W <= channels;
    const bool complete = load<W>(base, channels, length, adjacent, x, seen);
    Real<W> found[STATISTICS];
    if (complete) {
      describe<W, true>(x, seen, scratch.tree<W>(), length, found);
    } else {
      describe<W, false>(x, seen, scratch.tree<W>(), length, found);
    }
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      float* mine = out + (first + lane) * STATISTICS;
      for (std::size_t i = 0; i < STATISTICS; ++i) mine[i] = static_cast<float>(found[i][lane]);
    }
  }
}

// A fitted head in float64. The hidden layer is padded to a multiple of COLUMNS with units that
// add zero; `kernel` is (features, padded hidden) row by row, empty for a linear head.
struct Head {
  static constexpr std::size_t COLUMNS = 16;
  std::vector<double> center, scale, skip, kernel, hidden_bias, output;
  double bias = 0.0;
  std::size_t features() const { return center.size(); }
  std::size_t hidden() const { return hidden_bias.size(); }
};

// statistics (count, features) -> scores (count,); `z` holds GROUP rows of features.
template <int W>
MGF_INLINE void head_of(const Head& head, const float* statistics, std::size_t count, double* z,
                        float* out) {
  // A few windows share each read of the kernel, which is larger than the L1 cache; their sums
  // advance side by side.
  constexpr std::size_t VECTORS = 2, TOGETHER = VECTORS * W;
  static_assert(Head::COLUMNS % TOGETHER == 0, "a pass reads whole vectors");
  constexpr double limit = std::numeric_limits<float>::max();
  const std::size_t features = head.features(), width = head.hidden();
  const double *center = head.center.data(), *scale = head.scale.data();
  const double* skip = head.skip.data();
  for (std::size_t start = 0; start < count; start += GROUP) {
    const std::size_t last = std::min(GROUP, count - start) - 1;
    for (std::size_t g = 0; g < GROUP; ++g) {
      const float* mine = statistics + (start + std::min(g, last)) * features;
      double* row = z + g * features;
      for (std::size_t f = 0; f < features; ++f) {
        const double value = (static_cast<double>(mine[f]) - center[f]) / scale[f];
        const double above = value < -CLIP ? -CLIP : value;
        row[f] = above > CLIP ? CLIP : above;
      }
    }
    double score[GROUP];
    std::fill_n(score, GROUP, head.bias);
    for (std::size_t f = 0; f < features; ++f) {
      for (std::size_t g = 0; g < GROUP; ++g) score[g] += z[g * features + f] * skip[f];
    }
    for (std::size_t first = 0; first < width; first += TOGETHER) {
      Real<W> sums[GROUP][VECTORS];
      for (std::size_t g = 0; g < GROUP; ++g) {
        for (std::size_t v = 0; v < VECTORS; ++v) {
          sums[g][v] = unaligned<W>(&head.hidden_bias[first + v * W]);
        }
      }
      for (std::size_t f = 0; f < features; ++f) {
        const double* row = &head.kernel[f * width + first];
        const Real<W> left = unaligned<W>(row), right = unaligned<W>(row + W);
        for (std::size_t g = 0; g < GROUP; ++g) {
          const double value = z[g * features + f];
          sums[g][0] += value * left;
          sums[g][1] += value * right;
        }
      }
      for (std::size_t g = 0; g < GROUP; ++g) {
        for (std::size_t h = 0; h < TOGETHER; ++h) {
          const double hidden = sums[g][h / W][h % W];
          score[g] += (hidden > 0.0 ? hidden : 0.0) * head.output[first + h];
        }
      }
    }
    for (std::size_t g = 0; g <= last; ++g) {
      out[start + g] = static_cast<float>(std::clamp(score[g], -limit, limit));
    }
  }
}

enum class Isa { portable, avx2, avx512 };

inline bool supported(Isa isa) {
  if (isa == Isa::portable) return true;
#if MGF_X86
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

inline Isa best_isa() {
  if (supported(Isa::avx512)) return Isa::avx512;
  return supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

#if MGF_X86
MGF_TARGET("avx512f,avx512dq")
inline void statistics_avx512(const float* windows, std::size_t count, std::size_t length,
                              std::size_t channels, Scratch& scratch, float* out) {
  statistics_of<8>(windows, count, length, channels, scratch, out);
}
MGF_TARGET("avx512f,avx512dq")
inline void head_avx512(const Head& head, const float* statistics, std::size_t count, double* z,
                        float* out) {
  head_of<8>(head, statistics, count, z, out);
}
MGF_TARGET("avx2")
inline void statistics_avx2(const float* windows, std::size_t count, std::size_t length,
                            std::size_t channels, Scratch& scratch, float* out) {
  statistics_of<4>(windows, count, length, channels, scratch, out);
}
MGF_TARGET("avx2")
inline void head_avx2(const Head& head, const float* statistics, std::size_t count, double* z,
                        float* out) {
  head_of<4>(head, statistics, count, z, out);
}
#endif

// `isa` must be supported; `scratch` is for windows of this length.
inline void statistics(const float* windows, std::size_t count, std::size_t length,
                       std::size_t channels, Isa isa, Scratch& scratch, float* out) {
#if MGF_X86
  if (isa == Isa::avx512) {
    return statistics_avx512(windows, count, length, channels, scratch, out);
  }
  if (isa == Isa::avx2) return statistics_avx2(windows, count, length, channels, scratch, out);
#endif
  (void)isa;
  statistics_of<2>(windows, count, length, channels, scratch, out);
}

// windows (count, length, channels) -> scores (count,), a few windows' statistics at a time.
inline void scores(const float* windows, std::size_t count, std::size_t length,
                   std::size_t channels, const Head& head, Isa isa, float* out) {
  constexpr std::size_t TOGETHER = 16;
  Scratch scratch(length);
  std::vector<float> found(std::min(TOGETHER, count) * head.features());
  std::vector<double> z(GROUP * head.features());
  for (std::size_t first = 0; first < count; first += TOGETHER) {
    const std::size_t some = std::min(TOGETHER, count - first);
    statistics(windows + first * length * channels, some, length, channels, isa, scratch,
               found.data());
#if MGF_X86
    if (isa == Isa::avx512) {
      head_avx512(head, found.data(), some, z.data(), out + first);
      continue;
    }
    if (isa == Isa::avx2) {
      head_avx2(head, found.data(), some, z.data(), out + first);
      continue;
    }
#endif
    head_of<2>(head, found.data(), some, z.data(), out + first);
  }
}

}  // namespace series
