// Training in fp16: overflows, what they leave, and resuming across them.
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "small_model.h"

namespace normformer::testing_support {
namespace {

constexpr int64_t kSteps = 40;

RunConfig scaled_config(Precision precision, double init) {
  RunConfig c = small_config(precision);
  c.train.loss_scale_init = init;
  c.train.loss_scale_window = 10;
  c.optimizer.lr = 1e-2;
  c.optimizer.decay = DecayStyle::constant;
  return c;
}

struct Trained {
  std::vector<StepReport> reports;
  TrainingCounters counters;
  std::vector<std::vector<double>> state;  // this rank's masters and moments
};

void run_steps(SmallModel& small, int64_t steps, Trained& into) {
  for (int64_t i = 0; i < steps; ++i) into.reports.push_back(small.trainer.step());
  into.counters = small.trainer.counters();
}

std::vector<std::vector<double>> state_of(SmallModel& small) {
  std::vector<std::vector<double>> state;
  for (const StatePiece& piece : small.trainer.optimizer().state())
    state.push_back(to_host(piece.piece.values));
  return state;
}

Trained train(const RunConfig& config, const Group& world, const MeshDegrees& degrees) {
  SmallModel small(config, DeviceKind::cpu, world, degrees);
  Trained trained;
  run_steps(small, kSteps, trained);
  trained.state = state_of(small);
  return trained;
}

std::vector<double> losses_of(const Trained& trained) {
  std::vector<double> losses;
  for (const StepReport& report : trained.reports) losses.push_back(report.loss);
  return losses;
}

TEST(LossScaling, AScaleFarTooHighFallsOnAllRanksAlikeAndTrainingLearns) {
  const double init = 0x1p30;  // no gradient of a loss in fp16 is finite
  for (const MeshDegrees& degrees :
       {MeshDegrees{}, MeshDegrees{.tensor = 2}, MeshDegrees{.pipeline = 2}, MeshDegrees{.data = 2}}) {
    const auto ranks = static_cast<int>(num_ranks(degrees));
    run_local_world(ranks, [&](const Group& world) {
      const Trained t = train(scaled_config(Precision::fp16, init), world, degrees);
      int64_t skipped = 0;
      int64_t clean = 0;
      double scale = init;
      for (const StepReport& report : t.reports) {
        EXPECT_EQ(report.loss_scale, scale);
        EXPECT_TRUE(std::isfinite(report.loss));
        EXPECT_EQ(std::isfinite(report.gradient_norm), !report.skipped);
        skipped += report.skipped;
        clean = report.skipped ? 0 : clean + 1;
        if (report.skipped) scale /= 2;
        if (clean == 10) {
          scale *= 2;
          clean = 0;
        }
      }
      EXPECT_TRUE(t.reports.front().skipped);
      EXPECT_GE(skipped, 14);  // 2^30 down to what fp16 has room for
      EXPECT_LT(skipped, 30);
      EXPECT_EQ(t.counters.loss_scale, (LossScale{scale, clean, skipped}));
      EXPECT_EQ(t.counters.batch_index, kSteps);
      EXPECT_EQ(t.counters.updates, kSteps - skipped);
      EXPECT_EQ(t.counters.skipped_in_a_row, 0);
      EXPECT_LT(t.reports.back().loss, 0.9 * t.reports.front().loss);
      EXPECT_EQ(world.all_reduce(scale, ReduceOp::max), scale);
      EXPECT_EQ(world.all_reduce_sum(skipped), skipped * world.size());
    });
  }
}

// What is not lost to underflow is exact under any power of two, so nothing of the scale is left in updates.
TEST(LossScaling, TheScaleIsTakenOutOfNormsAndUpdates) {
  const Trained plain = train(scaled_config(Precision::bf16, 128.0), make_self_world(), {});
  const Trained low = train(scaled_config(Precision::fp16, 16.0), make_self_world(), {});
  const Trained high = train(scaled_config(Precision::fp16, 1024.0), make_self_world(), {});
  EXPECT_EQ(low.counters.loss_scale.overflows + high.counters.loss_scale.overflows, 0);
  for (size_t i = 0; i < plain.reports.size(); ++i) {
    EXPECT_NEAR(low.reports[i].gradient_norm, high.reports[i].gradient_norm,
                0.02 * high.reports[i].gradient_norm);
    EXPECT_NEAR(plain.reports[i].gradient_norm, high.reports[i].gradient_norm,
                0.2 * high.reports[i].gradient_norm);
  }
  EXPECT_EQ(plain.counters.loss_scale, LossScale{});
}

TEST(LossScaling, MemoryEfficientTrainingStaysNearMasters) {
  const std::vector<double> masters =
      losses_of(train(scaled_config(Precision::fp16, 128.0), make_self_world(), {}));
  const std::vector<double> without =
      losses_of(train(scaled_config(Precision::fp16_memory_efficient, 128.0), make_self_world(), {}));
  EXPECT_NE(masters, without);
  // Each update rounds a weight by up to 2^-11 of it, where masters are rounded for the pass alone.
  for (size_t i = 0; i < masters.size(); ++i) EXPECT_NEAR(without[i], masters[i], 0.01 * masters[i]) << i;
}

// State and counters taken out in the middle of falling, or later, and put into a fresh trainer.
TEST(LossScaling, ResumingAcrossAnOverflowChangesNoBit) {
  for (const Precision precision : {Precision::fp16, Precision::fp16_memory_efficient}) {
    const RunConfig config = scaled_config(precision, 0x1p30);
    for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.tensor = 2, .data = 2}}) {
      run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
        const Trained straight = train(config, world, degrees);
        for (const int64_t stop : {3, 25}) {
          Trained resumed;
          SmallModel first(config, DeviceKind::cpu, world, degrees);
          run_steps(first, stop, resumed);
          SmallModel second(config, DeviceKind::cpu, world, degrees);
          const auto from = first.trainer.optimizer().state();
          const auto to = second.trainer.optimizer().state();
          for (size_t i = 0; i < from.size(); ++i)
            copy(second.context, from[i].piece.values, to[i].piece.values);
          second.trainer.set_counters(resumed.counters);
          second.trainer.weights_changed();
          run_steps(second, kSteps - stop, resumed);
          EXPECT_EQ(losses_of(resumed), losses_of(straight));
          EXPECT_EQ(resumed.counters, straight.counters);
          EXPECT_EQ(state_of(second), straight.state);
        }
      });
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
