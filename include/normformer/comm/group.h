#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/tensor/context.h"

namespace normformer {

/// How values of several ranks become one.
enum class ReduceOp { sum, max };

/// What all communication of one kind over one group has moved so far.
struct TrafficRecord {
  std::string group;
  std::string kind;  ///< "all_reduce", "reduce_scatter", "all_gather", "broadcast", "send", "receive",
                     ///< "barrier", or "control" for host numbers and texts
  int64_t calls = 0;
  int64_t bytes = 0;  ///< payload in bytes as the caller sees it, not what an algorithm sends
  bool operator==(const TrafficRecord&) const = default;
};

/// Which ranks form a group.
struct GroupMembers {
  std::string name;
  std::vector<int> world_ranks;  ///< world_ranks[r] is rank r of the group
};

/// One call, in the order of calls. Two ranks agree on their collectives where their events of every group
/// that they share (same name, same members) are alike.
struct TrafficEvent {
  std::shared_ptr<const GroupMembers> group;
  std::string_view kind;  ///< as in TrafficRecord, or "wait" for a call that was only started
  int64_t bytes = 0;
  int peer = -1;      ///< the other rank of the group, for "send" and "receive"; the root, for "broadcast"
  int tag = 0;        ///< for "send" and "receive"
  int64_t start = 0;  ///< of a call that is only started, and of its "wait": its number; else 0
};

class LedgerFile;

/// One call of a rank from its issue on. It is done when this ends, unless an exception has been thrown since
/// on the thread that ends it: then it stays as issued. Movable, also to another thread; without a file to
/// mark it in (TrafficLedger::attach) it does nothing.
class TrafficCall {
 public:
  TrafficCall() = default;
  TrafficCall(std::shared_ptr<LedgerFile> file, uint64_t number);
  TrafficCall(TrafficCall&&) noexcept = default;
  TrafficCall& operator=(TrafficCall&& other) noexcept;
  ~TrafficCall();

  /// Marks the call as done now.
  void complete() noexcept;

  /// The call stays as issued, whatever comes.
  void abandon() noexcept { file_ = nullptr; }

 private:
  void end() noexcept;

  std::shared_ptr<LedgerFile> file_;
  uint64_t number_ = 0;
  int exceptions_ = 0;  // in flight when the call was issued
};

/// The account of a rank's communication; shared by all groups split from one world. A group of one rank
/// moves nothing and enters nothing, save messages to itself. Safe from several threads.
class TrafficLedger {
 public:
  [[nodiscard]] TrafficCall record(const TrafficEvent& event);

  /// The next TrafficEvent::start.
  int64_t number_start();

  /// Enters among the events that a started call is waited for.
  void record_wait(std::shared_ptr<const GroupMembers> group, int64_t start);

  /// From now on calls are entered in this file too, for others to read; null for none.
  void attach(std::shared_ptr<LedgerFile> file);

  /// By group and kind, in the order of their first calls.
  std::vector<TrafficRecord> records() const;

  /// Whether every event is kept too, from now on: for a plan, not for a run of many steps.
  void keep_events(bool keep);
  std::vector<TrafficEvent> events() const;

  /// Forgets records and events.
  void clear();

 private:
  mutable std::mutex mutex_;
  std::vector<TrafficRecord> records_;
  std::vector<TrafficEvent> events_;
  bool keeps_events_ = false;
  int64_t starts_ = 0;
  std::shared_ptr<LedgerFile> file_;
};

/// Something on its way: a message, or a collective that was started. Its tensors are to be left alone until
/// wait() returns. Movable; its destructor waits too, unless an exception has been thrown since it was made:
/// then it is left to its fate.
class CommRequest {
 public:
  /// What a transport knows of it. Destroyed without a wait(), it must leave the tensors' memory alone as
  /// long as the transport may use it, and not block on another rank.
  class Impl {
   public:
    virtual ~Impl() = default;
    virtual void wait() = 0;

    /// Whether wait() would return at once; moves on what moves in calls only. Any thread may call it, one at
    /// a time. True where the transport needs no calls.
    virtual bool test() { return true; }
  };

  CommRequest() = default;
  /// `call` is done once the message is.
  explicit CommRequest(std::unique_ptr<Impl> impl, TrafficCall call = {});
  CommRequest(CommRequest&&) noexcept = default;
  CommRequest& operator=(CommRequest&& other) noexcept;
  ~CommRequest();

  /// Throws CommError where the transport failed. A second wait does nothing.
  void wait();

  /// Whether there is something that was not waited for.
  bool pending() const { return impl_ != nullptr; }

 private:
  void finish() noexcept;

