#include <cstring>
#include <deque>
#include <map>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// A message of a rank to itself, on its way until it is received.
struct Note {
  Tensor tensor;
  bool received = false;
};

class NoteRequest final : public CommRequest::Impl {
 public:
  explicit NoteRequest(std::shared_ptr<Note> note) : note_(std::move(note)) {}
  void wait() override {
    if (!note_->received) throw CommError("a rank alone waits for its own message before receiving it");
  }

 private:
  std::shared_ptr<Note> note_;
};

class SelfGroup final : public detail::GroupImpl {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }

  void exchange(std::span<const detail::Outgoing> sends, std::span<const detail::Incoming> receives,
                int) override {
    NF_CHECK(sends.empty() && receives.empty(), "a rank alone exchanges with another");
  }
  std::unique_ptr<detail::Transfer> start_exchange(std::span<const detail::Outgoing>,
                                                   std::span<const detail::Incoming>, int) override {
    refuse_start();
  }
  std::unique_ptr<detail::Transfer> start_receive(std::byte*, int64_t, int, int) override { refuse_start(); }

  std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int, int tag) override {
    auto note = std::make_shared<Note>(Note{tensor});
    notes_[tag].push_back(note);
    return std::make_unique<NoteRequest>(std::move(note));
  }

  void receive(std::byte* data, int64_t bytes, int, int tag) override {
    auto& waiting = notes_[tag];
    if (waiting.empty()) throw CommError("a rank alone waits for a message that it has not sent");
    const std::shared_ptr<Note> note = std::move(waiting.front());
    waiting.pop_front();
    const int64_t sent = note->tensor.nbytes();
    if (sent != bytes)
      throw CommError(fmt::format("a message of {} bytes where {} were expected", sent, bytes));
    if (bytes > 0) std::memcpy(data, note->tensor.raw(), static_cast<size_t>(bytes));
    note->received = true;
  }

  std::unique_ptr<detail::GroupImpl> subgroup(std::span<const int> members) override {
    return members.empty() ? nullptr : std::make_unique<SelfGroup>();
  }

 private:
  [[noreturn]] static void refuse_start() { throw CommError("a rank alone starts an exchange with another"); }

  std::map<int, std::deque<std::shared_ptr<Note>>> notes_;  // by tag
};

}  // namespace

Group make_self_world() {
  return Group(std::make_unique<SelfGroup>(), {"world", {0}}, std::make_shared<TrafficLedger>());
}

}  // namespace normformer
