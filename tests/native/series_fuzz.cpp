// Compares the series kernels with a naive loop on random windows, bit for bit.
//
//   c++ -std=c++17 -O1 -fsanitize=address,undefined -ffp-contract=off -I kernels/scorer ...
//   ./series_fuzz CASES SEED
//
// Every supported instruction set runs every case: shapes from 1 x 1 up, NaN and inf patterns,
// constants, steps, subnormal and huge values. Exits 1 with the case at the first difference, and
// where a statistic or a score is not finite.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "series_stats.h"

namespace {

struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  std::size_t below(std::size_t n) { return next() % n; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
};

double ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }
double clip(double a, double low, double high) { return std::min(std::max(a, low), high); }
double log2_linear(double a, double floor) {
  int exponent = 0;
  const double fraction = std::frexp(std::max(a, floor), &exponent);
  return (exponent - 1.0) + (2.0 * fraction - 1.0);
}

// One series at a time, straight from the definition in kernels/scorer/series.py.
void naive(const std::vector<float>& raw, float* out) {
  const std::size_t length = raw.size();
  std::vector<double> x(length), d(length);
  std::vector<bool> seen(length);
  double observed = 0, sum = 0, low = 0, high = 0, times = 0, squares = 0;
  for (std::size_t t = 0; t < length; ++t) {
    seen[t] = std::isfinite(raw[t]);
    if (!seen[t]) continue;
    x[t] = raw[t] + 0.0;
    low = observed == 0 ? x[t] : std::min(low, x[t]);
    high = observed == 0 ? x[t] : std::max(high, x[t]);
    observed += 1;
    sum += x[t];
    times += static_cast<double>(t);
    squares += static_cast<double>(t) * static_cast<double>(t);
  }
  const double count = std::max(observed, 1.0), mean = sum / count;
  const auto together = [&](std::size_t lag) {
    double pairs = 0;
    for (std::size_t t = lag; t < length; ++t) pairs += seen[t] && seen[t - lag] ? 1 : 0;
    return std::max(pairs, 1.0);
  };
  double path = 0, step = 0, still = 0, run = 0, longest = 0;
  for (std::size_t t = 1; t < length; ++t) {
    const bool both = seen[t] && seen[t - 1];
    const double size = both ? std::fabs(x[t] - x[t - 1]) : 0.0;
    path += size;
    step = std::max(step, size);
    run = both && size == 0.0 ? run + 1 : 0;
    still += both && size == 0.0 ? 1 : 0;
    longest = std::max(longest, run);
  }
  const double roughness = path / together(1);

  double energy = 0, lopsided = 0, fourth = 0, drift = 0, loudest = 0;
  for (std::size_t t = 0; t < length; ++t) {
    d[t] = seen[t] ? x[t] - mean : 0.0;
    energy += d[t] * d[t];
    lopsided += d[t] * std::fabs(d[t]);
    fourth += (d[t] * d[t]) * (d[t] * d[t]);
    drift += static_cast<double>(t) * d[t];
  }
  for (std::size_t block = 0; block < 8; ++block) {
    double here = 0;
    for (std::size_t t = block * length / 8; t < (block + 1) * length / 8; ++t) here += d[t] * d[t];
    loudest = std::max(loudest, here);
  }
  const double variance = energy / count, deviation = std::sqrt(variance);
  std::vector<double> found = {observed / static_cast<double>(length), mean, 0, low, high};
  found.push_back(log2_linear(deviation, 0x1p-149));
  found.push_back(log2_linear(ratio(roughness, deviation), 0x1p-20));
  found.push_back(log2_linear(ratio(step, roughness), 1.0));
  found.push_back(still / together(1));
  found.push_back(longest / std::max(static_cast<double>(length) - 1.0, 1.0));
  found.push_back(ratio(lopsided, energy));
  found.push_back(log2_linear(ratio(fourth / count, variance * variance), 1.0));
  found.push_back(ratio(loudest, energy));
  const double spread_of_time = squares - times * times / count;
  const double joint = std::sqrt(std::max(energy * spread_of_time, 0.0));
  found.push_back(clip(ratio(drift, joint), -1.0, 1.0));
  for (const std::size_t lag : {1, 2, 4, 8}) {
    double product = 0;
    for (std::size_t t = lag; t < length; ++t) product += d[t] * d[t - lag];
    found.push_back(clip(ratio(product / together(lag), variance), -1.0, 1.0));
  }
  std::vector<double> sums = d;
  double weight = 1.0;
  for (std::size_t scale = 0; scale < 6; ++scale) {
    weight *= 0.5;
    double detail = 0;
    std::vector<double> parents(sums.size() / 2);
    for (std::size_t i = 0; i < parents.size(); ++i) {
      const double difference = sums[2 * i + 1] - sums[2 * i];
      detail += difference * difference;
      parents[i] = sums[2 * i] + sums[2 * i + 1];
    }
    sums = parents;
    found.push_back(log2_linear(ratio(detail * weight, energy), 0x1p-20));
  }
  const double r1 = found[14], r2 = found[15];
  const double second = clip(ratio(r2 - r1 * r1, 1.0 - r1 * r1), -1.0, 1.0);
  const double first = r1 * (1.0 - second);
  double cut = 0, residual = 0, worst = 0, triples = 0;
  for (std::size_t t = 0; t < length; ++t) cut += clip(d[t], -deviation, deviation);
  for (std::size_t t = 2; t < length; ++t) {
    if (!seen[t] || !seen[t - 1] || !seen[t - 2]) continue;
    const double error = d[t] - first * d[t - 1] - second * d[t - 2];
    residual += error * error;
    worst = std::max(worst, error * error);
    triples += 1;
  }
  const double unexplained = residual / std::max(triples, 1.0);
  found[2] = mean + cut / count;
  found.push_back(log2_linear(ratio(unexplained, variance), 0x1p-20));
  found.push_back(log2_linear(ratio(worst, std::max(unexplained, variance * 0x1p-20)), 1.0));
  for (std::size_t i = 0; i < found.size(); ++i) out[i] = static_cast<float>(found[i]);
}

