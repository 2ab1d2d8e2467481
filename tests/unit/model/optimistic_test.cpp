// Optimistic updates: whatever is taken back and done again, every bit is that of a trainer which waits.
#include <algorithm>
#include <bit>
#include <vector>

#include <gtest/gtest.h>

#include "small_model.h"

namespace normformer::testing_support {
namespace {

constexpr int64_t kSteps = 20;

struct Trained {
  std::vector<StepReport> reports;
  std::vector<TrainingCounters> counters;   // behind each step
  std::vector<std::vector<double>> state;   // this rank's masters and moments
  std::vector<std::vector<double>> values;  // whole parameters, where they are
  int64_t redone = 0;
};

void remember(const FinishedStep& finished, Trained& into) {
  into.reports.push_back(finished.report);
  into.counters.push_back(finished.counters);
  into.redone += finished.report.redone;
}

void run_steps(SmallModel& small, int64_t steps, Trained& into) {
  for (int64_t i = 0; i < steps; ++i)
    if (const auto finished = small.trainer.advance()) remember(*finished, into);
  if (const auto finished = small.trainer.settle()) remember(*finished, into);
  EXPECT_FALSE(small.trainer.settle().has_value());
}

std::vector<std::vector<double>> state_of(SmallModel& small) {
  std::vector<std::vector<double>> state;
  for (const StatePiece& piece : small.trainer.optimizer().state())
    state.push_back(to_host(piece.piece.values));
  return state;
}

void look(SmallModel& small, Trained& trained) {
  trained.state = state_of(small);
  small.model.store().await_values();
  for (const Parameter& p : small.model.store().parameters())
    if (p.value) trained.values.push_back(to_host(p.value));
}

Trained train(RunConfig config, bool optimistic, const Group& world, const MeshDegrees& degrees) {
  config.optimizer.optimistic = optimistic;
  SmallModel small(config, DeviceKind::cpu, world, degrees);
  Trained trained;
  run_steps(small, kSteps, trained);
  look(small, trained);
  return trained;
}

std::vector<uint64_t> bits_of(const std::vector<std::vector<double>>& values) {
  std::vector<uint64_t> bits;
  for (const auto& some : values)
    for (const double value : some) bits.push_back(std::bit_cast<uint64_t>(value));
  return bits;
}

void expect_same_bits(const Trained& got, const Trained& expected) {
  ASSERT_EQ(got.reports.size(), expected.reports.size());
  for (size_t i = 0; i < expected.reports.size(); ++i) {
    const StepReport& a = got.reports[i];
    const StepReport& b = expected.reports[i];
    EXPECT_EQ(bits_of({{a.loss, a.gradient_norm, a.lr, a.loss_scale}}),
              bits_of({{b.loss, b.gradient_norm, b.lr, b.loss_scale}}))
        << "step " << i << ": " << a.loss << " for " << b.loss;
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.skipped, b.skipped);
    EXPECT_EQ(got.counters[i], expected.counters[i]) << "step " << i;
  }
  EXPECT_EQ(bits_of(got.state), bits_of(expected.state));
  EXPECT_EQ(bits_of(got.values), bits_of(expected.values));
}

// The bits are the same on every rank; returns how many updates were made again.
int64_t expect_as_without(const RunConfig& config, const MeshDegrees& degrees) {
  int64_t redone = 0;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    const Trained expected = train(config, false, world, degrees);
    EXPECT_EQ(expected.redone, 0);
    const Trained got = train(config, true, world, degrees);
    expect_same_bits(got, expected);
    EXPECT_EQ(world.all_reduce_sum(got.redone), got.redone * world.size());
    if (world.rank() == 0) redone = got.redone;
  });
  return redone;
}

// A norm that about half of the steps' gradients exceed.
double median_norm(const RunConfig& config) {
  const Trained plain = train(config, false, make_self_world(), {});
  std::vector<double> norms;
  for (const StepReport& report : plain.reports) norms.push_back(report.gradient_norm);
  std::sort(norms.begin(), norms.end());
  return norms[norms.size() / 2];
}

RunConfig deep_config(Precision precision) {
  RunConfig config = small_config(precision);
  config.model.layers = 4;
  config.train.micro_batch = 1;
  config.optimizer.lr = 3e-3;
  config.optimizer.warmup_updates = 2;
  return config;
}

struct Layout {
  MeshDegrees degrees;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  Sharding sharding = Sharding::optimizer;
  Recompute recompute = Recompute::none;
  bool sequence = false;
};

RunConfig config_of(const Layout& layout, Precision precision) {
  RunConfig config = deep_config(precision);
  config.parallel.schedule = layout.schedule;
  config.parallel.virtual_stages = layout.schedule == PipelineSchedule::interleaved ? 2 : 1;
  config.parallel.sharding = layout.sharding;
  config.parallel.sequence = layout.sequence;
  config.parallel.bucket_mib = 0.002;
  config.train.recompute = layout.recompute;
  return config;
}

