#include "mpi_group.h"

#include <algorithm>

#include "messages.h"

namespace normformer::detail {

namespace {

constexpr int tag_of_exchange(int number) { return Group::kMaxTag + 1 + number; }
static_assert(tag_of_exchange(GroupImpl::kExchangeNumbers) <= 32767, "every MPI has as many tags");

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

  // Whether all are done; moves on with them. To be called in a turn at MPI. One by one: MPI_Waitall of Open
  // MPI 4.1.4 now and then never returns where a message fails.
  bool test() {
    while (done_ < requests_.size()) {
      MPI_Status status;
      int flag = 0;
      check_mpi(MPI_Test(&requests_[done_], &flag, &status), "MPI_Test");
      if (flag == 0) return false;
      if (sizes_[done_] != kNoSize) check_size(status, sizes_[done_]);
      ++done_;
    }
    requests_.clear();
    sizes_.clear();
    done_ = 0;
    return true;
  }

  void wait() {
    poll_mpi([this] { return test(); });
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
  size_t done_ = 0;
};

class MpiTransfer final : public Transfer {
 public:
  explicit MpiTransfer(Requests requests) : requests_(std::move(requests)) {}
  bool test() override {
    const auto turn = take_turn();
    return requests_.test();
  }

 private:
  Requests requests_;
};

class MpiSend final : public CommRequest::Impl {
 public:
  MpiSend(const Tensor& tensor, int to, int tag, MPI_Comm communicator)
      : tensor_(std::make_unique<Tensor>(tensor)) {
    const auto turn = take_turn();
    requests_.send(static_cast<const std::byte*>(tensor.raw()), tensor.nbytes(), to, tag, communicator);
  }
  MpiSend(const MpiSend&) = delete;
  MpiSend& operator=(const MpiSend&) = delete;

  // Not waited for: MPI may still read the tensor, which therefore stays for the rest of the process.
  ~MpiSend() override {
    if (!requests_.empty()) static_cast<void>(tensor_.release());  // NOLINT(bugprone-unused-return-value)
  }

  void wait() override { requests_.wait(); }
  bool test() override {
    const auto turn = take_turn();
    return requests_.test();
  }

 private:
  std::unique_ptr<Tensor> tensor_;
  Requests requests_;
};

}  // namespace

MpiGroup::MpiGroup(Communicator communicator) : communicator_(std::move(communicator)) {
  check_mpi(MPI_Comm_rank(communicator_.get(), &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(communicator_.get(), &size_), "MPI_Comm_size");
}

namespace {

Requests begin_exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number,
                        MPI_Comm communicator) {
  const auto turn = take_turn();
  Requests requests;
  const int tag = tag_of_exchange(number);
  for (const Incoming& in : receives) requests.receive(in.data, in.bytes, in.from, tag, communicator);
  for (const Outgoing& out : sends) requests.send(out.data, out.bytes, out.to, tag, communicator);
  return requests;
}

void wait_for(MPI_Request request, const char* call) {
  poll_mpi([&] {
    int flag = 0;
    check_mpi(MPI_Test(&request, &flag, MPI_STATUS_IGNORE), call);
    return flag != 0;
  });
}

}  // namespace

void MpiGroup::exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number) {
  begin_exchange(sends, receives, number, communicator_.get()).wait();
}

std::unique_ptr<Transfer> MpiGroup::start_exchange(std::span<const Outgoing> sends,
                                                   std::span<const Incoming> receives, int number) {
  return std::make_unique<MpiTransfer>(begin_exchange(sends, receives, number, communicator_.get()));
}

void MpiGroup::broadcast(std::byte* data, int64_t bytes, int root) {
  for_each_message(bytes, [&](int64_t offset, int count) {
    MPI_Request request = MPI_REQUEST_NULL;
    {
      const auto turn = take_turn();
      check_mpi(MPI_Ibcast(data + offset, count, MPI_BYTE, root, communicator_.get(), &request),
                "MPI_Ibcast");
    }
    wait_for(request, "MPI_Ibcast");
  });
}

void MpiGroup::barrier() {
  MPI_Request request = MPI_REQUEST_NULL;
  {
    const auto turn = take_turn();
    check_mpi(MPI_Ibarrier(communicator_.get(), &request), "MPI_Ibarrier");
  }
  wait_for(request, "MPI_Ibarrier");
}

std::unique_ptr<CommRequest::Impl> MpiGroup::send(const Tensor& tensor, int to, int tag) {
  return std::make_unique<MpiSend>(tensor, to, tag, communicator_.get());
}

namespace {

Requests begin_receive(std::byte* data, int64_t bytes, int from, int tag, MPI_Comm communicator) {
  const auto turn = take_turn();
  Requests requests;
  requests.receive(data, bytes, from, tag, communicator);
  return requests;
}

}  // namespace

void MpiGroup::receive(std::byte* data, int64_t bytes, int from, int tag) {
  begin_receive(data, bytes, from, tag, communicator_.get()).wait();
}

std::unique_ptr<Transfer> MpiGroup::start_receive(std::byte* data, int64_t bytes, int from, int tag) {
  return std::make_unique<MpiTransfer>(begin_receive(data, bytes, from, tag, communicator_.get()));
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
  const auto turn = take_turn();
  MPI_Comm made = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(communicator_.get(), color, key, &made), "MPI_Comm_split");
  Communicator communicator = own_communicator(made);
  return communicator ? std::make_unique<MpiGroup>(std::move(communicator)) : nullptr;
}

}  // namespace normformer::detail
