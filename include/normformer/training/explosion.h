#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "normformer/config/run_config.h"

namespace normformer {

/// What ends a stability test: a run whose learning rate rises until training explodes (NormFormer, Shleifer
/// et al. 2021, figure 5, which does not say by which rule).
struct ExplosionRule {
  double rise = 0.0;  ///< of the smoothed loss above its lowest, in nats; 0: nothing is an explosion
  double loss_scale_min = 0.0;  ///< fp16: a scale below this is an explosion

  static constexpr int64_t kWindow = 5;  ///< updates whose losses are averaged: one spike is no explosion

  bool active() const { return rise > 0.0; }
};

/// The rule that a configuration asks for.
ExplosionRule explosion_rule(const RunConfig& config);

/// Where the smoothed loss stands and stood. All of it is part of a checkpoint.
struct LossTrend {
  std::vector<double> newest;    ///< losses of the newest updates, oldest first, at most a window of them
  std::optional<double> lowest;  ///< of the means over a window; none before one is full
  bool operator==(const LossTrend&) const = default;
};

/// Enters the loss of an update that was made.
void enter_loss(const ExplosionRule& rule, LossTrend& trend, double loss);

/// The mean over a full window less the lowest such mean, in nats; 0 before a window is full.
double rise_of(const LossTrend& trend);

/// Why a run counts as exploded.
enum class ExplosionReason {
  nonfinite,   ///< its loss, or without a loss scale a gradient, was not finite
  loss_scale,  ///< overflows drove the loss scale below the least
  rise,        ///< its smoothed loss rose
};

/// "nonfinite", "loss_scale", "rise".
std::string_view name_of(ExplosionReason reason);

/// What is judged of a step; the same on every rank.
struct JudgedStep {
  double loss = 0.0;
  bool nonfinite = false;   ///< it was skipped because a number without a scale was not finite
  bool overflowed = false;  ///< it was skipped because one with a scale was not
  double loss_scale = 1.0;  ///< behind it
};

/// Whether a run has exploded with this step, which `trend` holds if its update was made.
std::optional<ExplosionReason> find_explosion(const ExplosionRule& rule, const JudgedStep& step,
                                              const LossTrend& trend);

}  // namespace normformer
