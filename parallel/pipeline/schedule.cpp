#include "normformer/pipeline/schedule.h"

#include <algorithm>

#include <fmt/format.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

void check_sizes(int64_t stages, int64_t micro_batches) {
  NF_CHECK(stages >= 1, "a pipeline of {} stages", stages);
  NF_CHECK(micro_batches >= 0, "a schedule of {} micro-batches", micro_batches);
}

Message to_part(const Schedule& schedule, MessageKind kind, int64_t from, int64_t part, int64_t micro_batch) {
  const int64_t p = schedule.num_stages();
  return {kind, from, part % p, micro_batch, part / p};
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

Schedule gpipe_schedule(int64_t stages, int64_t micro_batches) {
  check_sizes(stages, micro_batches);
  std::vector<Action> list;
  for (int64_t m = 0; m < micro_batches; ++m) list.push_back({ActionKind::forward, m});
  for (int64_t m = 0; m < micro_batches; ++m) list.push_back({ActionKind::backward, m});
  return {micro_batches, 1, std::vector<std::vector<Action>>(static_cast<size_t>(stages), list)};
}

Schedule one_f_one_b_schedule(int64_t stages, int64_t micro_batches) {
  check_sizes(stages, micro_batches);
  Schedule schedule{micro_batches, 1, {}};
  for (int64_t s = 0; s < stages; ++s) {
    const int64_t ahead = std::min(stages - s - 1, micro_batches);
    std::vector<Action> list;
    for (int64_t m = 0; m < ahead; ++m) list.push_back({ActionKind::forward, m});
    for (int64_t m = 0; m < micro_batches; ++m) {
      if (m + ahead < micro_batches) list.push_back({ActionKind::forward, m + ahead});
      list.push_back({ActionKind::backward, m});
    }
    schedule.stages.push_back(std::move(list));
  }
  return schedule;
}

std::optional<Message> received_by(const Schedule& schedule, int64_t stage, const Action& action) {
  const int64_t p = schedule.num_stages();
  const int64_t part = schedule.part(stage, action.chunk);
  if (action.kind == ActionKind::backward_weight) return std::nullopt;
  if (action.kind == ActionKind::forward) {
    if (part == 0) return std::nullopt;
    return to_part(schedule, MessageKind::activation, (part - 1) % p, part, action.micro_batch);
  }
  if (part == schedule.num_parts() - 1) return std::nullopt;
  return to_part(schedule, MessageKind::gradient, (part + 1) % p, part, action.micro_batch);
}

std::optional<Message> sent_by(const Schedule& schedule, int64_t stage, const Action& action) {
  const int64_t part = schedule.part(stage, action.chunk);
  if (action.kind == ActionKind::backward_weight) return std::nullopt;
  if (action.kind == ActionKind::forward) {
    if (part == schedule.num_parts() - 1) return std::nullopt;
    return to_part(schedule, MessageKind::activation, stage, part + 1, action.micro_batch);
  }
  if (part == 0) return std::nullopt;
  return to_part(schedule, MessageKind::gradient, stage, part - 1, action.micro_batch);
}

}  // namespace normformer
