#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "normformer/model/model_instance.h"

namespace normformer {

/// How a text is continued.
struct GenerationOptions {
  int64_t max_tokens = 100;
  double temperature = 1.0;  ///< 0 always takes the likeliest token
  int64_t top_k = 0;         ///< only the k likeliest tokens; 0 means all
  double top_p = 1.0;        ///< only the likeliest tokens that together reach this probability
  uint64_t seed = 1;
  std::optional<int32_t> stop = std::nullopt;  ///< ends the text; not part of it
};

/// Draws one token from logits: temperature, then top_k, then top_p (Holtzman et al. 2020), with the random
/// number at `position` of `stream`. A pure function; of equal logits the smaller id counts as likelier.
int32_t sample_token(std::span<const double> logits, const GenerationOptions& options, RandomStream stream,
                     int64_t position);

/// Continues `prompt` (not empty) token by token; the model sees the last `length` tokens, whole: the
/// mesh's context degree is 1. `visit` is called
/// on every rank with each new token. Returns the new tokens, the same on every rank. Collective over the
/// world.
std::vector<int32_t> generate(ModelInstance& model, std::span<const int32_t> prompt,
                              const GenerationOptions& options,
                              const std::function<void(int32_t token)>& visit = {});

}  // namespace normformer
