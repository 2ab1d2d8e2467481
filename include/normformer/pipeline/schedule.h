#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace normformer {

/// What a stage does with one micro-batch. `backward` is `backward_input` and `backward_weight` together,
/// layer by layer; a schedule uses either it or the two halves for a micro-batch, never both.
enum class ActionKind { forward, backward, backward_input, backward_weight };

/// "forward", "backward", "backward_input", "backward_weight".
std::string_view name_of(ActionKind kind);

/// One entry of a stage's list.
struct Action {
  ActionKind kind = ActionKind::forward;
  int64_t micro_batch = 0;
  int64_t chunk = 0;  ///< which of the rank's parts of the model; see Schedule
  bool operator==(const Action&) const = default;
};

/// "backward_input of micro-batch 3", and ", chunk 1" where the chunk is not 0.
std::string to_string(const Action& action);

/// Who does what in which order: plain data, the same on every rank. Any function that returns one is a
/// schedule; check_schedule proves it sound, run_schedule runs it, simulate times it.
///
/// The model is cut into stages x chunks parts, passed in the order of `part`: rank s holds, as its chunk c,
/// part c * stages + s, so that a micro-batch crosses all ranks before it comes to their next chunks
/// (interleaving; Narayanan et al. 2021, section 2.2). Plain schedules have one chunk.
struct Schedule {
  int64_t micro_batches = 0;
  int64_t chunks = 1;
  std::vector<std::vector<Action>> stages;  ///< [stage]: its actions, in order

  int64_t num_stages() const { return static_cast<int64_t>(stages.size()); }
  int64_t num_parts() const { return num_stages() * chunks; }
  int64_t part(int64_t stage, int64_t chunk) const { return chunk * num_stages() + stage; }
};

/// All forwards, then all backwards, both in the order of micro-batches (GPipe, Huang et al. 2019; there
/// backwards run in reverse, here not, so that every schedule adds weight gradients in one order). Keeps all
/// micro-batches' saved state. `stages` at least 1, `micro_batches` at least 0.
Schedule gpipe_schedule(int64_t stages, int64_t micro_batches);

/// Stage s runs min(stages - s - 1, micro_batches) forwards ahead, then alternates forward and backward, then
/// drains (PipeDream-flush, Narayanan et al. 2021, section 2.1). Keeps the saved state of
/// min(stages - s, micro_batches) micro-batches. `stages` at least 1, `micro_batches` at least 0.
Schedule one_f_one_b_schedule(int64_t stages, int64_t micro_batches);

/// What crosses a boundary between two parts of the model: an output on its way forward or the gradient of an
/// output on its way back. The value is the message's tag.
enum class MessageKind : int { activation = 0, gradient = 1 };

/// A boundary tensor on its way. Messages of one sender and kind arrive in the order sent.
struct Message {
  MessageKind kind = MessageKind::activation;
  int64_t from = 0;  ///< stage; the receiver itself where chunks of a pipeline of one stage follow each other
  int64_t to = 0;
  int64_t micro_batch = 0;
  int64_t chunk = 0;  ///< the receiver's
  auto operator<=>(const Message&) const = default;
};

/// The message that `stage` must have before it can begin `action`; none for the first part's forward, the
/// last part's backward and any backward_weight.
std::optional<Message> received_by(const Schedule& schedule, int64_t stage, const Action& action);

/// The message that `stage` sends when `action` is done; none for the last part's forward, the first part's
/// backward and any backward_weight.
std::optional<Message> sent_by(const Schedule& schedule, int64_t stage, const Action& action);

}  // namespace normformer
