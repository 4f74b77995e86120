// How fast this core reads rows at random addresses: the limit of any scorer that looks tokens up.
//
//   gather_limit TABLE_BYTES ROW_BYTES ROWS REPEATS  ->  nanoseconds per row, best repetition
//
// Row numbers are drawn beforehand (streamed, as a scorer's hashes are), rows of 16 bytes and more
// are added into vector registers, single bytes are summed with eight independent accumulators.
// Three ways of hiding latency are tried and the best counts: none, and prefetching 16 or 48 rows
// ahead. Tables of 8 MiB and more lie in 2 MiB pages where the system grants them.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

typedef std::int8_t Vector16 __attribute__((vector_size(16)));

template <int Ahead>
std::int64_t read_vectors(const std::int8_t* table, std::size_t width,
                          const std::vector<std::uint32_t>& rows, std::size_t count) {
  Vector16 sums[8] = {};
  const std::size_t parts = width / 16;
  for (std::size_t i = 0; i < count; ++i) {
    if (Ahead > 0) __builtin_prefetch(table + rows[i + Ahead] * width);
    const std::int8_t* row = table + rows[i] * width;
    for (std::size_t part = 0; part < parts; ++part) {
      Vector16 value;
      std::memcpy(&value, row + 16 * part, 16);
      sums[part % 8] += value;
    }
  }
  std::int64_t total = 0;
  for (const Vector16& sum : sums) {
    for (int lane = 0; lane < 16; ++lane) total += sum[lane];
  }
  return total;
}

template <int Ahead>
std::int64_t read_bytes(const std::int8_t* table, const std::vector<std::uint32_t>& rows,
                        std::size_t count) {
  std::int64_t sums[8] = {};
  for (std::size_t i = 0; i + 8 <= count; i += 8) {
    if (Ahead > 0) {
      for (int lane = 0; lane < 8; ++lane) __builtin_prefetch(table + rows[i + Ahead + lane]);
    }
    for (int lane = 0; lane < 8; ++lane) sums[lane] += table[rows[i + lane]];
  }
  std::int64_t total = 0;
  for (const std::int64_t sum : sums) total += sum;
  return total;
}

template <int Ahead>
std::int64_t read_rows(const std::int8_t* table, std::size_t width,
                       const std::vector<std::uint32_t>& rows, std::size_t count) {
  return width == 1 ? read_bytes<Ahead>(table, rows, count)
                    : read_vectors<Ahead>(table, width, rows, count);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: gather_limit TABLE_BYTES ROW_BYTES ROWS REPEATS\n");
    return 2;
  }
  const std::size_t bytes = std::strtoull(argv[1], nullptr, 10);
  const std::size_t width = std::strtoull(argv[2], nullptr, 10);
  const std::size_t count = std::strtoull(argv[3], nullptr, 10);
  const int repeats = std::atoi(argv[4]);
  if ((width != 1 && (width % 16 != 0 || width == 0)) || bytes < width || count < 8 ||
      repeats < 1) {
    std::fprintf(stderr, "ROW_BYTES must be 1 or a multiple of 16, TABLE_BYTES at least a row\n");
    return 2;
  }
  const std::size_t huge = std::size_t{2} << 20;
  auto* table = static_cast<std::int8_t*>(std::aligned_alloc(huge, (bytes + huge - 1) / huge * huge));
  if (table == nullptr) return 1;
  if (bytes >= 4 * huge) madvise(table, bytes, MADV_HUGEPAGE);
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  const auto next = [&] {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  };
  for (std::size_t i = 0; i < bytes; ++i) table[i] = static_cast<std::int8_t>(next());
  std::vector<std::uint32_t> rows(count + 64);
  for (auto& row : rows) row = static_cast<std::uint32_t>(next() % (bytes / width));
  double best = 1e30;
  std::int64_t total = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int way = 0; way < 3; ++way) {
      const auto began = std::chrono::steady_clock::now();
      total += way == 0   ? read_rows<0>(table, width, rows, count)
               : way == 1 ? read_rows<16>(table, width, rows, count)
                          : read_rows<48>(table, width, rows, count);
      const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - began;
      best = std::min(best, taken.count() / static_cast<double>(count));
    }
  }
  std::printf("%.6f %lld\n", best, static_cast<long long>(total));
  return 0;
}
