#include "normformer/comm/group.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "normformer/core/error.h"
#include "normformer/tensor/dispatch.h"

namespace normformer {

namespace detail {

void GroupImpl::broadcast(std::byte* data, int64_t bytes, int root) {
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
  if (rank() != root) receives.push_back({root, data, bytes});
  for (int r = 0; r < size() && rank() == root; ++r) {
    if (r != root) sends.push_back({r, data, bytes});
  }
  exchange(sends, receives);
}

void GroupImpl::barrier() {
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
  for (int r = 0; r < size(); ++r) {
    if (r == rank()) continue;
    sends.push_back({r, nullptr, 0});
    receives.push_back({r, nullptr, 0});
  }
  exchange(sends, receives);
}

namespace {
[[noreturn]] void reaches_no_gpu() { NF_CHECK(false, "a transport that does not reach a GPU was asked to"); }
}  // namespace

void GroupImpl::exchange_on_gpu(Context&, std::span<const Outgoing>, std::span<const Incoming>) {
  reaches_no_gpu();
}
void GroupImpl::broadcast_on_gpu(Context&, std::byte*, int64_t, int) { reaches_no_gpu(); }
std::unique_ptr<SendRequest::Impl> GroupImpl::send_on_gpu(Context&, const Tensor&, int, int) {
  reaches_no_gpu();
}
void GroupImpl::receive_on_gpu(Context&, const Tensor&, int, int) { reaches_no_gpu(); }

}  // namespace detail

namespace {

// Up to this many bytes over all ranks, sending everything to everybody in one round is cheaper than a second
// round. The sums have the same bits either way.
constexpr int64_t kOneRoundBytes = 64 << 10;

std::byte* bytes_of(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

// The tensors of one exchange; empty ones are left out on both sides. What lies on a GPU goes by way of the
// host where the transport cannot reach it.
class Moves {
 public:
  Moves(Context& context, detail::GroupImpl& impl)
      : context_(context), impl_(impl), stages_(context.is_cuda() && !impl.moves_gpu_memory()) {}

  void send(int to, const Tensor& tensor) {
    if (!wanted(tensor)) return;
    const Tensor from = stages_ ? staged(tensor) : tensor;
    sends_.push_back({to, bytes_of(from), from.nbytes()});
  }
  void receive(int from, const Tensor& tensor) {
    if (!wanted(tensor)) return;
    Tensor to = tensor;
    if (stages_) {
      to = context_.host().empty(tensor.shape(), tensor.dtype(), MemoryUse::communication);
      arrivals_.push_back({to, tensor});
    }
    receives_.push_back({from, bytes_of(to), to.nbytes()});
  }
  void run() {
    if (sends_.empty() && receives_.empty()) return;
    if (context_.is_cuda() && !stages_) return impl_.exchange_on_gpu(context_, sends_, receives_);
    impl_.exchange(sends_, receives_);
    for (const auto& [host, gpu] : arrivals_) copy(context_, host, gpu);
  }

 private:
  static bool wanted(const Tensor& tensor) {
    return tensor.device() != DeviceKind::meta && tensor.numel() > 0;
  }

  // A tensor that goes to several ranks is copied once.
  Tensor staged(const Tensor& tensor) {
    for (const auto& [gpu, host] : departures_) {
      if (gpu.raw() == tensor.raw() && gpu.nbytes() == tensor.nbytes()) return host;
    }
    departures_.push_back({tensor, on_host(context_, tensor)});
    return departures_.back().second;
  }

  Context& context_;
  detail::GroupImpl& impl_;
  bool stages_;
  std::vector<std::pair<Tensor, Tensor>> departures_;
  std::vector<std::pair<Tensor, Tensor>> arrivals_;
  std::vector<detail::Outgoing> sends_;
  std::vector<detail::Incoming> receives_;
};

// The other ranks of a group, each rank starting with its neighbour so that not all write to one at once.
std::vector<int> peers_of(const detail::GroupImpl& impl) {
  std::vector<int> peers;
  for (int i = 1; i < impl.size(); ++i) peers.push_back((impl.rank() + i) % impl.size());
  return peers;
}

// What the other ranks hold of one rank's piece, a row each in the order of ranks.
class Inbox {
 public:
  Inbox(Context& context, const detail::GroupImpl& impl, const Tensor& own)
      : rank_(impl.rank()),
        size_(impl.size()),
        own_(own.flat(0, own.numel())),
        rows_(context.empty({impl.size() - 1, own.numel()}, own.dtype(), MemoryUse::communication)) {}

  Tensor from(int peer) const {
    if (peer == rank_) return own_;
    const int64_t row = peer < rank_ ? peer : peer - 1;
    return rows_.flat(row * own_.numel(), own_.numel());
  }

  std::vector<Tensor> all() const {
    std::vector<Tensor> pieces;
    for (int r = 0; r < size_; ++r) pieces.push_back(from(r));
    return pieces;
  }

 private:
  int rank_;
  int size_;
  Tensor own_;
  Tensor rows_;
};

double larger_or_nan(double a, double b) { return b > a || std::isnan(b) ? b : a; }

void combine(Context& context, ReduceOp op, const Inbox& inbox, const Tensor& out) {
  if (inbox.all().size() == 1) return copy(context, inbox.all().front(), out);
  if (op == ReduceOp::sum)
    sum_in_order(context, inbox.all(), out);
  else
    max_in_order(context, inbox.all(), out);
}

// A whole and its cut into one piece a rank, in their order; checks that they fill it.
class Pieces {
 public:
  Pieces(const RowShare& share, std::span<const int64_t> rows, int ranks, int rank) : share_(share) {
    const Tensor& whole = share.whole;
    NF_CHECK(static_cast<int>(rows.size()) == ranks, "{} counts for {} ranks", rows.size(), ranks);
    NF_CHECK(whole.shape().rank() > 0, "{} has no rows", to_string(whole));
    const int64_t of_row = whole.dim(0) > 0 ? whole.numel() / whole.dim(0) : 0;
    int64_t total = 0;
    for (const int64_t count : rows) {
      NF_CHECK(count >= 0, "a piece of {} elements", count);
      total = checked_add(total, count);
      offsets_.push_back(checked_mul(total, of_row));
    }
    NF_CHECK(total == whole.dim(0), "pieces of {} elements make up {}", total, to_string(whole));
    NF_CHECK(share.part.dtype() == whole.dtype() && share.part.numel() == of(rank).numel(),
             "{} as a piece of {} elements of {}", to_string(share.part), of(rank).numel(), to_string(whole));
  }

  Tensor of(int rank) const {
    const auto r = static_cast<size_t>(rank);
    return share_.whole.flat(offsets_[r], offsets_[r + 1] - offsets_[r]);
  }
  const Tensor& part() const { return share_.part; }

 private:
  RowShare share_;
  std::vector<int64_t> offsets_ = {0};
};

// A tensor's elements as its rows.
RowShare by_elements(const Tensor& whole, const Tensor& part) {
  return {whole.flat(0, whole.numel()), part.flat(0, part.numel())};
}

// FNV-1a, to compare what ranks believe.
uint64_t fingerprint(std::span<const SplitChoice> choices) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&](int value) { hash = (hash ^ static_cast<uint32_t>(value)) * 0x100000001b3u; };
  for (const SplitChoice& choice : choices) {
    mix(choice.color);
    mix(choice.key);
  }
  return hash;
}

}  // namespace

