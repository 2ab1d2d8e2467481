#include "normformer/pipeline/executor.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "normformer/core/error.h"
#include "normformer/pipeline/checker.h"

namespace normformer {

namespace {

int tag_of(MessageKind kind) { return static_cast<int>(kind); }

bool is_empty(const StageBoundary& part, int64_t micro_batch) {
  return part.boundary_shape(micro_batch).numel() == 0;
}

// What a neighbour sends must be a boundary tensor; what goes nowhere must not exist.
void check_returned(const StageBoundary& part, int64_t micro_batch, const Tensor& returned, bool is_sent) {
  if (!is_sent) {
    NF_CHECK(!returned.defined(), "the outermost part of a pipeline returned {}", to_string(returned));
    return;
  }
  NF_CHECK(returned.defined(), "a part of a pipeline returned nothing for micro-batch {}", micro_batch);
  NF_CHECK(returned.shape() == part.boundary_shape(micro_batch) && returned.dtype() == part.boundary_dtype(),
           "a part of a pipeline returned {} for micro-batch {}", to_string(returned), micro_batch);
}

Tensor empty_boundary(Context& context, const StageBoundary& part, const Message& message) {
  return context.empty(part.boundary_shape(message.micro_batch), part.boundary_dtype());
}

Tensor receive_boundary(Context& context, const Group& pipeline, const StageBoundary& part,
                        const Message& message) {
  const Tensor tensor = empty_boundary(context, part, message);
  if (!is_empty(part, message.micro_batch))
    pipeline.receive(context, tensor, static_cast<int>(message.from), tag_of(message.kind));
  return tensor;
}

// Tensors on their way between two parts of this rank.
class OwnMessages {
 public:
  void put(const Message& message, const Tensor& tensor) { waiting_.emplace(message, tensor); }
  Tensor take(const Message& message) { return waiting_.extract(message).mapped(); }

 private:
  std::map<Message, Tensor> waiting_;
};

// Which entry of its list a neighbour sends each message to this rank with, and which one receives each
// message from it.
class NeighbourPlaces {
 public:
  NeighbourPlaces(const Schedule& schedule, int64_t stage) {
    const int64_t p = schedule.num_stages();
    read_list(schedule, (stage + 1) % p, stage);
    read_list(schedule, (stage + p - 1) % p, stage);
  }
  int64_t sent_at(const Message& message) const { return sent_.at(message); }
  int64_t received_at(const Message& message) const { return received_.at(message); }

  /// Of every message to this rank: sent_at.
  const std::map<Message, int64_t>& sent() const { return sent_; }

 private:
  void read_list(const Schedule& schedule, int64_t neighbour, int64_t stage) {
    int64_t index = 0;
    for (const Action& action : schedule.stages[static_cast<size_t>(neighbour)]) {
      const auto in = received_by(schedule, neighbour, action);
      const auto out = sent_by(schedule, neighbour, action);
      if (in && in->from == stage) received_.emplace(*in, index);
      if (out && out->to == stage) sent_.emplace(*out, index);
      ++index;
    }
  }

  std::map<Message, int64_t> sent_;
  std::map<Message, int64_t> received_;
};

class ScheduleRun {
 public:
  ScheduleRun(Context& context, const Group& pipeline, const Schedule& schedule,
              std::span<Stage* const> parts, bool receive_ahead, const BeginAgain* begin_again)
      : context_(context),
        pipeline_(pipeline),
        schedule_(schedule),
        parts_(parts),
        receive_ahead_(receive_ahead),
        begin_again_(begin_again),
        rank_(pipeline.rank()),
        neighbours_(schedule, rank_),
        saved_(static_cast<size_t>(schedule.chunks * schedule.micro_batches)) {}

  void run() {
    const std::vector<Action>& actions = schedule_.stages[static_cast<size_t>(rank_)];
    size_t begin = 0;
    if (begin_again_ != nullptr) {
      const std::vector<size_t> places = places_to_ask(schedule_);
      begin = places[static_cast<size_t>(rank_)];
      run_actions({actions.data(), begin});
      if ((*begin_again_)()) {
        drop_all(places);
        begin = 0;
      }
    }
    run_actions(std::span(actions).subspan(begin));
    for (Sent& sent : sent_) sent.request.wait();
  }

