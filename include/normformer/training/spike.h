#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "normformer/config/run_config.h"

namespace normformer {

/// What makes a batch a spike: a loss or a gradient norm far above those of the batches before it.
struct SpikeRule {
  double zscore = 0.0;   ///< robust standard deviations above the median; 0: nothing is a spike
  int64_t window = 128;  ///< batches that are compared with

  bool active() const { return zscore > 0.0; }
};

/// The rule that a configuration asks for.
SpikeRule spike_rule(const HealthConfig& health);

/// The batches that the next one is compared with, oldest first. All of it is part of a checkpoint.
struct RecentBatches {
  std::vector<double> losses;
  std::vector<double> gradient_norms;  ///< of the same batches
  bool operator==(const RecentBatches&) const = default;
};

/// How far a batch's numbers lie above those before it, in robust standard deviations.
struct SpikeScores {
  double loss = 0.0;
  double gradient_norm = 0.0;
  int64_t batches = 0;  ///< that it was compared with
  bool operator==(const SpikeScores&) const = default;
};

/// (value - median) / s, where s is 1.4826 times the median of the values' distances from their median: what
/// the standard deviation of normal values is (Hampel 1974). s is taken to be at least a thousandth of the
/// median's size, since values that are all but the same tell nothing. A median of an even number is the mean
/// of the middle two. `values` has one at least.
double robust_zscore(std::span<const double> values, double value);

/// A batch's scores; none before a quarter of the window is there. Both numbers are finite.
std::optional<SpikeScores> spike_scores(const SpikeRule& rule, const RecentBatches& recent, double loss,
                                        double gradient_norm);

/// Whether either score is above the rule's: a fall is no spike.
bool is_spike(const SpikeRule& rule, const SpikeScores& scores);

/// What stands at the start, or goes on from `saved`: the newest of it that the rule has use for.
RecentBatches start_recent(const SpikeRule& rule, RecentBatches saved);

/// Adds a batch that was accepted; the oldest goes where the window is full.
void enter_batch(const SpikeRule& rule, RecentBatches& recent, double loss, double gradient_norm);

}  // namespace normformer