const std::vector<Layout>& layouts() {
  using S = PipelineSchedule;
  static const std::vector<Layout> all{
      {.degrees = {}},
      {.degrees = {.pipeline = 2}, .schedule = S::gpipe},
      {.degrees = {.pipeline = 3}, .schedule = S::one_f_one_b, .recompute = Recompute::full},
      {.degrees = {.pipeline = 2}, .schedule = S::interleaved},
      {.degrees = {.pipeline = 4}, .schedule = S::zb_h1},
      {.degrees = {.pipeline = 3}, .schedule = S::zb_h2},
      {.degrees = {.pipeline = 2}, .schedule = S::zb_v},
      {.degrees = {.tensor = 2}, .sequence = true},
      {.degrees = {.tensor = 2, .pipeline = 2}, .schedule = S::zb_h2, .sequence = true},
      {.degrees = {.data = 2}, .sharding = Sharding::gradients},
      {.degrees = {.data = 3}, .sharding = Sharding::parameters, .recompute = Recompute::selective},
      {.degrees = {.data = 2, .pipeline = 2}, .schedule = S::zb_v, .sharding = Sharding::parameters},
      {.degrees = {.data = 2, .pipeline = 2}, .schedule = S::interleaved, .sharding = Sharding::optimizer},
      {.degrees = {.context = 2, .pipeline = 2}, .schedule = S::zb_h2, .sharding = Sharding::gradients},
  };
  return all;
}

TEST(Optimistic, GivesTheBitsOfATrainerThatWaitsInEveryLayout) {
  const double median = median_norm(deep_config(Precision::fp32));
  int64_t i = 0;
  for (const Layout& layout : layouts()) {
    for (const double clip : {0.0, median, 1e-3 * median}) {
      RunConfig config = config_of(layout, ++i % 2 == 0 ? Precision::fp32 : Precision::bf16);
      config.optimizer.clip_norm = clip;
      SCOPED_TRACE(to_toml(config));
      const int64_t redone = expect_as_without(config, layout.degrees);
      const bool sometimes = clip == median;
      EXPECT_GE(redone, sometimes ? 1 : clip > 0.0 ? kSteps : 0);
      EXPECT_LE(redone, sometimes ? kSteps - 1 : clip > 0.0 ? kSteps : 0);
    }
  }
}

// Scales fall from far too high, and rise until they overflow again.
TEST(Optimistic, OverflowsAreTakenBack) {
  for (const Precision precision : {Precision::fp16, Precision::fp16_memory_efficient}) {
    for (const Layout& layout :
         {Layout{.degrees = {.pipeline = 3}, .schedule = PipelineSchedule::zb_h2},
          Layout{.degrees = {.data = 2, .pipeline = 2}, .schedule = PipelineSchedule::zb_v},
          Layout{.degrees = {.data = 2}, .sharding = Sharding::parameters}}) {
      RunConfig config = config_of(layout, precision);
      config.train.loss_scale_init = 0x1p22;
      config.train.loss_scale_window = 3;
      SCOPED_TRACE(to_toml(config));
      const int64_t redone = expect_as_without(config, layout.degrees);
      EXPECT_TRUE(0 < redone && redone < kSteps) << redone;
    }
  }
}

// Batches that are a little above those before them, which small models' often are.
TEST(Optimistic, SpikesAreTakenBack) {
  for (const Layout& layout :
       {Layout{.degrees = {}},
        Layout{.degrees = {.tensor = 2, .pipeline = 2}, .schedule = PipelineSchedule::zb_h2},
        Layout{.degrees = {.data = 2}, .sharding = Sharding::parameters}}) {
    RunConfig config = config_of(layout, Precision::bf16);
    config.health.spike_zscore = 1.0;
    config.health.spike_window = 8;
    config.health.on_spike = SpikePolicy::skip;
    SCOPED_TRACE(to_toml(config));
    const int64_t redone = expect_as_without(config, layout.degrees);
    EXPECT_TRUE(0 < redone && redone < kSteps) << redone;
  }
}

// One update too large for any number, after which no gradient is finite.
TEST(Optimistic, GradientsThatAreNotFiniteMoveNothing) {
  for (const Layout& layout :
       {Layout{.degrees = {}},
        Layout{.degrees = {.tensor = 2, .pipeline = 2}, .schedule = PipelineSchedule::zb_h2},
        Layout{.degrees = {.data = 2}, .sharding = Sharding::gradients}}) {
    RunConfig config = config_of(layout, Precision::bf16);
    config.optimizer.lr = 1e37;
    config.optimizer.warmup_updates = 0;
    SCOPED_TRACE(to_toml(config));
    EXPECT_GE(expect_as_without(config, layout.degrees), kSteps - 2);
  }
}

