#pragma once

#include <cstdint>

#include "normformer/config/run_config.h"

namespace normformer {

/// Dynamic loss scaling (Micikevicius et al. 2018, section 3.2), by fairseq's rule without tolerance: the
/// scale halves with every overflow and doubles after `window` updates without one.
struct LossScaleRule {
  double init = 0.0;   ///< the scale at first; 0 means that losses are not scaled
  int64_t window = 1;  ///< updates without overflow after which the scale doubles
  double min = 0.0;    ///< a run ends where its scale falls below

  bool active() const { return init > 0.0; }
};

/// The rule that a configuration asks for. A window of 0 there means fairseq's 2^14 over data-parallel ranks
/// times micro-batches of each: 2^14 over the micro-batches of a global batch, whatever the layout; at least
/// 1.
LossScaleRule loss_scale_rule(const TrainConfig& config);

/// Where dynamic loss scaling stands. All of it is part of a checkpoint.
struct LossScale {
  double value = 0.0;         ///< what the loss' gradient is multiplied by, a power of two; 0 means nothing
  int64_t clean_updates = 0;  ///< updates since the scale doubled or a batch overflowed
  int64_t overflows = 0;      ///< batches of the whole run that were skipped for an overflow

  /// What the loss' gradient is multiplied by: 1 where losses are not scaled.
  double factor() const { return value > 0.0 ? value : 1.0; }
  bool operator==(const LossScale&) const = default;
};

/// What stands at the start, or goes on from `saved` where that was scaled.
LossScale start_loss_scale(const LossScaleRule& rule, const LossScale& saved);

/// The scale behind a batch whose gradients were finite, or not.
LossScale next_loss_scale(const LossScaleRule& rule, const LossScale& now, bool overflowed);

}  // namespace normformer