Group::Group(std::unique_ptr<detail::GroupImpl> impl, GroupMembers members,
             std::shared_ptr<TrafficLedger> ledger)
    : impl_(std::move(impl)),
      members_(std::make_shared<GroupMembers>(std::move(members))),
      ledger_(std::move(ledger)) {
  NF_CHECK(static_cast<int>(world_ranks().size()) == size(), "{} members in group {} of {} ranks",
           world_ranks().size(), name(), size());
}

std::unique_ptr<detail::GroupImpl> Group::duplicate_transport() const {
  std::vector<int> everyone(static_cast<size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  return impl_->subgroup(everyone);
}

void Group::record(std::string_view kind, int64_t bytes, int peer, int tag) const {
  ledger_->record({members_, kind, bytes, peer, tag});
}

TraceScope Group::trace(Context& context, std::string_view kind, int64_t bytes) const {
  return {context, TraceKind::communication, kind, {}, {.bytes = bytes, .group = name()}};
}

void Group::check(const Context& context, const Tensor& tensor) const {
  NF_CHECK(tensor.defined(), "an undefined tensor in group {}", name());
  NF_CHECK(tensor.device() == context.device(), "{} of another device than its context", to_string(tensor));
  NF_CHECK(context.is_meta() || !is_meta(), "{} has values, but nobody else is there: group {} is on meta",
           to_string(tensor), name());
}

void Group::all_reduce(Context& context, const Tensor& tensor, ReduceOp op) const {
  all_reduce_together(context, {&tensor, 1}, op);
}

void Group::all_reduce_sum(Context& context, std::span<const Tensor> tensors) const {
  all_reduce_together(context, tensors, ReduceOp::sum);
}

void Group::all_reduce_together(Context& context, std::span<const Tensor> tensors, ReduceOp op) const {
  int64_t bytes = 0;
  for (const Tensor& tensor : tensors) {
    check(context, tensor);
    NF_CHECK(is_floating(tensor.dtype()) && (op == ReduceOp::sum || !is_16_bit(tensor.dtype())),
             "no {} of {} over ranks", op == ReduceOp::sum ? "sum" : "maximum", to_string(tensor));
    bytes += tensor.nbytes();
  }
  if (size() == 1) return;
  record("all_reduce", bytes);
  const TraceScope scope = trace(context, "all_reduce", bytes);

  const bool one_round = bytes <= kOneRoundBytes / size();
  const auto piece = [&](const Tensor& tensor, int r) {
    const Range cut = one_round ? Range{0, tensor.numel()} : even_part(tensor.numel(), size(), r);
    return tensor.flat(cut.begin, cut.size());
  };
  const std::vector<int> peers = peers_of(*impl_);
  {
    std::vector<Inbox> inboxes;
    Moves moves(context, *impl_);
    for (const Tensor& tensor : tensors) {
      inboxes.emplace_back(context, *impl_, piece(tensor, rank()));
      for (const int peer : peers) {
        moves.send(peer, piece(tensor, peer));
        moves.receive(peer, inboxes.back().from(peer));
      }
    }
    moves.run();
    for (size_t t = 0; t < tensors.size(); ++t) {
      combine(context, op, inboxes[t], piece(tensors[t], rank()));
    }
  }
  if (one_round) return;
  Moves moves(context, *impl_);
  for (const Tensor& tensor : tensors) {
    for (const int peer : peers) {
      moves.send(peer, piece(tensor, rank()));
      moves.receive(peer, piece(tensor, peer));
    }
  }
  moves.run();
}

int64_t Group::check_shares(const Context& context, std::span<const RowShare> tensors) const {
  int64_t bytes = 0;
  for (const RowShare& share : tensors) {
    check(context, share.whole);
    check(context, share.part);
    bytes += share.whole.nbytes();
  }
  return bytes;
}

void Group::reduce_scatter_sum(Context& context, const Tensor& whole, const Tensor& part,
                               std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  reduce_scatter_rows(context, {&share, 1}, counts);
}

void Group::reduce_scatter_rows(Context& context, std::span<const RowShare> tensors,
                                std::span<const int64_t> rows) const {
  const int64_t bytes = check_shares(context, tensors);
  if (size() > 1) record("reduce_scatter", bytes);
  const TraceScope scope = trace(context, "reduce_scatter", bytes);

  std::vector<Inbox> inboxes;
  std::vector<Tensor> parts;
  Moves moves(context, *impl_);
  for (const RowShare& share : tensors) {
    const Pieces pieces(share, rows, size(), rank());
    inboxes.emplace_back(context, *impl_, pieces.of(rank()));
    parts.push_back(pieces.part());
    for (const int peer : peers_of(*impl_)) {
      moves.send(peer, pieces.of(peer));
      moves.receive(peer, inboxes.back().from(peer));
    }
  }
  moves.run();
  for (size_t t = 0; t < parts.size(); ++t) combine(context, ReduceOp::sum, inboxes[t], parts[t]);
}

void Group::all_gather(Context& context, const Tensor& part, const Tensor& whole,
                       std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  all_gather_rows(context, {&share, 1}, counts);
}

void Group::all_gather_rows(Context& context, std::span<const RowShare> tensors,
                            std::span<const int64_t> rows) const {
  const int64_t bytes = check_shares(context, tensors);
  if (size() > 1) record("all_gather", bytes);
  const TraceScope scope = trace(context, "all_gather", bytes);

  Moves moves(context, *impl_);
  for (const RowShare& share : tensors) {
    const Pieces pieces(share, rows, size(), rank());
    copy(context, pieces.part(), pieces.of(rank()));
    for (const int peer : peers_of(*impl_)) {
      moves.send(peer, pieces.of(rank()));
      moves.receive(peer, pieces.of(peer));
    }
  }
  moves.run();
}

void Group::broadcast(Context& context, const Tensor& tensor, int root) const {
  check(context, tensor);
  NF_CHECK(root >= 0 && root < size(), "root {} of group {} of {} ranks", root, name(), size());
  if (size() == 1) return;
  record("broadcast", tensor.nbytes(), root);
  const TraceScope scope = trace(context, "broadcast", tensor.nbytes());
  if (context.is_meta() || tensor.numel() == 0) return;
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return impl_->broadcast_on_gpu(context, bytes_of(tensor), tensor.nbytes(), root);
  }
  const Tensor host = on_host(context, tensor);
  impl_->broadcast(bytes_of(host), host.nbytes(), root);
  if (context.is_cuda()) copy(context, host, tensor);
}

