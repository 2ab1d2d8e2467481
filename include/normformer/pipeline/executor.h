#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

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

/// Asked once a run, behind forwards only: whether what was computed so far is void, because weights have
/// changed. All ranks of the pipeline must answer alike. It may communicate, though not over the pipeline.
using BeginAgain = std::function<bool()>;

/// Where each rank of a pipeline asks: the place in its list of the first action that may add to gradients
/// (any but a forward, and the last part's forward, which makes the loss' gradient) or that takes what
/// another rank sends behind its own place.
std::vector<size_t> places_to_ask(const Schedule& schedule);

/// As above with receive_ahead as given, for forwards that are begun before it is known whether the weights
/// will stand (optimistic update with post-validation; Qi et al. 2024, section 4). Before its place in
/// places_to_ask each rank calls `begin_again`. Where that says so, it receives and drops what others have
/// sent to it, destroys all that was saved and begins its list anew. Collective over `pipeline`.
void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule,
                  std::span<Stage* const> parts, bool receive_ahead, const BeginAgain& begin_again);

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
