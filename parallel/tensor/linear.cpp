#include "normformer/tensor_parallel/linear.h"

#include "normformer/ops/matmul.h"

namespace normformer {

namespace {

Tensor empty_product(Context& context, const Tensor& like, int64_t columns) {
  return context.empty({like.dim(0), columns}, like.dtype());
}

}  // namespace

Placed<FeatureSharded> ColumnParallelLinear::forward(const Placed<Replicated>& x) const {
  Tensor y = empty_product(*context_, x.tensor(), weights_.weight.dim(0));
  ops::linear_forward(*context_, x.tensor(), weights_.weight, weights_.bias, y);
  return Placed<FeatureSharded>(std::move(y));
}

Placed<Partial> ColumnParallelLinear::backward_input(const Placed<FeatureSharded>& dy) const {
  Tensor dx = empty_product(*context_, dy.tensor(), weights_.weight.dim(1));
  ops::linear_backward_input(*context_, dy.tensor(), weights_.weight, dx);
  return Placed<Partial>(std::move(dx));
}

void ColumnParallelLinear::backward_weight(const Placed<FeatureSharded>& dy,
                                           const Placed<Replicated>& x) const {
  ops::linear_backward_weight(*context_, dy.tensor(), x.tensor(), weights_.weight_gradient);
  if (weights_.bias.defined()) ops::add_column_sums(*context_, dy.tensor(), weights_.bias_gradient);
}

RowParallelLinear::RowParallelLinear(Context& context, LinearWeights weights)
    : context_(&context), weights_(std::move(weights)) {
  NF_CHECK(!weights_.bias.defined(), "a row-parallel linear would add its bias once for every rank");
}

Placed<Partial> RowParallelLinear::forward(const Placed<FeatureSharded>& x) const {
  Tensor y = empty_product(*context_, x.tensor(), weights_.weight.dim(0));
  ops::linear_forward(*context_, x.tensor(), weights_.weight, Tensor(), y);
  return Placed<Partial>(std::move(y));
}

Placed<FeatureSharded> RowParallelLinear::backward_input(const Placed<Replicated>& dy) const {
  Tensor dx = empty_product(*context_, dy.tensor(), weights_.weight.dim(1));
  ops::linear_backward_input(*context_, dy.tensor(), weights_.weight, dx);
  return Placed<FeatureSharded>(std::move(dx));
}

void RowParallelLinear::backward_weight(const Placed<Replicated>& dy, const Placed<FeatureSharded>& x) const {
  ops::linear_backward_weight(*context_, dy.tensor(), x.tensor(), weights_.weight_gradient);
}

}  // namespace normformer
