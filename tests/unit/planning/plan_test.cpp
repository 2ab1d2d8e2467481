// A plan says what the ranks themselves account, and what formulas say.
#include "normformer/planning/plan.h"

#include <map>
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"
#include "normformer/model/parts.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

RunConfig config_of(int64_t tensor, int64_t pipeline, int64_t data) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 8;
  config.parallel.tensor = tensor;
  config.parallel.pipeline = pipeline;
  config.parallel.data = data;
  return config;
}

Plan plan_of(const RunConfig& config, int64_t most_ranks = 64) {
  return make_plan(config, num_ranks(mesh_degrees(config.parallel)), most_ranks);
}

int64_t held(const RankPlan& rank, MemoryUse use) {
  return rank.memory.at_peak_by_use[static_cast<size_t>(use)];
}

// What ranks on the CPU have used after a step.
std::map<int64_t, RankPlan> real_ranks(const RunConfig& config) {
  std::map<int64_t, RankPlan> ranks;
  std::mutex mutex;
  run_local_world(static_cast<int>(num_ranks(mesh_degrees(config.parallel))), [&](const Group& world) {
    SmallModel small(config, DeviceKind::cpu, world, mesh_degrees(config.parallel));
    world.ledger().clear();
    small.context.costs().clear();
    small.trainer.step();
    const std::lock_guard lock(mutex);
    ranks[world.rank()] = {.rank = world.rank(),
                           .at = small.model.mesh().coordinates(),
                           .memory = small.context.memory().report(),
                           .traffic = world.ledger().records(),
                           .flops = small.context.costs().total_flops(),
                           .calls = 0,
                           .staging_bytes = 0};
  });
  return ranks;
}

TEST(Plan, IsWhatRealRanksUse) {
  RunConfig with_context = config_of(2, 1, 2);
  with_context.parallel.context = 2;
  RunConfig in_groups = config_of(1, 1, 4);
  in_groups.parallel.shard_group = 2;
  RunConfig in_groups_of_context = with_context;
  in_groups_of_context.parallel.shard_group = 2;
  RunConfig classifier = config_of(2, 2, 1);
  classifier.model = small_classifier_config(Precision::bf16).model;
  for (RunConfig config : {config_of(2, 2, 1), config_of(1, 2, 2), config_of(1, 1, 3), config_of(3, 1, 1),
                           with_context, in_groups, in_groups_of_context, classifier}) {
    config.parallel.sharding = config.parallel.data > 1 ? Sharding::gradients : Sharding::optimizer;
    SCOPED_TRACE(to_string(mesh_degrees(config.parallel)));
    const Plan plan = plan_of(config);
    const auto real = real_ranks(config);
    ASSERT_EQ(static_cast<int64_t>(plan.stages.size()), config.parallel.pipeline);
    int64_t most_flops = 0;
    int64_t most_bytes = 0;
    for (const auto& [rank, used] : real) {
      const RankPlan& largest = plan.stages[static_cast<size_t>(used.at.pipeline)].largest;
      EXPECT_LE(used.memory.peak_live, largest.memory.peak_live);
      most_flops = std::max(most_flops, used.flops);
      most_bytes = std::max(most_bytes, used.traffic_bytes());
    }
    for (const StagePlan& stage : plan.stages) {
      const RankPlan& used = real.at(stage.largest.rank);
      EXPECT_EQ(stage.largest.memory.peak_live, used.memory.peak_live);
      EXPECT_EQ(stage.largest.memory.peak_reserved, used.memory.peak_reserved);
      EXPECT_EQ(stage.largest.memory.at_peak_by_use, used.memory.at_peak_by_use);
    }
    EXPECT_EQ(plan.busiest.traffic, real.at(plan.busiest.rank).traffic);
    EXPECT_EQ(plan.busiest.traffic_bytes(), most_bytes);
    EXPECT_EQ(plan.most_flops, most_flops);
    EXPECT_EQ(plan.order.violation, "");
    EXPECT_EQ(plan.order.ranks, static_cast<int64_t>(real.size()));
  }
}

TEST(Plan, ReadsTheModelOffTheConfiguration) {
  RunConfig config;
  config.model = {.layers = 24, .width = 1024, .heads = 16, .ffn = 4096, .vocab = 51200, .length = 2048};
  config.parallel = {.tensor = 2, .pipeline = 4, .data = 16};
  config.train.global_batch = 64;
  const Plan plan = plan_of(config);
  EXPECT_EQ(plan.parameters, 354740224);  // the paper's baseline of 24 layers
  EXPECT_EQ(plan.micro_batches, 4);
  EXPECT_EQ(plan.order.ranks, 2 * 2 * 4);
  EXPECT_EQ(plan.model_flops, training_flops_per_token(config) * 64 * 2048);
  std::vector<int64_t> layers;
  for (const StagePlan& stage : plan.stages) layers.push_back(stage.layers.at(0).size());
  EXPECT_EQ(layers, balanced_split(config.model, 4));
}