  std::unique_ptr<Impl> impl_;
  TrafficCall call_;
  int exceptions_ = 0;  // in flight when the request was made
};

namespace detail {

class Collective;
class Progress;

/// Bytes for another rank of the group.
struct Outgoing {
  int to;
  const std::byte* data;
  int64_t bytes;
};

/// Bytes from another rank of the group.
struct Incoming {
  int from;
  std::byte* data;
  int64_t bytes;
};

/// Bytes that a transport has begun to move.
class Transfer {
 public:
  virtual ~Transfer() = default;

  /// Whether this rank's part is done and its memory is its own again; moves on what moves in calls only. Any
  /// thread may call it, one at a time. On a GPU: true, and what is enqueued later finds the bytes. Throws
  /// CommError where the transport has failed.
  virtual bool test() = 0;

  /// Whether its destruction before that makes the transport leave the memory alone; otherwise the memory
  /// must stay for the rest of the process.
  virtual bool may_be_dropped() const { return false; }
};

/// What a transport gives: moving bytes. Everything that adds numbers is in Group, the same for every
/// transport. Every function is collective over the group unless it says otherwise, and throws CommError
/// where the transport fails or a message has another size than was expected.
class GroupImpl {
 public:
  virtual ~GroupImpl() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// Whether nobody is there: on the meta device no bytes move, and no other function but subgroup is called.
  virtual bool is_meta() const { return false; }

  /// The number of the next exchange: all ranks of the group, which begin the same ones in the same order,
  /// count alike. Numbers come round again after kExchangeNumbers.
  int next_exchange() { return exchanges_ = (exchanges_ + 1) % kExchangeNumbers; }
  static constexpr int kExchangeNumbers = 700;

  /// Moves all of this at once: between two ranks, what one sends meets what the other receives in exchange
  /// `number`, in the order of their lists. Returns when this rank's part is done and its memory is its own
  /// again.
  virtual void exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number) = 0;

  /// Begins the same and returns at once. Exchanges of different numbers may be under way together.
  virtual std::unique_ptr<Transfer> start_exchange(std::span<const Outgoing> sends,
                                                   std::span<const Incoming> receives, int number) = 0;

  /// Every rank's `data` receives root's.
  virtual void broadcast(std::byte* data, int64_t bytes, int root);

  /// Returns once every rank has called it.
  virtual void barrier();

  /// Not collective: between this rank and `to`, which may be itself. The tensor is kept alive until the
  /// request is done.
  virtual std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int to, int tag) = 0;

  /// Not collective: waits for a message of exactly `bytes` bytes.
  virtual void receive(std::byte* data, int64_t bytes, int from, int tag) = 0;

  /// Begins the same and returns at once.
  virtual std::unique_ptr<Transfer> start_receive(std::byte* data, int64_t bytes, int from, int tag) = 0;

  /// Whether the transport reaches a GPU's memory; only then are the five functions below called. They
  /// enqueue on the context's GPU and return: what is enqueued later finds the result.
  virtual bool moves_gpu_memory() const { return false; }
  virtual void exchange_on_gpu(Context& context, std::span<const Outgoing> sends,
                               std::span<const Incoming> receives);
  /// Begins beside the GPU's own queue, behind what that has been given so far.
  virtual std::unique_ptr<Transfer> start_exchange_on_gpu(Context& context, std::span<const Outgoing> sends,
                                                          std::span<const Incoming> receives);
  virtual void broadcast_on_gpu(Context& context, std::byte* data, int64_t bytes, int root);
  virtual std::unique_ptr<CommRequest::Impl> send_on_gpu(Context& context, const Tensor& tensor, int to,
                                                         int tag);
  virtual void receive_on_gpu(Context& context, const Tensor& tensor, int from, int tag);

  /// The group of `members`, this group's ranks in their new order: this rank among them. Ranks that form no
  /// new group call it too, with no members, and receive null.
  virtual std::unique_ptr<GroupImpl> subgroup(std::span<const int> members) = 0;

 private:
  int exchanges_ = 0;
};

}  // namespace detail

/// A tensor whose rows are dealt out to ranks, and the rows of this one.
struct RowShare {
  Tensor whole;  ///< [N, ...]
  Tensor part;   ///< [rows of this rank, ...]
};

/// Which group a rank joins on a split: ranks with equal color form one, ordered by key, then by rank. A
/// negative color joins none.
struct SplitChoice {
  int color = 0;
  int key = 0;
};

