// The inner loops of the text scorer, compiled once per instruction set.
//
// ngram_core.h includes this file several times, each time with other NGRAM_ISA (a namespace) and
// NGRAM_FN (the target attribute of every function); hence no include guard. NGRAM_LEVEL is 0
// (portable), 2 (AVX2 and F16C) or 5 (AVX-512), NGRAM_BYTES the size of its vectors. All three give
// the same bits: integer sums are exact, and float sums follow the order that ngram_core.h defines.
//
// Vector types are compiler extensions (GCC, Clang); only gathers and float16 need intrinsics.

namespace NGRAM_ISA {

// Vectors of the size that the processor has: compilers handle larger ones through memory.
typedef float Floats __attribute__((vector_size(NGRAM_BYTES)));
typedef double Doubles __attribute__((vector_size(NGRAM_BYTES)));
constexpr int FLOATS = NGRAM_BYTES / 4, DOUBLES = NGRAM_BYTES / 8;

NGRAM_FN inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

NGRAM_FN inline std::uint32_t pair(std::int32_t a, std::int32_t b, std::uint32_t seed) {
  const std::uint32_t first = static_cast<std::uint32_t>(a) * FIRST + seed;
  return mix((first ^ (first >> 15)) + static_cast<std::uint32_t>(b) * SECOND);
}

// Rows of the unigrams, then of the bigrams, then of the trigrams.
NGRAM_LOOP void hash_window(const Model& model, const std::int32_t* __restrict ids,
                            std::size_t length, std::uint32_t* __restrict rows) {
  const std::uint32_t seed = model.hash_seed;
  const int shift = 32 - model.bits;
  for (std::size_t t = 0; t < length; ++t) {
    rows[t] = mix(static_cast<std::uint32_t>(ids[t]) * UNIGRAM + seed) >> shift;
  }
  if (model.orders < 2) return;
  const std::uint32_t bigram_seed = mix(seed ^ BIGRAM_SEED);
  std::uint32_t* __restrict pairs = rows + length;
  for (std::size_t t = 0; t + 1 < length; ++t) {
    pairs[t] = pair(ids[t], ids[t + 1], bigram_seed) >> shift;
  }
  if (model.orders < 3 || length < 3) return;
  const std::uint32_t trigram_seed = mix(seed ^ TRIGRAM_SEED);
  std::uint32_t* __restrict triples = pairs + (length - 1);
  for (std::size_t t = 0; t + 2 < length; ++t) {
    const std::uint32_t first = pair(ids[t], ids[t + 1], bigram_seed) ^ trigram_seed;
    triples[t] = mix(first + static_cast<std::uint32_t>(ids[t + 2]) * THIRD) >> shift;
  }
}

struct Seen {
  bool bad;     // an id outside [0, vocab_size) that is not padding
  bool padded;  // padding
};

NGRAM_FN Seen look(const Model& model, const Padding& padding, const std::int32_t* ids,
                   std::size_t length) {
  const auto limit = static_cast<std::uint32_t>(model.vocab_size);
  std::uint32_t bad = 0, padded = 0;
  for (std::size_t t = 0; t < length; ++t) {
    const std::uint32_t is_padding = padding.given & (ids[t] == padding.id);
    // The unsigned comparison also catches negative ids.
    bad |= (static_cast<std::uint32_t>(ids[t]) >= limit) & (is_padding ^ 1u);
    padded |= is_padding;
  }
  return {bad != 0, padded != 0};
}

// Points absent n-grams to the zero row; returns how many are present.
NGRAM_FN std::size_t drop_absent(const Model& model, std::int32_t pad, const std::int32_t* ids,
                                 std::size_t length, std::uint32_t* rows) {
  const auto zero = std::uint32_t{1} << model.bits;
  std::size_t present = 0;
  for (std::size_t order = 1; order <= static_cast<std::size_t>(model.orders); ++order) {
    for (std::size_t t = 0; t + order <= length; ++t, ++rows) {
      bool absent = false;
      for (std::size_t i = 0; i < order; ++i) absent |= ids[t + i] == pad;
      if (absent) *rows = zero;
      present += !absent;
    }
  }
  return present;
}

// Hashes a window and readies its rows for the sums; returns the number of present n-grams, or
// BAD_IDS. `rows` has room for `grams + SLACK`; the slack points to the zero row.
NGRAM_FN std::size_t prepare(const Model& model, const Padding& padding, const std::int32_t* ids,
                             std::size_t length, std::size_t grams, std::uint32_t* rows) {
  const Seen seen = look(model, padding, ids, length);
  if (seen.bad) return BAD_IDS;
  hash_window(model, ids, length, rows);
  std::fill(rows + grams, rows + grams + SLACK, std::uint32_t{1} << model.bits);
  return seen.padded ? drop_absent(model, padding.id, ids, length, rows) : grams;
}

NGRAM_FN inline void widen(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }
NGRAM_FN inline void widen(const std::uint16_t* from, Floats& to) {
#if NGRAM_LEVEL == 5
  to = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif NGRAM_LEVEL == 2
  to = (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < FLOATS; ++i) to[i] = float_of_half(from[i]);
#endif
}
NGRAM_FN inline void widen(const std::int8_t* from, Shorts16& to) {
#if NGRAM_LEVEL >= 2
  to = (Shorts16)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Bytes16 values;
  std::memcpy(&values, from, sizeof values);
  to = __builtin_convertvector(values, Shorts16);
#endif
}

// The sums are functions of their own (NGRAM_LOOP): inlined into one large function, their counters
// would live in memory.

// Width 1: one weight per n-gram. `grams` may be rounded up, the slack adds zeros.
NGRAM_LOOP std::int32_t sum_weights(const std::int8_t* table, const std::uint32_t* rows,
                                    std::size_t grams) {
#if NGRAM_LEVEL == 5
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (std::size_t g = 0; g < grams; g += 32) {
    for (int half = 0; half < 2; ++half) {
      // Four bytes at the weight's own offset; the lowest is the weight.
      const __m512i words =
          _mm512_i32gather_epi32(_mm512_loadu_si512(rows + g + 16 * half), table, 1);
      sums[half] =
          _mm512_add_epi32(sums[half], _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24));
    }
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]));
#else
  std::int32_t sums[4] = {};
  for (std::size_t g = 0; g < grams; g += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += table[rows[g + lane]];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
#endif
}

