#include "normformer/training/loss_scale.h"

#include <algorithm>

#include "normformer/core/checked.h"

namespace normformer {

LossScaleRule loss_scale_rule(const TrainConfig& config) {
  if (!scales_loss(config.precision)) return {};
  constexpr int64_t kMicroBatches = 1 << 14;
  const int64_t of_batch = ceil_div(config.global_batch, config.micro_batch);
  const int64_t window = config.loss_scale_window > 0 ? config.loss_scale_window : kMicroBatches / of_batch;
  return {
      .init = config.loss_scale_init, .window = std::max<int64_t>(1, window), .min = config.loss_scale_min};
}

LossScale start_loss_scale(const LossScaleRule& rule, const LossScale& saved) {
  if (!rule.active()) return {};
  if (saved.value > 0.0) return saved;
  return {.value = rule.init};
}

LossScale next_loss_scale(const LossScaleRule& rule, const LossScale& now, bool overflowed) {
  if (!rule.active()) return now;
  LossScale next = now;
  if (overflowed) {
    next.value /= 2.0;
    next.clean_updates = 0;
    next.overflows += 1;
  } else if (++next.clean_updates >= rule.window) {
    next.value *= 2.0;
    next.clean_updates = 0;
  }
  return next;
}

}  // namespace normformer
