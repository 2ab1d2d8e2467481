// The schedules of the field. Each list is made of strands that advance together: forwards some places ahead,
// weight gradients some places behind.
#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "normformer/core/error.h"
#include "normformer/pipeline/schedule.h"

namespace normformer {

namespace {

void check_sizes(int64_t stages, int64_t micro_batches) {
  NF_CHECK(stages >= 1, "a pipeline of {} stages", stages);
  NF_CHECK(micro_batches >= 0, "a schedule of {} micro-batches", micro_batches);
}

// Actions of one kind, `ahead` places before the rest; behind it where negative.
struct Strand {
  ActionKind kind;
  int64_t ahead;
};

// In each turn every strand takes its next place from 0 to places - 1, where it has one.
template <class ActionAt>
std::vector<Action> in_turn(int64_t places, std::span<const Strand> strands, ActionAt action_at) {
  int64_t first = 0;
  int64_t last = places - 1;
  for (const Strand& strand : strands) {
    first = std::min(first, -strand.ahead);
    last = std::max(last, places - 1 - strand.ahead);
  }
  std::vector<Action> list;
  for (int64_t turn = first; turn <= last; ++turn)
    for (const Strand& strand : strands) {
      const int64_t place = turn + strand.ahead;
      if (place >= 0 && place < places) list.push_back(action_at(strand.kind, place));
    }
  return list;
}

// One chunk a rank; strands_of(stage) are its strands.
template <class StrandsOf>
Schedule plain_schedule(int64_t stages, int64_t micro_batches, StrandsOf strands_of) {
  check_sizes(stages, micro_batches);
  Schedule schedule{micro_batches, 1, {}};
  for (int64_t s = 0; s < stages; ++s)
    schedule.stages.push_back(in_turn(micro_batches, strands_of(s), [](ActionKind kind, int64_t place) {
      return Action{kind, place};
    }));
  return schedule;
}

// `spread` times 1F1B's lead at each stage, with weight gradients as far behind as makes every stage keep as
// much as the first.
Schedule zero_bubble_schedule(int64_t stages, int64_t micro_batches, int64_t spread) {
  return plain_schedule(stages, micro_batches, [&](int64_t stage) {
    return std::vector<Strand>{{ActionKind::forward, spread * (stages - 1 - stage)},
                               {ActionKind::backward_input, 0},
                               {ActionKind::backward_weight, -spread * stage}};
  });
}

// Drops micro-batches that do not exist. What is left of a sound schedule is sound: every wait that remains
// was a wait before.
void keep_only(std::vector<Action>& list, int64_t micro_batches) {
  std::erase_if(list, [&](const Action& action) { return action.micro_batch >= micro_batches; });
}

// A list in which actions of each kind and chunk come in the order of micro-batches.
class OrderedList {
 public:
  OrderedList& add(ActionKind kind, int64_t chunk) {
    int64_t& next = next_[static_cast<size_t>(kind)][static_cast<size_t>(chunk)];
    list_.push_back({kind, next++, chunk});
    return *this;
  }
  OrderedList& forward(int64_t chunk) { return add(ActionKind::forward, chunk); }
  OrderedList& input(int64_t chunk) { return add(ActionKind::backward_input, chunk); }
  OrderedList& weight(int64_t chunk) { return add(ActionKind::backward_weight, chunk); }
  std::vector<Action> take() { return std::move(list_); }