/// A group of ranks that communicate: a cheap value. Collectives block; every rank of a group calls the same
/// ones in the same order, and one thread of a rank at a time. Tensors lie on the context's device. On the
/// meta device they account and move nothing: a call enters the same in the context's memory and costs, and
/// in the ledger, as a real one.
///
/// Sums are made here, the same for every transport: ranks exchange pieces, and each piece is added in the
/// order of ranks (fp32 for 16- and 32-bit values, fp64 for fp64) and rounded once. So a sum depends neither
/// on the transport nor on timing. A failed transport throws CommError; the group is dead then.
///
/// start_* begin what the function of the same name does, and return; the request's wait() ends it. All count
/// as called where they are started, and give the same bits. On CPU a communication thread of this rank moves
/// on what was started while the rank computes; on GPUs with NCCL it is moved in a queue of its own, and only
/// what is enqueued after wait() finds the result; where tensors go from a GPU by way of the host, all is
/// done at once. What is started lies in as much memory as the function itself takes, until wait().
class Group {
 public:
  Group() = default;
  /// `members.world_ranks` has impl->size() entries. For transports.
  Group(std::unique_ptr<detail::GroupImpl> impl, GroupMembers members, std::shared_ptr<TrafficLedger> ledger);

  bool defined() const { return impl_ != nullptr; }
  int rank() const { return impl_->rank(); }
  int size() const { return impl_->size(); }
  const std::string& name() const { return members_->name; }

  /// The world rank of every member, in the order of this group's ranks.
  const std::vector<int>& world_ranks() const { return members_->world_ranks; }
  TrafficLedger& ledger() const { return *ledger_; }

  /// Whether this is a world of make_meta_world: its calls accept meta contexts only, and host numbers are
  /// taken to be the same on every rank.
  bool is_meta() const { return impl_->is_meta(); }

  /// tensor = op over ranks of tensor, in place. Floating-point types for sum; f32, f64 for max, where a NaN
  /// on any rank wins. Collective over the group.
  void all_reduce(Context& context, const Tensor& tensor, ReduceOp op) const;

  /// As all_reduce(sum) of each of several tensors, of any floating-point types, in one exchange.
  /// Collective over the group.
  void all_reduce_sum(Context& context, std::span<const Tensor> tensors) const;
  [[nodiscard]] CommRequest start_all_reduce_sum(Context& context, const Tensor& tensor) const;

  /// `part` receives this rank's piece of the sum over ranks of `whole`. Rank r's piece is counts[r]
  /// elements; pieces stand in rank order. part may be this rank's piece of whole itself, and otherwise must
  /// not overlap it; what else whole holds stays. Collective over the group.
  void reduce_scatter_sum(Context& context, const Tensor& whole, const Tensor& part,
                          std::span<const int64_t> counts) const;
  [[nodiscard]] CommRequest start_reduce_scatter_sum(Context& context, const Tensor& whole,
                                                     const Tensor& part,
                                                     std::span<const int64_t> counts) const;

  /// `whole` receives every rank's `part`, in rank order; counts[r] elements of rank r. part may be this
  /// rank's piece of whole itself, and otherwise must not overlap it. Collective over the group.
  void all_gather(Context& context, const Tensor& part, const Tensor& whole,
                  std::span<const int64_t> counts) const;
  [[nodiscard]] CommRequest start_all_gather(Context& context, const Tensor& part, const Tensor& whole,
                                             std::span<const int64_t> counts) const;

  /// As reduce_scatter_sum of each of several tensors, of any floating-point types, in one exchange. Pieces
  /// are rows: rank r's are rows[r] of every whole. Collective over the group.
  void reduce_scatter_rows(Context& context, std::span<const RowShare> tensors,
                           std::span<const int64_t> rows) const;
  [[nodiscard]] CommRequest start_reduce_scatter_rows(Context& context, std::span<const RowShare> tensors,
                                                      std::span<const int64_t> rows) const;

  /// As all_gather of each of several tensors in one exchange, in pieces of rows. Collective over the group.
  void all_gather_rows(Context& context, std::span<const RowShare> tensors,
                       std::span<const int64_t> rows) const;

  /// Every rank's tensor receives root's. Collective over the group.
  void broadcast(Context& context, const Tensor& tensor, int root) const;

  /// Sends a tensor to rank `to`, which may be this one; it must not change before the request's wait()
  /// returns. Never blocks on the receiver. 0 <= tag <= kMaxTag.
  [[nodiscard]] CommRequest send(Context& context, const Tensor& tensor, int to, int tag) const;

  /// Receives into a tensor of as many bytes as `from` sends, waiting for it. Messages of one sender and tag
  /// arrive in the order sent.
  void receive(Context& context, const Tensor& tensor, int from, int tag) const;

  /// As receive; but on a GPU with NCCL it is called where wait() is, since messages of one direction wait
  /// for each other there.
  [[nodiscard]] CommRequest start_receive(Context& context, const Tensor& tensor, int from, int tag) const;

  /// What every transport can carry.
  static constexpr int kMaxTag = 32000;

