// The whole model, its gradients and its optimizer against numbers that an independent implementation
// computed, on ranks as threads.
#include "oracle.h"

#include <cmath>

#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "test_device.h"

namespace normformer::testing_support {
namespace {

std::vector<std::string> run_on(const OracleFixture& fixture, OracleLayout layout, double tolerance) {
  layout.device = test_device();
  const auto ranks = static_cast<int>(num_ranks(layout.degrees));
  std::vector<std::string> failures;
  run_local_world(ranks, [&](const Group& world) {
    auto mine = compare_with_oracle(fixture, layout, world, tolerance);
    if (world.rank() == 0) failures = std::move(mine);
  });
  return failures;
}

OracleErrors errors_on(const OracleFixture& fixture, OracleLayout layout) {
  layout.device = test_device();
  OracleErrors errors;
  run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
    OracleErrors mine = oracle_errors(fixture, layout, world);
    if (world.rank() == 0) errors = std::move(mine);
  });
  return errors;
}

class Oracle : public testing::TestWithParam<std::string> {};

TEST_P(Oracle, OneRankFp64) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
    for (const int64_t micro_batch : {1, 3, 4}) {
      const OracleLayout layout{.degrees = {1, 1, 1, 1}, .form = form, .micro_batch = micro_batch};
      EXPECT_EQ(run_on(fixture, layout, 1e-9), std::vector<std::string>{}) << to_string(layout);
    }
  }
}

TEST_P(Oracle, OneRankFp32) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
    const OracleLayout layout{.degrees = {1, 1, 1, 1}, .precision = Precision::fp32, .form = form};
    EXPECT_EQ(run_on(fixture, layout, 1e-5), std::vector<std::string>{}) << to_string(layout);
  }
}

// What it does to each number to round the weights to a type first, computed in fp64.
OracleErrors errors_of_weights(const OracleFixture& fixture, DType type) {
  return errors_on(fixture, {.degrees = {}, .weights = type});
}

// 16 bits: the bound of arXiv 2506.09280, theorem 5.3, for the first of L layers: k C^L eps with k = 4, C
// = 1.03. It is of computing; of a classifier, whose gradient comes from a few tokens, rounding the weights
// alone makes more than half of it, and is added.
TEST_P(Oracle, OneRankBf16) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  const double bound = 4.0 * std::pow(1.03, fixture.config.model.layers) * 0x1p-7;
  const bool classifies = fixture.config.model.head == OutputHead::classification;
  OracleErrors of_weights = classifies ? errors_of_weights(fixture, DType::bf16) : OracleErrors{};
  for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
    const OracleLayout layout{.degrees = {1, 1, 1, 1}, .precision = Precision::bf16, .form = form};
    for (const auto& [name, error] : errors_on(fixture, layout))
      EXPECT_LE(error, bound + of_weights[name]) << name << " on " << to_string(layout);
  }
}

// The same with fp16's unit roundoff; also over ranks. The bound is of computing. What it does to a gradient
// to round the weights first is found in fp64 and added: 0.004 for a sum over tokens that nearly cancels.
TEST_P(Oracle, Fp16) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  const double bound = 4.0 * std::pow(1.03, fixture.config.model.layers) * 0x1p-10;
  const OracleErrors of_weights = errors_of_weights(fixture, DType::f16);
  for (const Precision precision : {Precision::fp16, Precision::fp16_memory_efficient}) {
    for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.tensor = 2}, MeshDegrees{.pipeline = 2},
                                       MeshDegrees{.data = 2}, MeshDegrees{.context = 2}}) {
      const OracleLayout layout{.degrees = degrees, .precision = precision};
      const OracleErrors errors = errors_on(fixture, layout);
      ASSERT_EQ(errors.size(), of_weights.size());
      for (const auto& [name, error] : errors)
        EXPECT_LE(error, bound + of_weights.at(name)) << name << " on " << to_string(layout);
    }
  }
}

TEST_P(Oracle, EveryLayoutFp64) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  for (const MeshDegrees& degrees : oracle_degrees()) {
    for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
      if (form == FfnNormForm::plain && !fixture.config.model.ffn_norm) continue;
      const OracleLayout layout{.degrees = degrees, .form = form};
      EXPECT_EQ(run_on(fixture, layout, 1e-9), std::vector<std::string>{}) << to_string(layout);
    }
  }
}