// docs/sharding.md: weights of 2 bytes, gradients of 4, and 12 of masters and moments that replicas split.
TEST(Plan, HasTheBytesOfEveryUse) {
  RunConfig config = config_of(1, 1, 1);
  config.model.width = 320;
  config.model.ffn = 1280;
  const Plan alone = plan_of(config);
  const auto near = [](int64_t bytes, double expected) {
    return std::abs(static_cast<double>(bytes) / expected - 1.0) < 0.08;  // blocks are larger, starts aligned
  };
  const auto parameters = static_cast<double>(alone.parameters);
  const RankPlan& rank = alone.stages.at(0).largest;
  EXPECT_TRUE(near(held(rank, MemoryUse::parameters), 2 * parameters));
  EXPECT_TRUE(near(held(rank, MemoryUse::gradients), 4 * parameters));
  EXPECT_TRUE(near(held(rank, MemoryUse::optimizer), 12 * parameters));
  EXPECT_EQ(alone.busiest.traffic_bytes(), 0);
  config.parallel.data = 4;
  EXPECT_TRUE(near(held(plan_of(config).stages.at(0).largest, MemoryUse::optimizer), 3 * parameters));
}

// ZeRO, section 7: a reduction, and two gatherings, for every micro-batch.
TEST(Plan, SaysWhatSharingGradientsAndWeightsCosts) {
  RunConfig config = config_of(1, 1, 4);
  config.model.ffn_norm = false;  // whose folding reads all weights once more
  config.train.micro_batch = 1;
  config.train.global_batch = 12;
  EXPECT_FALSE(plan_of(config).sharding.has_value());
  int64_t layers = 0;
  int64_t others = 0;
  const auto plan_with = [&](Sharding sharding) {
    config.parallel.sharding = sharding;
    SmallModel small(config, DeviceKind::meta, make_meta_world(0, 4), {.data = 4});
    layers = others = 0;
    for (const Bucket& b : small.model.store().buckets()) (b.unit >= 0 ? layers : others) += b.size();
    return plan_of(config);
  };
  const ShardingPlan gradients = plan_with(Sharding::gradients).sharding.value();
  EXPECT_EQ(gradients.bytes, 4 * (3 * layers + others) + 2 * (layers + others));
  const ShardingPlan parameters = plan_with(Sharding::parameters).sharding.value();
  EXPECT_EQ(parameters.bytes, 4 * (3 * layers + others) + 2 * (2 * 3 * layers + others));
  EXPECT_EQ(parameters.bytes_of_optimizer, gradients.bytes_of_optimizer);
  EXPECT_EQ(parameters.group, "data");
  config.parallel.shard_group = 2;
  const ShardingPlan in_groups = plan_with(Sharding::parameters).sharding.value();
  EXPECT_EQ(in_groups.bytes, 4 * (3 * layers + others) + 2 * (2 * 3 * layers + others));
  EXPECT_EQ(in_groups.group, "sharding");
  config.parallel.shard_group = 1;
  EXPECT_FALSE(plan_with(Sharding::parameters).sharding.has_value());
  config.parallel.shard_group = 0;
  config.train.global_batch = 4;
  EXPECT_FALSE(plan_with(Sharding::parameters).sharding.has_value());
}

TEST(Plan, OfSomeRanksIsThatOfAll) {
  RunConfig in_groups = config_of(1, 1, 3);
  in_groups.parallel.context = in_groups.parallel.shard_group = 3;
  in_groups.parallel.sharding = Sharding::parameters;
  for (RunConfig config : {config_of(4, 2, 3), config_of(5, 1, 4), config_of(3, 4, 3), in_groups}) {
    config.parallel.sequence = config.parallel.tensor == 4;
    const Plan all = plan_of(config);
    const Plan some = plan_of(config, 1);
    EXPECT_EQ(all.order.ranks, all.ranks);
    EXPECT_EQ(some.order.ranks, 4 * config.parallel.pipeline);
    for (size_t s = 0; s < all.stages.size(); ++s) {
      EXPECT_EQ(all.stages[s].largest.memory.peak_live, some.stages[s].largest.memory.peak_live);
      EXPECT_EQ(all.stages[s].layers, some.stages[s].layers);
    }
    EXPECT_EQ(all.busiest.traffic_bytes(), some.busiest.traffic_bytes());
    EXPECT_EQ(all.most_flops, some.most_flops);
  }
}