// Replicas with fewer micro-batches than others, one without any.
TEST(Optimistic, ReplicasMayBeWithoutAMicroBatch) {
  for (const Sharding sharding : {Sharding::optimizer, Sharding::parameters}) {
    RunConfig config = config_of({.degrees = {}, .sharding = sharding}, Precision::fp32);
    config.train.global_batch = 2;
    config.optimizer.clip_norm = median_norm(config);
    EXPECT_GT(expect_as_without(config, {.data = 3}), 0);
  }
}

TEST(Optimistic, OneStepAtATimeAndResumingAreAlike) {
  RunConfig config = config_of({.degrees = {}, .schedule = PipelineSchedule::zb_h2}, Precision::bf16);
  config.optimizer.clip_norm = median_norm(config);
  const MeshDegrees degrees{.pipeline = 2};
  run_local_world(2, [&](const Group& world) {
    const Trained straight = train(config, true, world, degrees);
    RunConfig optimistic = config;
    optimistic.optimizer.optimistic = true;
    SmallModel single(optimistic, DeviceKind::cpu, world, degrees);
    for (const StepReport& report : straight.reports) {
      const StepReport mine = single.trainer.step();
      EXPECT_EQ(mine.loss, report.loss);
      EXPECT_EQ(mine.redone, report.redone);
    }
    EXPECT_EQ(state_of(single), straight.state);
    Trained resumed;
    SmallModel first(optimistic, DeviceKind::cpu, world, degrees);
    run_steps(first, 7, resumed);
    SmallModel second(optimistic, DeviceKind::cpu, world, degrees);
    const auto from = first.trainer.optimizer().state();
    const auto to = second.trainer.optimizer().state();
    for (size_t i = 0; i < from.size(); ++i) copy(second.context, from[i].piece.values, to[i].piece.values);
    second.trainer.set_counters(resumed.counters.back());
    second.trainer.weights_changed();
    run_steps(second, kSteps - 7, resumed);
    look(second, resumed);
    expect_same_bits(resumed, straight);
  });
}

TEST(Optimistic, AskedOnEveryRankToStopAllKnow) {
  RunConfig config = small_config(Precision::fp32);
  for (const bool optimistic : {false, true}) {
    config.optimizer.optimistic = optimistic;
    run_local_world(2, [&](const Group& world) {
      SmallModel small(config, DeviceKind::cpu, world, {.data = 2});
      std::vector<bool> wanted;
      for (int step = 0; step < 3; ++step) {
        const auto finished =
            small.trainer.advance([&] { return RankWord{.wants_stop = step == 1 && world.rank() == 1}; });
        if (finished) wanted.push_back(finished->stop_wanted);
      }
      if (const auto finished = small.trainer.settle()) wanted.push_back(finished->stop_wanted);
      EXPECT_EQ(wanted, (std::vector<bool>{false, true, false}));
    });
  }
}

// Rank 1 hears of a request one step after rank 0, and of a second one alone.
TEST(Optimistic, TheMostSaveRequestsThatARankHasHeardOfAreToldToAll) {
  RunConfig config = small_config(Precision::fp32);
  for (const bool optimistic : {false, true}) {
    config.optimizer.optimistic = optimistic;
    run_local_world(2, [&](const Group& world) {
      SmallModel small(config, DeviceKind::cpu, world, {.data = 2});
      std::vector<int64_t> told;
      for (const int64_t now : world.rank() == 0 ? std::vector{0, 1, 1, 1} : std::vector{0, 0, 1, 2}) {
        const auto finished = small.trainer.advance([&] { return RankWord{.save_requests = now}; });
        if (finished) told.push_back(finished->save_requests);
      }
      if (const auto finished = small.trainer.settle()) told.push_back(finished->save_requests);
      EXPECT_EQ(told, (std::vector<int64_t>{0, 1, 1, 2}));
    });
  }
}

TEST(Optimistic, WhatIsNotSettledIsLeftAlone) {
  RunConfig config = small_config(Precision::fp32);
  config.optimizer.optimistic = true;
  SmallModel small(config, DeviceKind::cpu, make_self_world());
  EXPECT_FALSE(small.trainer.advance().has_value());
  EXPECT_THROW(small.trainer.compute_gradients(), LogicError);
  EXPECT_THROW(small.trainer.step(), LogicError);
  EXPECT_THROW(small.trainer.set_counters({}), LogicError);
  EXPECT_THROW(small.trainer.weights_changed(), LogicError);
  EXPECT_EQ(small.trainer.settle()->counters.updates, 1);
  small.trainer.compute_gradients();
}

}  // namespace
}  // namespace normformer::testing_support
