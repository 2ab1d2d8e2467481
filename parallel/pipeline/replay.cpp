#include "replay.h"

#include <deque>
#include <map>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

#include <fmt/format.h>

#include "normformer/core/error.h"

namespace normformer::detail {

namespace {

std::string describe(const Message& message) {
  return fmt::format("the {} of micro-batch {} for chunk {} from stage {}",
                     message.kind == MessageKind::activation ? "activation" : "gradient", message.micro_batch,
                     message.chunk, message.from);
}

class Replay {
 public:
  Replay(const Schedule& schedule, const ReplayVisitor& visit)
      : schedule_(schedule), visit_(visit), next_(schedule.stages.size(), 0) {}

  void run() {
    std::deque<int64_t> ready;
    for (int64_t s = 0; s < schedule_.num_stages(); ++s) ready.push_back(s);
    while (!ready.empty()) {
      const int64_t stage = ready.front();
      ready.pop_front();
      while (advance(stage, ready)) {
      }
    }
    for (int64_t s = 0; s < schedule_.num_stages(); ++s)
      if (const Action* stuck = current(s)) refuse_deadlock(s, *stuck);
  }

 private:
  struct Sent {
    Message message;
    ActionPlace sender;
  };

  // Messages of one channel arrive in the order sent.
  std::deque<Sent>& channel(const Message& message) {
    return channels_[{message.kind, message.from, message.to}];
  }

  const Action* current(int64_t stage) const {
    const auto& list = schedule_.stages[static_cast<size_t>(stage)];
    const auto at = static_cast<size_t>(next_[static_cast<size_t>(stage)]);
    return at < list.size() ? &list[at] : nullptr;
  }

  // Runs the stage's next action, if it has one and its message is there; whom it wakes becomes ready.
  bool advance(int64_t stage, std::deque<int64_t>& ready) {
    const Action* action = current(stage);
    if (!action) return false;
    int64_t& next = next_[static_cast<size_t>(stage)];
    std::optional<ActionPlace> sender;
    if (const auto expected = received_by(schedule_, stage, *action)) {
      auto& queue = channel(*expected);
      if (queue.empty()) return false;
      if (queue.front().message != *expected)
        refuse_order(stage, next, *action, *expected, queue.front().message);
      sender = queue.front().sender;
      queue.pop_front();
    }
    const ActionPlace here{stage, next};
    visit_(here, sender);
    if (const auto sent = sent_by(schedule_, stage, *action)) {
      channel(*sent).push_back({*sent, here});
      if (sent->to != stage) ready.push_back(sent->to);
    }
    ++next;
    return true;
  }

  [[noreturn]] static void refuse_order(int64_t stage, int64_t index, const Action& action,
                                        const Message& expected, const Message& arrived) {
    throw LogicError(fmt::format("stage {}, action {} ({}): waits for {}, but next to arrive is {}", stage,
                                 index, to_string(action), describe(expected), describe(arrived)),
                     std::source_location::current());
  }

  [[noreturn]] void refuse_deadlock(int64_t stage, const Action& action) const {
    throw LogicError(fmt::format("stage {}, action {} ({}): deadlock, waits for ever for {}", stage,
                                 next_[static_cast<size_t>(stage)], to_string(action),
                                 describe(*received_by(schedule_, stage, action))),
                     std::source_location::current());
  }

  const Schedule& schedule_;
  const ReplayVisitor& visit_;
  std::vector<int64_t> next_;
  std::map<std::tuple<MessageKind, int64_t, int64_t>, std::deque<Sent>> channels_;  // kind, from, to
};

}  // namespace

void replay(const Schedule& schedule, const ReplayVisitor& visit) { Replay(schedule, visit).run(); }

}  // namespace normformer::detail