NGRAM_FN inline void gather(const std::uint16_t* table, const std::uint32_t* rows,
                            Floats& values) {
  std::uint16_t halves[FLOATS];
  for (int lane = 0; lane < FLOATS; ++lane) halves[lane] = table[rows[lane]];
  widen(halves, values);
}
NGRAM_FN inline void gather(const float* table, const std::uint32_t* rows, Floats& values) {
  for (int lane = 0; lane < FLOATS; ++lane) values[lane] = table[rows[lane]];
}

template <class Element>
NGRAM_LOOP float sum_weights(const Element* table, const std::uint32_t* rows, std::size_t grams) {
  Floats sums[16 / FLOATS] = {};
  for (std::size_t g = 0; g < grams; g += 16) {
    for (int part = 0; part < 16 / FLOATS; ++part) {
      Floats values;
      gather(table, rows + g + part * FLOATS, values);
      sums[part] += values;
    }
  }
  float total = 0.0f;
  for (int lane = 0; lane < 16; ++lane) total += sums[lane / FLOATS][lane % FLOATS];
  return total;
}

// BLOCKS blocks of 16 columns of int8 rows; exact.
template <int BLOCKS>
NGRAM_LOOP void sum_rows(const std::int8_t* table, std::size_t stride, const std::uint32_t* rows,
                         std::size_t grams, std::int32_t* sums) {
  std::fill(sums, sums + 16 * BLOCKS, 0);
  for (std::size_t start = 0; start < grams; start += 256) {
    const std::size_t stop = std::min(grams, start + 256);
    Shorts16 partial[BLOCKS] = {};  // 256 values of at most 128 fit sixteen bits
#pragma GCC unroll 8
    for (std::size_t g = start; g < stop; ++g) {
      __builtin_prefetch(table + rows[g + AHEAD] * stride);
      const std::int8_t* row = table + rows[g] * stride;
      for (int b = 0; b < BLOCKS; ++b) {
        Shorts16 values;
        widen(row + 16 * b, values);
        partial[b] += values;
      }
    }
    std::int16_t found[16 * BLOCKS];
    std::memcpy(found, partial, sizeof found);
    for (int c = 0; c < 16 * BLOCKS; ++c) sums[c] += found[c];
  }
}

