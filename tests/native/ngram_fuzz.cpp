// Feeds bytes to the text scorer's core: every instruction set must give the bits of a naive loop.
//
//   FLAGS="-std=c++17 -ffp-contract=off -fno-sanitize-recover=all -I kernels/scorer"
//   c++ $FLAGS -fsanitize=address,undefined tests/native/ngram_fuzz.cpp && ./a.out CASES SEED
//   clang++ $FLAGS -DFUZZER -fsanitize=fuzzer,address,undefined ...   (libFuzzer's own main)
//
// The bytes choose shapes, dtype, orders, padding, the table and the ids, also ids out of range.
// The arrays are allocated to the byte, so that the sanitizers see every read beyond them.
#include <cstdio>
#include <memory>

#include "ngram_core.h"

namespace {

using namespace ngram;

// Reads on as zeros where the bytes end.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t next() { return at_ < size_ ? data_[at_++] : 0; }
  std::size_t below(std::size_t limit) { return (next() | std::size_t{next()} << 8) % limit; }
  bool left() const { return at_ < size_; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

float small_float(Bytes& bytes) { return (static_cast<int>(bytes.next()) - 128) / 16.0f; }

std::uint32_t hash(const Description& d, const std::int32_t* ids, int order) {
  const auto id = [&](int i) { return static_cast<std::uint32_t>(ids[i]); };
  if (order == 1) return portable::mix(id(0) * UNIGRAM + d.hash_seed);
  std::uint32_t first = id(0) * FIRST + portable::mix(d.hash_seed ^ BIGRAM_SEED);
  first = portable::mix((first ^ (first >> 15)) + id(1) * SECOND);
  if (order == 2) return first;
  return portable::mix((first ^ portable::mix(d.hash_seed ^ TRIGRAM_SEED)) + id(2) * THIRD);
}

double value(const Description& d, std::size_t index) {
  if (d.dtype == Dtype::int8) return static_cast<const std::int8_t*>(d.table)[index];
  if (d.dtype == Dtype::float16) {
    return float_of_half(static_cast<const std::uint16_t*>(d.table)[index]);
  }
  return static_cast<const float*>(d.table)[index];
}

double dot8(const float* weights, const std::vector<double>& values) {
  double partial[8] = {};
  for (std::size_t i = 0; i < values.size(); ++i) partial[i % 8] += weights[i] * values[i];
  double total = partial[0];
  for (int i = 1; i < 8; ++i) total += partial[i];
  return total;
}

// The definition, one n-gram and one column at a time.
float naive(const Description& d, const Padding& padding, const std::int32_t* ids,
            std::size_t length) {
  const std::size_t partials = d.width == 1 ? 16 : ROW_PARTIALS;
  std::vector<float> sums(partials * d.width, 0.0f);
  std::vector<std::int64_t> exact(d.width, 0);
  std::size_t gram = 0, present = 0;
  for (int order = 1; order <= d.orders; ++order) {
    for (std::size_t t = 0; t + order <= length; ++t, ++gram) {
      bool absent = false;
      for (int i = 0; i < order; ++i) absent |= padding.given && ids[t + i] == padding.id;
      if (absent) continue;  // adding 0.0 changes no sum: none is ever -0.0
      ++present;
      const std::size_t row = hash(d, ids + t, order) >> (32 - d.bits);
      for (std::size_t c = 0; c < d.width; ++c) {
        const double found = value(d, row * d.width + c);
        exact[c] += static_cast<std::int64_t>(d.dtype == Dtype::int8 ? found : 0);
        sums[gram % partials * d.width + c] += static_cast<float>(found);
      }
    }
  }
  std::vector<double> mean(d.width), hidden(d.hidden);
  for (std::size_t c = 0; c < d.width; ++c) {
    float total = sums[c];
    for (std::size_t p = 1; p < partials; ++p) total += sums[p * d.width + c];
    const double sum = d.dtype == Dtype::int8 ? static_cast<double>(exact[c]) : total;
    mean[c] = sum * d.scale[c] / static_cast<double>(std::max<std::size_t>(present, 1));
  }
  double score = d.bias + dot8(d.skip, mean);
  if (d.hidden == 0) return static_cast<float>(score);
  for (std::size_t h = 0; h < d.hidden; ++h) {
    hidden[h] = d.hidden_bias[h];
    for (std::size_t c = 0; c < d.width; ++c) {
      hidden[h] += d.hidden_kernel[c * d.hidden + h] * mean[c];
    }
    hidden[h] = hidden[h] > 0 ? hidden[h] : 0;
  }
  score += dot8(d.output_kernel, hidden);
  return static_cast<float>(score);
}

void expect(bool condition, const char* what, const char* isa) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", isa, what);
  std::abort();
}

std::unique_ptr<float[]> floats(Bytes& bytes, std::size_t count) {
  auto found = std::make_unique<float[]>(count);
  for (std::size_t i = 0; i < count; ++i) found[i] = small_float(bytes);
  return found;
}

void run(const std::uint8_t* data, std::size_t size) {
  static const std::size_t widths[] = {1, 1, 1, 2, 15, 16, 17, 32, 48, 64, 65, 112};
  static const std::size_t lengths[] = {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 127, 128, 129, 300};
  Bytes bytes(data, size);
  Description d{};
  d.vocab_size = bytes.next() % 4 == 0 ? std::numeric_limits<std::int32_t>::max()
                                       : static_cast<std::int64_t>(1 + bytes.below(500));
  d.hash_seed = static_cast<std::uint32_t>(bytes.below(65536)) * 65537u;
  d.bits = 1 + static_cast<int>(bytes.below(8));
  d.orders = 1 + static_cast<int>(bytes.below(3));
  d.dtype = static_cast<Dtype>(bytes.below(3));
  d.width = widths[bytes.below(std::size(widths))];
  d.hidden = bytes.next() % 2 == 0 ? 0 : 1 + bytes.below(70);
  d.bias = small_float(bytes);
  const std::size_t length = lengths[bytes.below(std::size(lengths))];
  const std::size_t count = bytes.below(6);
  const Padding padding{bytes.next() % 2 == 0, static_cast<std::int32_t>(bytes.below(8)) - 2};

  std::unique_ptr<std::int32_t[]> ids(new std::int32_t[count * length]);
  std::size_t bad = count;
  const bool wild = bytes.next() % 8 == 0;
  for (std::size_t i = 0; i < count * length; ++i) {
    const auto vocab_size = static_cast<std::size_t>(d.vocab_size);
    auto id = static_cast<std::int32_t>(bytes.below(65536) % vocab_size);
    if (wild && bytes.next() == 1) {
      // Anything, or the first id that is too large.
      id = bytes.next() % 2 == 0 ? static_cast<std::int32_t>(bytes.below(65536) << 16)
                                 : static_cast<std::int32_t>(d.vocab_size);
    }
    if (padding.given && bytes.next() % 8 == 1) id = padding.id;
    ids[i] = id;
    const bool out = id < 0 || id >= d.vocab_size;
    if (out && !(padding.given && id == padding.id)) bad = std::min(bad, i / length);
  }
  const std::size_t values = (std::size_t{1} << d.bits) * d.width;
  std::unique_ptr<char[]> table(new char[values * size_of(d.dtype)]);
  // A short pattern, repeated: a few bytes of input fill any table.
  std::uint8_t pattern[64];
  for (std::uint8_t& byte : pattern) byte = bytes.next();
  for (std::size_t i = 0; i < values; ++i) {
    const std::uint8_t a = pattern[i % 64], b = pattern[(i / 7) % 64];
    if (d.dtype == Dtype::int8) {
      table[i] = static_cast<char>(a ^ b);
    } else if (d.dtype == Dtype::float16) {
      // Any finite half, denormals and both zeros included.
      auto half = static_cast<std::uint16_t>(a << 8 | b);
      if ((half & 0x7C00) == 0x7C00) half = static_cast<std::uint16_t>(half & 0x83FF);
      std::memcpy(table.get() + 2 * i, &half, 2);
    } else {
      const float single = (static_cast<int>(a) - 128) * static_cast<float>(b + 1) / 77.0f;
      std::memcpy(table.get() + 4 * i, &single, 4);
    }
  }
  d.table = table.get();
  const auto scale = floats(bytes, d.width), skip = floats(bytes, d.width);
  const auto kernel = floats(bytes, d.width * d.hidden);
  const auto hidden_bias = floats(bytes, d.hidden), output = floats(bytes, d.hidden);
  d.scale = scale.get();
  d.skip = skip.get();
  d.hidden_kernel = kernel.get();
  d.hidden_bias = hidden_bias.get();
  d.output_kernel = output.get();

  std::vector<float> expected(bad);
  for (std::size_t w = 0; w < bad; ++w) expected[w] = naive(d, padding, &ids[w * length], length);

  const Model model(d);
  for (const Isa& isa : available_isas()) {
    std::unique_ptr<float[]> found(new float[count]);
    const std::size_t done = isa.score(model, padding, ids.get(), count, length, found.get());
    expect(done == bad, "another window was refused", isa.name);
    // Windows before the refused one may or may not have been written.
    const bool complete = done == count;
    if (!complete) {
      const std::size_t at = bad_position(model, padding, ids.get(), done, length);
      expect(at / length == bad, "the refused id lies in another window", isa.name);
      expect(ids[at] < 0 || ids[at] >= d.vocab_size, "the refused id is in range", isa.name);
      continue;
    }
    expect(count == 0 || std::memcmp(found.get(), expected.data(), count * sizeof(float)) == 0,
           "scores differ from the naive loop", isa.name);
  }
}

}  // namespace

#ifdef FUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(data, size);
  return 0;
}
#else
int main(int argc, char** argv) {
  const long cases = argc > 1 ? std::atol(argv[1]) : 1000;
  std::uint64_t state = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  state = state * 0x9E3779B97F4A7C15u + 1;  // xorshift needs a state that is not zero
  std::vector<std::uint8_t> data;
  for (long i = 0; i < cases; ++i) {
    const auto next = [&state] {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      return state;
    };
    data.resize(next() % 4096);
    for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(next() >> 32);
    run(data.data(), data.size());
  }
  std::printf("%ld cases\n", cases);
}
#endif