namespace {

// A message on the meta device: it holds the tensor as long as a real one would.
class AccountedSend final : public SendRequest::Impl {
 public:
  explicit AccountedSend(Tensor tensor) : tensor_(std::move(tensor)) {}
  void wait() override { tensor_ = {}; }

 private:
  Tensor tensor_;
};

}  // namespace

SendRequest Group::send(Context& context, const Tensor& tensor, int to, int tag) const {
  check(context, tensor);
  NF_CHECK(to >= 0 && to < size() && tag >= 0 && tag <= kMaxTag, "rank {} and tag {} in group {} of {} ranks",
           to, tag, name(), size());
  record("send", tensor.nbytes(), to, tag);
  const TraceScope scope = trace(context, "send", tensor.nbytes());
  if (context.is_meta()) return SendRequest(std::make_unique<AccountedSend>(tensor));
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return SendRequest(impl_->send_on_gpu(context, tensor, to, tag));
  }
  return SendRequest(impl_->send(on_host(context, tensor), to, tag));
}

void Group::receive(Context& context, const Tensor& tensor, int from, int tag) const {
  check(context, tensor);
  NF_CHECK(from >= 0 && from < size() && tag >= 0 && tag <= kMaxTag,
           "rank {} and tag {} in group {} of {} ranks", from, tag, name(), size());
  record("receive", tensor.nbytes(), from, tag);
  const TraceScope scope = trace(context, "receive", tensor.nbytes());
  if (context.is_meta()) return;
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return impl_->receive_on_gpu(context, tensor, from, tag);
  }
  const Tensor host = context.is_cuda() ? context.host().empty(tensor.shape(), tensor.dtype()) : tensor;
  impl_->receive(bytes_of(host), host.nbytes(), from, tag);
  if (context.is_cuda()) copy(context, host, tensor);
}