 private:
  void run_actions(std::span<const Action> actions) {
    for (size_t i = 0; i < actions.size(); ++i) {
      const Tensor received = receive(actions[i]);
      if (receive_ahead_ && i + 1 < actions.size()) start_receive(actions[i + 1]);
      const Tensor returned = compute(actions[i], received);
      if (actions[i].kind != ActionKind::backward_weight) send(actions[i], returned);
    }
  }

  // What others have sent before their places and this rank has not received before its own is received in
  // the order sent. Theirs have come before anything of the second try can, and so has what this rank has
  // sent been received when a neighbour sends again.
  void drop_all(const std::vector<size_t>& places) {
    const auto& actions = schedule_.stages[static_cast<size_t>(rank_)];
    std::map<Message, int64_t> on_their_way;
    for (const auto& [message, sent_at] : neighbours_.sent()) {
      if (message.from != rank_ && sent_at < static_cast<int64_t>(places[static_cast<size_t>(message.from)]))
        on_their_way.emplace(message, sent_at);
    }
    for (size_t i = 0; i < places[static_cast<size_t>(rank_)]; ++i) {
      if (const auto message = received_by(schedule_, rank_, actions[i])) on_their_way.erase(*message);
    }
    std::vector<std::pair<int64_t, Message>> in_order;
    for (const auto& [message, sent_at] : on_their_way) in_order.emplace_back(sent_at, message);
    std::sort(in_order.begin(), in_order.end());
    for (const auto& [sent_at, message] : in_order)
      receive_boundary(context_, pipeline_, *parts_[static_cast<size_t>(message.chunk)], message);
    for (Sent& sent : sent_) sent.received_at = -1;
    for (auto& saved : saved_) saved.reset();
    own_ = {};
  }

  struct Sent {
    int64_t to;
    int64_t received_at;  // the place in the receiver's list
    CommRequest request;
  };

  // What an action takes that is on its way from another rank.
  struct Arrival {
    Tensor tensor;
    CommRequest request;
  };

  Stage& part(const Action& action) { return *parts_[static_cast<size_t>(action.chunk)]; }

  std::unique_ptr<Stage::Saved>& saved(const Action& action) {
    return saved_[static_cast<size_t>(action.chunk * schedule_.micro_batches + action.micro_batch)];
  }

  Tensor receive(const Action& action) {
    const auto message = received_by(schedule_, rank_, action);
    if (!message) return {};
    if (message->from == rank_) return own_.take(*message);
    const Tensor tensor =
        arrival_ ? take_arrival() : receive_boundary(context_, pipeline_, part(action), *message);
    if (!is_empty(part(action), action.micro_batch))
      complete_received(message->from, neighbours_.sent_at(*message));
    return tensor;
  }

  void start_receive(const Action& action) {
    const auto message = received_by(schedule_, rank_, action);
    if (!message || message->from == rank_ || is_empty(part(action), action.micro_batch)) return;
    arrival_.emplace();
    arrival_->tensor = empty_boundary(context_, part(action), *message);
    arrival_->request = pipeline_.start_receive(context_, arrival_->tensor, static_cast<int>(message->from),
                                                tag_of(message->kind));
  }

  Tensor take_arrival() {
    arrival_->request.wait();
    const Tensor tensor = arrival_->tensor;
    arrival_.reset();
    return tensor;
  }

  // A neighbour that sends with its action `index` has received whatever its actions up to that one take, so
  // waiting for these returns at once.
  void complete_received(int64_t by, int64_t index) {
    for (auto sent = sent_.begin(); sent != sent_.end();) {
      if (sent->to != by || sent->received_at > index) {
        ++sent;
        continue;
      }
      sent->request.wait();
      sent = sent_.erase(sent);
    }
  }

