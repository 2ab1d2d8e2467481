#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace normformer {

/// Whose turn it is when several datasets are mixed by weight.
struct BlendTurn {
  int64_t dataset = 0;
  int64_t index = 0;  ///< how many samples this dataset gave before
  bool operator==(const BlendTurn&) const = default;
};

/// The rule by which samples of several datasets are mixed: a pure function of the global sample index, in
/// O(log datasets), without a table or a history.
///
/// The datasets are the leaves of a balanced binary tree. At each node the samples go left and right in
/// turn, the left side having had round(n·w_left / (w_left + w_right)) of the first n: the most even mix of
/// two sides, in which the one that lags most is always next. After n samples a dataset has had its share of
/// n to within half a sample for each level of the tree.
class Blend {
 public:
  /// One weight above zero for each dataset; only their ratios matter. Throws ConfigError.
  explicit Blend(std::span<const double> weights);

  int64_t num_datasets() const { return static_cast<int64_t>(shares_.size()); }
  /// Whose turn global sample `index` >= 0 is. Every (dataset, index) pair comes up exactly once.
  BlendTurn turn(int64_t index) const;
  /// How many of the first `samples` samples dataset `dataset` gives.
  int64_t count(int64_t dataset, int64_t samples) const;

 private:
  uint64_t share(int64_t begin, int64_t end) const;

  std::vector<uint64_t> shares_;  ///< whole numbers in the ratio of the weights
};

}  // namespace normformer
