#pragma once

#include <vector>

#include "normformer/pipeline/schedule.h"

namespace normformer {

/// How long each action takes, in any one unit. A `backward` takes backward_input + backward_weight.
struct StageTimes {
  std::vector<double> forward;          ///< [part], see Schedule
  std::vector<double> backward_input;   ///< [part]
  std::vector<double> backward_weight;  ///< [part]
  double transfer = 0;  ///< from the end of an action to its message being there, on another rank; the sender
                        ///< goes on at once
};

/// An action and when it runs.
struct TimedAction {
  Action action;
  double start = 0;
  double end = 0;
};

/// The idle share of all rows' time from the first start to the last end; 0 where nothing takes time. A row
/// is what one stage does, simulated or measured.
double bubble_fraction(const std::vector<std::vector<TimedAction>>& rows);

/// A schedule on a time axis that begins at 0.
struct Simulation {
  std::vector<std::vector<TimedAction>> stages;  ///< [stage]: in the order of the schedule
  double makespan = 0;                           ///< end of the last action
  double bubble_fraction = 0;                    ///< of `stages`
};

/// When each action runs if every stage takes its actions in order and begins each as soon as its message is
/// there. LogicError where the schedule is not sound (check_schedule) or the times do not match its parts or
/// are negative.
Simulation simulate(const Schedule& schedule, const StageTimes& times);

}  // namespace normformer
