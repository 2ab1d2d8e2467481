#include "normformer/model/model_instance.h"

#include "normformer/mesh/layout.h"

namespace normformer {

DType model_dtype(Precision precision) {
  switch (precision) {
    case Precision::fp64:
      return DType::f64;
    case Precision::fp32:
      return DType::f32;
    case Precision::bf16:
      return DType::bf16;
  }
  return DType::f32;
}

StagePart stage_part(int64_t layers, int64_t stages, int64_t rank) {
  return {stage_layers(layers, stages, rank), rank == 0, rank == stages - 1};
}

ModelInstance::ModelInstance(Context& context, const Mesh& mesh, const RunConfig& config, bool with_gradients)
    : context_(&context),
      mesh_(mesh),
      store_(context, model_dtype(config.train.precision)),
      stage_({&context, config.model, model_dtype(config.train.precision), mesh.tensor(), config.train.seed},
             stage_part(config.model.layers, mesh.pipeline().size(), mesh.pipeline().rank()), store_) {
  store_.allocate(config.parallel.bucket_mib << 20, with_gradients);
}

int64_t ModelInstance::count_parameters() const {
  // Every data-parallel replica counts the same scalars.
  const int64_t mine = mesh_.data().rank() == 0 ? store_.owned_scalars() : 0;
  return mesh_.world().all_reduce_sum(mine);
}

bool ModelInstance::answers_for_loss() const { return stage_.part().last && mesh_.tensor().rank() == 0; }

double training_flops_per_token(const ModelConfig& config) {
  const auto d = static_cast<double>(config.width);
  const auto f = static_cast<double>(config.ffn);
  const auto layers = static_cast<double>(config.layers);
  const double products = layers * (4.0 * d * d + 2.0 * d * f) + static_cast<double>(config.vocab) * d;
  return 6.0 * products + 6.0 * layers * d * static_cast<double>(config.length);
}

}  // namespace normformer
