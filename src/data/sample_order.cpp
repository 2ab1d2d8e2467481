#include "normformer/data/sample_order.h"

#include "normformer/core/error.h"

namespace normformer {

namespace {

// Four rounds make a pseudo-random permutation of large domains (Luby and Rackoff, 1988); small ones need
// more, and a sample's thousand tokens cost far more than these.
constexpr uint64_t kRounds = 12;

uint64_t ceil_square_root(uint64_t value) {
  uint64_t low = 1;
  uint64_t high = uint64_t{1} << 32;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (middle * middle >= value) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace

Permutation::Permutation(RandomStream stream, int64_t size)
    : stream_(stream), size_(static_cast<uint64_t>(size)) {
  NF_CHECK(size > 0, "a permutation of {} elements", size);
  left_size_ = ceil_square_root(size_);
  right_size_ = (size_ + left_size_ - 1) / left_size_;
}

uint64_t Permutation::round_value(uint64_t half, uint64_t round) const {
  const auto w = stream_.words(half, round);
  return (uint64_t{w[1]} << 32) | w[0];
}

uint64_t Permutation::permute_once(uint64_t value) const {
  uint64_t left = value / right_size_;
  uint64_t right = value % right_size_;
  for (uint64_t round = 0; round < kRounds; round += 2) {
    left = (left + round_value(right, round) % left_size_) % left_size_;
    right = (right + round_value(left, round + 1) % right_size_) % right_size_;
  }
  return left * right_size_ + right;
}

int64_t Permutation::operator()(int64_t index) const {
  NF_CHECK(index >= 0 && static_cast<uint64_t>(index) < size_, "element {} of {}", index, size_);
  uint64_t value = permute_once(static_cast<uint64_t>(index));
  while (value >= size_) value = permute_once(value);
  return static_cast<int64_t>(value);
}

SampleOrder::SampleOrder(RandomStream stream, int64_t num_samples, bool shuffled)
    : stream_(stream), num_samples_(num_samples), shuffled_(shuffled) {
  NF_CHECK(num_samples > 0, "an order of {} samples", num_samples);
}

SampleOrder SampleOrder::shuffled(RandomStream stream, int64_t num_samples) {
  return {stream, num_samples, true};
}

SampleOrder SampleOrder::sequential(int64_t num_samples) { return {RandomStream{}, num_samples, false}; }

int64_t SampleOrder::at(int64_t index) const {
  NF_CHECK(index >= 0, "place {} of an order", index);
  const int64_t within = index % num_samples_;
  if (!shuffled_) return within;
  const auto epoch = static_cast<uint64_t>(index / num_samples_);
  return Permutation(stream_.with(epoch), num_samples_)(within);
}

}  // namespace normformer
