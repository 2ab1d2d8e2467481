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

// Blocks [first, first + count) of `length` tokens, the start token among them, from token `begin` on, of
// which the first is block `number` of the text.
Batch masked_blocks(std::span<const int32_t> tokens, const MaskingRule& rule, int64_t number, int64_t begin,
                    int64_t length, int64_t first, int64_t count) {
  const auto elements = static_cast<size_t>(count * length);
  Batch batch{.sequences = count,
              .seq_len = length,
              .inputs = {},
              .targets = {},
              .document_start = {},
              .loss_mask = std::vector<uint8_t>(elements)};
  for (int64_t block = first; block < first + count; ++block) {
    const auto text =
        tokens.subspan(static_cast<size_t>(begin + block * (length - 1)), static_cast<size_t>(length - 1));
    batch.targets.push_back(rule.start_token);
    batch.targets.insert(batch.targets.end(), text.begin(), text.end());
  }
  batch.inputs = batch.targets;
  for (int64_t block = 0; block < count; ++block) {
    const auto at = static_cast<size_t>(block * length);
    mask_sample(rule, number + first + block, std::span(batch.inputs).subspan(at, length),
                std::span(batch.loss_mask).subspan(at, length));
  }
  return batch;
}

}  // namespace

TextScore score_masked_tokens(ModelInstance& model, const RunConfig& config, std::span<const int32_t> tokens,
                              const MaskingRule& rule) {
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t text_of_block = config.model.length - 1;
  const int64_t whole_blocks = total / text_of_block;
  const int64_t rest = total % text_of_block;
  TextScore score;
  const auto add = [&](int64_t number, int64_t length, int64_t blocks) {
    const auto source = [&](int64_t first, int64_t count) {
      return masked_blocks(tokens, rule, number, number * text_of_block, length, first, count);
    };
    const EvaluationResult result = evaluate(model, config, source, blocks);
    score.nll_sum += result.nll_sum;
    score.tokens += result.tokens;
  };
  if (whole_blocks > 0) add(0, config.model.length, whole_blocks);
  if (rest > 0) add(whole_blocks, rest + 1, 1);
  return score;
}

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
    const ScoreVisitor keep = [&](int64_t first, const Batch& batch, const TokenScores& scores) {
      copy(context, scores.nll, all.flat(begin + first * block_length, batch.sequences * block_length));
    };
    const EvaluationResult result = evaluate(model, config, source, blocks, keep_nll ? keep : ScoreVisitor());
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
