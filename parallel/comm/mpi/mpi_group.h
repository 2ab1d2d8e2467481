#pragma once

#include "normformer/comm/group.h"

#include "mpi_call.h"

namespace normformer::detail {

/// A group over a communicator of its own. Messages of send and receive have their tag as MPI's, those of
/// exchanges the number of the exchange behind all of these.
class MpiGroup final : public GroupImpl {
 public:
  explicit MpiGroup(Communicator communicator);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number) override;
  std::unique_ptr<Transfer> start_exchange(std::span<const Outgoing> sends,
                                           std::span<const Incoming> receives, int number) override;
  void broadcast(std::byte* data, int64_t bytes, int root) override;
  void barrier() override;
  std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int to, int tag) override;
  void receive(std::byte* data, int64_t bytes, int from, int tag) override;
  std::unique_ptr<Transfer> start_receive(std::byte* data, int64_t bytes, int from, int tag) override;
  std::unique_ptr<GroupImpl> subgroup(std::span<const int> members) override;

 private:
  Communicator communicator_;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace normformer::detail
