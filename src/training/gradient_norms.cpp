#include "normformer/training/gradient_norms.h"

#include <cmath>

namespace normformer {

GradientNorms::GradientNorms(ModelInstance& model, const RunConfig& config) : model_(&model) {
  std::map<std::string, int64_t> place_of;
  for (const LogicalTensor& parameter : logical_parameters(config)) {
    place_of[parameter.name] = static_cast<int64_t>(names_.size());
    names_.push_back(parameter.name);
  }
  for (const Parameter& p : model.store().parameters()) places_[&p] = place_of.at(p.spec.name);
}

GradientNorms::Pending GradientNorms::start(const ShardedOptimizer& optimizer) const {
  Context& context = model_->context();
  const TraceScope scope(context, TraceKind::step, "norms of gradients");
  Pending pending;
  pending.sums = context.zeros({static_cast<int64_t>(names_.size()), 2}, DType::f64);
  for (const ParameterPiece& piece : optimizer.owned_gradients()) {
    ops::add_norm_sums(context, piece.values, pending.sums.flat(2 * places_.at(piece.parameter), 2));
  }
  pending.request = model_->mesh().world().start_all_reduce_sum(context, pending.sums);
  return pending;
}

std::vector<ParameterNorms> GradientNorms::finish(Pending& pending, double factor) const {
  pending.request.wait();
  if (model_->is_meta()) return {};
  const std::vector<double> sums = to_host(pending.sums);
  std::vector<ParameterNorms> norms;
  for (size_t i = 0; i < sums.size(); i += 2)
    norms.push_back({.l1 = sums[i] * factor, .l2 = std::sqrt(sums[i + 1]) * factor});
  return norms;
}

}  // namespace normformer