float naive_score(const series::Head& head, const float* statistics) {
  double score = head.bias;
  std::vector<double> z(head.features()), hidden = head.hidden_bias;
  for (std::size_t f = 0; f < z.size(); ++f) {
    z[f] = clip((statistics[f] - head.center[f]) / head.scale[f], -8.0, 8.0);
    score += z[f] * head.skip[f];
    for (std::size_t h = 0; h < hidden.size(); ++h) {
      hidden[h] += z[f] * head.kernel[f * hidden.size() + h];
    }
  }
  for (std::size_t h = 0; h < hidden.size(); ++h) {
    score += std::max(hidden[h], 0.0) * head.output[h];
  }
  constexpr double limit = std::numeric_limits<float>::max();
  return static_cast<float>(clip(score, -limit, limit));
}

std::vector<float> random_windows(Random& random, std::size_t count, std::size_t length,
                                  std::size_t channels) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr double scales[] = {1.0, 1e-44, 1e-20, 1e6, 1e30, 3.4e38};
  std::vector<float> windows(count * length * channels);
  const double scale = scales[random.below(6)], missing = random.below(2) * random.uniform();
  const std::size_t shape = random.below(4);
  double level = 0.0;
  for (float& value : windows) {
    const double noise = 2.0 * random.uniform() - 1.0;
    level = shape == 0 ? 0.75 : shape == 1 ? std::round(2.0 * noise) : noise;
    if (shape == 3 && random.below(8) != 0) level = 0.0;
    value = static_cast<float>(level * scale);
    if (random.uniform() < missing) {
      const std::size_t kind = random.below(4);
      value = kind == 0 ? infinity : kind == 1 ? -infinity : std::nanf("");
    }
    if (random.below(64) == 0) value = -0.0f;
  }
  return windows;
}

series::Head random_head(Random& random, std::size_t features) {
  const auto fill = [&](std::size_t size, double low, double high) {
    std::vector<double> values(size);
    for (double& value : values) {
      value = static_cast<float>(low + (high - low) * random.uniform());
    }
    return values;
  };
  const std::size_t hidden = random.below(3) * series::Head::COLUMNS;
  const double large = random.below(8) == 0 ? 3e38 : 1.0;
  series::Head head;
  head.center = fill(features, -1, 1);
  head.scale = fill(features, 1e-3, 2);
  head.skip = fill(features, -large, large);
  head.kernel = fill(features * hidden, -large, large);
  head.hidden_bias = fill(hidden, -1, 1);
  head.output = fill(hidden, -large, large);
  head.bias = random.uniform();
  return head;
}

bool same(const char* what, series::Isa isa, std::size_t number, const std::vector<float>& expected,
          const std::vector<float>& found) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::isfinite(found[i]) && std::memcmp(&expected[i], &found[i], sizeof(float)) == 0) {
      continue;
    }
    std::printf("case %zu, isa %d: %s %zu is %a, expected %a\n", number, static_cast<int>(isa),
                what, i, static_cast<double>(found[i]), static_cast<double>(expected[i]));
    return false;
  }
  return true;
}

bool run(Random& random, std::size_t number) {
  constexpr std::size_t width = series::STATISTICS;
  const std::size_t count = random.below(4), channels = 1 + random.below(11);
  const std::size_t length = 1 + random.below(random.below(4) == 0 ? 200 : 20);
  const std::vector<float> windows = random_windows(random, count, length, channels);
  const series::Head head = random_head(random, channels * width);

  std::vector<float> expected(count * channels * width), expected_scores(count);
  for (std::size_t w = 0; w < count; ++w) {
    for (std::size_t c = 0; c < channels; ++c) {
      std::vector<float> one(length);
      for (std::size_t t = 0; t < length; ++t) {
        one[t] = windows[(w * length + t) * channels + c];
      }
      naive(one, &expected[(w * channels + c) * width]);
    }
    expected_scores[w] = naive_score(head, &expected[w * channels * width]);
  }
  for (const auto isa : {series::Isa::portable, series::Isa::avx2, series::Isa::avx512}) {
    if (!series::supported(isa)) continue;
    std::vector<float> found(expected.size()), scores(count);
    series::Scratch scratch(length);
    series::statistics(windows.data(), count, length, channels, isa, scratch, found.data());
    series::scores(windows.data(), count, length, channels, head, isa, scores.data());
    if (!same("statistic", isa, number, expected, found)) return false;
    if (!same("score", isa, number, expected_scores, scores)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2000;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  Random random{(seed * 0x9E3779B97F4A7C15u) | 1};
  for (std::size_t number = 0; number < cases; ++number) {
    if (!run(random, number)) return 1;
  }
  std::printf("%zu cases agree\n", cases);
  return 0;
}
