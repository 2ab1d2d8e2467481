// Spikes in training: all layouts see the same ones, and what becomes of their batches.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "small_model.h"

namespace normformer::testing_support {
namespace {

constexpr int64_t kPoisoned = 20;
constexpr int64_t kSteps = 24;

RunConfig spiky_config(SpikePolicy policy) {
  RunConfig config = small_config(Precision::fp64);
  config.model.residual_dropout = 0.0;
  config.model.attention_dropout = 0.0;
  config.train.micro_batch = 1;
  config.optimizer.lr = 1e-2;
  config.optimizer.warmup_updates = 2;
  config.health.spike_zscore = 4.0;
  config.health.spike_window = 16;
  config.health.on_spike = policy;
  return config;
}

struct Steps {
  std::vector<StepReport> reports;
  std::vector<TrainingCounters> counters;
};

Steps run_steps(const RunConfig& config, const Group& world, const MeshDegrees& degrees, int64_t poisoned) {
  SmallModel small(config, DeviceKind::cpu, world, degrees, poisoned);
  Steps steps;
  for (int64_t i = 0; i < kSteps; ++i) {
    steps.reports.push_back(small.trainer.step());
    steps.counters.push_back(small.trainer.counters());
  }
  return steps;
}

TEST(SpikeSteps, ASpikeThatIsOnlyToldChangesNothing) {
  const Steps told = run_steps(spiky_config(SpikePolicy::log), make_self_world(), {}, kPoisoned);
  RunConfig blind = spiky_config(SpikePolicy::log);
  blind.health.spike_zscore = 0.0;
  const Steps untold = run_steps(blind, make_self_world(), {}, kPoisoned);
  for (size_t i = 0; i < kSteps; ++i) {
    EXPECT_EQ(told.reports[i].spike.has_value(), i == kPoisoned) << i;
    EXPECT_FALSE(told.reports[i].skipped);
    EXPECT_EQ(told.reports[i].loss, untold.reports[i].loss);
    EXPECT_FALSE(untold.reports[i].spike.has_value());
  }
  const StepReport& spike = told.reports[kPoisoned];
  EXPECT_GT(std::max(spike.spike->loss, spike.spike->gradient_norm), 4.0);
  EXPECT_EQ(told.counters.back().recent.losses.size(), 16u);
  EXPECT_EQ(told.counters[kPoisoned].recent.losses.back(), spike.loss);
  EXPECT_EQ(told.counters[kPoisoned].recent.gradient_norms.back(), spike.gradient_norm);
  EXPECT_TRUE(untold.counters.back().recent.losses.empty());
}

TEST(SpikeSteps, ASkippedSpikeMovesNeitherWeightsNorTheWindow) {
  const Steps steps = run_steps(spiky_config(SpikePolicy::skip), make_self_world(), {}, kPoisoned);
  const TrainingCounters& before = steps.counters[kPoisoned - 1];
  const TrainingCounters& behind = steps.counters[kPoisoned];
  EXPECT_TRUE(steps.reports[kPoisoned].skipped);
  EXPECT_EQ(steps.reports[kPoisoned].reason, SkipReason::spike);
  EXPECT_EQ(behind.batch_index, before.batch_index + 1);
  EXPECT_EQ(behind.updates, before.updates);
  EXPECT_EQ(behind.skipped_in_a_row, 1);
  EXPECT_EQ(behind.recent, before.recent);
  EXPECT_EQ(steps.counters[kPoisoned + 1].skipped_in_a_row, 0);
  EXPECT_EQ(steps.counters.back().updates, kSteps - 1);
}

// As if the batch had never been: the run whose data lack it has the same weights behind it.
TEST(SpikeSteps, ASkippedSpikeLeavesNoTrace) {
  const RunConfig config = spiky_config(SpikePolicy::skip);
  SmallModel skips(config, DeviceKind::cpu, make_self_world(), {}, kPoisoned);
  for (int64_t i = 0; i <= kPoisoned; ++i) skips.trainer.step();
  SmallModel lacks(config, DeviceKind::cpu, make_self_world());
  for (int64_t i = 0; i < kPoisoned; ++i) lacks.trainer.step();
  TrainingCounters counters = lacks.trainer.counters();
  counters.batch_index += 1;
  lacks.trainer.set_counters(counters);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(skips.trainer.step().loss, lacks.trainer.step().loss);
}

TEST(SpikeSteps, EveryLayoutSeesTheSameSpikes) {
  const RunConfig base = spiky_config(SpikePolicy::skip);
  const Steps expected = run_steps(base, make_self_world(), {}, kPoisoned);
  ASSERT_EQ(expected.reports[kPoisoned].reason, SkipReason::spike);
  for (const MeshDegrees& degrees :
       {MeshDegrees{.data = 2}, MeshDegrees{.tensor = 2}, MeshDegrees{.pipeline = 3},
        MeshDegrees{.tensor = 2, .pipeline = 2}, MeshDegrees{.context = 2, .data = 2}}) {
    for (const bool optimistic : {false, true}) {
      RunConfig config = base;
      config.optimizer.optimistic = optimistic;
      SCOPED_TRACE(to_string(degrees));
      run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
        const Steps steps = run_steps(config, world, degrees, kPoisoned);
        for (size_t i = 0; i < kSteps; ++i) {
          EXPECT_EQ(steps.reports[i].reason, expected.reports[i].reason) << i;
          EXPECT_NEAR(steps.reports[i].loss, expected.reports[i].loss, 1e-10) << i;
          EXPECT_EQ(steps.counters[i].updates, expected.counters[i].updates) << i;
        }
      });
    }
  }
}

// A scale is left alone by a batch that made no update and did not overflow.
TEST(SpikeSteps, ASpikeIsNoOverflow) {
  RunConfig config = spiky_config(SpikePolicy::skip);
  config.train.precision = Precision::fp16;
  config.train.loss_scale_init = 64.0;
  config.train.loss_scale_window = 1000;
  const Steps steps = run_steps(config, make_self_world(), {}, kPoisoned);
  EXPECT_EQ(steps.reports[kPoisoned].reason, SkipReason::spike);
  EXPECT_EQ(steps.counters[kPoisoned].loss_scale, steps.counters[kPoisoned - 1].loss_scale);
  EXPECT_EQ(steps.counters[kPoisoned].skipped_in_a_row, 1);
}

TEST(SpikeSteps, DrawingWeightsAnewForgetsEverything) {
  for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.data = 2}}) {
    for (const Sharding sharding : {Sharding::optimizer, Sharding::parameters}) {
      RunConfig config = spiky_config(SpikePolicy::log);
      config.train.precision = Precision::bf16;
      config.parallel.sharding = sharding;
      run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
        SmallModel again(config, DeviceKind::cpu, world, degrees);
        std::vector<double> first;
        for (int i = 0; i < 4; ++i) first.push_back(again.trainer.step().loss);
        again.trainer.initialise();
        again.trainer.set_counters({});
        for (const double loss : first) EXPECT_EQ(again.trainer.step().loss, loss);
      });
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
