#include "normformer/data/blend.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <fmt/format.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

__extension__ using Wide = unsigned __int128;

/// round(n * part / whole), halves up: it rises by 0 or 1 for each n as part <= whole.
int64_t rounded_share(int64_t n, uint64_t part, uint64_t whole) {
  return static_cast<int64_t>((2 * Wide{static_cast<uint64_t>(n)} * part + whole) / (2 * Wide{whole}));
}

}  // namespace

Blend::Blend(std::span<const double> weights) {
  if (weights.empty()) throw ConfigError("a blend needs at least one dataset");
  for (const double weight : weights) {
    if (!std::isfinite(weight) || weight <= 0) {
      throw ConfigError(
          fmt::format("a dataset's weight must be above 0, not {}; leave a dataset out that is "
                      "not wanted",
                      weight));
    }
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  // 40 bits for the largest keep every product with a 64-bit count inside of 128 bits.
  for (const double weight : weights) {
    shares_.push_back(std::max<uint64_t>(1, static_cast<uint64_t>(std::llround(weight / largest * 0x1p40))));
  }
}

uint64_t Blend::share(int64_t begin, int64_t end) const {
  return std::accumulate(shares_.begin() + begin, shares_.begin() + end, uint64_t{0});
}

BlendTurn Blend::turn(int64_t index) const {
  NF_CHECK(index >= 0, "sample {} of a blend", index);
  int64_t begin = 0;
  int64_t end = num_datasets();
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    const uint64_t left = share(begin, middle);
    const uint64_t whole = share(begin, end);
    const int64_t went_left = rounded_share(index, left, whole);
    if (rounded_share(index + 1, left, whole) > went_left) {
      end = middle;
      index = went_left;
    } else {
      begin = middle;
      index -= went_left;
    }
  }
  return {begin, index};
}

int64_t Blend::count(int64_t dataset, int64_t samples) const {
  NF_CHECK(dataset >= 0 && dataset < num_datasets(), "dataset {} of {}", dataset, num_datasets());
  NF_CHECK(samples >= 0, "{} samples of a blend", samples);
  int64_t begin = 0;
  int64_t end = num_datasets();
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    const int64_t went_left = rounded_share(samples, share(begin, middle), share(begin, end));
    if (dataset < middle) {
      end = middle;
      samples = went_left;
    } else {
      begin = middle;
      samples -= went_left;
    }
  }
  return samples;
}

}  // namespace normformer