TEST_P(Oracle, EveryLayoutFp32) {
  const OracleFixture fixture = load_oracle_fixture(GetParam());
  for (const MeshDegrees& degrees : oracle_degrees()) {
    const OracleLayout layout{.degrees = degrees, .precision = Precision::fp32};
    EXPECT_EQ(run_on(fixture, layout, 1e-5), std::vector<std::string>{}) << to_string(layout);
  }
}

void expect_agreement_in_fp64(const std::string& name, const std::vector<OracleLayout>& layouts) {
  const OracleFixture fixture = load_oracle_fixture(name);
  for (const OracleLayout& layout : layouts) {
    EXPECT_EQ(run_on(fixture, layout, 1e-9), std::vector<std::string>{}) << to_string(layout);
  }
}

// Schedules, with one and several parts a rank, alone and beside other axes.
std::vector<OracleLayout> schedule_layouts() {
  std::vector<OracleLayout> layouts;
  const auto add = [&](PipelineSchedule schedule, int64_t virtual_stages, const MeshDegrees& degrees) {
    layouts.push_back({.degrees = degrees, .schedule = schedule, .virtual_stages = virtual_stages});
  };
  const auto degrees = [](int64_t tp, int64_t pp, int64_t dp) {
    return MeshDegrees{.tensor = tp, .context = 1, .data = dp, .pipeline = pp};
  };
  for (const auto schedule : {PipelineSchedule::gpipe, PipelineSchedule::zb_h1, PipelineSchedule::zb_h2}) {
    for (const int64_t stages : {1, 2, 3}) add(schedule, 1, degrees(1, stages, 1));
  }
  add(PipelineSchedule::interleaved, 2, degrees(1, 1, 1));
  add(PipelineSchedule::interleaved, 2, degrees(1, 2, 1));
  add(PipelineSchedule::interleaved, 2, degrees(2, 2, 1));
  add(PipelineSchedule::interleaved, 2, degrees(1, 2, 3));
  add(PipelineSchedule::interleaved, 4, degrees(3, 1, 1));
  add(PipelineSchedule::zb_h1, 1, degrees(2, 2, 2));
  add(PipelineSchedule::zb_v, 1, degrees(1, 1, 1));
  add(PipelineSchedule::zb_v, 1, degrees(1, 2, 1));
  add(PipelineSchedule::zb_v, 1, degrees(2, 2, 2));
  add(PipelineSchedule::zb_v, 1, degrees(1, 2, 3));
  return layouts;
}

TEST_P(Oracle, EveryScheduleFp64) { expect_agreement_in_fp64(GetParam(), schedule_layouts()); }

// What replicas split, alone and beside other axes; 4 sequences over 3 replicas leave one an empty
// micro-batch.
std::vector<OracleLayout> sharding_layouts() {
  std::vector<OracleLayout> layouts;
  for (const Sharding sharding : {Sharding::gradients, Sharding::parameters}) {
    const auto add = [&](const MeshDegrees& degrees,
                         PipelineSchedule schedule = PipelineSchedule::one_f_one_b,
                         Recompute recompute = Recompute::none) {
      layouts.push_back(
          {.degrees = degrees, .schedule = schedule, .recompute = recompute, .sharding = sharding});
    };
    add({});
    add({.data = 2});
    add({.data = 3});
    add({.data = 3, .pipeline = 2}, PipelineSchedule::zb_h1);
    add({.tensor = 2, .data = 2, .pipeline = 2}, PipelineSchedule::zb_v, Recompute::full);
    add({.tensor = 3, .data = 2}, PipelineSchedule::gpipe, Recompute::selective);
  }
  return layouts;
}

TEST_P(Oracle, EveryShardingFp64) { expect_agreement_in_fp64(GetParam(), sharding_layouts()); }

