#include "normformer/ops/cross_entropy.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void logits_max(Context& context, const Tensor& logits, const Tensor& maxima) {
  constexpr std::string_view kName = "logits_max";
  const Shape shape = matrix_shape(kName, "logits", logits);
  Arguments arguments(context, kName, logits.dtype());
  arguments.model("logits", logits, shape);
  arguments.accumulator("maxima", maxima, {shape[0]});
  context.costs().record(kName, logits.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(logits_max, context, logits, maxima);
}

void logits_first_max(Context& context, const Tensor& logits, const Tensor& maxima, int64_t first_row,
                      const Tensor& ids) {
  constexpr std::string_view kName = "logits_first_max";
  const Shape shape = matrix_shape(kName, "logits", logits);
  Arguments arguments(context, kName, logits.dtype());
  arguments.model("logits", logits, shape);
  arguments.accumulator("maxima", maxima, {shape[0]});
  arguments.accumulator("ids", ids, {shape[0]});
  context.costs().record(kName, logits.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(logits_first_max, context, logits, maxima, first_row, ids);
}

void logits_sums(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& targets,
                 int64_t first_row, const Tensor& sums) {
  constexpr std::string_view kName = "logits_sums";
  const Shape shape = matrix_shape(kName, "logits", logits);
  Arguments arguments(context, kName, logits.dtype());
  arguments.model("logits", logits, shape);
  arguments.accumulator("maxima", maxima, {shape[0]});
  arguments.check("targets", targets, {shape[0]}, DType::i32);
  arguments.accumulator("sums", sums, {shape[0], 2});
  context.costs().record(kName, 12 * logits.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(logits_sums, context, logits, maxima, targets, first_row, sums);
}

void cross_entropy(Context& context, const Tensor& sums, const Tensor& nll) {
  constexpr std::string_view kName = "cross_entropy";
  const int64_t rows = matrix_shape(kName, "sums", sums)[0];
  Arguments arguments(context, kName, sums.dtype());
  arguments.accumulator("sums", sums, {rows, 2});
  arguments.accumulator("nll", nll, {rows});
  context.costs().record(kName, 2 * rows, arguments.bytes());
  if (context.is_meta() || rows == 0) return;
  NF_ON_DEVICE(cross_entropy, context, sums, nll);
}

void cross_entropy_backward(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                            const Tensor& targets, int64_t first_row, const Tensor& weights, double factor) {
  constexpr std::string_view kName = "cross_entropy_backward";
  const Shape shape = matrix_shape(kName, "logits", logits);
  Arguments arguments(context, kName, logits.dtype());
  arguments.model("logits", logits, shape, 2);
  arguments.accumulator("maxima", maxima, {shape[0]});
  arguments.accumulator("sums", sums, {shape[0], 2});
  arguments.check("targets", targets, {shape[0]}, DType::i32);
  if (weights) arguments.check("weights", weights, {shape[0]}, DType::u8);
  context.costs().record(kName, 12 * logits.numel(), arguments.bytes());
  if (context.is_meta() || logits.numel() == 0) return;
  NF_ON_DEVICE(cross_entropy_backward, context, logits, maxima, sums, targets, first_row, weights, factor);
}

double weighted_sum(Context& context, const Tensor& values, const Tensor& weights) {
  constexpr std::string_view kName = "weighted_sum";
  NF_CHECK(values.defined(), "{}: values are undefined", kName);
  Arguments arguments(context, kName, values.dtype());
  arguments.accumulator("values", values, {values.numel()});
  if (weights) arguments.check("weights", weights, {values.numel()}, DType::u8);
  context.costs().record(kName, values.numel(), arguments.bytes());
  if (context.is_meta() || values.numel() == 0) return 0.0;
  return NF_ON_DEVICE(weighted_sum, context, values, weights);
}

}  // namespace normformer::ops
