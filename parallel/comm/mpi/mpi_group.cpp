#include "mpi_group.h"

#include <algorithm>

#include "messages.h"

namespace normformer::detail {

namespace {

constexpr int kCollectiveTag = 0;
constexpr int tag_of(int tag) { return tag + 1; }

// Several non-blocking calls and the sizes that the receiving ones expect.
class Requests {
 public:
  void send(const std::byte* data, int64_t bytes, int to, int tag, MPI_Comm communicator) {
    for_each_message(bytes, [&](int64_t offset, int count) {
      check_mpi(MPI_Isend(data + offset, count, MPI_BYTE, to, tag, communicator, &add(kNoSize)), "MPI_Isend");
    });
  }

  void receive(std::byte* data, int64_t bytes, int from, int tag, MPI_Comm communicator) {
    for_each_message(bytes, [&](int64_t offset, int count) {
      check_mpi(MPI_Irecv(data + offset, count, MPI_BYTE, from, tag, communicator, &add(count)), "MPI_Irecv");
    });
  }

  bool empty() const { return requests_.empty(); }

  // One by one: while one is waited for, MPI moves all. MPI_Waitall of Open MPI 4.1.4 now and then never
  // returns where a message fails.
  void wait() {
    for (size_t i = 0; i < requests_.size(); ++i) {
      MPI_Status status;
      check_mpi(MPI_Wait(&requests_[i], &status), "MPI_Wait");
      if (sizes_[i] != kNoSize) check_size(status, sizes_[i]);
    }
    requests_.clear();
    sizes_.clear();
  }

 private:
  static constexpr int kNoSize = -1;

  MPI_Request& add(int size) {
    sizes_.push_back(size);
    return requests_.emplace_back(MPI_REQUEST_NULL);
  }

  static void check_size(const MPI_Status& status, int expected) {
    int count = 0;
    check_mpi(MPI_Get_count(&status, MPI_BYTE, &count), "MPI_Get_count");
    if (count != expected) {
      throw CommError(
          fmt::format("rank {} sent {} bytes where {} were expected", status.MPI_SOURCE, count, expected));
    }
  }

  std::vector<MPI_Request> requests_;
  std::vector<int> sizes_;
};

class MpiSend final : public SendRequest::Impl {
 public:
  MpiSend(const Tensor& tensor, int to, int tag, MPI_Comm communicator)
      : tensor_(std::make_unique<Tensor>(tensor)) {
    requests_.send(static_cast<const std::byte*>(tensor.raw()), tensor.nbytes(), to, tag_of(tag),
                   communicator);
  }
  MpiSend(const MpiSend&) = delete;
  MpiSend& operator=(const MpiSend&) = delete;

  // Not waited for: MPI may still read the tensor, which therefore stays for the rest of the process.
  ~MpiSend() override {
    if (!requests_.empty()) static_cast<void>(tensor_.release());  // NOLINT(bugprone-unused-return-value)
  }

  void wait() override { requests_.wait(); }

 private:
  std::unique_ptr<Tensor> tensor_;
  Requests requests_;
};

}  // namespace

MpiGroup::MpiGroup(Communicator communicator) : communicator_(std::move(communicator)) {
  check_mpi(MPI_Comm_rank(communicator_.get(), &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(communicator_.get(), &size_), "MPI_Comm_size");
}

void MpiGroup::exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  Requests requests;
  for (const Incoming& in : receives) {
    requests.receive(in.data, in.bytes, in.from, kCollectiveTag, communicator_.get());
  }
  for (const Outgoing& out : sends) {
    requests.send(out.data, out.bytes, out.to, kCollectiveTag, communicator_.get());
  }
  requests.wait();
}

void MpiGroup::broadcast(std::byte* data, int64_t bytes, int root) {
  for_each_message(bytes, [&](int64_t offset, int count) {
    check_mpi(MPI_Bcast(data + offset, count, MPI_BYTE, root, communicator_.get()), "MPI_Bcast");
  });
}

void MpiGroup::barrier() { check_mpi(MPI_Barrier(communicator_.get()), "MPI_Barrier"); }

std::unique_ptr<SendRequest::Impl> MpiGroup::send(const Tensor& tensor, int to, int tag) {
  return std::make_unique<MpiSend>(tensor, to, tag, communicator_.get());
}

void MpiGroup::receive(std::byte* data, int64_t bytes, int from, int tag) {
  Requests requests;
  requests.receive(data, bytes, from, tag_of(tag), communicator_.get());
  requests.wait();
}

std::unique_ptr<GroupImpl> MpiGroup::subgroup(std::span<const int> members) {
  int color = MPI_UNDEFINED;
  int key = 0;
  if (!members.empty()) {
    const auto mine = std::find(members.begin(), members.end(), rank_);
    NF_CHECK(mine != members.end(), "rank {} forms a group without itself", rank_);
    color = members.front();
    key = static_cast<int>(mine - members.begin());
  }
  MPI_Comm made = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(communicator_.get(), color, key, &made), "MPI_Comm_split");
  Communicator communicator = own_communicator(made);
  return communicator ? std::make_unique<MpiGroup>(std::move(communicator)) : nullptr;
}

}  // namespace normformer::detail