  Tensor compute(const Action& action, const Tensor& received) {
    const int64_t micro_batch = action.micro_batch;
    const TraceScope scope(context_, TraceKind::pipeline, name_of(action.kind), {},
                           {.micro_batch = micro_batch, .chunk = action.chunk});
    auto& state = saved(action);
    if (action.kind == ActionKind::forward) {
      Tensor output = part(action).forward(micro_batch, received, state);
      NF_CHECK(state != nullptr, "forward of micro-batch {} saved nothing", micro_batch);
      return output;
    }
    NF_CHECK(state != nullptr, "{} on stage {} has no saved state", to_string(action), rank_);
    if (action.kind == ActionKind::backward_input)
      return part(action).backward_input(micro_batch, *state, received);
    Tensor dinput;
    if (action.kind == ActionKind::backward)
      dinput = part(action).backward(micro_batch, *state, received);
    else
      part(action).backward_weight(micro_batch, *state);
    state.reset();
    return dinput;
  }

  void send(const Action& action, const Tensor& tensor) {
    const auto message = sent_by(schedule_, rank_, action);
    check_returned(part(action), action.micro_batch, tensor, message.has_value());
    if (!message) return;
    if (message->to == rank_) return own_.put(*message, tensor);
    if (is_empty(part(action), action.micro_batch)) return;
    sent_.push_back({message->to, neighbours_.received_at(*message),
                     pipeline_.send(context_, tensor, static_cast<int>(message->to), tag_of(message->kind))});
  }

  Context& context_;
  const Group& pipeline_;
  const Schedule& schedule_;
  std::span<Stage* const> parts_;
  bool receive_ahead_;
  const BeginAgain* begin_again_;  // null where nobody asks
  int64_t rank_;
  NeighbourPlaces neighbours_;
  std::vector<std::unique_ptr<Stage::Saved>> saved_;  // [chunk][micro_batch]
  OwnMessages own_;
  std::optional<Arrival> arrival_;  // of the next action
  std::vector<Sent> sent_;
};

class ForwardRun {
 public:
  ForwardRun(Context& context, const Group& pipeline, int64_t micro_batches,
             std::span<ForwardStage* const> parts, Placement placement)
      : context_(context),
        pipeline_(pipeline),
        parts_(parts),
        rank_(pipeline.rank()),
        wiring_{micro_batches, static_cast<int64_t>(parts.size()),
                std::vector<std::vector<Action>>(static_cast<size_t>(pipeline.size())), placement} {}

  // As many micro-batches as stages go through a chunk before the next chunk takes them, so that a chunk's
  // first one has just come round. All ranks run the same order, and send_window() covers one such group: a
  // rank that waits for its neighbour to receive therefore waits for an earlier place in that order, or for
  // the same place further down the pipeline, and some rank can always go on. (In a V a message is received
  // in the place in which it was sent, so any window would do.)
  void run() {
    const int64_t group = wiring_.num_stages();
    for (int64_t begin = 0; begin < wiring_.micro_batches; begin += group)
      for (int64_t c = 0; c < wiring_.chunks; ++c)
        for (int64_t m = begin; m < std::min(begin + group, wiring_.micro_batches); ++m) forward(m, c);
    for (CommRequest& request : sent_) request.wait();
  }

 private:
  size_t send_window() const { return static_cast<size_t>(wiring_.num_stages()); }

  void forward(int64_t micro_batch, int64_t chunk) {
    ForwardStage& part = *parts_[static_cast<size_t>(chunk)];
    const Action action{ActionKind::forward, micro_batch, chunk};
    const auto to = sent_by(wiring_, rank_, action);
    const Tensor output = part.forward(micro_batch, receive(part, received_by(wiring_, rank_, action)));
    check_returned(part, micro_batch, output, to.has_value());
    if (!to) return;
    if (to->to == rank_) return own_.put(*to, output);
    if (!is_empty(part, micro_batch)) send(*to, output);
  }