// BLOCKS blocks of 16 columns of float rows: n-gram g belongs to partial sum g % ROW_PARTIALS.
template <int BLOCKS, class Element>
NGRAM_LOOP void sum_rows(const Element* table, std::size_t stride, const std::uint32_t* rows,
                         std::size_t grams, float* sums) {
  static_assert(ROW_PARTIALS == 2, "the loop below takes two n-grams a turn");
  constexpr int PARTS = 16 * BLOCKS / FLOATS;
  Floats even[PARTS] = {}, odd[PARTS] = {};
  for (std::size_t g = 0; g < grams; g += 2) {
    for (int turn = 0; turn < 2; ++turn) {
      const Element* ahead = table + rows[g + turn + AHEAD] * stride;
      for (std::size_t c = 0; c < 16 * BLOCKS; c += 64 / sizeof(Element)) {
        __builtin_prefetch(ahead + c);
      }
    }
    // An odd number of n-grams ends with the zero row.
    const std::uint32_t second = g + 1 < grams ? rows[g + 1] : rows[grams + SLACK - 1];
    for (int part = 0; part < PARTS; ++part) {
      Floats values;
      widen(table + rows[g] * stride + part * FLOATS, values);
      even[part] += values;
      widen(table + second * stride + part * FLOATS, values);
      odd[part] += values;
    }
  }
  for (int part = 0; part < PARTS; ++part) even[part] += odd[part];
  std::memcpy(sums, even, sizeof even);
}

// Any stride that is a multiple of 16.
template <class Element, class Sum>
NGRAM_FN void sum_columns(const Element* table, std::size_t stride, const std::uint32_t* rows,
                          std::size_t grams, Sum* sums) {
  std::size_t column = 0;
  for (; column + 64 <= stride; column += 64) {
    sum_rows<4>(table + column, stride, rows, grams, sums + column);
  }
  for (; column + 32 <= stride; column += 32) {
    sum_rows<2>(table + column, stride, rows, grams, sums + column);
  }
  for (; column + 16 <= stride; column += 16) {
    sum_rows<1>(table + column, stride, rows, grams, sums + column);
  }
}

// Eight partial sums, added in order.
struct Partials {
  Doubles parts[8 / DOUBLES] = {};
};

NGRAM_FN inline double in_order(const Partials& partials) {
  double total = 0.0;
  for (int lane = 0; lane < 8; ++lane) total += partials.parts[lane / DOUBLES][lane % DOUBLES];
  return total;
}

// Both operands padded with zeros to a multiple of eight.
NGRAM_FN double dot(const double* a, const double* b, std::size_t size) {
  Partials partials;
  for (std::size_t i = 0; i < size; i += 8) {
    for (int part = 0; part < 8 / DOUBLES; ++part) {
      Doubles x, y;
      std::memcpy(&x, a + i + part * DOUBLES, sizeof x);
      std::memcpy(&y, b + i + part * DOUBLES, sizeof y);
      partials.parts[part] += x * y;
    }
  }
  return in_order(partials);
}

// `8 * BLOCKS` hidden units from `unit` on, through relu and the output kernel.
template <int BLOCKS>
NGRAM_LOOP void hidden_units(const Model& model, const double* mean, std::size_t unit,
                             Partials& partials) {
  constexpr int PARTS = 8 * BLOCKS / DOUBLES;
  const std::size_t hidden = model.hidden_bias.size();
  Doubles units[PARTS];
  std::memcpy(units, model.hidden_bias.data() + unit, sizeof units);
  for (std::size_t d = 0; d < model.width; ++d) {
    const double* kernel = model.hidden_kernel.data() + d * hidden + unit;
    for (int part = 0; part < PARTS; ++part) {
      Doubles weights;
      std::memcpy(&weights, kernel + part * DOUBLES, sizeof weights);
      units[part] += weights * mean[d];
    }
  }
  for (int part = 0; part < PARTS; ++part) {
    Doubles weights;
    std::memcpy(&weights, model.output_kernel.data() + unit + part * DOUBLES, sizeof weights);
    partials.parts[part % (8 / DOUBLES)] +=
        (units[part] > 0.0 ? units[part] : Doubles{}) * weights;
  }
}