// Replicas that split in groups and hold copies across them, beside every other axis.
std::vector<OracleLayout> hybrid_layouts() {
  using S = PipelineSchedule;
  std::vector<OracleLayout> layouts;
  for (const Sharding sharding : {Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
    for (const MeshDegrees& degrees : {MeshDegrees{.data = 4}, MeshDegrees{.tensor = 2, .data = 4},
                                       MeshDegrees{.context = 2, .data = 2}}) {
      layouts.push_back({.degrees = degrees, .sharding = sharding, .shard_group = 2});
    }
    layouts.push_back({.degrees = {.data = 3}, .sharding = sharding, .shard_group = 1});
    layouts.push_back({.degrees = {.context = 2, .data = 3, .pipeline = 2},
                       .schedule = S::zb_v,
                       .recompute = Recompute::full,
                       .sharding = sharding,
                       .shard_group = 3});
  }
  return layouts;
}

TEST_P(Oracle, HybridShardingFp64) { expect_agreement_in_fp64(GetParam(), hybrid_layouts()); }

// The residual stream dealt out to the tensor group, alone and beside other axes; with sizes that do not
// divide.
std::vector<OracleLayout> sequence_layouts() {
  std::vector<OracleLayout> layouts;
  const auto add = [&](int64_t tp, int64_t pp, int64_t dp, int64_t micro_batch, PipelineSchedule schedule) {
    layouts.push_back({.degrees = {.tensor = tp, .context = 1, .data = dp, .pipeline = pp},
                       .sequence = true,
                       .schedule = schedule,
                       .micro_batch = micro_batch});
  };
  for (const int64_t micro_batch : {1, 3}) {
    add(2, 1, 1, micro_batch, PipelineSchedule::one_f_one_b);
    add(3, 1, 1, micro_batch, PipelineSchedule::one_f_one_b);
  }
  add(1, 2, 1, 1, PipelineSchedule::one_f_one_b);
  add(2, 2, 1, 1, PipelineSchedule::one_f_one_b);
  add(2, 1, 2, 1, PipelineSchedule::one_f_one_b);
  add(2, 2, 2, 1, PipelineSchedule::one_f_one_b);
  add(2, 2, 3, 1, PipelineSchedule::one_f_one_b);  // some replicas run empty micro-batches
  add(3, 2, 1, 3, PipelineSchedule::zb_h1);
  add(2, 2, 1, 1, PipelineSchedule::zb_v);
  return layouts;
}

// In both forms of the FFN LayerNorm, where there is one.
void expect_oracle_in_fp64(const OracleFixture& fixture, const std::vector<OracleLayout>& layouts) {
  for (OracleLayout layout : layouts) {
    for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
      if (form == FfnNormForm::plain && !fixture.config.model.ffn_norm) continue;
      layout.form = form;
      EXPECT_EQ(run_on(fixture, layout, 1e-9), std::vector<std::string>{}) << to_string(layout);
    }
  }
}

void expect_oracle_in_fp32(const OracleFixture& fixture, const std::vector<OracleLayout>& layouts) {
  for (OracleLayout layout : layouts) {
    layout.precision = Precision::fp32;
    EXPECT_EQ(run_on(fixture, layout, 1e-5), std::vector<std::string>{}) << to_string(layout);
  }
}

TEST_P(Oracle, SequenceParallelFp64) {
  expect_oracle_in_fp64(load_oracle_fixture(GetParam()), sequence_layouts());
}

TEST_P(Oracle, SequenceParallelFp32) {
  expect_oracle_in_fp32(load_oracle_fixture(GetParam()), sequence_layouts());
}

// Sequences split, beside every other axis and what it can do; the fixtures' lengths fall into parts of
// several sizes.
std::vector<OracleLayout> context_layouts() {
  using S = PipelineSchedule;
  std::vector<OracleLayout> layouts{
      {.degrees = {.context = 2}, .recompute = Recompute::selective, .micro_batch = 3},
      {.degrees = {.context = 4}, .recompute = Recompute::full},
      {.degrees = {.context = 2, .data = 3}, .sharding = Sharding::parameters},  // and empty micro-batches
      {.degrees = {.context = 3, .data = 2}, .sharding = Sharding::gradients},
      {.degrees = {.context = 2, .pipeline = 2}, .schedule = S::zb_v},
      {.degrees = {.context = 2, .pipeline = 2}, .schedule = S::zb_h1, .sharding = Sharding::parameters},
      {.degrees = {.context = 2, .pipeline = 2}, .schedule = S::interleaved, .virtual_stages = 2},
      {.degrees = {.tensor = 2, .context = 2, .data = 2},
       .sequence = true,
       .recompute = Recompute::full,
       .sharding = Sharding::parameters}};
  for (const MeshDegrees& degrees :
       {MeshDegrees{.tensor = 2, .context = 2}, MeshDegrees{.tensor = 3, .context = 2},
        MeshDegrees{.tensor = 2, .context = 2, .pipeline = 2}}) {
    layouts.push_back({.degrees = degrees, .sequence = true, .micro_batch = 3});
  }
  return layouts;
}

TEST_P(Oracle, ContextParallelFp64) {
  expect_oracle_in_fp64(load_oracle_fixture(GetParam()), context_layouts());
}

