#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "normformer/data/masking.h"
#include "normformer/training/trainer.h"

namespace normformer {

/// Negative log-likelihoods of a text's tokens.
struct TextScore {
  double nll_sum = 0.0;  ///< natural logarithm
  int64_t tokens = 0;
  std::vector<double> nll;  ///< every token's, on rank 0 and where asked for; else empty
};

/// Scores every token of a text once: blocks of the model's length, without overlap, each reading the token
/// before it; the first token is predicted from `before` (the end-of-document token). Collective over the
/// world.
TextScore score_tokens(ModelInstance& model, const RunConfig& config, std::span<const int32_t> tokens,
                       int32_t before, bool keep_nll);

/// Scores the masked tokens of a text: blocks of the model's length, without overlap, each beginning with the
/// rule's start token and masked as a sample of its number. Keeps no single token's score. Collective over
/// the world.
TextScore score_masked_tokens(ModelInstance& model, const RunConfig& config, std::span<const int32_t> tokens,
                              const MaskingRule& rule);

}  // namespace normformer
