// A sample of the oracle's layouts, short enough for ThreadSanitizer: whole models on ranks as threads, each
// with threads of its own.
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "oracle.h"

namespace normformer::testing_support {
namespace {

const std::vector<MeshDegrees> kSample = {MeshDegrees{.tensor = 2, .context = 1, .data = 1, .pipeline = 2},
                                          MeshDegrees{.tensor = 1, .context = 1, .data = 3, .pipeline = 1},
                                          MeshDegrees{.tensor = 2, .context = 1, .data = 2, .pipeline = 2}};

TEST(RanksAsThreads, MatchTheOracle) {
  const OracleFixture fixture = load_oracle_fixture("normformer-resscale");
  for (const MeshDegrees& degrees : kSample) {
    for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
      const OracleLayout layout{.degrees = degrees, .form = form, .threads = 2};
      run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
        EXPECT_EQ(compare_with_oracle(fixture, layout, world, 1e-9), std::vector<std::string>{})
            << to_string(layout);
      });
    }
  }
}

TEST(RanksAsThreads, MatchTheOracleInPartsAndPieces) {
  const OracleFixture fixture = load_oracle_fixture("normformer");
  const OracleLayout layout{.degrees = {.data = 2, .pipeline = 2},
                            .schedule = PipelineSchedule::zb_v,
                            .recompute = Recompute::full,
                            .sharding = Sharding::parameters,
                            .threads = 2};
  run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
    EXPECT_EQ(compare_with_oracle(fixture, layout, world, 1e-9), std::vector<std::string>{});
  });
}

TEST(RanksAsThreads, TheirOwnThreadsChangeNoBit) {
  const OracleFixture fixture = load_oracle_fixture("normformer");
  for (const MeshDegrees& degrees : kSample) {
    std::vector<double> expected;
    for (const int threads : {1, 3}) {
      std::vector<double> losses;
      const OracleLayout layout{.degrees = degrees, .precision = Precision::fp32, .threads = threads};
      run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
        auto mine = dropout_losses(fixture, layout, world, 3);
        if (world.rank() == 0) losses = std::move(mine);
      });
      if (expected.empty()) expected = losses;
      EXPECT_EQ(losses, expected) << to_string(layout);
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
