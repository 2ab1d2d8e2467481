#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "normformer/comm/group.h"

#include "progress.h"

namespace normformer::detail {

/// The other ranks of a group, each rank starting with its neighbour so that not all write to one at once.
std::vector<int> peers_of(const GroupImpl& impl);

/// What other ranks hold of one rank's piece, a row each in the order of ranks.
class Inbox {
 public:
  Inbox(Context& context, const GroupImpl& impl, const Tensor& own);

  /// A rank's; this one's own for itself.
  Tensor from(int peer) const;

  /// Every rank's, in their order.
  std::vector<Tensor> all() const;

 private:
  int rank_;
  int size_;
  Tensor own_;
  Tensor rows_;
};

/// One exchange of a collective, and what is computed of what has come. Empty tensors are left out on both
/// sides; on the meta device nothing moves. What lies on a GPU goes by way of the host where the transport
/// cannot reach it.
class Round {
 public:
  Round(Context& context, GroupImpl& impl);

  void send(int to, const Tensor& tensor);
  void receive(int from, const Tensor& tensor);

  /// Once all has come: out = op over ranks of what came to the inbox, in their order.
  void combine(ReduceOp op, Inbox inbox, Tensor out);

  /// All of it now.
  void run(Context& context);

  /// Begins to move the bytes.
  void start(Context& context);
  bool is_started() const { return started_; }

  /// Whether all has come; moves on with it.
  bool test() { return transfer_ == nullptr || transfer_->test(); }

  /// Computes what is to be computed.
  void combine_all(Context& context) const;

  bool may_be_dropped() const { return transfer_ == nullptr || transfer_->may_be_dropped(); }

 private:
  struct Combination {
    ReduceOp op;
    Inbox inbox;
    Tensor out;
  };

  void list_moves();
  Tensor staged(const Tensor& tensor);

  Context* context_;
  GroupImpl* impl_;
  int number_;
  bool stages_;
  bool started_ = false;
  std::vector<std::pair<int, Tensor>> departing_;    // and to whom
  std::vector<std::pair<int, Tensor>> arriving_;     // and from whom
  std::vector<std::pair<Tensor, Tensor>> copies_;    // of GPU tensors on the host
  std::vector<std::pair<Tensor, Tensor>> landings_;  // on the host, and where they belong
  std::vector<Outgoing> sends_;
  std::vector<Incoming> receives_;
  std::vector<Combination> combinations_;
  std::unique_ptr<Transfer> transfer_;
};

/// A collective as the rounds that it is made of, all of its memory in it.
class Collective {
 public:
  Collective(Context& context, GroupImpl& impl) : context_(&context), impl_(&impl) {}

  /// A further round, which begins when the one before is done.
  Round& add_round() { return rounds_.emplace_back(*context_, *impl_); }

  /// All of it now; memory goes round by round.
  void run(Context& context);

  std::deque<Round>& rounds() { return rounds_; }

 private:
  Context* context_;
  GroupImpl* impl_;
  std::deque<Round> rounds_;
};

/// Begins a collective of `impl`'s group beside what this rank goes on with.
std::unique_ptr<CommRequest::Impl> start_collective(Context& context, const std::shared_ptr<GroupImpl>& impl,
                                                    const std::shared_ptr<Progress>& progress,
                                                    Collective collective);

/// A message that the communication thread moves on.
std::unique_ptr<CommRequest::Impl> watch_message(Context& context, const std::shared_ptr<Progress>& progress,
                                                 std::unique_ptr<CommRequest::Impl> message);

/// Begins to receive bytes into memory that `kept` keeps.
std::unique_ptr<CommRequest::Impl> start_transfer(Context& context, const std::shared_ptr<Progress>& progress,
                                                  std::unique_ptr<Transfer> transfer,
                                                  std::shared_ptr<void> kept);

}  // namespace normformer::detail
