#pragma once

#include "normformer/comm/group.h"

#include "mpi_call.h"

namespace normformer::detail {

/// A group over a communicator of its own. Collectives' messages have MPI tag 0, those of send and receive
/// their tag + 1.
class MpiGroup final : public GroupImpl {
 public:
  explicit MpiGroup(Communicator communicator);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives) override;
  void broadcast(std::byte* data, int64_t bytes, int root) override;
  void barrier() override;
  std::unique_ptr<SendRequest::Impl> send(const Tensor& tensor, int to, int tag) override;
  void receive(std::byte* data, int64_t bytes, int from, int tag) override;
  std::unique_ptr<GroupImpl> subgroup(std::span<const int> members) override;

 private:
  Communicator communicator_;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace normformer::detail
