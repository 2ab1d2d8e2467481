#include "normformer/training/pipeline_drawing.h"

#include <gtest/gtest.h>

#include "normformer/model/parts.h"

namespace normformer {
namespace {

TraceSpan span(const char* name, TraceKind kind, TraceLane lane, double begin, double end,
               int64_t micro_batch = -1, int64_t chunk = -1) {
  return {.name = name,
          .kind = kind,
          .lane = lane,
          .begin_us = begin,
          .duration_us = end - begin,
          .details = {.micro_batch = micro_batch, .chunk = chunk},
          .group = {}};
}

std::vector<TraceSpan> two_steps(TraceLane lane) {
  using K = TraceKind;
  return {span("step", K::step, lane, 0, 10),
          span("forward", K::pipeline, lane, 1, 2, 0, 0),
          span("step", K::step, lane, 10, 30),
          span("read the batch", K::step, lane, 10, 11),
          span("forward", K::pipeline, lane, 11, 13, 0, 0),
          span("linear_forward", K::operation, lane, 11, 12),
          span("backward", K::pipeline, lane, 12.9, 20, 0, 0)};
}

TEST(ActionsOfLastStep, AreItsSpansInOrderWithoutOverlap) {
  const std::vector<TimedAction> actions = actions_of_last_step(two_steps(TraceLane::host));
  ASSERT_EQ(actions.size(), 2U);
  EXPECT_EQ(actions[0].action, (Action{ActionKind::forward, 0, 0}));
  EXPECT_EQ(actions[0].start, 11);
  EXPECT_EQ(actions[1].action, (Action{ActionKind::backward, 0, 0}));
  EXPECT_EQ(actions[1].start, 13);
  EXPECT_EQ(actions[1].end, 20);
}

TEST(ActionsOfLastStep, AreTheGpusWhereThereIsOne) {
  std::vector<TraceSpan> spans = two_steps(TraceLane::host);
  for (TraceSpan& s : spans) s.begin_us -= 5;  // enqueued before
  for (const TraceSpan& s : two_steps(TraceLane::gpu_compute)) spans.push_back(s);
  EXPECT_EQ(actions_of_last_step(spans).front().start, 11);
}

TEST(MeanTimes, AreByPartAndKind) {
  ParallelConfig parallel;
  parallel.schedule = PipelineSchedule::zb_v;
  const Schedule schedule = make_schedule(parallel, 2, 2);
  const auto at = [](ActionKind kind, int64_t micro_batch, int64_t chunk, double start, double end) {
    return TimedAction{{kind, micro_batch, chunk}, start, end};
  };
  // Stage 0 holds parts 0 and 3, stage 1 parts 1 and 2.
  const std::vector<std::vector<TimedAction>> rows{
      {at(ActionKind::forward, 0, 0, 0, 1), at(ActionKind::forward, 1, 0, 1, 4),
       at(ActionKind::backward, 0, 1, 4, 10)},
      {at(ActionKind::backward_input, 0, 1, 0, 5), at(ActionKind::backward_weight, 0, 0, 5, 7)}};
  const StageTimes times = mean_times(schedule, rows);
  EXPECT_EQ(times.forward, (std::vector<double>{2, 0, 0, 0}));
  EXPECT_EQ(times.backward_input, (std::vector<double>{0, 0, 5, 3}));
  EXPECT_EQ(times.backward_weight, (std::vector<double>{0, 2, 0, 3}));
}

}  // namespace
}  // namespace normformer