  Tensor receive(const ForwardStage& part, const std::optional<Message>& message) {
    if (!message) return {};
    if (message->from == rank_) return own_.take(*message);
    return receive_boundary(context_, pipeline_, part, *message);
  }

  void send(const Message& message, const Tensor& tensor) {
    if (sent_.size() == send_window()) {
      sent_.front().wait();
      sent_.pop_front();
    }
    sent_.push_back(pipeline_.send(context_, tensor, static_cast<int>(message.to), tag_of(message.kind)));
  }

  Context& context_;
  const Group& pipeline_;
  std::span<ForwardStage* const> parts_;
  int64_t rank_;
  Schedule wiring_;  // sizes only: who sends to whom
  std::deque<CommRequest> sent_;
  OwnMessages own_;
};

void check_and_run(Context& context, const Group& pipeline, const Schedule& schedule,
                   std::span<Stage* const> parts, bool receive_ahead, const BeginAgain* begin_again) {
  check_schedule(schedule);
  NF_CHECK(pipeline.size() == schedule.num_stages(), "a schedule of {} stages on {} ranks",
           schedule.num_stages(), pipeline.size());
  NF_CHECK(static_cast<int64_t>(parts.size()) == schedule.chunks, "{} parts for {} chunks", parts.size(),
           schedule.chunks);
  const TraceScope scope(context, TraceKind::step, "forward and backward");
  ScheduleRun(context, pipeline, schedule, parts, receive_ahead, begin_again).run();
}

}  // namespace

std::vector<size_t> places_to_ask(const Schedule& schedule) {
  // Where in its sender's list a message is sent.
  std::map<Message, size_t> sent_at;
  std::vector<size_t> places;
  for (int64_t s = 0; s < schedule.num_stages(); ++s) {
    const std::vector<Action>& actions = schedule.stages[static_cast<size_t>(s)];
    for (size_t i = 0; i < actions.size(); ++i)
      if (const auto message = sent_by(schedule, s, actions[i])) sent_at.emplace(*message, i);
    const auto first = std::find_if(actions.begin(), actions.end(), [&](const Action& action) {
      return action.kind != ActionKind::forward || schedule.part(s, action.chunk) == schedule.num_parts() - 1;
    });
    places.push_back(static_cast<size_t>(first - actions.begin()));
  }
  // Each place that moves may move others.
  for (bool moved = true; std::exchange(moved, false);) {
    for (int64_t s = 0; s < schedule.num_stages(); ++s) {
      size_t& place = places[static_cast<size_t>(s)];
      for (size_t i = 0; i < place; ++i) {
        const auto message = received_by(schedule, s, schedule.stages[static_cast<size_t>(s)][i]);
        if (!message || sent_at.at(*message) < places[static_cast<size_t>(message->from)]) continue;
        place = i;
        moved = true;
      }
    }
  }
  return places;
}

void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule,
                  std::span<Stage* const> parts, bool receive_ahead) {
  check_and_run(context, pipeline, schedule, parts, receive_ahead, nullptr);
}

void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule,
                  std::span<Stage* const> parts, bool receive_ahead, const BeginAgain& begin_again) {
  check_and_run(context, pipeline, schedule, parts, receive_ahead, &begin_again);
}

void run_schedule(Context& context, const Group& pipeline, const Schedule& schedule, Stage& stage) {
  Stage* const parts[] = {&stage};
  run_schedule(context, pipeline, schedule, parts);
}

void run_forward(Context& context, const Group& pipeline, int64_t micro_batches,
                 std::span<ForwardStage* const> parts, Placement placement) {
  NF_CHECK(micro_batches >= 0, "{} micro-batches", micro_batches);
  NF_CHECK(!parts.empty(), "a rank of a pipeline without a part of the model");
  ForwardRun(context, pipeline, micro_batches, parts, placement).run();
}

void run_forward(Context& context, const Group& pipeline, int64_t micro_batches, ForwardStage& stage) {
  ForwardStage* const parts[] = {&stage};
  run_forward(context, pipeline, micro_batches, parts);
}

}  // namespace normformer
