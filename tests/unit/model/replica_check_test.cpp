// Copies that must be alike: in every layout they are, and one bit that changed is found and named.
#include "normformer/training/replica_check.h"

#include <algorithm>
#include <cstring>

#include <gtest/gtest.h>

#include "normformer/training/agreement.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

struct Case {
  MeshDegrees degrees;
  Precision precision = Precision::fp32;
  Sharding sharding = Sharding::optimizer;
  int64_t shard_group = 0;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  bool sequence = false;
  bool overlap = false;
  bool optimistic = false;
};

RunConfig config_of(const Case& c) {
  RunConfig config = small_config(c.precision);
  config.model.layers = 4;
  config.parallel.sharding = c.sharding;
  config.parallel.shard_group = c.shard_group;
  config.parallel.schedule = c.schedule;
  config.parallel.virtual_stages = c.schedule == PipelineSchedule::interleaved ? 2 : 1;
  config.parallel.sequence = c.sequence;
  config.parallel.overlap_gradients = c.overlap;
  config.parallel.overlap_parameters = c.overlap;
  config.parallel.bucket_mib = 0.002;
  config.optimizer.optimistic = c.optimistic;
  config.optimizer.clip_norm = 0.5;
  config.train.loss_scale_init = 1024.0;
  return config;
}

void train_a_little(SmallModel& small) {
  for (int i = 0; i < 3; ++i) small.trainer.advance();
  small.trainer.settle();
}

TEST(ReplicaCheck, FindsNothingInAnyLayout) {
  using S = PipelineSchedule;
  const std::vector<Case> cases{
      {.degrees = {}, .precision = Precision::bf16},
      {.degrees = {.tensor = 2}, .precision = Precision::bf16, .sequence = true},
      {.degrees = {.tensor = 3}},
      {.degrees = {.tensor = 5}, .precision = Precision::fp16},
      {.degrees = {.context = 3}, .precision = Precision::bf16},
      {.degrees = {.data = 4}, .precision = Precision::fp64},
      {.degrees = {.data = 3}, .precision = Precision::bf16, .optimistic = true},
      {.degrees = {.data = 3},
       .precision = Precision::bf16,
       .sharding = Sharding::gradients,
       .overlap = true},
      {.degrees = {.data = 3}, .sharding = Sharding::parameters, .overlap = true},
      {.degrees = {.data = 4}, .precision = Precision::bf16, .shard_group = 2, .overlap = true},
      {.degrees = {.data = 4}, .precision = Precision::fp16_memory_efficient, .shard_group = 1},
      {.degrees = {.context = 2, .data = 2},
       .precision = Precision::bf16,
       .sharding = Sharding::parameters,
       .shard_group = 2},
      {.degrees = {.data = 4}, .sharding = Sharding::gradients, .shard_group = 2},
      {.degrees = {.pipeline = 2}, .schedule = S::zb_v},
      {.degrees = {.pipeline = 2}, .precision = Precision::bf16, .schedule = S::interleaved},
      {.degrees = {.pipeline = 4}, .schedule = S::zb_h2, .optimistic = true},
      {.degrees = {.tensor = 2, .data = 2, .pipeline = 2}, .precision = Precision::bf16, .sequence = true},
      {.degrees = {.tensor = 2, .data = 2}, .sharding = Sharding::parameters},
      {.degrees = {.tensor = 2, .context = 2, .pipeline = 2}, .precision = Precision::bf16},
  };
  for (const Case& c : cases) {
    const RunConfig config = config_of(c);
    SCOPED_TRACE(to_toml(config));
    run_local_world(static_cast<int>(num_ranks(c.degrees)), [&](const Group& world) {
      SmallModel small(config, DeviceKind::cpu, world, c.degrees);
      EXPECT_TRUE(compare_replicas(small.trainer).empty());
      train_a_little(small);
      EXPECT_TRUE(compare_replicas(small.trainer).empty());
      require_equal_replicas(small.trainer);
    });
  }
}

void flip(const Tensor& tensor, int64_t element, int bit) {
  auto* bytes = static_cast<uint8_t*>(tensor.host_raw()) + element * size_of(tensor.dtype());
  bytes[bit / 8] = static_cast<uint8_t>(bytes[bit / 8] ^ (1u << (bit % 8)));
}

