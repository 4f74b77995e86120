// Mean of hashed n-gram rows: the inner loop of the text scorer.
//
//   input   table (2^bits, D) float32, windows (N, T) int32
//   output  (N, D) float64, bit-identical to metagrad_filter.scorer.features.ngram_mean
//   cost    2T-1 table reads per window; the table should fit the L2 cache (2^16 x 1 = 256 KiB)
//
// Sums are float64 and sequential in n-gram order (unigrams, then bigrams). Speed comes from
// hashing in a loop that vectorises and from interleaving LANES windows, whose addition chains are
// independent of one another, and never from reordering one window's sum.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// Integer results are the same on every instruction set, so the dispatch cannot change a score.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define MGF_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MGF_MULTIVERSION
#endif

constexpr std::size_t LANES = 8;
constexpr int MAX_BITS = 24;
constexpr std::uint32_t UNIGRAM = 0x9E3779B1u;
constexpr std::uint32_t FIRST = 0x85EBCA77u;
constexpr std::uint32_t SECOND = 0xC2B2AE3Du;
constexpr std::uint32_t BIGRAM_SEED = 0x27D4EB2Fu;

inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// rows[0 .. T-1] unigrams, rows[T .. 2T-2] bigrams.
MGF_MULTIVERSION
void hash_window(const std::int32_t* ids, std::size_t length, std::uint32_t seed, int shift,
                 std::uint32_t* rows) {
  const std::uint32_t bigram_seed = mix(seed ^ BIGRAM_SEED);
  for (std::size_t t = 0; t < length; ++t) {
    rows[t] = mix(static_cast<std::uint32_t>(ids[t]) * UNIGRAM + seed) >> shift;
  }
  std::uint32_t* pairs = rows + length;
  for (std::size_t t = 0; t + 1 < length; ++t) {
    const std::uint32_t first = static_cast<std::uint32_t>(ids[t]) * FIRST + bigram_seed;
    const std::uint32_t second = static_cast<std::uint32_t>(ids[t + 1]) * SECOND;
    pairs[t] = mix((first ^ (first >> 15)) + second) >> shift;
  }
}

struct Ids {
  std::int64_t vocab_size;
  bool has_pad;
  std::int32_t pad;
};

// Index of the first id outside [0, vocab_size) that is not padding, or `count`.
std::size_t first_bad_id(const std::int32_t* ids, std::size_t count, const Ids& rule) {
  const auto limit = static_cast<std::uint32_t>(
      std::min<std::int64_t>(rule.vocab_size, std::numeric_limits<std::int32_t>::max()));
  for (std::size_t i = 0; i < count; ++i) {
    // The unsigned comparison also catches negative ids.
    if (static_cast<std::uint32_t>(ids[i]) >= limit && !(rule.has_pad && ids[i] == rule.pad)) {
      return i;
    }
  }
  return count;
}

bool has_padding(const std::int32_t* ids, std::size_t length, const Ids& rule) {
  return rule.has_pad && std::find(ids, ids + length, rule.pad) != ids + length;
}

// Any D, any padding; absent n-grams are skipped.
void bag_general(const float* table, std::size_t width, const std::int32_t* ids,
                 std::size_t length, const Ids& rule, const std::uint32_t* rows, double* out) {
  std::size_t present = 0;
  const auto add = [&](std::uint32_t row) {
    const float* source = table + static_cast<std::size_t>(row) * width;
    for (std::size_t d = 0; d < width; ++d) out[d] += static_cast<double>(source[d]);
    ++present;
  };
  const auto absent = [&](std::size_t t) { return rule.has_pad && ids[t] == rule.pad; };
  std::fill(out, out + width, 0.0);
  for (std::size_t t = 0; t < length; ++t) {
    if (!absent(t)) add(rows[t]);
  }
  for (std::size_t t = 0; t + 1 < length; ++t) {
    if (!absent(t) && !absent(t + 1)) add(rows[length + t]);
  }
  if (present > 0) {
    for (std::size_t d = 0; d < width; ++d) out[d] /= static_cast<double>(present);
  }
}

