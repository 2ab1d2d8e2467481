#include "normformer/training/learning_rate.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace normformer {

namespace {

// How much of lr - min_lr is left at a fraction of the decay.
double remaining(const OptimizerConfig& optimizer, double progress) {
  switch (optimizer.decay) {
    case DecayStyle::constant:
      return 1.0;
    case DecayStyle::linear:
      return 1.0 - progress;
    case DecayStyle::cosine:
      return 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
    case DecayStyle::polynomial:
      return std::pow(1.0 - progress, optimizer.decay_power);
  }
  return 1.0;
}

}  // namespace

double learning_rate(const OptimizerConfig& optimizer, int64_t updates, int64_t update) {
  const int64_t warmup = optimizer.warmup_updates;
  if (update <= warmup) return optimizer.lr * static_cast<double>(update) / static_cast<double>(warmup);
  const int64_t end = optimizer.decay_updates > 0 ? optimizer.decay_updates : updates;
  const double span = static_cast<double>(std::max<int64_t>(1, end - warmup));
  const double progress = std::min(1.0, static_cast<double>(update - warmup) / span);
  return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * remaining(optimizer, progress);
}

}  // namespace normformer
