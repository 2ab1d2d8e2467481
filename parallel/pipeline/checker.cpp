#include "normformer/pipeline/checker.h"

#include <algorithm>
#include <source_location>
#include <string>

#include <fmt/format.h>

#include "normformer/core/error.h"

#include "replay.h"

namespace normformer {

namespace {

// How far a micro-batch has come on one stage and chunk.
enum class Progress { nothing, forward, input, all };

// Reads one stage's list on its own: what comes once, in which order, and what is alive at once.
class ListCheck {
 public:
  ListCheck(const Schedule& schedule, int64_t stage)
      : schedule_(schedule),
        stage_(stage),
        progress_(static_cast<size_t>(schedule.chunks * schedule.micro_batches), Progress::nothing),
        next_input_(static_cast<size_t>(schedule.chunks), 0),
        next_weight_(static_cast<size_t>(schedule.chunks), 0) {}

  int64_t peak_saved() {
    const auto& list = schedule_.stages[static_cast<size_t>(stage_)];
    for (; index_ < static_cast<int64_t>(list.size()); ++index_) take(list[static_cast<size_t>(index_)]);
    for (int64_t c = 0; c < schedule_.chunks; ++c)
      for (int64_t m = 0; m < schedule_.micro_batches; ++m) require_complete(m, c);
    return peak_;
  }

 private:
  Progress& progress(int64_t micro_batch, int64_t chunk) {
    return progress_[static_cast<size_t>(chunk * schedule_.micro_batches + micro_batch)];
  }

  void take(const Action& action) {
    if (action.micro_batch < 0 || action.micro_batch >= schedule_.micro_batches)
      refuse(action, fmt::format("there are {} micro-batches", schedule_.micro_batches));
    if (action.chunk < 0 || action.chunk >= schedule_.chunks)
      refuse(action, fmt::format("there are {} chunks", schedule_.chunks));
    Progress& now = progress(action.micro_batch, action.chunk);
    switch (action.kind) {
      case ActionKind::forward:
        if (now != Progress::nothing) refuse(action, "the micro-batch has gone forward before");
        now = Progress::forward;
        peak_ = std::max(peak_, ++alive_);
        return;
      case ActionKind::backward:
        take_input(action, now);
        take_weight(action, now);
        return;
      case ActionKind::backward_input:
        take_input(action, now);
        return;
      case ActionKind::backward_weight:
        take_weight(action, now);
        return;
    }
    refuse(action, "not a kind of action");
  }

  void take_input(const Action& action, Progress& now) {
    if (now == Progress::nothing) refuse(action, "the micro-batch has not gone forward yet");
    if (now != Progress::forward) refuse(action, "the micro-batch has gone back before");
    require_next(action, next_input_, "input");
    now = Progress::input;
  }

  void take_weight(const Action& action, Progress& now) {
    if (now == Progress::all) refuse(action, "the micro-batch has its weight gradients already");
    if (now != Progress::input) refuse(action, "its backward_input has not run yet");
    require_next(action, next_weight_, "weight");
    now = Progress::all;
    --alive_;
  }

  void require_next(const Action& action, std::vector<int64_t>& next, const char* what) const {
    int64_t& expected = next[static_cast<size_t>(action.chunk)];
    if (action.micro_batch != expected)
      refuse(action, fmt::format("{} gradients must come in the order of micro-batches, and {} is next", what,
                                 expected));
    ++expected;
  }

  void require_complete(int64_t micro_batch, int64_t chunk) {
    const auto missing = [&](ActionKind kind) {
      throw LogicError(
          fmt::format("stage {}: {} is missing", stage_, to_string(Action{kind, micro_batch, chunk})),
          std::source_location::current());
    };
    switch (progress(micro_batch, chunk)) {
      case Progress::nothing:
        return missing(ActionKind::forward);
      case Progress::forward:
        return missing(ActionKind::backward);
      case Progress::input:
        return missing(ActionKind::backward_weight);
      case Progress::all:
        return;
    }
  }

  [[noreturn]] void refuse(const Action& action, const std::string& why) const {
    throw LogicError(fmt::format("stage {}, action {} ({}): {}", stage_, index_, to_string(action), why),
                     std::source_location::current());
  }

  const Schedule& schedule_;
  int64_t stage_;
  int64_t index_ = 0;
  int64_t alive_ = 0;
  int64_t peak_ = 0;
  std::vector<Progress> progress_;    // [chunk][micro_batch]
  std::vector<int64_t> next_input_;   // [chunk]
  std::vector<int64_t> next_weight_;  // [chunk]
};

}  // namespace

ScheduleReport check_schedule(const Schedule& schedule) {
  NF_CHECK(schedule.num_stages() >= 1, "a schedule without stages");
  NF_CHECK(schedule.chunks >= 1, "a schedule of {} chunks", schedule.chunks);
  NF_CHECK(schedule.micro_batches >= 0, "a schedule of {} micro-batches", schedule.micro_batches);
  NF_CHECK(schedule.placement == Placement::round_robin || schedule.placement == Placement::v_shape,
           "a schedule of unknown placement {}", static_cast<int>(schedule.placement));
  ScheduleReport report;
  for (int64_t s = 0; s < schedule.num_stages(); ++s)
    report.peak_saved.push_back(ListCheck(schedule, s).peak_saved());
  detail::replay(schedule, [](detail::ActionPlace, const std::optional<detail::ActionPlace>&) {});
  return report;
}

}  // namespace normformer
