#pragma once

#include <map>
#include <string>
#include <vector>

#include "normformer/model/model_instance.h"
#include "normformer/sharding/sharded_optimizer.h"

namespace normformer {

/// How large one parameter's gradient is, over all of its scalars.
struct ParameterNorms {
  double l1 = 0.0;  ///< sum of |g|
  double l2 = 0.0;  ///< square root of the sum of g^2
};

/// Measures the gradient of every parameter of the model by itself (NormFormer, section 4.2 and figure 3):
/// after its reduction over ranks, before clipping. Sums are in fp64, each scalar counted once by the rank
/// that owns it, so that layouts differ by the rounding of those sums alone.
class GradientNorms {
 public:
  /// Sums that are on their way.
  struct Pending {
    Tensor sums;  // f64 [parameters of the model, 2]
    CommRequest request;
  };

  GradientNorms(ModelInstance& model, const RunConfig& config);

  /// The parameters, in the order of the results.
  const std::vector<std::string>& names() const { return names_; }

  /// Begins to measure what stands in the optimizer's gradients, which may change then. Collective over the
  /// world.
  Pending start(const ShardedOptimizer& optimizer) const;

  /// What every rank has measured, times `factor`: the same on all.
  std::vector<ParameterNorms> finish(Pending& pending, double factor) const;

 private:
  ModelInstance* model_;
  std::vector<std::string> names_;
  std::map<const Parameter*, int64_t> places_;  // in names_, of each parameter of this rank
};

}  // namespace normformer
