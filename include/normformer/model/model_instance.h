#pragma once

#include <memory>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/mesh/mesh.h"
#include "normformer/model/language_model.h"
#include "normformer/pipeline/schedule.h"
#include "normformer/sharding/parameter_piece.h"
#include "normformer/sharding/parameter_store.h"

namespace normformer {

/// The type of weights and activations under a precision.
DType model_dtype(Precision precision);

/// The type of the weights that the optimizer updates.
DType master_dtype(Precision precision);

/// The mesh that a resolved configuration asks for.
MeshDegrees mesh_degrees(const ParallelConfig& parallel);

/// That mesh's ranks, and which of them split what replicas split. Collective over the world.
Mesh make_mesh(Group world, const ParallelConfig& parallel);

/// What one rank holds of a model, with its memory: parameters declared and allocated, values not yet set.
class ModelInstance {
 public:
  /// `config` is resolved for the mesh and has a vocabulary. `with_gradients` false leaves out main
  /// gradients.
  ModelInstance(Context& context, const Mesh& mesh, const RunConfig& config, bool with_gradients);

  Context& context() { return *context_; }
  bool is_meta() const { return context_->is_meta(); }
  const Mesh& mesh() const { return mesh_; }
  ParameterStore& store() { return store_; }

  /// This rank's parts, as chunks of the configuration's schedule.
  const std::vector<std::unique_ptr<LanguageModelStage>>& parts() const { return parts_; }

  /// What every part was made with.
  const ModelEnvironment& environment() const { return parts_.front()->environment(); }

  /// Whether this rank holds the first part, which reads tokens, and the last, which has the loss.
  bool has_first_part() const;
  bool has_last_part() const;

  /// LanguageModelStage's functions for all parts. Collective over the tensor group: prepare().
  void prepare();
  void set_micro_batches(const std::vector<MicroBatch>& batches);
  double loss_sum() const;
  int64_t correct() const;

  /// Results and logits of the last part; LogicError on ranks without it.
  const Tensor& result(int64_t micro_batch) const;
  const Tensor& minus_likeliest(int64_t micro_batch) const;
  std::vector<double> logits(int64_t micro_batch) const;

  /// Room for so many sequences of so many tokens, in this rank's layers.
  KeyValueCache make_cache(int64_t slots, int64_t capacity);

  /// Passes micro-batches 0 ... micro_batches - 1 through the whole model, nothing saved. Collective over the
  /// model's ranks.
  void forward(int64_t micro_batches);

  /// Scalars of the whole model. Collective over the world.
  int64_t count_parameters() const;

  /// True on the rank that answers for the losses of the tokens that it has: of those with the same tokens,
  /// the first of the tensor group that holds the last part.
  bool answers_for_loss() const;

 private:
  Context* context_;
  Mesh mesh_;
  ParameterStore store_;
  std::vector<std::unique_ptr<LanguageModelStage>> parts_;
  Placement placement_;
};

/// Every parameter of the model, whoever holds it, in the order in which one process declares them. The
/// configuration is resolved; its layout does not matter.
std::vector<LogicalTensor> logical_parameters(const RunConfig& config);

}  // namespace normformer
