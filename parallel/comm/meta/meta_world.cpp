#include <algorithm>
#include <numeric>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

class MetaGroup final : public detail::GroupImpl {
 public:
  MetaGroup(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  bool is_meta() const override { return true; }

  void exchange(std::span<const detail::Outgoing>, std::span<const detail::Incoming>, int) override {
    refuse();
  }
  std::unique_ptr<detail::Transfer> start_exchange(std::span<const detail::Outgoing>,
                                                   std::span<const detail::Incoming>, int) override {
    refuse();
  }
  std::unique_ptr<CommRequest::Impl> send(const Tensor&, int, int) override { refuse(); }
  void receive(std::byte*, int64_t, int, int) override { refuse(); }
  std::unique_ptr<detail::Transfer> start_receive(std::byte*, int64_t, int, int) override { refuse(); }

  std::unique_ptr<detail::GroupImpl> subgroup(std::span<const int> members) override {
    if (members.empty()) return nullptr;
    const auto mine = std::find(members.begin(), members.end(), rank_);
    NF_CHECK(mine != members.end(), "rank {} forms a group without itself", rank_);
    return std::make_unique<MetaGroup>(static_cast<int>(mine - members.begin()),
                                       static_cast<int>(members.size()));
  }

 private:
  [[noreturn]] void refuse() const { throw CommError("no bytes move on the meta device"); }

  int rank_;
  int size_;
};

}  // namespace

Group make_meta_world(int rank, int size) {
  NF_CHECK(rank >= 0 && rank < size, "rank {} of {}", rank, size);
  std::vector<int> everyone(static_cast<size_t>(size));
  std::iota(everyone.begin(), everyone.end(), 0);
  return Group(std::make_unique<MetaGroup>(rank, size), {"world", std::move(everyone)},
               std::make_shared<TrafficLedger>());
}

}  // namespace normformer
