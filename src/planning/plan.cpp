#include "normformer/planning/plan.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "normformer/comm/launch_order.h"
#include "normformer/core/error.h"
#include "normformer/model/parts.h"
#include "normformer/training/run_checkpoint.h"
#include "normformer/training/trainer.h"

namespace normformer {

namespace {

// Ones in a share of so many places, as evenly as can be.
std::vector<uint8_t> even_mask(size_t places, double share) {
  std::vector<uint8_t> mask(places);
  const auto ones_before = [&](size_t place) { return std::floor(static_cast<double>(place) * share); };
  for (size_t i = 0; i < places; ++i) mask[i] = ones_before(i + 1) > ones_before(i) ? 1 : 0;
  return mask;
}

// Samples of the right size; on meta nobody reads them.
Batch blank_batch(const RunConfig& config, int64_t sequences) {
  const auto tokens = static_cast<size_t>(sequences * config.model.length);
  Batch batch{.sequences = sequences,
              .seq_len = config.model.length,
              .inputs = std::vector<int32_t>(tokens),
              .targets = std::vector<int32_t>(tokens),
              .document_start = {},
              .loss_mask = {}};
  const bool classifies = config.model.head == OutputHead::classification;
  if (classifies) {
    batch.loss_mask.resize(tokens);
    for (size_t row = 0; row < tokens; row += static_cast<size_t>(config.model.length))
      batch.loss_mask[row] = 1;
  } else if (predicts_some_tokens(config.model)) {
    batch.loss_mask = even_mask(tokens, predicted_share(config));
  }
  if (!config.data.document_mask && !classifies) return batch;
  batch.document_start.resize(tokens);
  batch.loss_mask.resize(tokens, 1);
  return batch;
}

// One rank of a run, alone on meta.
struct PlannedRank {
  PlannedRank(const RunConfig& c, int64_t rank, int64_t ranks)
      : config(c),
        world(make_meta_world(static_cast<int>(rank), static_cast<int>(ranks))),
        model(context, make_mesh(world, config.parallel), config, true),
        trainer(model, config, [this](int64_t, int64_t count) { return blank_batch(config, count); }) {}

  RunConfig config;
  Context context{DeviceKind::meta};
  Group world;
  ModelInstance model;
  Trainer trainer;
};

// Initial weights and one step. All calls of both go to `events` where it is not null.
RankPlan run_step(PlannedRank& planned, std::vector<TrafficEvent>* events) {
  TrafficLedger& ledger = planned.world.ledger();
  ledger.keep_events(events != nullptr);
  planned.trainer.initialise();
  if (events != nullptr) *events = ledger.events();
  ledger.clear();
  planned.context.costs().clear();
  planned.trainer.step();
  if (events != nullptr) {
    const std::vector<TrafficEvent> of_step = ledger.events();
    events->insert(events->end(), of_step.begin(), of_step.end());
  }
  return {.rank = planned.world.rank(),
          .at = planned.model.mesh().coordinates(),
          .memory = planned.context.memory().report(),
          .traffic = ledger.records(),
          .flops = planned.context.costs().total_flops(),
          .calls = events != nullptr ? static_cast<int64_t>(events->size()) : 0,
          .staging_bytes = staging_bytes(planned.config.checkpoint, planned.trainer.optimizer())};
}

// Even parts give the first ranks of an axis the most and the last ones the least.
std::vector<int64_t> ranks_to_run(const RunConfig& config, int64_t ranks, int64_t most_ranks) {
  const MeshDegrees degrees = mesh_degrees(config.parallel);
  std::vector<int64_t> chosen;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const MeshCoordinates at = coordinates_of(degrees, rank);
    const auto at_an_end = [](int64_t coordinate, int64_t degree) {
      return coordinate == 0 || coordinate == degree - 1;
    };
    if (ranks <= most_ranks || (at_an_end(at.tensor, degrees.tensor) && at_an_end(at.data, degrees.data) &&
                                at_an_end(at.context, degrees.context)))
      chosen.push_back(rank);
  }
  return chosen;
}

int64_t count_parameters(RunConfig config) {
  config.parallel = {.tensor = 1, .pipeline = 1, .data = 1};
  Context context(DeviceKind::meta);
  return ModelInstance(context, Mesh(make_self_world(), {}), config, false).count_parameters();
}

void enter(Plan& plan, const RankPlan& rank, const ModelInstance& model) {
  StagePlan& stage = plan.stages[static_cast<size_t>(rank.at.pipeline)];
  if (stage.layers.empty()) {
    for (const auto& part : model.parts()) stage.layers.push_back(part->part().layers);
    stage.largest = rank;
  }
  if (rank.memory.peak_live > stage.largest.memory.peak_live) stage.largest = rank;
  if (rank.traffic_bytes() > plan.busiest.traffic_bytes() || plan.order.ranks == 0) plan.busiest = rank;
  plan.most_flops = std::max(plan.most_flops, rank.flops);
  plan.order.ranks += 1;
  plan.order.calls += rank.calls;
}

std::string violation_of(std::span<const RankEvents> events) {
  try {
    check_launch_order(events);
    return "";
  } catch (const LogicError& e) {
    return e.what();
  }
}

PipelinePlan plan_pipeline(const RunConfig& config, const Schedule& schedule) {
  const StageTimes times = flops_of_parts(config);
  const Simulation simulation = simulate(schedule, times);
  return {.bubble_fraction = simulation.bubble_fraction,
          .barrier_share = 1.0 - steady_step_time(schedule, times) / simulation.makespan};
}

// One micro-batch there and back through one part.
void time_part(Context& context, LanguageModelStage& part, size_t number, StageTimes& times) {
  int64_t before = context.costs().total_flops();
  const auto spent = [&] {
    const int64_t after = context.costs().total_flops();
    return static_cast<double>(after - std::exchange(before, after));
  };
  const auto boundary = [&](bool exists) {
    return exists ? context.empty(part.boundary_shape(0), part.boundary_dtype()) : Tensor();
  };
  std::unique_ptr<Stage::Saved> saved;
  part.forward(0, boundary(!part.part().first), saved);
  times.forward[number] = spent();
  part.backward_input(0, *saved, boundary(!part.part().last));
  times.backward_input[number] = spent();
  part.backward_weight(0, *saved);
  times.backward_weight[number] = spent();
}

// Gradients reduced and weights gathered over the ranks that split them.
int64_t bytes_of_sharding(const RankPlan& rank, const std::string& group) {
  int64_t bytes = 0;
  for (const TrafficRecord& r : rank.traffic) {
    if (r.group == group && (r.kind == "reduce_scatter" || r.kind == "all_gather")) bytes += r.bytes;
  }
  return bytes;
}

ShardingPlan plan_sharding(const Plan& plan) {
  RunConfig config = plan.config;
  config.parallel.sharding = Sharding::optimizer;
  PlannedRank planned(config, plan.busiest.rank, plan.ranks);
  const std::string& group = planned.model.mesh().sharding().name();
  return {.group = group,
          .bytes = bytes_of_sharding(plan.busiest, group),
          .bytes_of_optimizer = bytes_of_sharding(run_step(planned, nullptr), group)};
}

}  // namespace

