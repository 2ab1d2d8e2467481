#include "normformer/training/explosion.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace normformer {

namespace {

bool is_full(const LossTrend& trend) {
  return static_cast<int64_t>(trend.newest.size()) >= ExplosionRule::kWindow;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

ExplosionRule explosion_rule(const RunConfig& config) {
  return {config.health.explosion_rise,
          scales_loss(config.train.precision) ? config.train.loss_scale_min : 0.0};
}

void enter_loss(const ExplosionRule& rule, LossTrend& trend, double loss) {
  if (!rule.active()) return;
  if (is_full(trend)) trend.newest.erase(trend.newest.begin());
  trend.newest.push_back(loss);
  if (is_full(trend)) trend.lowest = std::min(mean(trend.newest), trend.lowest.value_or(mean(trend.newest)));
}

double rise_of(const LossTrend& trend) {
  return is_full(trend) && trend.lowest ? mean(trend.newest) - *trend.lowest : 0.0;
}

std::string_view name_of(ExplosionReason reason) {
  switch (reason) {
    case ExplosionReason::nonfinite:
      return "nonfinite";
    case ExplosionReason::loss_scale:
      return "loss_scale";
    case ExplosionReason::rise:
      return "rise";
  }
  return "?";
}

std::optional<ExplosionReason> find_explosion(const ExplosionRule& rule, const JudgedStep& step,
                                              const LossTrend& trend) {
  if (!rule.active()) return std::nullopt;
  if (step.nonfinite || !std::isfinite(step.loss)) return ExplosionReason::nonfinite;
  if (step.overflowed && step.loss_scale < rule.loss_scale_min) return ExplosionReason::loss_scale;
  if (rise_of(trend) >= rule.rise) return ExplosionReason::rise;
  return std::nullopt;
}

}  // namespace normformer