template <class Sum>
NGRAM_FN float head(const Model& model, const Sum* sums, std::size_t present, double* mean) {
  const double count = present > 0 ? static_cast<double>(present) : 1.0;
  if (model.width == 1 && model.hidden_bias.empty()) {
    // What the general form below comes to; a partial sum starts at 0.0 and is never -0.0.
    const double only = static_cast<double>(sums[0]) * model.scale[0] / count;
    return static_cast<float>(model.bias + (0.0 + model.skip[0] * only));
  }
  for (std::size_t d = 0; d < model.width; ++d) {
    mean[d] = static_cast<double>(sums[d]) * model.scale[d] / count;
  }
  double score = model.bias + dot(model.skip.data(), mean, model.skip.size());
  const std::size_t hidden = model.hidden_bias.size();
  if (hidden > 0) {
    Partials partials;
    std::size_t unit = 0;
    for (; unit + 32 <= hidden; unit += 32) hidden_units<4>(model, mean, unit, partials);
    for (; unit < hidden; unit += 8) hidden_units<1>(model, mean, unit, partials);
    score += in_order(partials);
  }
  return static_cast<float>(score);
}

#if NGRAM_LEVEL == 5
NGRAM_FN inline __m512i constant(std::uint32_t value) {
  return _mm512_set1_epi32(static_cast<int>(value));
}

NGRAM_FN inline __m512i mix(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, constant(0x7FEB352Du));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, constant(0x846CA68Bu));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// The default scorer (width 1, int8, bigrams): sixteen tokens are hashed and their weights read at
// once, so that hashing goes on while the processor waits for the table. Stops before padding and
// bad ids; `done` is the number of tokens whose n-grams are in the sum.
NGRAM_LOOP std::int32_t sum_tokens(const Model& model, const Padding& padding,
                                   const std::int32_t* ids, std::size_t length,
                                   std::size_t& done) {
  const auto* table = static_cast<const std::int8_t*>(model.table);
  const __m128i shift = _mm_cvtsi32_si128(32 - model.bits);
  const __m512i seed = constant(model.hash_seed);
  const __m512i bigram_seed = constant(mix(model.hash_seed ^ BIGRAM_SEED));
  const __m512i limit = constant(static_cast<std::uint32_t>(model.vocab_size));
  const __m512i pad = _mm512_set1_epi32(padding.id);
  const __mmask16 look_for_pad = padding.given ? 0xFFFF : 0;
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  std::size_t t = 0;
  for (; t < length; t += 16) {
    const std::size_t left = length - t;
    // Lanes whose unigram, and whose bigram, lie in the window.
    const auto now = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1);
    const auto next = static_cast<__mmask16>(left > 16 ? 0xFFFF : (1u << (left - 1)) - 1);
    const __m512i ids_now = _mm512_maskz_loadu_epi32(now, ids + t);
    const __m512i ids_next = _mm512_maskz_loadu_epi32(next, ids + t + 1);
    const unsigned stop = _mm512_mask_cmpge_epu32_mask(now, ids_now, limit) |
                          _mm512_mask_cmpeq_epi32_mask(now & look_for_pad, ids_now, pad) |
                          _mm512_mask_cmpeq_epi32_mask(next & look_for_pad, ids_next, pad);
    if (stop != 0) break;
    __m512i hashes[2];
    hashes[0] = mix(_mm512_add_epi32(_mm512_mullo_epi32(ids_now, constant(UNIGRAM)), seed));
    __m512i first = _mm512_add_epi32(_mm512_mullo_epi32(ids_now, constant(FIRST)), bigram_seed);
    first = _mm512_xor_si512(first, _mm512_srli_epi32(first, 15));
    hashes[1] = mix(_mm512_add_epi32(first, _mm512_mullo_epi32(ids_next, constant(SECOND))));
    for (int n = 0; n < 2; ++n) {
      const __m512i words = _mm512_mask_i32gather_epi32(
          _mm512_setzero_si512(), n == 0 ? now : next, _mm512_srl_epi32(hashes[n], shift), table,
          1);
      sums[n] = _mm512_add_epi32(sums[n], _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24));
    }
  }
  done = std::min(t, length);
  return _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]));
}