int64_t RankPlan::traffic_bytes() const {
  int64_t bytes = 0;
  for (const TrafficRecord& r : traffic) bytes += r.bytes;
  return bytes;
}

Plan make_plan(const RunConfig& config, int64_t ranks, int64_t most_ranks) {
  Plan plan;
  plan.config = config;
  plan.ranks = ranks;
  plan.parameters = count_parameters(config);
  plan.stages.resize(static_cast<size_t>(config.parallel.pipeline));
  plan.model_flops =
      training_flops_per_token(config) * static_cast<double>(config.train.global_batch * config.model.length);
  std::vector<RankEvents> events;
  for (const int64_t rank : ranks_to_run(config, ranks, most_ranks)) {
    PlannedRank planned(config, rank, ranks);
    events.push_back({static_cast<int>(rank), {}});
    enter(plan, run_step(planned, &events.back().events), planned.model);
    if (rank != 0) continue;
    const Schedule& schedule = planned.trainer.schedule();
    plan.micro_batches = schedule.micro_batches;
    if (schedule.num_stages() > 1) plan.pipeline = plan_pipeline(config, schedule);
  }
  plan.order.violation = violation_of(events);
  const bool splits = config.parallel.data * config.parallel.context > 1 && config.parallel.shard_group != 1;
  if (config.parallel.sharding != Sharding::optimizer && splits && plan.micro_batches > 1)
    plan.sharding = plan_sharding(plan);
  return plan;
}

StageTimes flops_of_parts(const RunConfig& config) {
  const auto parts = static_cast<size_t>(config.parallel.parts());
  StageTimes times{.forward = std::vector<double>(parts),
                   .backward_input = std::vector<double>(parts),
                   .backward_weight = std::vector<double>(parts)};
  const MeshDegrees degrees = mesh_degrees(config.parallel);
  const Schedule schedule = make_schedule(config.parallel, degrees.pipeline, 0);
  for (int64_t stage = 0; stage < degrees.pipeline; ++stage) {
    PlannedRank planned(config, world_rank_of(degrees, {.pipeline = stage}), num_ranks(degrees));
    planned.trainer.initialise();
    const int64_t sequences = std::min(config.train.micro_batch, config.train.global_batch);
    planned.model.set_micro_batches(
        {make_micro_batch(planned.model, blank_batch(config, sequences), 0, 0, Purpose::training)});
    int64_t chunk = 0;
    for (const auto& part : planned.model.parts())
      time_part(planned.context, *part, static_cast<size_t>(schedule.part(stage, chunk++)), times);
  }
  return times;
}

}  // namespace normformer
