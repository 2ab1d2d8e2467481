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

/// Which rank holds which parts of the model, in the order in which a micro-batch passes them.
enum class Placement {
  round_robin,  ///< chunk c of rank s is part c * stages + s: a micro-batch crosses all ranks, then comes to
                ///< their next chunks (Narayanan et al. 2021, section 2.2)
  v_shape,      ///< as round_robin in even chunks, backwards in odd ones: two chunks lie like a V, the first
                ///< and the last part on rank 0, and the turn is inside a rank (Qi et al. 2024, section 6)
};

/// Who does what in which order: plain data, the same on every rank. Any function that returns one is a
/// schedule; check_schedule proves it sound, run_schedule runs it, simulate times it.
///
/// The model is cut into stages x chunks parts, passed in the order of `part`; rank s is stage s and holds
/// one part per chunk. Plain schedules have one chunk.
struct Schedule {
  int64_t micro_batches = 0;
  int64_t chunks = 1;
  std::vector<std::vector<Action>> stages;  ///< [stage]: its actions, in order
  Placement placement = Placement::round_robin;

  int64_t num_stages() const { return static_cast<int64_t>(stages.size()); }
  int64_t num_parts() const { return num_stages() * chunks; }
  int64_t part(int64_t stage, int64_t chunk) const { return chunk * num_stages() + turned(stage, chunk); }
  int64_t chunk_of(int64_t part) const { return part / num_stages(); }
  int64_t stage_of(int64_t part) const { return turned(part % num_stages(), chunk_of(part)); }

 private:
  int64_t turned(int64_t stage, int64_t chunk) const {
    return placement == Placement::v_shape && chunk % 2 == 1 ? num_stages() - 1 - stage : stage;
  }
};

/// What crosses a boundary between two parts of the model: an output on its way forward or the gradient of an
/// output on its way back. The value is the message's tag.
enum class MessageKind : int { activation = 0, gradient = 1 };

/// A boundary tensor on its way. Messages of one sender and kind arrive in the order sent.
struct Message {
  MessageKind kind = MessageKind::activation;
  int64_t from = 0;  ///< stage; the receiver itself where two parts on one rank follow each other
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

// The schedules of the field, for any `stages` p of at least 1 and `micro_batches` m of at least 0;
// LogicError otherwise. F, B and W are the times of a stage's forward, backward_input and backward_weight,
// all its chunks together. "Bubble" is what each stage idles per step, on equal stages and with free
// transfers; "keeps" is the report of check_schedule. Why, and measured: docs/pipeline.md.

/// All forwards, then all backwards, both in the order of micro-batches (GPipe, Huang et al. 2019, section
/// 2.3; there backwards run in reverse, here not, so that every schedule adds weight gradients in one order).
/// Bubble (p - 1)(F + B + W). Keeps m.
Schedule gpipe_schedule(int64_t stages, int64_t micro_batches);

/// Stage s runs p - s - 1 forwards ahead, then alternates forward and backward, then drains (PipeDream-flush,
/// Narayanan et al. 2021, section 2.1). Bubble (p - 1)(F + B + W). Stage s keeps min(p - s, m).
Schedule one_f_one_b_schedule(int64_t stages, int64_t micro_batches);

/// 1F1B over `chunks` v parts a rank, placed round robin (Narayanan et al. 2021, section 2.2). `group` g
/// micro-batches go through a chunk before the rank turns to its next one (Megatron-LM's
/// --microbatch-group-size-per-virtual-pipeline-stage): at least p, and p where nothing is given; more keep
/// more and give transfers more time. Bubble (p - 1)(F + B + W) / v where g divides m. Rank s keeps
/// min(v m, 2(p - s - 1) + (v - 1) min(g, m) + 1), each 1/v of the layers; no more where g does not divide
/// m: the order is then that of the next multiple, without the micro-batches that are not there. One chunk:
/// 1F1B.
Schedule interleaved_schedule(int64_t stages, int64_t micro_batches, int64_t chunks,
                              std::optional<int64_t> group = std::nullopt);

/// 1F1B with split backwards, where stage s computes weight gradients s micro-batches late, in what was
/// bubble (ZB-H1; Qi et al. 2024, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.1). Bubble
/// (p - 1)(F + B - W) for W <= F and m >= p. Every stage keeps min(p, m), as 1F1B's first one.
Schedule zb_h1_schedule(int64_t stages, int64_t micro_batches);

/// Twice ZB-H1's forwards ahead and twice its delay of weight gradients (ZB-H2; the same, section 2.2). No
/// stage idles between its first and its last action for F = B = W and m >= 2p - 1; generally
/// max(0, (p - 1)(F + B - 2W)) for W <= F. Stages still begin and end one after the other: see barrier_cost.
/// Every stage keeps min(2p - 1, m).
Schedule zb_h2_schedule(int64_t stages, int64_t micro_batches);

/// Two chunks a rank in a V: the last rank turns a micro-batch round by itself, so that the first gradient
/// is back soon and little must be kept (ZB-V; the same, section 6). No stage idles between its first and its
/// last action for equal F, B and W of all parts and m >= 2p - 1. Every rank keeps at most min(2p, 2m), each
/// half of the layers: 1F1B's p micro-batches.
Schedule zb_v_schedule(int64_t stages, int64_t micro_batches);

/// The same step `steps` times, at least once, as one schedule: micro-batch i of step k is k m + i. As sound
/// as the schedule itself.
Schedule repeated(const Schedule& schedule, int64_t steps);

}  // namespace normformer
