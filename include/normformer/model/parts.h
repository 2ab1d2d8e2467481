#pragma once

#include <cstdint>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/model/language_model.h"
#include "normformer/pipeline/schedule.h"

// How a model is cut into the parts of a pipeline, and who holds which: pure functions of the configuration.
namespace normformer {

/// The schedule that the configuration asks for, for so many stages and micro-batches.
Schedule make_schedule(const ParallelConfig& parallel, int64_t stages, int64_t micro_batches);

/// The layers of each of `parts` parts, first to last, at least one each: so that the slowest part is as fast
/// as can be, where the last one has the logits to compute beside its layers (in multiply-adds a token,
/// causal attention counted; embedding tokens costs next to nothing). Of equal ways the one with more layers
/// in earlier parts. LogicError for fewer layers than parts.
std::vector<int64_t> balanced_split(const ModelConfig& model, int64_t parts);

/// What `stage` holds as each of its chunks, as the configuration's schedule and split have it.
std::vector<StagePart> parts_of_stage(const RunConfig& config, int64_t stages, int64_t stage);

}  // namespace normformer
