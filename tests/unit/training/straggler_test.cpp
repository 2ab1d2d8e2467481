#include "normformer/training/straggler.h"

#include <functional>

#include <gtest/gtest.h>

#include "normformer/comm/group.h"
#include "normformer/comm/wait_time.h"

namespace normformer {
namespace {

// The namings of `steps` equal steps, each with the step behind which it came.
std::vector<std::pair<int64_t, Straggler>> watch(StragglerWatch& watch, const std::vector<double>& seconds,
                                                 int64_t steps) {
  std::vector<std::pair<int64_t, Straggler>> named;
  for (int64_t step = 1; step <= steps; ++step)
    for (const Straggler& straggler : watch.enter_step(seconds)) named.emplace_back(step, straggler);
  return named;
}

TEST(Straggler, IsNamedByItsMeanOverThirtyTwoSteps) {
  StragglerWatch four(1.5, {0, 0, 0, 0});
  const auto named = watch(four, {1.0, 1.25, 2.0, 0.5}, 32);
  ASSERT_EQ(named.size(), 1u);
  EXPECT_EQ(named[0].first, 32);
  EXPECT_EQ(named[0].second.rank, 2);
  EXPECT_DOUBLE_EQ(named[0].second.seconds, 2.0);
  EXPECT_DOUBLE_EQ(named[0].second.median, 1.0);
  EXPECT_EQ(describe(named[0].second, "b"),
            "rank 2 on host b computes 2.0 times as long as the median of its stage (2 s against 1 s) over "
            "the last "
            "32 steps");
}

TEST(Straggler, OneSlowStepIsNotEnough) {
  StragglerWatch two(1.5, {0, 0});
  EXPECT_TRUE(watch(two, {1.0, 16.0}, 1).empty());
  EXPECT_TRUE(watch(two, {1.0, 1.0}, 31).empty());  // 47 seconds of 32
  EXPECT_TRUE(watch(two, {1.0, 16.0}, 1).empty());
  EXPECT_EQ(watch(two, {1.0, 1.1}, 31).size(), 1u);  // 50.1 of 32
}

TEST(Straggler, IsNotNamedAgainTooSoon) {
  StragglerWatch three(1.5, {0, 0, 0});
  std::vector<int64_t> steps;
  for (const auto& [step, straggler] : watch(three, {1.0, 1.0, 3.0}, 300)) steps.push_back(step);
  EXPECT_EQ(steps, (std::vector<int64_t>{32, 160, 288}));
}

TEST(Straggler, StagesAreNotCompared) {
  StragglerWatch stages(1.5, {0, 0, 1, 1, 2});
  EXPECT_TRUE(watch(stages, {1.0, 1.0, 3.0, 3.0, 9.0}, 64).empty());
  const auto named = watch(stages, {2.0, 1.0, 3.0, 3.0, 9.0}, 32);
  ASSERT_EQ(named.size(), 1u);
  EXPECT_EQ(named[0].second.rank, 0);
}

TEST(Straggler, ZeroNamesNobody) {
  StragglerWatch none(0.0, {0, 0});
  EXPECT_TRUE(watch(none, {1.0, 100.0}, 64).empty());
}

TEST(Straggler, AStepIsSummarised) {
  const std::vector<double> seconds{0.5, 2.0, 1.0, 2.0};
  const ComputeSummary summary = summarise_compute(seconds);
  EXPECT_EQ(summary.median, 1.0);
  EXPECT_EQ(summary.largest, 2.0);
  EXPECT_EQ(summary.slowest_rank, 1);
}

// Every call that waits is counted, and none twice, though calls are made of others.
TEST(Straggler, WaitingForOthersIsNotComputing) {
  using Wait = std::function<void(Context&, const Group&)>;
  const std::vector<Wait> waits{[](Context&, const Group& world) { world.barrier(); },
                                [](Context&, const Group& world) { world.all_reduce_sum(int64_t{1}); },
                                [](Context&, const Group& world) { world.all_gather_text("x"); },
                                [](Context& context, const Group& world) {
                                  world.all_reduce(context, context.zeros({3}, DType::f32), ReduceOp::sum);
                                },
                                [](Context& context, const Group& world) {
                                  const Tensor tensor = context.zeros({3}, DType::f32);
                                  world.start_all_reduce_sum(context, tensor).wait();
                                },
                                [](Context& context, const Group& world) {
                                  world.broadcast(context, context.zeros({3}, DType::f32), 1);
                                },
                                [](Context& context, const Group& world) {
                                  const Tensor tensor = context.zeros({3}, DType::f32);
                                  if (world.rank() == 1) return world.send(context, tensor, 0, 1).wait();
                                  world.receive(context, tensor, 1, 1);
                                },
                                [](Context& context, const Group& world) {
                                  std::vector<double> all;
                                  const double mine = 1.0;
                                  world.start_gather(context, {&mine, 1}, all).wait();
                                }};
  for (size_t i = 0; i < waits.size(); ++i) {
    run_local_world(2, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      ComputeClock clock;
      const auto begin = std::chrono::steady_clock::now();
      const int64_t before = nanoseconds_waited();
      {
        const ComputeClock::Running running(clock);
        waits[i](context, world);
      }
      const double total = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      const double waited = 1e-9 * static_cast<double>(nanoseconds_waited() - before);
      const double computed = clock.take();
      EXPECT_GT(waited, 0.0) << "wait " << i;
      EXPECT_LE(computed + waited, total * 1.000001) << "wait " << i;
      EXPECT_EQ(clock.take(), 0.0);
    });
  }
}

}  // namespace
}  // namespace normformer