NGRAM_FN std::size_t score_weights(const Model& model, const Padding& padding,
                                   const std::int32_t* windows, std::size_t count,
                                   std::size_t length, float* out) {
  const std::unique_ptr<std::uint32_t[]> rows(
      new std::uint32_t[count_ngrams(length, model.orders) + SLACK]);
  std::vector<double> mean(model.skip.size(), 0.0);
  for (std::size_t w = 0; w < count; ++w) {
    const std::int32_t* ids = windows + w * length;
    std::size_t done = 0;
    std::int32_t sum = sum_tokens(model, padding, ids, length, done);
    std::size_t present = done < length ? 2 * done : 2 * length - 1;
    if (done < length) {
      // The n-grams that start in the rest of the window are those of the rest by itself.
      const std::size_t grams = count_ngrams(length - done, model.orders);
      const std::size_t found =
          prepare(model, padding, ids + done, length - done, grams, rows.get());
      if (found == BAD_IDS) return w;
      present += found;
      sum += sum_weights(static_cast<const std::int8_t*>(model.table), rows.get(), grams);
    }
    out[w] = head(model, &sum, present, mean.data());
  }
  return count;
}
#endif

template <class Element, class Sum>
NGRAM_FN std::size_t score_as(const Model& model, const Padding& padding,
                              const std::int32_t* windows, std::size_t count, std::size_t length,
                              float* out) {
  const auto* table = static_cast<const Element*>(model.table);
  const std::size_t grams = count_ngrams(length, model.orders);
  // `new` leaves the memory as it is: zeroing it would take as long as hashing a window.
  const std::unique_ptr<std::uint32_t[]> rows(new std::uint32_t[2 * (grams + SLACK)]);
  std::vector<Sum> sums(model.stride);
  std::vector<double> mean(model.skip.size(), 0.0);
  std::uint32_t* current = rows.get();
  std::uint32_t* next = current + grams + SLACK;
  std::size_t present = count > 0 ? prepare(model, padding, windows, length, grams, current) : 0;
  for (std::size_t w = 0; w < count; ++w) {
    if (present == BAD_IDS) return w;
    std::size_t following = 0;
    if (w + 1 < count) {
      following = prepare(model, padding, windows + (w + 1) * length, length, grams, next);
    }
    if (model.stride == 1) {
      sums[0] = sum_weights(table, current, grams);
    } else {
      if (w + 1 < count && following != BAD_IDS) {
        // The last rows of this window prefetch the first ones of the next.
        std::memcpy(current + grams, next, AHEAD * sizeof *next);
      }
      sum_columns(table, model.stride, current, grams, sums.data());
    }
    out[w] = head(model, sums.data(), present, mean.data());
    std::swap(current, next);
    present = following;
  }
  return count;
}

// Scores `count` windows; returns `count`, or the first window with an id out of range.
NGRAM_FN std::size_t score(const Model& model, const Padding& padding,
                           const std::int32_t* windows, std::size_t count, std::size_t length,
                           float* out) {
  switch (model.dtype) {
    case Dtype::int8:
#if NGRAM_LEVEL == 5
      if (model.width == 1 && model.orders == 2) {
        return score_weights(model, padding, windows, count, length, out);
      }
#endif
      return score_as<std::int8_t, std::int32_t>(model, padding, windows, count, length, out);
    case Dtype::float16:
      return score_as<std::uint16_t, float>(model, padding, windows, count, length, out);
    default:
      return score_as<float, float>(model, padding, windows, count, length, out);
  }
}

}  // namespace NGRAM_ISA

#undef NGRAM_ISA
#undef NGRAM_FN
#undef NGRAM_LEVEL
#undef NGRAM_BYTES
