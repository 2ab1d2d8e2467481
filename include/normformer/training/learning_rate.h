#pragma once

#include <cstdint>

#include "normformer/config/run_config.h"

namespace normformer {

/// The learning rate of update `update`, counted from 1, of a run of `updates`: linear from 0 over
/// warmup_updates, reaching `lr` at the last of them; then as `decay` says to min_lr at decay_updates (0: at
/// `updates`), and min_lr after.
double learning_rate(const OptimizerConfig& optimizer, int64_t updates, int64_t update);

}  // namespace normformer