  /// Returns once every rank has called it. Collective over the group.
  void barrier() const;

  /// Every rank's text, in rank order: for control, not for tensors. Collective over the group.
  std::vector<std::string> all_gather_text(const std::string& mine) const;

  /// The sum or maximum of a host number over ranks, added in rank order; a NaN on any rank wins a maximum.
  /// Collective over the group.
  double all_reduce(double value, ReduceOp op) const;

  /// Starts to gather as many host numbers from every rank; `all` receives them, rank by rank, and must live
  /// until the request was waited for. Collective over the group.
  [[nodiscard]] CommRequest start_gather(Context& context, std::span<const double> mine,
                                         std::vector<double>& all) const;

  /// The exact sum of a host integer over ranks; LogicError where it leaves 64 bits. Collective over the
  /// group.
  int64_t all_reduce_sum(int64_t value) const;

  /// Forms groups named `name` from what every rank chooses for itself; undefined for a negative color. Not
  /// on a meta world of several ranks, where nobody else can say what they choose. Collective over the group.
  Group split(SplitChoice choice, std::string name) const;

  /// As split, where every rank knows what all choose: `choose(r)` for rank r of this group. Works on every
  /// transport. LogicError where ranks do not know the same. Collective over the group.
  Group split_by(const std::function<SplitChoice(int)>& choose, std::string name) const;

  /// Another transport among the same ranks, and the account: for a transport that is built upon this one.
  /// Collective over the group.
  std::unique_ptr<detail::GroupImpl> duplicate_transport() const;
  const std::shared_ptr<TrafficLedger>& shared_ledger() const { return ledger_; }

 private:
  Group form(std::span<const SplitChoice> choices, std::string name) const;
  [[nodiscard]] TrafficCall record(std::string_view kind, int64_t bytes, int peer = -1, int tag = 0,
                                   int64_t start = 0) const;
  TraceScope trace(Context& context, std::string_view kind, int64_t bytes) const;
  void check(const Context& context, const Tensor& tensor) const;
  int64_t check_summands(const Context& context, std::span<const Tensor> tensors, ReduceOp op) const;
  int64_t check_shares(const Context& context, std::span<const RowShare> tensors) const;
  void check_receive(const Context& context, const Tensor& tensor, int from, int tag) const;
  void all_reduce_together(Context& context, std::span<const Tensor> tensors, ReduceOp op) const;
  void run(Context& context, std::string_view kind, int64_t bytes, detail::Collective collective) const;
  CommRequest start(Context& context, std::string_view kind, int64_t bytes,
                    detail::Collective collective) const;
  struct Started;  // what is known of a call that is only started
  Started record_start(std::string_view kind, int64_t bytes, int peer = -1, int tag = 0) const;
  CommRequest accounted(Context& context, Started started, std::unique_ptr<CommRequest::Impl> request) const;
  void receive_now(Context& context, const Tensor& tensor, int from, int tag) const;
  std::vector<std::string> gather_text(const std::string& mine) const;

  /// Every rank's value, in rank order.
  template <class T>
  std::vector<T> gather_values(T mine) const;

  std::shared_ptr<detail::GroupImpl> impl_;
  std::shared_ptr<const GroupMembers> members_;
  std::shared_ptr<TrafficLedger> ledger_;
  std::shared_ptr<detail::Progress> progress_;  // of all groups of this rank's world
};

/// A world of one rank: every operation is valid.
Group make_self_world();

/// Runs body(world) on `ranks` threads, one a rank, and returns when all have ended. Where one throws, the
/// others are woken with CommError from whatever they wait in, and the first failure (not a woken one) is
/// rethrown. Ranks that all wait for each other, or for one that has ended, fail too, with a CommError that
/// says who waits for what. For tests, and for planning on meta contexts.
void run_local_world(int ranks, const std::function<void(Group)>& body);

/// A world on the meta device as rank `rank` of `size` sees it, alone in its process: collectives only
/// account.
Group make_meta_world(int rank, int size);

/// MPI's life in this process: initialises on construction, finalises on destruction unless an exception is
/// in flight. At most one. MPI is asked for MPI_THREAD_SERIALIZED and to return its errors, which become
/// CommError. Labels the calling thread with its rank and host.
class MpiSession {
 public:
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  /// All ranks of the job. Groups must not be used after the session; they may be destroyed later.
  const Group& world() const { return world_; }

  /// This rank among those on its host, and how many they are.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }

  /// Ends all ranks of the job with this exit code; never returns.
  [[noreturn]] static void abort(int exit_code) noexcept;

 private:
  Group world_;
  int local_rank_ = 0;
  int local_size_ = 1;
};

}  // namespace normformer
