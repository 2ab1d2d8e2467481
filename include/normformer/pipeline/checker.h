#pragma once

#include <cstdint>
#include <vector>

#include "normformer/pipeline/schedule.h"

namespace normformer {

/// What check_schedule learns of a sound schedule.
struct ScheduleReport {
  /// [stage]: the most micro-batches (counted once per chunk) whose saved state is alive at once: from the
  /// beginning of forward to the end of backward or backward_weight.
  std::vector<int64_t> peak_saved;
};

/// Proves that a schedule can run, before anything does. On every stage and chunk each micro-batch goes
/// forward once, then back once, by `backward` or by `backward_input` and a later `backward_weight`. Input
/// gradients and weight gradients come in the order of micro-batches, so that no schedule changes a bit of a
/// sum. Run to its end under the executor's rule (a send never waits, a receive waits for its message,
/// messages of one sender and kind arrive in the order sent), no stage waits for ever or for another message
/// than the next to arrive.
///
/// The run is deterministic in what each stage receives, so one order of the stages stands for all.
/// Throws LogicError naming stage and action.
ScheduleReport check_schedule(const Schedule& schedule);

}  // namespace normformer