 private:
  std::array<std::array<int64_t, 2>, 4> next_{};  // [kind][chunk]
  std::vector<Action> list_;
};

// Rank `stage` of `stages`, for at least 2 * stages - 1 micro-batches: forwards of the first chunk until
// micro-batch 0 has turned and is back, both chunks forward until its gradient is there, then each chunk in
// turn. What weight gradients are late at the end fill the time in which the last gradients come round.
std::vector<Action> zb_v_list(int64_t stages, int64_t micro_batches, int64_t stage) {
  OrderedList list;
  const int64_t to_turn = stages - stage;  // ranks from here to the last one
  for (int64_t i = 0; i < 2 * to_turn - 1; ++i) list.forward(0);
  for (int64_t i = 0; i < stage; ++i) list.forward(1).forward(0);
  for (int64_t i = 0; i < to_turn; ++i) list.forward(1).input(1).weight(1);
  for (int64_t i = stages; i < micro_batches; ++i)
    list.forward(0).input(0).weight(0).forward(1).input(1).weight(1);
  for (int64_t i = 0; i < stage; ++i) list.input(0).input(1);
  for (int64_t i = 0; i < to_turn; ++i) list.input(0).weight(0);
  for (int64_t i = 0; i < stage; ++i) list.weight(1);
  for (int64_t i = 0; i < stage; ++i) list.weight(0);
  return list.take();
}

}  // namespace

Schedule gpipe_schedule(int64_t stages, int64_t micro_batches) {
  return plain_schedule(stages, micro_batches, [&](int64_t) {
    return std::vector<Strand>{{ActionKind::forward, micro_batches}, {ActionKind::backward, 0}};
  });
}

Schedule one_f_one_b_schedule(int64_t stages, int64_t micro_batches) {
  return plain_schedule(stages, micro_batches, [&](int64_t stage) {
    return std::vector<Strand>{{ActionKind::forward, stages - 1 - stage}, {ActionKind::backward, 0}};
  });
}

Schedule interleaved_schedule(int64_t stages, int64_t micro_batches, int64_t chunks,
                              std::optional<int64_t> group) {
  check_sizes(stages, micro_batches);
  NF_CHECK(chunks >= 1, "an interleaved schedule of {} chunks", chunks);
  NF_CHECK(!group || *group >= stages, "groups of {} micro-batches in a pipeline of {} stages", *group,
           stages);
  if (chunks == 1) return one_f_one_b_schedule(stages, micro_batches);
  const int64_t g = std::min(group.value_or(stages), std::max<int64_t>(micro_batches, 1));
  const int64_t groups = (micro_batches + g - 1) / g;
  const auto action_at = [&](ActionKind kind, int64_t place) {
    const int64_t chunk = place / g % chunks;
    return Action{kind, place / (g * chunks) * g + place % g,
                  kind == ActionKind::forward ? chunk : chunks - 1 - chunk};
  };
  Schedule schedule{micro_batches, chunks, {}};
  for (int64_t s = 0; s < stages; ++s) {
    const int64_t ahead = 2 * (stages - 1 - s) + (chunks - 1) * g;
    const Strand strands[] = {{ActionKind::forward, ahead}, {ActionKind::backward, 0}};
    schedule.stages.push_back(in_turn(groups * g * chunks, strands, action_at));
    keep_only(schedule.stages.back(), micro_batches);
  }
  return schedule;
}

Schedule zb_h1_schedule(int64_t stages, int64_t micro_batches) {
  return zero_bubble_schedule(stages, micro_batches, 1);
}

Schedule zb_h2_schedule(int64_t stages, int64_t micro_batches) {
  return zero_bubble_schedule(stages, micro_batches, 2);
}

Schedule zb_v_schedule(int64_t stages, int64_t micro_batches) {
  check_sizes(stages, micro_batches);
  Schedule schedule{micro_batches, 2, {}, Placement::v_shape};
  for (int64_t s = 0; s < stages; ++s) {
    schedule.stages.push_back(zb_v_list(stages, std::max(micro_batches, 2 * stages - 1), s));
    keep_only(schedule.stages.back(), micro_batches);
  }
  return schedule;
}

Schedule repeated(const Schedule& schedule, int64_t steps) {
  NF_CHECK(steps >= 1, "{} steps", steps);
  Schedule all = schedule;
  all.micro_batches *= steps;
  for (int64_t k = 1; k < steps; ++k)
    for (size_t s = 0; s < all.stages.size(); ++s)
      for (Action action : schedule.stages[s]) {
        action.micro_batch += k * schedule.micro_batches;
        all.stages[s].push_back(action);
      }
  return all;
}

}  // namespace normformer
