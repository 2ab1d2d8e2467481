// The same as tests/integration/oracle_test.cpp with ranks as processes: every layout that this world's size
// allows.
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "support/mpi_world.h"
#include "support/oracle.h"

namespace normformer::testing_support {
namespace {

using testing::mpi_world;

// What disagreed, of all fixtures and layouts; the same on every rank, so that no rank leaves a collective
// early.
std::vector<std::string> disagreements(Precision precision, double tolerance) {
  std::vector<std::string> failures;
  for (const std::string& name : oracle_fixture_names()) {
    const OracleFixture fixture = load_oracle_fixture(name);
    for (const MeshDegrees& degrees : oracle_degrees()) {
      if (num_ranks(degrees) != mpi_world().size()) continue;
      for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
        if (form == FfnNormForm::plain && !fixture.config.model.ffn_norm) continue;
        const OracleLayout layout{.degrees = degrees, .precision = precision, .form = form};
        for (const std::string& line : compare_with_oracle(fixture, layout, mpi_world(), tolerance)) {
          failures.push_back(fmt::format("{} {}: {}", name, to_string(layout), line));
        }
      }
    }
  }
  return failures;
}

TEST(OracleOverMpi, Fp64) { EXPECT_EQ(disagreements(Precision::fp64, 1e-9), std::vector<std::string>{}); }

TEST(OracleOverMpi, Fp32) { EXPECT_EQ(disagreements(Precision::fp32, 1e-5), std::vector<std::string>{}); }

TEST(OracleOverMpi, GPipeGivesTheSame) {
  const OracleFixture fixture = load_oracle_fixture("normformer");
  for (const MeshDegrees& degrees : oracle_degrees()) {
    if (num_ranks(degrees) != mpi_world().size()) continue;
    const OracleLayout layout{.degrees = degrees, .schedule = PipelineSchedule::gpipe};
    EXPECT_EQ(compare_with_oracle(fixture, layout, mpi_world(), 1e-9), std::vector<std::string>{});
  }
}

// A sample of what ranks as threads are held to in full (oracle_test, layout_matrix_test).
TEST(OracleOverMpi, SchedulesShardingAndRecomputationGiveTheSame) {
  using S = PipelineSchedule;
  const std::vector<OracleLayout> layouts{
      {.degrees = {.data = 2}, .recompute = Recompute::full, .sharding = Sharding::parameters},
      {.degrees = {.pipeline = 2}, .schedule = S::zb_v},
      {.degrees = {.data = 3}, .sharding = Sharding::gradients},
      {.degrees = {.context = 4}, .recompute = Recompute::full},
      {.degrees = {.data = 4}, .sharding = Sharding::parameters, .shard_group = 2},
      {.degrees = {.context = 2, .data = 2}, .sharding = Sharding::parameters},
      {.degrees = {.tensor = 2, .context = 2, .pipeline = 2}, .sequence = true, .schedule = S::zb_h1},
      {.degrees = {.pipeline = 3}, .schedule = S::zb_h2, .recompute = Recompute::selective},
      {.degrees = {.data = 2, .pipeline = 2},
       .schedule = S::interleaved,
       .virtual_stages = 2,
       .sharding = Sharding::parameters},
      {.degrees = {.tensor = 2, .data = 2, .pipeline = 2},
       .schedule = S::zb_v,
       .recompute = Recompute::full,
       .sharding = Sharding::parameters}};
  const OracleFixture fixture = load_oracle_fixture("normformer");
  for (const OracleLayout& layout : layouts) {
    if (num_ranks(layout.degrees) != mpi_world().size()) continue;
    EXPECT_EQ(compare_with_oracle(fixture, layout, mpi_world(), 1e-9), std::vector<std::string>{})
        << to_string(layout);
  }
}

TEST(OracleOverMpi, SequenceParallelFp64) {
  for (const std::string name : {"normformer-fairseq", "normformer-resscale", "baseline-learned"}) {
    const OracleFixture fixture = load_oracle_fixture(name);
    for (const MeshDegrees& degrees : oracle_degrees()) {
      if (num_ranks(degrees) != mpi_world().size() || degrees.tensor == 1) continue;
      const OracleLayout layout{.degrees = degrees, .sequence = true, .micro_batch = 3};
      EXPECT_EQ(compare_with_oracle(fixture, layout, mpi_world(), 1e-9), std::vector<std::string>{})
          << name << " " << to_string(layout);
    }
  }
}

// Gradients are always clipped, so that every update is taken back.
TEST(OracleOverMpi, OptimisticUpdatesChangeNoBit) {
  OracleFixture fixture = load_oracle_fixture("normformer-resscale");
  fixture.config.optimizer.clip_norm = 1e-3;
  for (const MeshDegrees& degrees : oracle_degrees()) {
    if (num_ranks(degrees) != mpi_world().size()) continue;
    const OracleLayout layout{
        .degrees = degrees,
        .precision = Precision::fp32,
        .schedule = degrees.pipeline > 1 ? PipelineSchedule::zb_h2 : PipelineSchedule::one_f_one_b,
        .sharding = Sharding::parameters};
    fixture.config.optimizer.optimistic = false;
    const std::vector<double> waiting = dropout_losses(fixture, layout, mpi_world(), 8);
    fixture.config.optimizer.optimistic = true;
    EXPECT_EQ(dropout_losses(fixture, layout, mpi_world(), 8), waiting) << to_string(layout);
  }
}

// Processes and threads run the same sums in the same order: not a bit differs.
TEST(OracleOverMpi, ProcessesAndThreadsGiveTheSameBits) {
  const OracleFixture fixture = load_oracle_fixture("normformer-resscale");
  for (const MeshDegrees& degrees : oracle_degrees()) {
    if (num_ranks(degrees) != mpi_world().size()) continue;
    for (const Precision precision : {Precision::fp32, Precision::bf16}) {
      // The one precision without, the other with tokens dealt out.
      const OracleLayout layout{
          .degrees = degrees, .sequence = precision == Precision::bf16, .precision = precision};
      const std::vector<double> processes = dropout_losses(fixture, layout, mpi_world(), 5);
      std::vector<double> threads;
      run_local_world(mpi_world().size(), [&](const Group& world) {
        auto mine = dropout_losses(fixture, layout, world, 5);
        if (world.rank() == 0) threads = std::move(mine);
      });
      EXPECT_EQ(processes, threads) << to_string(layout);
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