void Group::barrier() const {
  if (size() == 1) return;
  record("barrier", 0);
  if (!is_meta()) impl_->barrier();
}

template <class T>
std::vector<T> Group::gather_values(T mine) const {
  std::vector<T> all(static_cast<size_t>(size()), mine);
  if (is_meta() || size() == 1) return all;
  std::vector<detail::Outgoing> sends;
  std::vector<detail::Incoming> receives;
  for (const int peer : peers_of(*impl_)) {
    sends.push_back({peer, reinterpret_cast<const std::byte*>(&mine), sizeof(T)});
    receives.push_back({peer, reinterpret_cast<std::byte*>(&all[static_cast<size_t>(peer)]), sizeof(T)});
  }
  impl_->exchange(sends, receives);
  return all;
}

std::vector<std::string> Group::all_gather_text(const std::string& mine) const {
  if (size() > 1) record("control", static_cast<int64_t>(mine.size()));
  return gather_text(mine);
}

std::vector<std::string> Group::gather_text(const std::string& mine) const {
  std::vector<std::string> all(static_cast<size_t>(size()), mine);
  if (is_meta() || size() == 1) return all;
  const std::vector<int64_t> sizes = gather_values(static_cast<int64_t>(mine.size()));
  std::vector<detail::Outgoing> sends;
  std::vector<detail::Incoming> receives;
  for (const int peer : peers_of(*impl_)) {
    std::string& text = all[static_cast<size_t>(peer)];
    text.resize(static_cast<size_t>(sizes[static_cast<size_t>(peer)]));
    sends.push_back(
        {peer, reinterpret_cast<const std::byte*>(mine.data()), static_cast<int64_t>(mine.size())});
    receives.push_back({peer, reinterpret_cast<std::byte*>(text.data()), static_cast<int64_t>(text.size())});
  }
  impl_->exchange(sends, receives);
  return all;
}

