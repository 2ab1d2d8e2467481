#pragma once

#include <optional>
#include <string>
#include <vector>

#include "normformer/mesh/mesh.h"
#include "normformer/pipeline/simulator.h"
#include "normformer/tensor/trace.h"

namespace normformer {

/// Two pictures (draw_svg) of one update's way through a pipeline.
struct PipelineDrawing {
  std::string measured;   ///< as it ran
  std::string simulated;  ///< as `simulate` has it with the mean times of what ran
};

/// What each stage did, from its rank's spans of kind `pipeline`: those of the last span named "step", where
/// the work was done (a GPU's queue of computing, or else the host). Milliseconds from the first action.
std::vector<TimedAction> actions_of_last_step(const std::vector<TraceSpan>& spans);

/// The mean time of each kind of action on each part of the schedule. A `backward` counts half as
/// backward_input and half as backward_weight, of which only the sum matters then. `rows` is [stage].
StageTimes mean_times(const Schedule& schedule, const std::vector<std::vector<TimedAction>>& rows);

/// Draws the last traced update of the ranks whose tensor, context and data coordinates are 0. `spans` are
/// this rank's. On world rank 0; elsewhere nothing. Collective over the mesh's world.
std::optional<PipelineDrawing> draw_pipeline(const Mesh& mesh, const Schedule& schedule,
                                             const std::vector<TraceSpan>& spans);

}  // namespace normformer
