#pragma once

#include "normformer/config/run_config.h"
#include "normformer/mesh/mesh.h"
#include "normformer/model/language_model.h"
#include "normformer/sharding/parameter_store.h"

namespace normformer {

/// The type of weights and activations under a precision.
DType model_dtype(Precision precision);

/// Which layers stage `rank` of `stages` holds, and whether it is an end.
StagePart stage_part(int64_t layers, int64_t stages, int64_t rank);

/// One rank's part of a model with its memory: parameters declared and allocated, values not yet set.
class ModelInstance {
 public:
  /// `config` is resolved for the mesh and has a vocabulary. `with_gradients` false leaves out main
  /// gradients.
  ModelInstance(Context& context, const Mesh& mesh, const RunConfig& config, bool with_gradients);

  Context& context() { return *context_; }
  bool is_meta() const { return context_->is_meta(); }
  const Mesh& mesh() const { return mesh_; }
  ParameterStore& store() { return store_; }
  LanguageModelStage& stage() { return stage_; }

  /// Scalars of the whole model. Collective over the world.
  int64_t count_parameters() const;

  /// True on the one rank of each data-parallel replica that answers for its losses: the first of the tensor
  /// group on the last stage.
  bool answers_for_loss() const;

 private:
  Context* context_;
  Mesh mesh_;
  ParameterStore store_;
  LanguageModelStage stage_;
};

/// Floating-point operations that training on one token needs: three times the products of a forward pass,
/// tied output included, counting only what the causal mask lets through: 6 (4 L d^2 + 2 L d F + V d) + 6 L d
/// T.
double training_flops_per_token(const ModelConfig& config);

}  // namespace normformer
