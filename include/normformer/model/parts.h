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

/// The share of tokens of which logits are made: of masked language models those that are predicted, of a
/// classified sequence one token, else all.
double predicted_share(const RunConfig& config);

/// The layers of each of `parts` parts, first to last, at least one each: so that the slowest part is as fast
/// as can be, where the last one has the logits of a share `predicted` of the tokens to compute beside its
/// layers (in multiply-adds a token, attention counted as far as the mask lets it through; embedding tokens
/// costs next to nothing). Of equal ways the one with more layers in earlier parts. LogicError for fewer
/// layers than parts.
std::vector<int64_t> balanced_split(const ModelConfig& model, int64_t parts, double predicted = 1.0);

/// Floating-point operations that training on one token needs: three times the products of a forward pass,
/// output included, counting only what the mask lets through: of causal models 6 (4 L d^2 + 2 L d F + V d) +
/// 6 L d T, where V are the rows of the matrices behind the last layer times predicted_share(); of
/// bidirectional ones attention's 6 L d T twice.
double training_flops_per_token(const RunConfig& config);

/// What `stage` holds as each of its chunks, as the configuration's schedule and split have it.
std::vector<StagePart> parts_of_stage(const RunConfig& config, int64_t stages, int64_t stage);

}  // namespace normformer
