#include "normformer/training/spike.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr double kOfNormal = 1.4826;  // 1 / the 0.75 quantile of the standard normal distribution
constexpr double kLeastSpread = 1e-3;

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return 0.5 * (*std::max_element(values.begin(), middle) + *middle);
}

void keep_newest(std::vector<double>& values, int64_t most) {
  const auto excess = static_cast<int64_t>(values.size()) - most;
  if (excess > 0) values.erase(values.begin(), values.begin() + excess);
}

}  // namespace

SpikeRule spike_rule(const HealthConfig& health) { return {health.spike_zscore, health.spike_window}; }

double robust_zscore(std::span<const double> values, double value) {
  NF_CHECK(!values.empty(), "a value is compared with none");
  const double middle = median({values.begin(), values.end()});
  std::vector<double> distances;
  for (const double v : values) distances.push_back(std::abs(v - middle));
  const double spread = kOfNormal * median(std::move(distances));
  const double least = std::max(kLeastSpread * std::abs(middle), std::numeric_limits<double>::min());
  return (value - middle) / std::max(spread, least);
}

std::optional<SpikeScores> spike_scores(const SpikeRule& rule, const RecentBatches& recent, double loss,
                                        double gradient_norm) {
  if (!rule.active() || 4 * static_cast<int64_t>(recent.losses.size()) < rule.window) return std::nullopt;
  return SpikeScores{robust_zscore(recent.losses, loss), robust_zscore(recent.gradient_norms, gradient_norm),
                     static_cast<int64_t>(recent.losses.size())};
}

bool is_spike(const SpikeRule& rule, const SpikeScores& scores) {
  return rule.active() && std::max(scores.loss, scores.gradient_norm) > rule.zscore;
}

RecentBatches start_recent(const SpikeRule& rule, RecentBatches saved) {
  const int64_t most = rule.active() ? rule.window : 0;
  keep_newest(saved.losses, most);
  keep_newest(saved.gradient_norms, most);
  return saved;
}

void enter_batch(const SpikeRule& rule, RecentBatches& recent, double loss, double gradient_norm) {
  if (!rule.active()) return;
  recent.losses.push_back(loss);
  recent.gradient_norms.push_back(gradient_norm);
  recent = start_recent(rule, std::move(recent));
}

}  // namespace normformer
