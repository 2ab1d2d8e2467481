#include <algorithm>
#include <numeric>

#include "normformer/comm/tcp.h"
#include "normformer/core/error.h"

#include "join.h"
#include "tcp_mesh.h"

namespace normformer {

namespace {

using detail::Incoming;
using detail::Outgoing;
using detail::TcpMesh;
using detail::Transfer;

class TcpTransfer final : public Transfer {
 public:
  TcpTransfer(std::shared_ptr<TcpMesh> mesh, std::shared_ptr<TcpMesh::Tally> tally)
      : mesh_(std::move(mesh)), tally_(std::move(tally)) {}
  bool test() override { return mesh_->is_done(*tally_); }

 private:
  std::shared_ptr<TcpMesh> mesh_;
  std::shared_ptr<TcpMesh::Tally> tally_;
};

class TcpSend final : public CommRequest::Impl {
 public:
  TcpSend(std::shared_ptr<TcpMesh> mesh, std::shared_ptr<TcpMesh::Departure> departure)
      : mesh_(std::move(mesh)), departure_(std::move(departure)) {}
  TcpSend(const TcpSend&) = delete;
  TcpSend& operator=(const TcpSend&) = delete;
  ~TcpSend() override {
    if (departure_ != nullptr) mesh_->abandon(*departure_);
  }

  void wait() override {
    mesh_->await_sent(*departure_);
    departure_.reset();
  }

 private:
  std::shared_ptr<TcpMesh> mesh_;
  std::shared_ptr<TcpMesh::Departure> departure_;
};

// A group over the connections that all groups of a process share; its number tells its messages from theirs.
class TcpGroup final : public detail::GroupImpl {
 public:
  TcpGroup(std::shared_ptr<TcpMesh> mesh, uint64_t number, int rank, std::vector<int> members)
      : mesh_(std::move(mesh)), number_(number), rank_(rank), members_(std::move(members)) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }

  void exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number) override {
    mesh_->exchange(number_, with_world_ranks(sends), with_world_ranks(receives), number);
  }

  std::unique_ptr<Transfer> start_exchange(std::span<const Outgoing> sends,
                                           std::span<const Incoming> receives, int number) override {
    return std::make_unique<TcpTransfer>(
        mesh_, mesh_->start_exchange(number_, with_world_ranks(sends), with_world_ranks(receives), number));
  }

  std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int to, int tag) override {
    return std::make_unique<TcpSend>(mesh_, mesh_->send(number_, tensor, world_rank(to), tag));
  }

  void receive(std::byte* data, int64_t bytes, int from, int tag) override {
    mesh_->receive(number_, data, bytes, world_rank(from), tag);
  }

  std::unique_ptr<Transfer> start_receive(std::byte* data, int64_t bytes, int from, int tag) override {
    return std::make_unique<TcpTransfer>(mesh_,
                                         mesh_->start_receive(number_, data, bytes, world_rank(from), tag));
  }

  std::unique_ptr<GroupImpl> subgroup(std::span<const int> members) override {
    const int split = splits_++;
    if (members.empty()) return nullptr;
    const auto mine = std::find(members.begin(), members.end(), rank_);
    NF_CHECK(mine != members.end(), "rank {} forms a group without itself", rank_);
    std::vector<int> world_members;
    for (const int member : members) world_members.push_back(world_rank(member));
    const uint64_t number = mesh_->group_number(number_, split, world_members.front());
    return std::make_unique<TcpGroup>(mesh_, number, static_cast<int>(mine - members.begin()),
                                      std::move(world_members));
  }

 private:
  int world_rank(int rank) const { return members_[static_cast<size_t>(rank)]; }

  std::vector<Outgoing> with_world_ranks(std::span<const Outgoing> sends) const {
    std::vector<Outgoing> departing(sends.begin(), sends.end());
    for (Outgoing& out : departing) out.to = world_rank(out.to);
    return departing;
  }
  std::vector<Incoming> with_world_ranks(std::span<const Incoming> receives) const {
    std::vector<Incoming> arriving(receives.begin(), receives.end());
    for (Incoming& in : arriving) in.from = world_rank(in.from);
    return arriving;
  }

  std::shared_ptr<TcpMesh> mesh_;
  uint64_t number_;
  int rank_;
  std::vector<int> members_;  // world ranks
  int splits_ = 0;
};

}  // namespace

Group make_tcp_world(const Rendezvous& rendezvous, double timeout_seconds) {
  NF_CHECK(rendezvous.rank >= 0 && rendezvous.rank < rendezvous.size, "rank {} of {}", rendezvous.rank,
           rendezvous.size);
  set_rank_label(rendezvous.rank, host_name());
  if (rendezvous.size == 1) return make_self_world();
  const auto mesh =
      std::make_shared<TcpMesh>(rendezvous.rank, detail::join_ranks(rendezvous, timeout_seconds));
  std::vector<int> everyone(static_cast<size_t>(rendezvous.size));
  std::iota(everyone.begin(), everyone.end(), 0);
  auto impl = std::make_unique<TcpGroup>(mesh, 0, rendezvous.rank, everyone);
  // Nobody leaves before all are connected: whoever is not yet would take it for dead.
  impl->barrier();
  return Group(std::move(impl), {"world", std::move(everyone)}, std::make_shared<TrafficLedger>());
}

}  // namespace normformer
