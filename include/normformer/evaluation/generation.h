#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "normformer/model/model_instance.h"

namespace normformer {

/// How texts are continued.
struct GenerationOptions {
  int64_t max_tokens = 100;  ///< new ones of each text
  double temperature = 1.0;  ///< 0 always takes the likeliest token
  int64_t top_k = 0;         ///< only the k likeliest tokens; 0 means all
  double top_p = 1.0;        ///< only the likeliest tokens that together reach this probability
  uint64_t seed = 1;
  std::optional<int32_t> stop = std::nullopt;  ///< ends the text; not part of it
  int64_t samples = 1;                         ///< continuations of each prompt
  int64_t batch = 16;                          ///< texts that each replica continues at a time
  bool keep_logits = false;                    ///< of the vocabulary, for every new token
};

/// Draws one token from logits: temperature, then top_k, then top_p (Holtzman et al. 2020), with the random
/// number at `position` of `stream`. A pure function; of equal logits the smaller id counts as likelier.
/// NumericError where the logits are not numbers.
int32_t sample_token(std::span<const double> logits, const GenerationOptions& options, RandomStream stream,
                     int64_t position);

/// One continuation of a prompt.
struct GeneratedText {
  int64_t prompt = 0;                ///< its number among the prompts
  int64_t sample = 0;                ///< its number among the prompt's continuations
  std::vector<int32_t> tokens = {};  ///< the new ones
  /// What each was drawn from, a row of the vocabulary's logits each, if they are kept; else empty, and given
  /// back once an observer was told that the text is finished.
  std::vector<std::vector<double>> logits = {};
};

/// Who is told of texts while they are made, on every rank alike. Either may be empty.
struct GenerationObserver {
  std::function<void(const GeneratedText& text)> grown;     ///< by one token, its last one
  std::function<void(const GeneratedText& text)> finished;  ///< in the order of prompts, then of samples
};

/// Continues each of the prompts (none empty) `samples` times, token by token. The model sees the last
/// `length` tokens of a text, whole: the mesh's context degree is 1. While they are all of the text, keys and
/// values of the tokens before the last are read from a cache; a longer text moves its window with every
/// token, which gives all tokens other positions, so the window is computed anew. Replicas share the texts,
/// and the place of a finished one is taken by the next.
///
/// A text is a function of the weights, the prompt, the options and the numbers of prompt and sample, but for
/// how logits are rounded: not of the batch, nor of the layout. Returns all of them, in order, on every rank.
/// Collective over the world.
std::vector<GeneratedText> generate(ModelInstance& model, std::span<const std::vector<int32_t>> prompts,
                                    const GenerationOptions& options,
                                    const GenerationObserver& observer = {});

}  // namespace normformer
