#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "normformer/data/bpe_tokenizer.h"
#include "normformer/evaluation/task.h"
#include "normformer/tensor/context.h"
#include "normformer/training/trainer.h"

namespace normformer {

/// A request in tokens: a context and behind it the continuation, which is all that is scored.
struct EncodedRequest {
  std::vector<int32_t> tokens;
  int64_t continuation = 0;  ///< how many of them it is, at least one and less than all
};

/// Encodes a request as lm-evaluation-harness does: white space at the context's end goes to the
/// continuation; that is what the tokens of both together have beyond the number of the context's. An empty
/// context becomes the token `before`. Of more than `length` + 1 tokens the last are taken. DataError where
/// nothing is left of the continuation, or more than `length` tokens. `place` begins its message.
EncodedRequest encode_request(BpeEncoder& encoder, const ContinuationRequest& request, int32_t before,
                              int64_t length, const std::string& place);

/// How a continuation fared.
struct ContinuationScore {
  double log_likelihood = 0.0;  ///< natural logarithm of its probability behind the context
  bool is_greedy = false;       ///< each of its tokens is the likeliest, the first of equals
  int64_t tokens = 0;
};

/// Scores requests, given alike on every rank, of a model that continues texts: sorted by length, dealt out
/// to the replicas, in micro-batches of the configuration's size that are padded at their ends. Returns the
/// same on every rank. Collective over the world.
std::vector<ContinuationScore> score_requests(ModelInstance& model, const RunConfig& config,
                                              std::span<const EncodedRequest> requests);

/// What an item's scores say; of equal choices the first is taken.
struct ItemResult {
  bool is_right = false;
  std::optional<bool> is_right_normalised;  ///< by likelihoods divided by the choices' lengths in characters
};

/// `scores` are those of the item's requests.
ItemResult judge_item(const TaskRule& rule, const TaskItem& item, std::span<const ContinuationScore> scores);

/// One number of a task, and how far chance may have moved it.
struct TaskMetric {
  std::string name;  ///< "acc", "acc_norm" or "perplexity"
  double value = 0.0;
  std::optional<double> standard_error;  ///< of one item nothing is known
  bool higher_is_better = true;
};

/// The task's numbers as lm-evaluation-harness tells them. Accuracies' standard errors are the sample's
/// deviation over the root of the items; a perplexity's is the deviation of 100,000 bootstrapped ones (Efron
/// 1979), drawn with Python's random numbers, so that it is the harness' own. `scores` are those of all
/// items' requests, one item behind the other.
std::vector<TaskMetric> task_metrics(Context& context, const Task& task,
                                     std::span<const ContinuationScore> scores);

}  // namespace normformer
