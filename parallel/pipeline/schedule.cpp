#include "normformer/pipeline/schedule.h"

#include <fmt/format.h>

namespace normformer {

namespace {

Message between_parts(const Schedule& schedule, MessageKind kind, int64_t from, int64_t to,
                      int64_t micro_batch) {
  return {kind, schedule.stage_of(from), schedule.stage_of(to), micro_batch, schedule.chunk_of(to)};
}

}  // namespace

std::string_view name_of(ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return "forward";
    case ActionKind::backward:
      return "backward";
    case ActionKind::backward_input:
      return "backward_input";
    case ActionKind::backward_weight:
      return "backward_weight";
  }
  return "?";
}

std::string to_string(const Action& action) {
  const std::string text = fmt::format("{} of micro-batch {}", name_of(action.kind), action.micro_batch);
  return action.chunk == 0 ? text : fmt::format("{}, chunk {}", text, action.chunk);
}

std::optional<Message> received_by(const Schedule& schedule, int64_t stage, const Action& action) {
  const int64_t part = schedule.part(stage, action.chunk);
  if (action.kind == ActionKind::backward_weight) return std::nullopt;
  if (action.kind == ActionKind::forward) {
    if (part == 0) return std::nullopt;
    return between_parts(schedule, MessageKind::activation, part - 1, part, action.micro_batch);
  }
  if (part == schedule.num_parts() - 1) return std::nullopt;
  return between_parts(schedule, MessageKind::gradient, part + 1, part, action.micro_batch);
}

std::optional<Message> sent_by(const Schedule& schedule, int64_t stage, const Action& action) {
  const int64_t part = schedule.part(stage, action.chunk);
  if (action.kind == ActionKind::backward_weight) return std::nullopt;
  if (action.kind == ActionKind::forward) {
    if (part == schedule.num_parts() - 1) return std::nullopt;
    return between_parts(schedule, MessageKind::activation, part, part + 1, action.micro_batch);
  }
  if (part == 0) return std::nullopt;
  return between_parts(schedule, MessageKind::gradient, part, part - 1, action.micro_batch);
}

}  // namespace normformer