// The work of all parts is what the ranks are not idle.
TEST(Plan, SimulatesThePipelineWithTheFlopsOfItsParts) {
  for (const auto schedule : {PipelineSchedule::one_f_one_b, PipelineSchedule::interleaved,
                              PipelineSchedule::zb_h2, PipelineSchedule::zb_v}) {
    RunConfig config = config_of(1, 2, 1);
    config.model.width = 160;  // of narrow models the products are but a part
    config.model.ffn = 640;
    config.parallel.schedule = schedule;
    config.parallel.virtual_stages = schedule == PipelineSchedule::interleaved ? 2 : 1;
    const StageTimes times = flops_of_parts(config);
    double work = 0;
    for (size_t part = 0; part < times.forward.size(); ++part) {
      EXPECT_GT(times.forward[part], 0);
      EXPECT_NEAR((times.backward_input[part] + times.backward_weight[part]) / times.forward[part], 2, 0.4);
      work += times.forward[part] + times.backward_input[part] + times.backward_weight[part];
    }
    const Schedule planned = make_schedule(config.parallel, 2, 1);
    const Simulation one = simulate(planned, times);
    config.train.global_batch = config.train.micro_batch;
    const Plan plan = plan_of(config);
    EXPECT_NEAR((1 - plan.pipeline.value().bubble_fraction) * 2 * one.makespan / work, 1, 1e-12);
    EXPECT_NEAR(plan.pipeline->barrier_share, barrier_cost(planned, times) / one.makespan, 1e-12);
  }
}

TEST(Plan, TheBarrierCostsWhatStagesThatBeginLateCouldDo) {
  RunConfig config = config_of(1, 4, 1);
  config.train.micro_batch = 1;
  config.train.global_batch = 12;
  config.parallel.schedule = PipelineSchedule::zb_h2;
  EXPECT_GT(plan_of(config).pipeline.value().barrier_share, 0.02);
}

TEST(Plan, ReadsAsText) {
  RunConfig config = config_of(2, 2, 2);
  config.parallel.sharding = Sharding::gradients;
  config.train.micro_batch = 1;
  Plan plan = plan_of(config);
  const std::string text = describe(plan);
  EXPECT_THAT(text, HasSubstr("layout      tensor 2 x pipeline 2 x data 2, schedule \"1f1b\", sharding "
                              "\"gradients\"\n"));
  EXPECT_THAT(text, HasSubstr("batch       5 sequences of 12 tokens; micro-batches of 1, 3 a step"));
  EXPECT_THAT(text, HasSubstr("of all 8 ranks fit together"));
  // 6 for each weight of a product and token, 8 * (4 * 20^2 + 2 * 20 * 33) + 41 * 20, and attention's 6 * 8 *
  // 20 * 12.
  EXPECT_THAT(text,
              HasSubstr("training: 1,000 updates take 60,000 tokens and 9.40e+09 FLOPs of the model\n"));
  EXPECT_THAT(text, HasSubstr("sharding: \"gradients\" moves "));
  EXPECT_THAT(text, HasSubstr("gradients are reduced for each of 3 micro-batches: a pipeline"));
  EXPECT_THAT(text, HasSubstr(" over the data group, "));
  config.parallel.context = config.parallel.shard_group = 2;
  const std::string hybrid = describe(plan_of(config));
  EXPECT_THAT(hybrid, HasSubstr("layout      tensor 2 x context 2 x pipeline 2 x data 2, schedule \"1f1b\", "
                                "sharding \"gradients\" in groups of 2\n"));
  EXPECT_THAT(hybrid, HasSubstr(" over the sharding group, "));
  EXPECT_THAT(hybrid, HasSubstr("\n  replication all_reduce "));
  plan.parameters = 1234567890;
  plan.order.violation = "ranks 0 and 1 do not agree";
  EXPECT_THAT(describe(plan), HasSubstr("(1,234,567,890)"));
  EXPECT_THAT(describe(plan), HasSubstr("order of calls: NOT SOUND: ranks 0 and 1 do not agree\n"));
  const std::string alone = describe(plan_of(config_of(1, 1, 1)));
  EXPECT_THAT(alone, HasSubstr("traffic of a step: none"));
  EXPECT_THAT(alone, Not(HasSubstr("pipeline:")));
}

TEST(Plan, TakesDocumentMasksAndRecomputation) {
  RunConfig config = config_of(1, 1, 1);
  const Plan plain = plan_of(config);
  config.data.document_mask = true;
  const Plan masked = plan_of(config);
  EXPECT_GT(held(masked.stages[0].largest, MemoryUse::activations),
            held(plain.stages[0].largest, MemoryUse::activations));
  config.train.recompute = Recompute::full;
  const Plan recomputed = plan_of(config);
  EXPECT_GT(recomputed.most_flops, 1.2 * static_cast<double>(plain.most_flops));
  EXPECT_LT(recomputed.stages[0].largest.memory.peak_live, plain.stages[0].largest.memory.peak_live);
}

}  // namespace
}  // namespace normformer::testing_support