using Corrupt = std::function<void(SmallModel&)>;

// What all ranks find once `corrupt` has been called on one of them.
std::vector<ReplicaFault> faults_of(const Case& c, int rank, const Corrupt& corrupt) {
  std::vector<ReplicaFault> found;
  run_local_world(static_cast<int>(num_ranks(c.degrees)), [&](const Group& world) {
    SmallModel small(config_of(c), DeviceKind::cpu, world, c.degrees);
    train_a_little(small);
    if (world.rank() == rank) corrupt(small);
    const std::vector<ReplicaFault> mine = compare_replicas(small.trainer);
    std::string text;
    const std::vector<std::string> hosts(static_cast<size_t>(world.size()), "h");
    if (!mine.empty()) text = describe(mine, hosts);
    for (const std::string& theirs : world.all_gather_text(text)) EXPECT_EQ(theirs, text);
    if (world.rank() == 0) found = mine;
  });
  return found;
}

Corrupt flip_weight(const std::string& name, int64_t element = 5) {
  return [=](SmallModel& small) { flip(small.model.store().find(name)->value, element, 3); };
}

Corrupt flip_state(StateRole role, size_t piece) {
  return [role, piece](SmallModel& small) mutable {
    for (const StatePiece& state : small.trainer.optimizer().state()) {
      if (state.role == role && piece-- == 0) return flip(state.piece.values, 0, 0);
    }
    FAIL() << "no such piece";
  };
}

void expect_fault(const std::vector<ReplicaFault>& faults, const std::string& parameter,
                  const std::string& what, const std::vector<int>& suspects, const std::vector<int>& others) {
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_EQ(faults[0].parameter, parameter);
  EXPECT_EQ(faults[0].what, what);
  EXPECT_EQ(faults[0].suspects, suspects);
  EXPECT_EQ(faults[0].others, others);
}

const std::string kMatrix = "decoder.layers.2.fc1.weight";
const std::string kVector = "decoder.layers.1.final_layer_norm.weight";
const std::string kEmbedding = "decoder.embed_tokens.weight";

TEST(ReplicaCheck, NamesTheReplicaThatDiffersFromMost) {
  expect_fault(faults_of({.degrees = {.data = 3}}, 1, flip_weight(kMatrix)), kMatrix, "weights", {1}, {0, 2});
  expect_fault(faults_of({.degrees = {.context = 2, .data = 2}}, 2, flip_weight(kMatrix)), kMatrix, "weights",
               {2}, {0, 1, 3});
  expect_fault(faults_of({.degrees = {.data = 3, .pipeline = 2}}, 5, flip_weight(kMatrix)), kMatrix,
               "weights", {5}, {3, 4});
}

TEST(ReplicaCheck, OfTwoCopiesEitherMayBeWrong) {
  expect_fault(faults_of({.degrees = {.data = 2}}, 0, flip_weight(kMatrix)), kMatrix, "weights", {0, 1}, {});
  expect_fault(faults_of({.degrees = {.tensor = 2}}, 1, flip_weight(kVector)), kVector, "weights", {0, 1},
               {});
  expect_fault(faults_of({.degrees = {.pipeline = 2}}, 1, flip_weight(kEmbedding)), kEmbedding, "weights",
               {0, 1}, {});
}

TEST(ReplicaCheck, NamesWhatTheTensorGroupHoldsWhole) {
  for (const bool sequence : {false, true}) {
    const Case c{.degrees = {.tensor = 3}, .sequence = sequence};
    expect_fault(faults_of(c, 2, flip_weight(kVector)), kVector, "weights", {2}, {0, 1});
  }
}

// Copies over several groups together may make a majority that none of them has.
TEST(ReplicaCheck, GroupsTogetherTellWhichCopyIsWrong) {
  expect_fault(faults_of({.degrees = {.tensor = 2, .data = 2}}, 3, flip_weight(kVector)), kVector, "weights",
               {3}, {1, 2});
  expect_fault(faults_of({.degrees = {.data = 2, .pipeline = 2}}, 3, flip_weight(kEmbedding)), kEmbedding,
               "weights", {3}, {1, 2});
}

