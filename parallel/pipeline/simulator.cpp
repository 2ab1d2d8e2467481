#include "normformer/pipeline/simulator.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "normformer/core/error.h"
#include "normformer/pipeline/checker.h"

#include "replay.h"

namespace normformer {

namespace {

void check_times(const Schedule& schedule, const StageTimes& times) {
  const auto parts = static_cast<size_t>(schedule.num_parts());
  for (const auto* of_parts : {&times.forward, &times.backward_input, &times.backward_weight}) {
    NF_CHECK(of_parts->size() == parts, "{} times for {} parts", of_parts->size(), parts);
    for (const double t : *of_parts) NF_CHECK(t >= 0, "an action that takes {}", t);
  }
  NF_CHECK(times.transfer >= 0, "a transfer that takes {}", times.transfer);
}

double duration(const StageTimes& times, ActionKind kind, int64_t part) {
  const auto at = static_cast<size_t>(part);
  switch (kind) {
    case ActionKind::forward:
      return times.forward[at];
    case ActionKind::backward:
      return times.backward_input[at] + times.backward_weight[at];
    case ActionKind::backward_input:
      return times.backward_input[at];
    case ActionKind::backward_weight:
      return times.backward_weight[at];
  }
  return 0;
}

}  // namespace

double bubble_fraction(const std::vector<std::vector<TimedAction>>& rows) {
  double begin = std::numeric_limits<double>::infinity();
  double end = -begin;
  double busy = 0;
  for (const auto& row : rows)
    for (const TimedAction& timed : row) {
      begin = std::min(begin, timed.start);
      end = std::max(end, timed.end);
      busy += timed.end - timed.start;
    }
  const double available = (end - begin) * static_cast<double>(rows.size());
  return available > 0 ? (available - busy) / available : 0;
}

Simulation simulate(const Schedule& schedule, const StageTimes& times) {
  check_schedule(schedule);
  check_times(schedule, times);
  Simulation result;
  result.stages.resize(schedule.stages.size());
  const auto run = [&](detail::ActionPlace here, const std::optional<detail::ActionPlace>& sender) {
    auto& done = result.stages[static_cast<size_t>(here.stage)];
    const Action& action = schedule.stages[static_cast<size_t>(here.stage)][static_cast<size_t>(here.index)];
    double start = done.empty() ? 0 : done.back().end;
    if (sender) {
      const double sent =
          result.stages[static_cast<size_t>(sender->stage)][static_cast<size_t>(sender->index)].end;
      start = std::max(start, sent + (sender->stage == here.stage ? 0 : times.transfer));
    }
    const double takes = duration(times, action.kind, schedule.part(here.stage, action.chunk));
    done.push_back({action, start, start + takes});
    result.makespan = std::max(result.makespan, start + takes);
  };
  detail::replay(schedule, run);
  result.bubble_fraction = bubble_fraction(result.stages);
  return result;
}

double steady_step_time(const Schedule& schedule, const StageTimes& times) {
  check_schedule(schedule);
  if (schedule.micro_batches == 0) return 0;
  const int64_t steps = schedule.num_stages();
  const Simulation run = simulate(repeated(schedule, steps), times);
  double longest = 0;
  for (const auto& stage : run.stages) {
    const auto end_of = [&](int64_t step) {
      const auto done = stage.size() / static_cast<size_t>(steps) * static_cast<size_t>(step);
      return done == 0 ? 0.0 : stage[done - 1].end;
    };
    double mean = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < steps; ++k)
      mean = std::min(mean, (end_of(steps) - end_of(k)) / static_cast<double>(steps - k));
    longest = std::max(longest, mean);
  }
  return longest;
}

double barrier_cost(const Schedule& schedule, const StageTimes& times) {
  return simulate(schedule, times).makespan - steady_step_time(schedule, times);
}

}  // namespace normformer
