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

/// How long a step takes in the long run if every rank begins its next step when its own list is done. This
/// is an optimizer that updates without waiting for the norm or the finiteness of all gradients and takes the
/// update back where it must (optimistic update with post-validation; Qi et al. 2024, section 4). Exact: the
/// largest mean of a cycle of waits (Karp 1978), from as many steps as there are stages. The optimizer itself
/// takes no time here. LogicError as simulate.
double steady_step_time(const Schedule& schedule, const StageTimes& times);

/// What a barrier between steps (clipping by the global norm, the check for finite gradients) costs: each
/// rank idles so much longer per step than in steady_step_time. LogicError as simulate.
double barrier_cost(const Schedule& schedule, const StageTimes& times);

}  // namespace normformer
