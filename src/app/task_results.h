#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "normformer/evaluation/task_scores.h"

namespace normformer {

/// A task with what was found of it.
struct TaskResult {
  Task task;
  std::vector<ContinuationScore> scores;  ///< of all items' requests, one item behind the other
  std::vector<TaskMetric> metrics;
};

/// What was evaluated.
struct EvaluatedModel {
  std::string run;
  std::string checkpoint;
  std::optional<int64_t> limit;  ///< of items a task
};

/// A line for each number, in the form of lm-evaluation-harness.
std::string results_table(std::span<const TaskResult> results);

/// Writes results.json in the harness' form into `folder`, which is made if need be, and with `samples` a
/// samples_TASK.jsonl of a line an item. Throws IoError.
void write_results(const std::filesystem::path& folder, const EvaluatedModel& model,
                   std::span<const TaskResult> results, bool samples);

}  // namespace normformer
