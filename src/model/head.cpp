#include "normformer/model/head.h"

#include "normformer/ops/embedding.h"

namespace normformer {

Tensor put_rows(Context& context, const Tensor& picked, const Tensor& rows, int64_t count) {
  const Shape shape{count, picked.dim(1)};
  const Tensor sums = context.zeros(shape, accumulator_of(picked.dtype()));
  ops::embedding_backward(context, rows, picked, 1.0, 0, sums);
  if (sums.dtype() == picked.dtype()) return sums;
  const Tensor rounded = context.empty(shape, picked.dtype());
  copy(context, sums, rounded);
  return rounded;
}

}  // namespace normformer
