#include "normformer/evaluation/perplexity.h"

namespace normformer {

namespace {

// Blocks [first, first + count) of `length` tokens from token `begin` on.
Batch read_blocks(std::span<const int32_t> tokens, int32_t before, int64_t begin, int64_t length,
                  int64_t first, int64_t count) {
  Batch batch{.sequences = count,
              .seq_len = length,
              .inputs = {},
              .targets = {},
              .document_start = {},
              .loss_mask = {}};
  const int64_t start = begin + first * length;
  for (int64_t i = start; i < start + count * length; ++i) {
    batch.inputs.push_back(i == 0 ? before : tokens[static_cast<size_t>(i - 1)]);
    batch.targets.push_back(tokens[static_cast<size_t>(i)]);
  }
  return batch;
}

}  // namespace

TextScore score_tokens(ModelInstance& model, const RunConfig& config, std::span<const int32_t> tokens,
                       int32_t before, bool keep_nll) {
  Context& context = model.context();
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t length = config.model.length;
  const int64_t whole_blocks = total / length;
  const Tensor all = keep_nll ? context.zeros({total}, DType::f64) : Tensor();
  TextScore score;
  const auto add = [&](int64_t begin, int64_t block_length, int64_t blocks) {
    const auto source = [&](int64_t first, int64_t count) {
      return read_blocks(tokens, before, begin, block_length, first, count);
    };
    const NllVisitor keep = [&](int64_t first, const Batch& batch, const Tensor& nll) {
      copy(context, nll, all.flat(begin + first * block_length, batch.sequences * block_length));
    };
    const EvaluationResult result = evaluate(model, config, source, blocks, keep_nll ? keep : NllVisitor());
    score.nll_sum += result.nll_sum;
    score.tokens += result.tokens;
  };
  if (whole_blocks > 0) add(0, length, whole_blocks);
  if (total > whole_blocks * length) add(whole_blocks * length, total - whole_blocks * length, 1);
  if (keep_nll) {
    // Each token was visited by one rank; the others hold zeros.
    model.mesh().world().all_reduce(context, all, ReduceOp::sum);
    if (model.mesh().world().rank() == 0) score.nll = to_host(all);
  }
  return score;
}

}  // namespace normformer
