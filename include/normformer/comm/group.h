#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/tensor/context.h"

namespace normformer {

/// How values of several ranks become one.
enum class ReduceOp { sum, max };

/// What one collective has moved so far, by group and kind.
struct TrafficRecord {
  std::string group;
  std::string kind;  ///< "all_reduce", "send", ...
  int64_t calls = 0;
  int64_t bytes = 0;  ///< payload in bytes as the caller sees it, not what an algorithm sends
};

/// The account of a rank's communication; shared by all groups split from one world.
class TrafficLedger {
 public:
  void record(std::string_view group, std::string_view kind, int64_t bytes);
  const std::vector<TrafficRecord>& records() const { return records_; }
  void clear() { records_.clear(); }

 private:
  std::vector<TrafficRecord> records_;
};

/// A message on its way. wait() returns once the sender may forget about it. Movable; its destructor waits
/// too, unless an exception is in flight.
class SendRequest {
 public:
  class Impl {
   public:
    virtual ~Impl() = default;
    virtual void wait() = 0;
  };

  SendRequest() = default;
  explicit SendRequest(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
  void wait();

 private:
  std::unique_ptr<Impl> impl_;
};

namespace detail {

/// What a transport gives: moving bytes. Everything that adds numbers is in Group, the same for every
/// transport. Every function is collective over the group unless it says otherwise. Offsets and counts are in
/// bytes.
class GroupImpl {
 public:
  virtual ~GroupImpl() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// Rank r receives, at receive + receive_offsets[s], what rank s has at send + send_offsets[r].
  virtual void all_to_all(const std::byte* send, std::span<const int64_t> send_offsets,
                          std::span<const int64_t> send_counts, std::byte* receive,
                          std::span<const int64_t> receive_offsets,
                          std::span<const int64_t> receive_counts) = 0;

  /// Every rank receives rank s's `mine` at receive + offsets[s]. `mine` may already lie in its place.
  virtual void all_gather(const std::byte* mine, std::byte* receive, std::span<const int64_t> offsets,
                          std::span<const int64_t> counts) = 0;

  virtual void broadcast(std::byte* data, int64_t bytes, int root) = 0;
  virtual void barrier() = 0;

  /// Not collective: between this rank and `to`. The tensor is kept alive until the request is done.
  virtual std::unique_ptr<SendRequest::Impl> send(const Tensor& tensor, int to, int tag) = 0;

  /// Not collective: waits for a message of exactly `bytes` bytes.
  virtual void receive(std::byte* data, int64_t bytes, int from, int tag) = 0;

  /// Ranks with equal color form a group, ordered by key; a negative color forms none (null).
  virtual std::unique_ptr<GroupImpl> split(int color, int key) = 0;
};

}  // namespace detail

/// A group of ranks that communicate: a cheap value. Collectives run in the order in which they are called,
/// the same on every rank of the group, and block. Tensors are contiguous. On the meta device they account
/// and move nothing.
///
/// Sums are made here, the same for every transport: ranks exchange pieces, and each piece is added in the
/// order of ranks (fp32 for 16- and 32-bit values, fp64 for fp64) and rounded once. So a sum depends neither
/// on the transport nor on timing. A failed transport throws CommError; the group is dead then.
class Group {
 public:
  Group() = default;
  Group(std::unique_ptr<detail::GroupImpl> impl, std::string name, std::shared_ptr<TrafficLedger> ledger);

  bool defined() const { return impl_ != nullptr; }
  int rank() const { return impl_->rank(); }
  int size() const { return impl_->size(); }
  const std::string& name() const { return name_; }
  TrafficLedger& ledger() const { return *ledger_; }

  /// tensor = op over ranks of tensor, in place. Floating-point types for sum; f32, f64 for max.
  /// Collective over the group.
  void all_reduce(Context& context, const Tensor& tensor, ReduceOp op) const;

  /// As all_reduce(sum) of several tensors, in one exchange where a transport can. Collective over the group.
  void all_reduce_sum(Context& context, std::span<const Tensor> tensors) const;

  /// `part` receives this rank's piece of the sum over ranks of `whole`. Rank r's piece is counts[r]
  /// elements; pieces stand in rank order. part may lie inside whole; what else whole holds is undefined
  /// afterwards. Collective over the group.
  void reduce_scatter_sum(Context& context, const Tensor& whole, const Tensor& part,
                          std::span<const int64_t> counts) const;

  /// `whole` receives every rank's `part`, in rank order; counts[r] elements of rank r. part may lie in its
  /// place in whole. Collective over the group.
  void all_gather(Context& context, const Tensor& part, const Tensor& whole,
                  std::span<const int64_t> counts) const;

  /// Every rank's tensor receives root's. Collective over the group.
  void broadcast(Context& context, const Tensor& tensor, int root) const;

  /// Sends a tensor to rank `to`; it must not change before the request's wait() returns. Never blocks on the
  /// receiver.
  SendRequest send(Context& context, const Tensor& tensor, int to, int tag) const;

  /// Receives into a tensor of the shape and type that `from` sends, waiting for it. Messages of one sender
  /// and tag arrive in the order sent.
  void receive(Context& context, const Tensor& tensor, int from, int tag) const;

  /// Returns once every rank has called it. Collective over the group.
  void barrier() const;

  /// Every rank's text, in rank order: for control, not for tensors. Collective over the group.
  std::vector<std::string> all_gather_text(const std::string& mine) const;

  /// The sum or maximum of a host number over ranks, added in rank order. Collective over the group.
  double all_reduce(double value, ReduceOp op) const;

  /// The exact sum of a host integer over ranks. Collective over the group.
  int64_t all_reduce_sum(int64_t value) const;

  /// Ranks with equal color form a group named `name`, ordered by key, then by rank; a negative color gives
  /// an undefined group. Collective over the group.
  Group split(int color, int key, std::string name) const;

 private:
  std::shared_ptr<detail::GroupImpl> impl_;
  std::string name_;
  std::shared_ptr<TrafficLedger> ledger_;
};

/// A world of one rank: every operation is valid.
Group make_self_world();

/// Runs body(world) on `ranks` threads, one a rank, and returns when all have ended. Where one throws, the
/// others are woken with CommError from whatever collective they wait in, and the first failure (not a woken
/// one) is rethrown. For tests, and for planning on meta.
void run_local_world(int ranks, const std::function<void(Group)>& body);

/// A world on the meta device as rank `rank` of `size` sees it, alone in its process: collectives only
/// account.
Group make_meta_world(int rank, int size);

/// MPI's life in this process: initialises on construction, finalises on destruction unless an exception is
/// in flight. At most one. MPI is asked for MPI_THREAD_SERIALIZED and to return its errors, which become
/// CommError.
class MpiSession {
 public:
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  /// All ranks of the job.
  Group world() const;

  /// This rank among those on its host, and how many they are.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }

  /// Ends all ranks of the job with this exit code; never returns.
  [[noreturn]] static void abort(int exit_code) noexcept;

 private:
  int local_rank_ = 0;
  int local_size_ = 1;
};

}  // namespace normformer
