// A run saved under each of twelve layouts goes on under each of them: every weight and moment bit for bit,
// and the losses that follow those of the run that was never stopped.

#include <map>
#include <utility>

#include <gtest/gtest.h>

#include "normformer/mesh/layout.h"
#include "normformer/training/run_checkpoint.h"

#include "small_model.h"
#include "temporary_folder.h"
#include "test_device.h"

namespace normformer::testing_support {
namespace {

constexpr int64_t kBefore = 4;
constexpr int64_t kAfter = 3;

struct Layout {
  const char* name;
  ParallelConfig parallel;
};

// Layers, heads, features, vocabulary and batch divide by none of these degrees.
const std::vector<Layout>& layouts() {
  using enum PipelineSchedule;
  static const std::vector<Layout> all{
      {"one process", {}},
      {"data 2", {.data = 2}},
      {"data 5, gradients split", {.data = 5, .sharding = Sharding::gradients}},
      {"data 3, parameters split", {.data = 3, .sharding = Sharding::parameters}},
      {"data 4 in groups of 2, parameters split",
       {.data = 4, .sharding = Sharding::parameters, .shard_group = 2}},
      {"tensor 2 with sequences split", {.tensor = 2, .sequence = true}},
      {"tensor 3", {.tensor = 3}},
      {"tensor 2 x pipeline 2 x data 2", {.tensor = 2, .pipeline = 2, .data = 2}},
      {"pipeline 3", {.pipeline = 3}},
      {"pipeline 2, zb_v, data 2", {.pipeline = 2, .data = 2, .schedule = zb_v}},
      {"context 2 x data 2, gradients split", {.context = 2, .data = 2, .sharding = Sharding::gradients}},
      {"tensor 2 x pipeline 2, interleaved",
       {.tensor = 2, .pipeline = 2, .schedule = interleaved, .virtual_stages = 2}}};
  return all;
}

RunConfig config_of(const Layout& layout, const std::filesystem::path& folder, Precision precision) {
  RunConfig config = small_config(precision);
  config.model.layers = 5;
  config.optimizer.lr = 3e-3;
  config.optimizer.warmup_updates = 2;
  config.optimizer.clip_norm = 0.5;
  config.train.updates = kBefore + kAfter;
  if (scales_loss(precision)) config.train.loss_scale_window = 3;
  config.checkpoint.folder = folder.string();
  config.parallel = layout.parallel;
  config.parallel.data = std::max<int64_t>(1, layout.parallel.data);
  return config;
}

using Values = std::map<std::pair<std::string, StateRole>, std::vector<double>>;

/// All optimizer state as logical tensors, on rank 0.
Values gather_state(SmallModel& small, const Group& world) {
  Values values;
  for (const StateRole role : {StateRole::master, StateRole::moment1, StateRole::moment2}) {
    std::vector<ParameterPiece> mine;
    DType type = DType::f64;
    for (const StatePiece& state : small.trainer.optimizer().state()) {
      if (state.role != role) continue;
      type = state.piece.values.dtype();
      if (small.trainer.optimizer().owns(*state.piece.parameter)) mine.push_back(state.piece);
    }
    gather_logical(small.context, world, mine, type, 0, [&](const std::string& name, const Tensor& whole) {
      values[{name, role}] = to_host(whole);
    });
  }
  return values;
}

struct Continued {
  Values state;  ///< as it was saved or read
  TrainingCounters counters;
  std::vector<double> losses;  ///< of the updates behind that
};

/// Trains `updates` updates from scratch, or from what is in the folder where `resume`, and saves in the
/// first case.
Continued run(const Layout& layout, const std::filesystem::path& folder, Precision precision, bool resume,
              DeviceKind device = DeviceKind::cpu) {
  const RunConfig config = config_of(layout, folder, precision);
  const MeshDegrees degrees = mesh_degrees(config.parallel);
  Continued result;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    SmallModel small(config, device, world, degrees);
    RunCheckpoints checkpoints(world, folder, config, "tokenizer", 1);
    if (resume) {
      EXPECT_TRUE(checkpoints.load_newest(small.trainer));
    } else {
      for (int64_t i = 0; i < kBefore; ++i) small.trainer.step();
      EXPECT_FALSE(checkpoints.begin_save(small.trainer, {}));
    }
    Values state = gather_state(small, world);
    const TrainingCounters counters = small.trainer.counters();
    std::vector<double> losses;
    for (int64_t i = 0; i < kAfter; ++i) losses.push_back(small.trainer.step().loss);
    if (!resume) {
      const SaveResult saved = checkpoints.writer().finish();
      EXPECT_TRUE(saved) << saved.reason;
    }
    if (world.rank() == 0) result = {std::move(state), counters, std::move(losses)};
  });
  return result;
}

void expect_same_run(const Continued& read, const Continued& written) {
  EXPECT_EQ(read.counters, written.counters);
  EXPECT_EQ(read.state, written.state);
  for (size_t i = 0; i < written.losses.size(); ++i)
    EXPECT_NEAR(read.losses[i], written.losses[i], 1e-12 * written.losses[i]) << "step " << i;
}

class Reshard : public ::testing::TestWithParam<size_t> {};

TEST_P(Reshard, EveryLayoutGoesOnWithWhatThisOneSaved) {
  const Layout& from = layouts()[GetParam()];
  const TemporaryFolder folder;
  const Continued written = run(from, folder.path(), Precision::fp64, false);
  ASSERT_EQ(written.losses.size(), static_cast<size_t>(kAfter));
  for (const Layout& to : layouts()) {
    SCOPED_TRACE(std::string(from.name) + " to " + to.name);
    expect_same_run(run(to, folder.path(), Precision::fp64, true), written);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Reshard, ::testing::Range<size_t>(0, 12));

// The loss scale and what the other precisions keep travel, too.
TEST(ReshardInOtherPrecisions, StateIsTheSameBits) {
  for (const Precision precision :
       {Precision::fp32, Precision::bf16, Precision::fp16, Precision::fp16_memory_efficient}) {
    const TemporaryFolder folder;
    const Continued written = run(layouts()[7], folder.path(), precision, false);
    for (const size_t to : {0, 2, 6, 10}) {
      SCOPED_TRACE(layouts()[to].name);
      const Continued read = run(layouts()[to], folder.path(), precision, true);
      EXPECT_EQ(read.counters, written.counters);
      EXPECT_EQ(read.state, written.state);
    }
  }
}

// From the host to the device and back.
TEST(ReshardOverDevices, ARunGoesOnOnTheOther) {
  const Layout& one = layouts()[0];
  const Layout& many = layouts()[7];
  for (const auto& [from, to] :
       {std::pair(DeviceKind::cpu, test_device()), std::pair(test_device(), DeviceKind::cpu)}) {
    const TemporaryFolder folder;
    const Continued written = run(many, folder.path(), Precision::fp64, false, from);
    expect_same_run(run(one, folder.path(), Precision::fp64, true, to), written);
    expect_same_run(run(many, folder.path(), Precision::fp64, true, to), written);
  }
}

}  // namespace
}  // namespace normformer::testing_support
