#include "normformer/model/model_instance.h"

#include "normformer/model/parts.h"
#include "normformer/pipeline/executor.h"

namespace normformer {

DType model_dtype(Precision precision) {
  switch (precision) {
    case Precision::fp64:
      return DType::f64;
    case Precision::fp32:
      return DType::f32;
    case Precision::bf16:
      return DType::bf16;
    case Precision::fp16:
    case Precision::fp16_memory_efficient:
      return DType::f16;
  }
  return DType::f32;
}

DType master_dtype(Precision precision) {
  const DType type = model_dtype(precision);
  return precision == Precision::fp16_memory_efficient ? type : accumulator_of(type);
}

MeshDegrees mesh_degrees(const ParallelConfig& parallel) {
  return {.tensor = parallel.tensor,
          .context = parallel.context,
          .data = parallel.data,
          .pipeline = parallel.pipeline};
}

Mesh make_mesh(Group world, const ParallelConfig& parallel) {
  return Mesh(std::move(world), mesh_degrees(parallel), parallel.shard_group);
}

ModelInstance::ModelInstance(Context& context, const Mesh& mesh, const RunConfig& config, bool with_gradients)
    : context_(&context),
      mesh_(mesh),
      store_(context, model_dtype(config.train.precision)),
      placement_(make_schedule(config.parallel, mesh.pipeline().size(), 0).placement) {
  // What is captured for a GPU as a graph neither waits for other queues nor has others wait for it.
  const bool graphs = config.device.cuda_graphs;
  const ModelEnvironment environment{
      .context = &context,
      .config = config.model,
      .dtype = store_.dtype(),
      .tensor = mesh.tensor(),
      .sequences = mesh.context(),
      .seed = config.train.seed,
      .sequence = config.parallel.sequence && mesh.tensor().size() > 1,
      .recompute = config.train.recompute,
      .recompute_layers = config.train.recompute_layers,
      .overlap_context = config.parallel.overlap_context,
      .overlap_tensor = config.parallel.overlap_tensor && mesh.tensor().size() > 1};
  for (const StagePart& part : parts_of_stage(config, mesh.pipeline().size(), mesh.pipeline().rank()))
    parts_.push_back(make_language_model_stage(environment, part, store_));
  store_.allocate(
      mesh.sharding(),
      {.bucket_bytes = static_cast<int64_t>(config.parallel.bucket_mib * 0x1p20),
       .with_gradients = with_gradients,
       .sharding = config.parallel.sharding,
       .overlap_gradients = config.parallel.overlap_gradients && !graphs && mesh.replicas().size() > 1,
       .overlap_values = config.parallel.overlap_parameters && !graphs && mesh.sharding().size() > 1},
      mesh.replication());
}

bool ModelInstance::has_first_part() const { return parts_.front()->part().first; }

bool ModelInstance::has_last_part() const { return parts_.back()->part().last; }

void ModelInstance::prepare() {
  for (const auto& part : parts_) part->prepare();
}

void ModelInstance::set_micro_batches(const std::vector<MicroBatch>& batches) {
  for (const auto& part : parts_) part->set_micro_batches(batches);
}

double ModelInstance::loss_sum() const { return has_last_part() ? parts_.back()->loss_sum() : 0.0; }

int64_t ModelInstance::correct() const { return has_last_part() ? parts_.back()->correct() : 0; }

std::vector<double> ModelInstance::logits(int64_t micro_batch) const {
  NF_CHECK(has_last_part(), "logits are asked of a rank without the model's last part");
  return parts_.back()->logits(micro_batch);
}

const Tensor& ModelInstance::result(int64_t micro_batch) const {
  NF_CHECK(has_last_part(), "a result is asked of a rank without the model's last part");
  return parts_.back()->result(micro_batch);
}

KeyValueCache ModelInstance::make_cache(int64_t slots, int64_t capacity) {
  std::vector<Range> layers;
  for (const auto& part : parts_) layers.push_back(part->part().layers);
  const ModelEnvironment& e = environment();
  return KeyValueCache(*context_, e.dtype, {slots, capacity, e.heads().size(), e.config.head_size()}, layers);
}

const Tensor& ModelInstance::minus_likeliest(int64_t micro_batch) const {
  NF_CHECK(has_last_part(), "likeliest tokens are asked of a rank without the model's last part");
  return parts_.back()->minus_likeliest(micro_batch);
}

void ModelInstance::forward(int64_t micro_batches) {
  std::vector<ForwardOnlyStage> stages;
  for (const auto& part : parts_) stages.emplace_back(*part);
  std::vector<ForwardStage*> pointers;
  for (ForwardOnlyStage& stage : stages) pointers.push_back(&stage);
  run_forward(*context_, mesh_.pipeline(), micro_batches, pointers, placement_);
}

int64_t ModelInstance::count_parameters() const {
  // Every replica counts the same scalars.
  const int64_t mine = mesh_.replicas().rank() == 0 ? store_.owned_scalars() : 0;
  return mesh_.world().all_reduce_sum(mine);
}

bool ModelInstance::answers_for_loss() const { return has_last_part() && mesh_.tensor().rank() == 0; }

std::vector<LogicalTensor> logical_parameters(const RunConfig& config) {
  RunConfig alone = config;
  alone.parallel = {.tensor = 1, .pipeline = 1, .data = 1};
  alone.device.cuda_graphs = false;
  Context context(DeviceKind::meta);
  ModelInstance model(context, make_mesh(make_meta_world(0, 1), alone.parallel), alone, false);
  std::vector<LogicalTensor> all;
  for (const Parameter& p : model.store().parameters()) all.push_back({p.spec.name, p.spec.logical_shape});
  return all;
}

}  // namespace normformer
