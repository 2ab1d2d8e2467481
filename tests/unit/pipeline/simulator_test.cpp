#include "normformer/pipeline/simulator.h"

#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "lists.h"

namespace normformer {
namespace {

TEST(Simulator, BubbleOfEqualStagesIsTheTextbooks) {
  for (int64_t p = 1; p <= 8; ++p)
    for (int64_t m = 1; m <= 12; ++m) {
      const auto bubble = static_cast<double>(p - 1) / static_cast<double>(m + p - 1);
      const StageTimes times = equal_times(p, 1, 1, 1);
      EXPECT_DOUBLE_EQ(simulate(gpipe_schedule(p, m), times).bubble_fraction, bubble) << p << " " << m;
      EXPECT_DOUBLE_EQ(simulate(one_f_one_b_schedule(p, m), times).bubble_fraction, bubble) << p << " " << m;
      EXPECT_EQ(simulate(one_f_one_b_schedule(p, m), times).makespan, static_cast<double>(3 * (m + p - 1)));
    }
}

TEST(Simulator, ZeroBubbleIdlesOneForwardAndInputLessWeight) {
  // (p - 1)(F + I - W) a stage: Qi et al. 2024, table 2.
  const Simulation zero_bubble = simulate(zero_bubble_two_stages(), equal_times(2, 1, 1, 1));
  EXPECT_EQ(zero_bubble.makespan, 4 * 3 + 1);
  EXPECT_DOUBLE_EQ(zero_bubble.bubble_fraction, 1.0 / 13);
  EXPECT_EQ(simulate(one_f_one_b_schedule(2, 4), equal_times(2, 1, 1, 1)).makespan, 4 * 3 + 3);
}

TEST(Simulator, HandDrawnTimes) {
  StageTimes times{{2, 3}, {1, 2}, {1, 2}, 0.5};
  const Simulation drawn = simulate(one_f_one_b_schedule(2, 2), times);
  // stage 0: F0 0-2, F1 2-4, B0 10-12, B1 17-19; stage 1: F0 2.5-5.5, B0 5.5-9.5, F1 9.5-12.5, B1 12.5-16.5
  const std::vector<std::vector<std::pair<double, double>>> expected{
      {{0, 2}, {2, 4}, {10, 12}, {17, 19}}, {{2.5, 5.5}, {5.5, 9.5}, {9.5, 12.5}, {12.5, 16.5}}};
  for (size_t s = 0; s < 2; ++s)
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(drawn.stages[s][i].start, expected[s][i].first) << s << " " << i;
      EXPECT_EQ(drawn.stages[s][i].end, expected[s][i].second) << s << " " << i;
      EXPECT_EQ(drawn.stages[s][i].action, one_f_one_b_schedule(2, 2).stages[s][i]);
    }
  EXPECT_EQ(drawn.makespan, 19);
  EXPECT_DOUBLE_EQ(drawn.bubble_fraction, 1 - (8.0 + 14.0) / 38.0);
}

TEST(Simulator, ChunksTakeTheTimesOfTheirParts) {
  // F0a 1, F0b 2, B0b 30 + 300, B0a 10 + 100; nothing is transferred inside a rank.
  const Simulation one = simulate(lists(1, {"F0a F0b B0b B0a"}, 2), {{1, 2}, {10, 30}, {100, 300}, 1000});
  EXPECT_EQ(one.makespan, 443);
  EXPECT_EQ(one.bubble_fraction, 0);
  // stage 0: F 0-4, B0b 6-8, B1b 9-11, B0a 11-13, B1a 13-15; stage 1: F0a 1-2, F1a 2-3, F0b 3-4, B0b 4-6,
  // F1b 6-7, B1b 7-9, B0a 9-11, B1a 11-13
  const Simulation two = simulate(interleaved_two_stages(), equal_times(4, 1, 1, 1));
  EXPECT_EQ(two.makespan, 15);
  EXPECT_EQ(two.stages[1].back().end, 13);
}

TEST(Barrier, CostsNothingWhereTheFirstStageEndsLast) {
  // stage 0: F0 0-1, F1 1-2, B0 4-6, B1 7-9; stage 1: F0 1-2, B0 2-4, F1 4-5, B1 5-7. The next F0 begins at 9
  // and reaches stage 1, done since 7, at 10.
  EXPECT_EQ(steady_step_time(one_f_one_b_schedule(2, 2), equal_times(2, 1, 1, 1)), 9);
  EXPECT_EQ(barrier_cost(one_f_one_b_schedule(2, 2), equal_times(2, 1, 1, 1)), 0);
  EXPECT_EQ(barrier_cost(one_f_one_b_schedule(1, 5), equal_times(1, 1, 1, 1)), 0);
}

TEST(Barrier, CostsZbH2OneForward) {
  // stage 0 is busy 0-9, stage 1 1-10: without a barrier steps follow each other every 9, with it every 10.
  const StageTimes times = equal_times(2, 1, 1, 1);
  EXPECT_EQ(simulate(zb_h2_schedule(2, 3), times).makespan, 10);
  EXPECT_EQ(steady_step_time(zb_h2_schedule(2, 3), times), 9);
  EXPECT_EQ(barrier_cost(zb_h2_schedule(2, 3), times), 1);
}

TEST(Barrier, CostsASlowStageItsWayToAndFrom) {
  // stage 0: F0 0-1, F1 1-2, B0 7-9, B1 13-15; stage 1: F0 1-3, B0 3-7, F1 7-9, B1 9-13. The step's way from
  // stage 0's F0 to its B1 takes 15, stage 1 alone 12; stage 1's next F0 begins at 16: a barrier adds
  // nothing.
  const StageTimes slow_last{{1, 2}, {1, 2}, {1, 2}};
  EXPECT_EQ(steady_step_time(one_f_one_b_schedule(2, 2), slow_last), 15);
  EXPECT_EQ(barrier_cost(one_f_one_b_schedule(2, 2), slow_last), 0);
  // ZB-H2's stage 0: F0 0-1, F1 1-2, I0 5-6, W0 6-7, I1 9-10, W1 10-11; stage 1: F0 1-3, I0 3-5, F1 5-7, I1
  // 7-9, W0 9-11, W1 11-13. The next F0 is there at 12, so stage 1 goes on at 13: 12 a step.
  EXPECT_EQ(simulate(zb_h2_schedule(2, 2), slow_last).makespan, 13);
  EXPECT_EQ(steady_step_time(zb_h2_schedule(2, 2), slow_last), 12);
  EXPECT_EQ(barrier_cost(zb_h2_schedule(2, 2), slow_last), 1);
}

TEST(Barrier, CountsTransfers) {
  // stage 0: F0 0-1, B0 6-8; stage 1: F0 2-3, B0 3-5.
  EXPECT_EQ(steady_step_time(one_f_one_b_schedule(2, 1), equal_times(2, 1, 1, 1, 1)), 8);
  EXPECT_EQ(barrier_cost(one_f_one_b_schedule(2, 1), equal_times(2, 1, 1, 1, 1)), 0);
}

TEST(Barrier, OfEmptyAndUnsoundSchedules) {
  EXPECT_EQ(steady_step_time(one_f_one_b_schedule(3, 0), equal_times(3, 1, 1, 1)), 0);
  EXPECT_EQ(barrier_cost(one_f_one_b_schedule(3, 0), equal_times(3, 1, 1, 1)), 0);
  EXPECT_THROW(steady_step_time(lists(1, {"F0"}), equal_times(1, 1, 1, 1)), LogicError);
  EXPECT_THROW(barrier_cost(gpipe_schedule(2, 1), equal_times(1, 1, 1, 1)), LogicError);
}

TEST(Simulator, BubbleOfRowsThatBeginLate) {
  const std::vector<std::vector<TimedAction>> rows{{{{}, 10, 12}, {{}, 13, 14}}, {{{}, 11, 14}}};
  EXPECT_DOUBLE_EQ(bubble_fraction(rows), 2.0 / 8);
  EXPECT_EQ(bubble_fraction({}), 0);
  EXPECT_EQ(bubble_fraction({{}, {}}), 0);
}

TEST(Simulator, NothingToDoTakesNoTime) {
  const Simulation nothing = simulate(one_f_one_b_schedule(3, 0), equal_times(3, 1, 1, 1));
  EXPECT_EQ(nothing.makespan, 0);
  EXPECT_EQ(nothing.bubble_fraction, 0);
}

TEST(Simulator, UnsoundSchedulesAndWrongTimesAreRefused) {
  EXPECT_THROW(simulate(lists(1, {"F0"}), equal_times(1, 1, 1, 1)), LogicError);
  EXPECT_THROW(simulate(gpipe_schedule(2, 1), equal_times(1, 1, 1, 1)), LogicError);
  EXPECT_THROW(simulate(gpipe_schedule(1, 1), equal_times(1, 1, -1, 1)), LogicError);
  EXPECT_THROW(simulate(gpipe_schedule(1, 1), equal_times(1, 1, 1, 1, -1)), LogicError);
}

}  // namespace
}  // namespace normformer
