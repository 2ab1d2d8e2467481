#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "normformer/pipeline/schedule.h"

namespace normformer::detail {

/// An entry of a schedule by its place: stages[stage][index].
struct ActionPlace {
  int64_t stage = 0;
  int64_t index = 0;
};

/// Called for each action as it runs, with the action that sent the message it waited for, if any.
using ReplayVisitor = std::function<void(ActionPlace action, const std::optional<ActionPlace>& sender)>;

/// Runs a schedule's lists in some order that the executor's rule allows, in time linear in the actions.
/// Micro-batches and chunks must be in range. LogicError where a stage would receive another message than it
/// expects, or all unfinished stages wait.
void replay(const Schedule& schedule, const ReplayVisitor& visit);

}  // namespace normformer::detail