double Group::all_reduce(double value, ReduceOp op) const {
  if (size() == 1) return value;
  record("control", sizeof value);
  const std::vector<double> all = gather_values(value);
  return op == ReduceOp::sum ? std::accumulate(all.begin() + 1, all.end(), all.front())
                             : std::accumulate(all.begin() + 1, all.end(), all.front(), larger_or_nan);
}

int64_t Group::all_reduce_sum(int64_t value) const {
  if (size() == 1) return value;
  record("control", sizeof value);
  const std::vector<int64_t> all = gather_values(value);
  return std::accumulate(all.begin(), all.end(), int64_t{0}, checked_add);
}

Group Group::split(SplitChoice choice, std::string name) const {
  NF_CHECK(!is_meta() || size() == 1, "group {} is on meta, where no other rank can choose: use split_by",
           this->name());
  return form(gather_values(choice), std::move(name));
}

Group Group::split_by(const std::function<SplitChoice(int)>& choose, std::string name) const {
  std::vector<SplitChoice> choices;
  for (int r = 0; r < size(); ++r) choices.push_back(choose(r));
  const uint64_t mine = fingerprint(choices);
  const std::vector<uint64_t> all = gather_values(mine);
  const auto other = std::find_if(all.begin(), all.end(), [&](uint64_t theirs) { return theirs != mine; });
  NF_CHECK(other == all.end(), "ranks {} and {} of group {} differ about who forms groups {}", rank(),
           other - all.begin(), this->name(), name);
  return form(choices, std::move(name));
}

Group Group::form(std::span<const SplitChoice> choices, std::string name) const {
  const int color = choices[static_cast<size_t>(rank())].color;
  std::vector<int> members;
  for (int r = 0; r < size() && color >= 0; ++r) {
    if (choices[static_cast<size_t>(r)].color == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return choices[static_cast<size_t>(a)].key < choices[static_cast<size_t>(b)].key;
  });
  auto impl = impl_->subgroup(members);
  if (impl == nullptr) return {};
  std::vector<int> world;
  for (const int r : members) world.push_back(world_ranks()[static_cast<size_t>(r)]);
  return Group(std::move(impl), {std::move(name), std::move(world)}, ledger_);
}

}  // namespace normformer