TEST(ReplicaCheck, NamesCopiesOfOptimizerStateInBlocks) {
  for (const StateRole role : {StateRole::master, StateRole::moment1, StateRole::moment2}) {
    const Case c{.degrees = {.data = 6}, .precision = Precision::bf16, .shard_group = 2};
    const auto faults = faults_of(c, 3, flip_state(role, 7));
    const char* what = role == StateRole::master    ? "master"
                       : role == StateRole::moment1 ? "moment1"
                                                    : "moment2";
    ASSERT_FALSE(faults.empty());
    expect_fault(faults, faults[0].parameter, what, {3}, {1, 5});
  }
}

TEST(ReplicaCheck, NamesPiecesOfWeightsThatBlocksHold) {
  const Case c{.degrees = {.data = 6}, .sharding = Sharding::parameters, .shard_group = 2};
  const auto corrupt = [](SmallModel& small) {
    for (const Bucket& bucket : small.model.store().buckets()) {
      if (bucket.unit == 2) return flip(bucket.value_piece, 4, 0);
    }
  };
  const auto faults = faults_of(c, 4, corrupt);
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_TRUE(faults[0].parameter.starts_with("decoder.layers.2.")) << faults[0].parameter;
  expect_fault(faults, faults[0].parameter, "weights", {4}, {0, 2});
}

TEST(ReplicaCheck, WeightsMustBeTheRoundedMasters) {
  expect_fault(faults_of({.degrees = {}, .precision = Precision::bf16}, 0, flip_weight(kMatrix)), kMatrix,
               ReplicaFault::kNotRounded, {0}, {});
  expect_fault(faults_of({.degrees = {.tensor = 2}, .precision = Precision::fp16}, 1, flip_weight(kMatrix)),
               kMatrix, ReplicaFault::kNotRounded, {1}, {});
}

TEST(ReplicaCheck, EveryBitOfAParameterCounts) {
  run_local_world(2, [&](const Group& world) {
    const Case c{.degrees = {.data = 2}, .precision = Precision::fp16_memory_efficient};
    SmallModel small(config_of(c), DeviceKind::cpu, world, c.degrees);
    const Tensor values = small.model.store().find(kVector)->value;
    for (int64_t element = 0; element < values.numel(); ++element) {
      for (int bit = 0; bit < 16; ++bit) {
        if (world.rank() == 1) flip(values, element, bit);
        EXPECT_EQ(compare_replicas(small.trainer).size(), 1u) << element << " " << bit;
        if (world.rank() == 1) flip(values, element, bit);
      }
    }
    EXPECT_TRUE(compare_replicas(small.trainer).empty());
  });
}

TEST(ReplicaCheck, TheRunEndsOnAllRanks) {
  run_local_world(3, [&](const Group& world) {
    const Case c{.degrees = {.data = 3}};
    SmallModel small(config_of(c), DeviceKind::cpu, world, c.degrees);
    train_a_little(small);
    if (world.rank() == 2) flip_weight(kMatrix)(small);
    try {
      require_equal_replicas(small.trainer);
      FAIL() << "did not throw";
    } catch (const AgreedError& e) {
      EXPECT_EQ(e.exit_code(), ExitCode::corrupt);
      const std::string host = host_name();
      const std::string expected =
          fmt::format("after update 3: weights of {} on rank 2 ({}) are not those of ranks 0 ({}), 1 ({});",
                      kMatrix, host, host, host);
      EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
    }
  });
}

TEST(ReplicaCheck, ManyFaultsAreCounted) {
  std::vector<ReplicaFault> faults;
  for (int i = 0; i < 8; ++i) faults.push_back({fmt::format("p{}", i), "weights", {0, 1}, {}});
  EXPECT_EQ(
      describe(faults, {"a", "b"}),
      "ranks 0 (a), 1 (b) hold different weights of p0; ranks 0 (a), 1 (b) hold different weights of p1; "
      "ranks 0 (a), 1 (b) hold different weights of p2; ranks 0 (a), 1 (b) hold different weights of p3; "
      "ranks 0 (a), 1 (b) hold different weights of p4; 3 more");
}

TEST(ReplicaCheck, AStepMustBeSettled) {
  const Case c{.degrees = {}, .optimistic = true};
  SmallModel small(config_of(c), DeviceKind::cpu, make_self_world());
  small.trainer.advance();
  EXPECT_THROW(compare_replicas(small.trainer), LogicError);
  small.trainer.settle();
}

}  // namespace
}  // namespace normformer::testing_support
