#pragma once

#include <cstdint>
#include <span>

#include "normformer/comm/group.h"
#include "normformer/pipeline/schedule.h"
#include "normformer/pipeline/stage.h"

namespace normformer {

/// Runs this rank's list: rank s of the group is stage s, `parts` its chunks. Receives from its neighbours,
/// calls the parts, sends what they return, and destroys each Saved after its last use. Between two parts of
/// this rank nothing is sent or copied: the next one gets the tensor itself.
///
/// Memory: an input or gradient received lives no longer than the call that takes it, unless the part keeps
/// it. A message sent is completed when something received later shows that it has arrived (only the last
/// ones are waited for), so completing never stalls and 1F1B keeps at most about `stages` of them, however
/// many micro-batches there are; none outlives the call.
///
/// With `receive_ahead` what the next action of the list takes is received while one is computed, which needs
/// memory for one tensor more.
///
/// The schedule must be the same on all ranks. LogicError, before anything is sent, where check_schedule
/// refuses it or the group or the parts do not fit it; later where a part breaks its contract. An exception
/// of a part leaves the neighbours waiting; whoever runs the ranks ends them. Collective over `pipeline`.
void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule,
                  std::span<Stage* const> parts, bool receive_ahead = false);

/// As above, for schedules of one chunk.
void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule, Stage& stage);

/// Streams micro-batches 0 .. micro_batches - 1 forward through all parts: rank s of the group is stage s,
/// `parts` its chunks, as in Schedule. At most as many messages as there are stages are on their way from
/// each rank. Collective over `pipeline`.
void run_forward(Context& context, const Group& pipeline, int64_t micro_batches,
                 std::span<ForwardStage* const> parts, Placement placement = Placement::round_robin);

/// As above, for one part a rank.
void run_forward(Context& context, const Group& pipeline, int64_t micro_batches, ForwardStage& stage);

}  // namespace normformer
