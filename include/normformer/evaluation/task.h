#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace normformer {

/// A text and what may follow it: asked for is the likelihood of the continuation.
struct ContinuationRequest {
  std::string context;
  std::string continuation;
  bool operator==(const ContinuationRequest&) const = default;
};

/// What a task's items ask.
enum class TaskKind {
  choice,    ///< which of several continuations is the likeliest
  last_word  ///< how likely a text's last word is, and whether the model would have written it
};

/// A zero-shot task as lm-evaluation-harness 0.4 defines it.
struct TaskRule {
  std::string_view name;
  TaskKind kind = TaskKind::choice;
  bool is_normalised = false;  ///< also tells the accuracy of likelihoods divided by the choices' lengths
  double version = 1.0;        ///< of the harness' definition that this follows
};

/// All tasks that read_task knows.
std::span<const TaskRule> known_tasks();

/// One item of a task.
struct TaskItem {
  std::string place;                          ///< its file and line
  std::vector<ContinuationRequest> requests;  ///< one a choice; of TaskKind::last_word one
  std::vector<int64_t> lengths;  ///< of each choice in characters, where the task is normalised by them
  int64_t gold = 0;              ///< the choice that is right
};

/// A task and its items, in the order of its file.
struct Task {
  TaskRule rule;
  std::vector<TaskItem> items;
};

/// Where a task comes from: NAME=FILE or NAME=FILE,LABELS.
struct TaskSource {
  std::string name;
  std::filesystem::path file;
  std::filesystem::path labels;  ///< of PIQA: a file of a number a line; else empty
};

/// Reads "piqa=FILE,LABELS" or "NAME=FILE" of another task. ConfigError where it is neither, or the name is
/// of no known task.
TaskSource parse_task_source(std::string_view text);

/// Reads a task's items, the first `limit` where given, from a file in the format in which its data set is
/// published (docs/evaluation.md). Makes the requests that lm-evaluation-harness 0.4 makes without examples.
/// Throws IoError, and DataError with file and line.
Task read_task(const TaskSource& source, std::optional<int64_t> limit = std::nullopt);

}  // namespace normformer