// D = 1 and no padding: LANES windows advance together, one accumulator each.
void bag_scalar_lanes(const float* table, std::size_t grams, const std::uint32_t* rows,
                      double* out) {
  double sums[LANES] = {};
  for (std::size_t g = 0; g < grams; ++g) {
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      sums[lane] += static_cast<double>(table[rows[lane * grams + g]]);
    }
  }
  for (std::size_t lane = 0; lane < LANES; ++lane) {
    out[lane] = sums[lane] / static_cast<double>(grams);
  }
}

void bag(const float* table, std::size_t width, const std::int32_t* windows, std::size_t count,
         std::size_t length, std::uint32_t seed, int shift, const Ids& rule,
         std::vector<std::uint32_t>& rows, double* out) {
  const std::size_t grams = 2 * length - 1;
  std::size_t w = 0;
  while (w < count) {
    const std::size_t lanes = std::min(LANES, count - w);
    const std::int32_t* ids = windows + w * length;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      hash_window(ids + lane * length, length, seed, shift, rows.data() + lane * grams);
    }
    if (width == 1 && lanes == LANES && !has_padding(ids, lanes * length, rule)) {
      bag_scalar_lanes(table, grams, rows.data(), out + w);
    } else {
      for (std::size_t lane = 0; lane < lanes; ++lane) {
        bag_general(table, width, ids + lane * length, length, rule, rows.data() + lane * grams,
                    out + (w + lane) * width);
      }
    }
    w += lanes;
  }
}

using FloatArray = py::array_t<float, py::array::c_style>;
using IdArray = py::array_t<std::int32_t, py::array::c_style>;

py::array_t<double> ngram_mean(const FloatArray& table, const IdArray& windows, int bits,
                               std::uint32_t hash_seed, std::optional<std::int32_t> pad_id,
                               std::int64_t vocab_size) {
  if (bits < 1 || bits > MAX_BITS) throw py::value_error("bits must lie in [1, 24]");
  if (vocab_size < 1) throw py::value_error("vocab_size must be positive");
  if (table.ndim() != 2 || table.shape(0) != (py::ssize_t{1} << bits) || table.shape(1) < 1) {
    throw py::value_error("table must have shape (2**bits, D) with D >= 1");
  }
  if (windows.ndim() != 2 || windows.shape(1) < 1) {
    throw py::value_error("windows must have shape (N, T) with T >= 1");
  }
  const auto width = static_cast<std::size_t>(table.shape(1));
  const auto count = static_cast<std::size_t>(windows.shape(0));
  const auto length = static_cast<std::size_t>(windows.shape(1));
  const Ids rule{vocab_size, pad_id.has_value(), pad_id.value_or(0)};
  py::array_t<double> result({static_cast<py::ssize_t>(count), static_cast<py::ssize_t>(width)});
  const float* table_data = table.data();
  const std::int32_t* window_data = windows.data();
  double* out = result.mutable_data();
  std::size_t bad = 0;
  {
    py::gil_scoped_release released;
    bad = first_bad_id(window_data, count * length, rule);
    if (bad == count * length) {
      std::vector<std::uint32_t> rows(std::min(LANES, count) * (2 * length - 1));
      bag(table_data, width, window_data, count, length, hash_seed, 32 - bits, rule, rows, out);
    }
  }
  if (bad != count * length) {
    throw py::index_error("id out of range at position " + std::to_string(bad));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_ngram_bag, module) {
  module.doc() = "Mean of hashed n-gram rows in float64; see ngram_bag.cpp.";
  module.def("ngram_mean", &ngram_mean, py::arg("table").noconvert(),
             py::arg("windows").noconvert(), py::arg("bits"), py::arg("hash_seed"),
             py::arg("pad_id"), py::arg("vocab_size"));
}
