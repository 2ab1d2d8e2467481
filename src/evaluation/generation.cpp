#include "normformer/evaluation/generation.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "normformer/mesh/layout.h"
#include "normformer/pipeline/executor.h"

namespace normformer {

namespace {

std::vector<int64_t> likeliest_first(std::span<const double> logits) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  return order;
}

// The logits of one sequence over the whole vocabulary. Collective over the tensor group of the last stage.
std::vector<double> whole_logits(ModelInstance& model, const Tensor& mine) {
  Context& context = model.context();
  const Group& tensor = model.mesh().tensor();
  const int64_t vocab = model.environment().config.vocab;
  const Tensor whole = context.empty({vocab}, mine.dtype());
  tensor.all_gather(context, mine.view({mine.numel()}), whole, shard_sizes(vocab, tensor.size()));
  return to_host(whole);
}

MicroBatch context_batch(ModelInstance& model, std::span<const int32_t> tokens) {
  const int64_t length = static_cast<int64_t>(tokens.size());
  MicroBatch batch;
  batch.sequences = 1;
  batch.length = length;
  batch.part = SequencePart::whole(length);
  batch.purpose = Purpose::generation;
  if (model.has_first_part()) batch.tokens = from_host<int32_t>(model.context(), tokens, {length});
  return batch;
}

}  // namespace

int32_t sample_token(std::span<const double> logits, const GenerationOptions& options, RandomStream stream,
                     int64_t position) {
  NF_CHECK(!logits.empty(), "a token is drawn from nothing");
  std::vector<int64_t> order = likeliest_first(logits);
  if (options.temperature <= 0.0) return static_cast<int32_t>(order.front());
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(order.size())) {
    order.resize(static_cast<size_t>(options.top_k));
  }
  const double largest = logits[static_cast<size_t>(order.front())];
  std::vector<double> weights;
  for (const int64_t id : order) {
    weights.push_back(std::exp((logits[static_cast<size_t>(id)] - largest) / options.temperature));
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t kept = 0;
  double mass = 0.0;
  while (kept < weights.size() && (kept == 0 || mass < options.top_p * total)) mass += weights[kept++];
  const double wanted = to_unit_open(stream.words(static_cast<uint64_t>(position))[0]) * mass;
  double sum = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    sum += weights[i];
    if (wanted < sum) return static_cast<int32_t>(order[i]);
  }
  return static_cast<int32_t>(order[kept - 1]);
}

std::vector<int32_t> generate(ModelInstance& model, std::span<const int32_t> prompt,
                              const GenerationOptions& options,
                              const std::function<void(int32_t token)>& visit) {
  NF_CHECK(!prompt.empty(), "an empty prompt");
  NF_CHECK(model.mesh().context().size() == 1, "generation on a mesh that splits sequences");
  const auto window = static_cast<size_t>(model.environment().config.length);
  const RandomStream stream = RandomStream{options.seed}.with("generation");
  std::vector<int32_t> text(prompt.begin(), prompt.end());
  for (int64_t i = 0; i < options.max_tokens; ++i) {
    const std::span<const int32_t> seen(text.end() - static_cast<int64_t>(std::min(window, text.size())),
                                        text.end());
    model.set_micro_batches({context_batch(model, seen)});
    model.forward(1);
    double token = -1.0;
    if (model.has_last_part()) {
      const std::vector<double> logits = whole_logits(model, model.result(0));
      if (model.answers_for_loss()) token = sample_token(logits, options, stream, i);
    }
    token = model.mesh().world().all_reduce(token, ReduceOp::max);
    const auto drawn = static_cast<int32_t>(token);
    if (options.stop && drawn == *options.stop) break;
    text.push_back(drawn);
    if (visit) visit(drawn);
  }
  return {text.begin() + static_cast<int64_t>(prompt.size()), text.end()};
}

}  // namespace normformer
