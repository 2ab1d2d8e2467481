#include "normformer/tensor_parallel/vocabulary.h"

#include <algorithm>

#include "normformer/ops/cross_entropy.h"
#include "normformer/ops/embedding.h"
#include "normformer/ops/matmul.h"

namespace normformer {

namespace {

// Logits of one chunk take about this much: enough rows for products at full speed, little beside the model.
// A GPU multiplies so fast that reading the weights and adding to their gradient, once a chunk, would show
// sooner.
constexpr int64_t kChunkBytes = int64_t{48} << 20;
constexpr int64_t kGpuChunkBytes = int64_t{1} << 30;
constexpr int64_t kLeastChunk = 64;

int64_t chunk_tokens(const Context& context, const VocabularyRows& rows) {
  const int64_t row_bytes = std::max<int64_t>(1, rows.weight.dim(0) * size_of(rows.weight.dtype()));
  const int64_t chunk_bytes = context.is_cuda() ? kGpuChunkBytes : kChunkBytes;
  return std::max(kLeastChunk, chunk_bytes / row_bytes / kLeastChunk * kLeastChunk);
}

// Statistics of the softmax over the whole vocabulary, from this rank's logits.
struct SoftmaxSums {
  Tensor maxima;
  Tensor sums;
};

SoftmaxSums softmax_sums(Context& context, const Group& tensor, const VocabularyRows& rows,
                         const Tensor& logits, const Tensor& targets) {
  const DType accumulator = accumulator_of(logits.dtype());
  SoftmaxSums s{context.empty({logits.dim(0)}, accumulator), context.empty({logits.dim(0), 2}, accumulator)};
  ops::logits_max(context, logits, s.maxima);
  tensor.all_reduce(context, s.maxima, ReduceOp::max);
  ops::logits_sums(context, logits, s.maxima, targets, rows.first_row, s.sums);
  tensor.all_reduce(context, s.sums, ReduceOp::sum);
  return s;
}

}  // namespace

Placed<Partial> embed_tokens(Context& context, const VocabularyRows& rows, const Tensor& tokens) {
  Tensor out = context.empty({tokens.dim(0), rows.weight.dim(1)}, rows.weight.dtype());
  ops::embedding_forward(context, tokens, rows.weight, rows.first_row, out);
  return Placed<Partial>(std::move(out));
}

void embed_tokens_backward(Context& context, const VocabularyRows& rows, const Tensor& tokens,
                           const Placed<Replicated>& dout, double factor) {
  ops::embedding_backward(context, tokens, dout.tensor(), factor, rows.first_row, rows.gradient);
}

Placed<FeatureSharded> vocabulary_logits(Context& context, const VocabularyRows& rows,
                                         const Placed<Replicated>& hidden) {
  Tensor logits = context.empty({hidden.tensor().dim(0), rows.weight.dim(0)}, rows.weight.dtype());
  ops::linear_forward(context, hidden.tensor(), rows.weight, rows.bias, logits);
  return Placed<FeatureSharded>(std::move(logits));
}

LossResult vocabulary_loss(Context& context, const Group& tensor, const VocabularyRows& rows,
                           const Placed<Replicated>& hidden, const LossOptions& options) {
  const Tensor& x = hidden.tensor();
  const int64_t tokens = x.dim(0);
  LossResult result;
  result.nll = context.empty({tokens}, accumulator_of(x.dtype()));
  if (options.likeliest) result.minus_likeliest = context.empty({tokens}, accumulator_of(x.dtype()));
  Tensor dx;
  if (options.training) dx = context.empty(x.shape(), x.dtype());
  const int64_t step = chunk_tokens(context, rows);
  for (int64_t begin = 0; begin < tokens; begin += step) {
    const int64_t end = std::min(tokens, begin + step);
    const Tensor x_chunk = x.rows(begin, end);
    const Tensor targets = options.targets.rows(begin, end);
    const Tensor weights = options.weights.defined() ? options.weights.rows(begin, end) : Tensor();
    const Tensor logits = vocabulary_logits(context, rows, Placed<Replicated>(x_chunk)).tensor();
    const SoftmaxSums s = softmax_sums(context, tensor, rows, logits, targets);
    ops::cross_entropy(context, s.sums, result.nll.rows(begin, end));
    if (options.likeliest) {
      const Tensor ids = result.minus_likeliest.rows(begin, end);
      ops::logits_first_max(context, logits, s.maxima, rows.first_row, ids);
      tensor.all_reduce(context, ids, ReduceOp::max);
    }
    if (!options.training) continue;
    ops::cross_entropy_backward(context, logits, s.maxima, s.sums, targets, rows.first_row, weights,
                                options.factor);
    ops::linear_backward_input(context, logits, rows.weight, dx.rows(begin, end));
    ops::linear_backward_weight(context, logits, x_chunk, rows.gradient);
    if (rows.bias) ops::add_column_sums(context, logits, rows.bias_gradient);
  }
  result.dhidden = Placed<Partial>(dx);
  return result;
}

}  // namespace normformer
