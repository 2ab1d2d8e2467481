#pragma once

#include "normformer/tensor/context.h"
#include "normformer/tensor_parallel/placed.h"

namespace normformer {

/// One rank's part of a linear's weight [M, K] and bias [M] with their main gradients; a bias may be
/// undefined.
struct LinearWeights {
  Tensor weight;
  Tensor bias;
  Tensor weight_gradient;
  Tensor bias_gradient;
};

/// y = x W^T + b with the output features split over the tensor-parallel group (Shoeybi et al. 2019, section
/// 3). Holds rows of W. Nothing here communicates: the types say which reductions the caller owes.
class ColumnParallelLinear {
 public:
  ColumnParallelLinear(Context& context, LinearWeights weights)
      : context_(&context), weights_(std::move(weights)) {}

  /// x [N, K] to y [N, M of this rank].
  Placed<FeatureSharded> forward(const Placed<Replicated>& x) const;

  /// dy to dx: each rank knows only what its own features contribute.
  Placed<Partial> backward_input(const Placed<FeatureSharded>& dy) const;

  /// Adds to the gradients of W and b.
  void backward_weight(const Placed<FeatureSharded>& dy, const Placed<Replicated>& x) const;

 private:
  Context* context_;
  LinearWeights weights_;
};

/// y = x W^T with the input features split over the tensor-parallel group. Holds columns of W; it has no
/// bias, which must be added once, after the reduction of y.
class RowParallelLinear {
 public:
  RowParallelLinear(Context& context, LinearWeights weights);

  /// x [N, K of this rank] to this rank's term of y [N, M].
  Placed<Partial> forward(const Placed<FeatureSharded>& x) const;

  /// dy to dx of this rank's features.
  Placed<FeatureSharded> backward_input(const Placed<Replicated>& dy) const;

  /// Adds to the gradient of W.
  void backward_weight(const Placed<Replicated>& dy, const Placed<FeatureSharded>& x) const;

 private:
  Context* context_;
  LinearWeights weights_;
};

}  // namespace normformer