TEST_P(Oracle, ContextParallelFp32) {
  expect_oracle_in_fp32(load_oracle_fixture(GetParam()), context_layouts());
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Oracle, testing::ValuesIn(oracle_fixture_names()),
                         [](const auto& fixture) {
                           std::string name = fixture.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// Whatever is computed anew is what was not kept, to the last bit, under every layout.
TEST(Recomputation, ChangesNoBit) {
  constexpr int64_t kSteps = 4;
  for (const std::string name : {"normformer-resscale", "normformer-fairseq", "post-ln"}) {
    const OracleFixture fixture = load_oracle_fixture(name);
    for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
      for (OracleLayout layout :
           {OracleLayout{.degrees = {}, .precision = Precision::bf16},
            OracleLayout{.degrees = {.tensor = 2, .pipeline = 2}, .precision = Precision::fp32},
            OracleLayout{
                .degrees = {.tensor = 2, .pipeline = 2}, .sequence = true, .precision = Precision::bf16},
            OracleLayout{.degrees = {.tensor = 3}, .sequence = true, .micro_batch = 3},
            OracleLayout{
                .degrees = {.tensor = 2, .context = 2}, .sequence = true, .precision = Precision::bf16},
            OracleLayout{.degrees = {.data = 2, .pipeline = 2},
            .precision = Precision::bf16,
            .schedule = PipelineSchedule::zb_v}}) {
        layout.form = form;
        std::vector<std::vector<double>> losses;
        for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
          layout.recompute = recompute;
          layout.device = test_device();
          run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
            auto mine = dropout_losses(fixture, layout, world, kSteps);
            if (world.rank() == 0) losses.push_back(std::move(mine));
          });
          EXPECT_EQ(losses.front(), losses.back()) << name << " " << to_string(layout);
        }
      }
    }
  }
}

// Whose losses with every dropout on are those of one process.
void expect_losses_of_one_process(const std::string& name, const std::vector<OracleLayout>& layouts) {
  constexpr int64_t kSteps = 20;
  const OracleFixture fixture = load_oracle_fixture(name);
  const auto losses_on = [&](const OracleLayout& layout) {
    std::vector<double> losses;
    run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
      auto mine = dropout_losses(fixture, layout, world, kSteps);
      if (world.rank() == 0) losses = std::move(mine);
    });
    return losses;
  };
  const std::vector<double> expected = losses_on({.degrees = {}});
  for (const OracleLayout& layout : layouts) {
    const std::vector<double> losses = losses_on(layout);
    ASSERT_EQ(losses.size(), expected.size());
    for (size_t i = 0; i < losses.size(); ++i)
      EXPECT_NEAR(losses[i], expected[i], 1e-12 * expected[i]) << "step " << i << " on " << to_string(layout);
  }
}

TEST(DropoutAcrossSchedules, LossesEqualOneProcess) {
  expect_losses_of_one_process("normformer-resscale", schedule_layouts());
}

TEST(DropoutAcrossSharding, LossesEqualOneProcess) {
  expect_losses_of_one_process("normformer-resscale", sharding_layouts());
  expect_losses_of_one_process("normformer-resscale", hybrid_layouts());
}

TEST(DropoutUnderSequenceParallelism, LossesEqualOneProcess) {
  for (const std::string name : {"normformer-resscale", "normformer-fairseq", "post-ln"})
    expect_losses_of_one_process(name, sequence_layouts());
}

TEST(DropoutUnderContextParallelism, LossesEqualOneProcess) {
  for (const std::string name : {"normformer-resscale", "normformer-fairseq", "post-ln"})
    expect_losses_of_one_process(name, context_layouts());
}

TEST(DropoutAcrossLayouts, LossesEqualOneProcess) {
  constexpr int64_t kSteps = 50;
  for (const std::string name : {"normformer-resscale", "normformer-fairseq"}) {
    const OracleFixture fixture = load_oracle_fixture(name);
    std::vector<double> expected;
    for (const MeshDegrees& degrees : oracle_degrees()) {
      const auto ranks = static_cast<int>(num_ranks(degrees));
      std::vector<double> losses;
      run_local_world(ranks, [&](const Group& world) {
        auto mine = dropout_losses(fixture, {.degrees = degrees, .device = test_device()}, world, kSteps);
        if (world.rank() == 0) losses = std::move(mine);
      });
      if (expected.empty()) expected = losses;
      ASSERT_EQ(losses.size(), expected.size());
      EXPECT_LT(losses.back(), losses.front());
      for (size_t i = 0; i < losses.size(); ++i) {
        EXPECT_NEAR(losses[i], expected[i], 1e-12 * expected[i])
            << name << " step " << i << " on " << to_string(OracleLayout{.degrees = degrees});
      }
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
