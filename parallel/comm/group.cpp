#include "normformer/comm/group.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "normformer/core/error.h"
#include "normformer/tensor/dispatch.h"

#include "collective.h"
#include "progress.h"
#include "wait_scope.h"

namespace normformer {

namespace detail {

void GroupImpl::broadcast(std::byte* data, int64_t bytes, int root) {
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
  if (rank() != root) receives.push_back({root, data, bytes});
  for (int r = 0; r < size() && rank() == root; ++r) {
    if (r != root) sends.push_back({r, data, bytes});
  }
  exchange(sends, receives, next_exchange());
}

void GroupImpl::barrier() {
  std::vector<Outgoing> sends;
  std::vector<Incoming> receives;
  for (int r = 0; r < size(); ++r) {
    if (r == rank()) continue;
    sends.push_back({r, nullptr, 0});
    receives.push_back({r, nullptr, 0});
  }
  exchange(sends, receives, next_exchange());
}

namespace {
[[noreturn]] void reaches_no_gpu() { NF_CHECK(false, "a transport that does not reach a GPU was asked to"); }
}  // namespace

void GroupImpl::exchange_on_gpu(Context&, std::span<const Outgoing>, std::span<const Incoming>) {
  reaches_no_gpu();
}
std::unique_ptr<Transfer> GroupImpl::start_exchange_on_gpu(Context&, std::span<const Outgoing>,
                                                           std::span<const Incoming>) {
  reaches_no_gpu();
}
void GroupImpl::broadcast_on_gpu(Context&, std::byte*, int64_t, int) { reaches_no_gpu(); }
std::unique_ptr<CommRequest::Impl> GroupImpl::send_on_gpu(Context&, const Tensor&, int, int) {
  reaches_no_gpu();
}
void GroupImpl::receive_on_gpu(Context&, const Tensor&, int, int) { reaches_no_gpu(); }

}  // namespace detail

namespace {

using detail::Collective;
using detail::Inbox;
using detail::peers_of;
using detail::Round;
using detail::WaitScope;

// Up to this many bytes over all ranks, sending everything to everybody in one round is cheaper than a second
// round. The sums have the same bits either way.
constexpr int64_t kOneRoundBytes = 64 << 10;

std::byte* bytes_of(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

double larger_or_nan(double a, double b) { return b > a || std::isnan(b) ? b : a; }

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
      ledger_(std::move(ledger)),
      progress_(std::make_shared<detail::Progress>()) {
  NF_CHECK(static_cast<int>(world_ranks().size()) == size(), "{} members in group {} of {} ranks",
           world_ranks().size(), name(), size());
}

std::unique_ptr<detail::GroupImpl> Group::duplicate_transport() const {
  std::vector<int> everyone(static_cast<size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  return impl_->subgroup(everyone);
}

TrafficCall Group::record(std::string_view kind, int64_t bytes, int peer, int tag, int64_t start) const {
  return ledger_->record({members_, kind, bytes, peer, tag, start});
}

struct Group::Started {
  std::string_view kind;
  int64_t bytes = 0;
  int64_t number = 0;  // in the ledger; 0 where it was not entered
  TrafficCall call = {};
};

Group::Started Group::record_start(std::string_view kind, int64_t bytes, int peer, int tag) const {
  const int64_t number = ledger_->number_start();
  return {kind, bytes, number, record(kind, bytes, peer, tag, number)};
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

namespace {

Collective plan_all_reduce(Context& context, detail::GroupImpl& impl, std::span<const Tensor> tensors,
                           ReduceOp op, int64_t bytes) {
  Collective collective(context, impl);
  const bool one_round = bytes <= kOneRoundBytes / impl.size();
  const auto piece = [&](const Tensor& tensor, int r) {
    const Range cut = one_round ? Range{0, tensor.numel()} : even_part(tensor.numel(), impl.size(), r);
    return tensor.flat(cut.begin, cut.size());
  };
  const std::vector<int> peers = peers_of(impl);
  Round& scatter = collective.add_round();
  for (const Tensor& tensor : tensors) {
    const Tensor own = piece(tensor, impl.rank());
    Inbox inbox(context, impl, own);
    for (const int peer : peers) {
      scatter.send(peer, piece(tensor, peer));
      scatter.receive(peer, inbox.from(peer));
    }
    scatter.combine(op, std::move(inbox), own);
  }
  if (one_round) return collective;
  Round& gather = collective.add_round();
  for (const Tensor& tensor : tensors) {
    for (const int peer : peers) {
      gather.send(peer, piece(tensor, impl.rank()));
      gather.receive(peer, piece(tensor, peer));
    }
  }
  return collective;
}

Collective plan_reduce_scatter(Context& context, detail::GroupImpl& impl, std::span<const RowShare> tensors,
                               std::span<const int64_t> rows) {
  Collective collective(context, impl);
  Round& round = collective.add_round();
  for (const RowShare& share : tensors) {
    const Pieces pieces(share, rows, impl.size(), impl.rank());
    Inbox inbox(context, impl, pieces.of(impl.rank()));
    for (const int peer : peers_of(impl)) {
      round.send(peer, pieces.of(peer));
      round.receive(peer, inbox.from(peer));
    }
    round.combine(ReduceOp::sum, std::move(inbox), pieces.part());
  }
  return collective;
}

Collective plan_all_gather(Context& context, detail::GroupImpl& impl, std::span<const RowShare> tensors,
                           std::span<const int64_t> rows) {
  Collective collective(context, impl);
  Round& round = collective.add_round();
  for (const RowShare& share : tensors) {
    const Pieces pieces(share, rows, impl.size(), impl.rank());
    copy(context, pieces.part(), pieces.of(impl.rank()));
    for (const int peer : peers_of(impl)) {
      round.send(peer, pieces.of(impl.rank()));
      round.receive(peer, pieces.of(peer));
    }
  }
  return collective;
}

}  // namespace

void Group::run(Context& context, std::string_view kind, int64_t bytes, Collective collective) const {
  const TrafficCall call = size() > 1 ? record(kind, bytes) : TrafficCall();
  const TraceScope scope = trace(context, kind, bytes);
  collective.run(context);
}

namespace {

// What was started. Traces show for how long it is waited for, and the ledger's events when.
class AccountedRequest final : public CommRequest::Impl {
 public:
  AccountedRequest(Context& context, std::string_view kind, TraceDetails details,
                   std::function<void()> record_wait, std::unique_ptr<CommRequest::Impl> started)
      : context_(&context),
        kind_(kind),
        details_(details),
        record_wait_(std::move(record_wait)),
        started_(std::move(started)) {}
  void wait() override {
    const TraceScope scope(*context_, TraceKind::communication, "wait for", kind_, details_);
    if (record_wait_) record_wait_();
    if (started_ != nullptr) started_->wait();
  }

 private:
  Context* context_;
  std::string_view kind_;
  TraceDetails details_;
  std::function<void()> record_wait_;
  std::unique_ptr<CommRequest::Impl> started_;
};

}  // namespace

CommRequest Group::start(Context& context, std::string_view kind, int64_t bytes,
                         Collective collective) const {
  Started started = size() > 1 ? record_start(kind, bytes) : Started{kind, bytes};
  const TraceScope scope = trace(context, kind, bytes);
  return accounted(context, std::move(started),
                   detail::start_collective(context, impl_, progress_, std::move(collective)));
}

CommRequest Group::accounted(Context& context, Started started,
                             std::unique_ptr<CommRequest::Impl> request) const {
  std::function<void()> record_wait;
  if (started.number > 0) {
    record_wait = [ledger = ledger_, members = members_, number = started.number] {
      ledger->record_wait(members, number);
    };
  }
  const TraceDetails details{.bytes = started.bytes, .group = name()};
  return CommRequest(std::make_unique<AccountedRequest>(context, started.kind, details,
                                                        std::move(record_wait), std::move(request)),
                     std::move(started.call));
}

int64_t Group::check_summands(const Context& context, std::span<const Tensor> tensors, ReduceOp op) const {
  int64_t bytes = 0;
  for (const Tensor& tensor : tensors) {
    check(context, tensor);
    NF_CHECK(is_floating(tensor.dtype()) && (op == ReduceOp::sum || !is_16_bit(tensor.dtype())),
             "no {} of {} over ranks", op == ReduceOp::sum ? "sum" : "maximum", to_string(tensor));
    bytes += tensor.nbytes();
  }
  return bytes;
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

void Group::all_reduce_together(Context& context, std::span<const Tensor> tensors, ReduceOp op) const {
  const int64_t bytes = check_summands(context, tensors, op);
  if (size() > 1) run(context, "all_reduce", bytes, plan_all_reduce(context, *impl_, tensors, op, bytes));
}

void Group::all_reduce(Context& context, const Tensor& tensor, ReduceOp op) const {
  all_reduce_together(context, {&tensor, 1}, op);
}

void Group::all_reduce_sum(Context& context, std::span<const Tensor> tensors) const {
  all_reduce_together(context, tensors, ReduceOp::sum);
}

CommRequest Group::start_all_reduce_sum(Context& context, const Tensor& tensor) const {
  const std::span<const Tensor> one(&tensor, 1);
  const int64_t bytes = check_summands(context, one, ReduceOp::sum);
  if (size() == 1) return {};
  return start(context, "all_reduce", bytes, plan_all_reduce(context, *impl_, one, ReduceOp::sum, bytes));
}

void Group::reduce_scatter_rows(Context& context, std::span<const RowShare> tensors,
                                std::span<const int64_t> rows) const {
  const int64_t bytes = check_shares(context, tensors);
  run(context, "reduce_scatter", bytes, plan_reduce_scatter(context, *impl_, tensors, rows));
}

CommRequest Group::start_reduce_scatter_rows(Context& context, std::span<const RowShare> tensors,
                                             std::span<const int64_t> rows) const {
  const int64_t bytes = check_shares(context, tensors);
  return start(context, "reduce_scatter", bytes, plan_reduce_scatter(context, *impl_, tensors, rows));
}

void Group::reduce_scatter_sum(Context& context, const Tensor& whole, const Tensor& part,
                               std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  reduce_scatter_rows(context, {&share, 1}, counts);
}

CommRequest Group::start_reduce_scatter_sum(Context& context, const Tensor& whole, const Tensor& part,
                                            std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  return start_reduce_scatter_rows(context, {&share, 1}, counts);
}

void Group::all_gather_rows(Context& context, std::span<const RowShare> tensors,
                            std::span<const int64_t> rows) const {
  const int64_t bytes = check_shares(context, tensors);
  run(context, "all_gather", bytes, plan_all_gather(context, *impl_, tensors, rows));
}

void Group::all_gather(Context& context, const Tensor& part, const Tensor& whole,
                       std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  all_gather_rows(context, {&share, 1}, counts);
}

CommRequest Group::start_all_gather(Context& context, const Tensor& part, const Tensor& whole,
                                    std::span<const int64_t> counts) const {
  const RowShare share = by_elements(whole, part);
  const int64_t bytes = check_shares(context, {&share, 1});
  return start(context, "all_gather", bytes, plan_all_gather(context, *impl_, {&share, 1}, counts));
}

void Group::broadcast(Context& context, const Tensor& tensor, int root) const {
  check(context, tensor);
  NF_CHECK(root >= 0 && root < size(), "root {} of group {} of {} ranks", root, name(), size());
  if (size() == 1) return;
  const TrafficCall call = record("broadcast", tensor.nbytes(), root);
  const TraceScope scope = trace(context, "broadcast", tensor.nbytes());
  if (context.is_meta() || tensor.numel() == 0) return;
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return impl_->broadcast_on_gpu(context, bytes_of(tensor), tensor.nbytes(), root);
  }
  const Tensor host = on_host(context, tensor);
  {
    const WaitScope waiting;
    impl_->broadcast(bytes_of(host), host.nbytes(), root);
  }
  if (context.is_cuda()) copy(context, host, tensor);
}

namespace {

// A message on the meta device: it holds the tensor as long as a real one would.
class AccountedSend final : public CommRequest::Impl {
 public:
  explicit AccountedSend(Tensor tensor) : tensor_(std::move(tensor)) {}
  void wait() override { tensor_ = {}; }

 private:
  Tensor tensor_;
};

}  // namespace

CommRequest Group::send(Context& context, const Tensor& tensor, int to, int tag) const {
  check(context, tensor);
  NF_CHECK(to >= 0 && to < size() && tag >= 0 && tag <= kMaxTag, "rank {} and tag {} in group {} of {} ranks",
           to, tag, name(), size());
  TrafficCall call = record("send", tensor.nbytes(), to, tag);
  const TraceScope scope = trace(context, "send", tensor.nbytes());
  if (context.is_meta()) return CommRequest(std::make_unique<AccountedSend>(tensor), std::move(call));
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return CommRequest(impl_->send_on_gpu(context, tensor, to, tag), std::move(call));
  }
  auto message = impl_->send(on_host(context, tensor), to, tag);
  if (progress_->is_running() && !message->test())
    message = detail::watch_message(context, progress_, std::move(message));
  return CommRequest(std::move(message), std::move(call));
}

void Group::check_receive(const Context& context, const Tensor& tensor, int from, int tag) const {
  check(context, tensor);
  NF_CHECK(from >= 0 && from < size() && tag >= 0 && tag <= kMaxTag,
           "rank {} and tag {} in group {} of {} ranks", from, tag, name(), size());
}

void Group::receive_now(Context& context, const Tensor& tensor, int from, int tag) const {
  const TraceScope scope = trace(context, "receive", tensor.nbytes());
  if (context.is_meta()) return;
  if (context.is_cuda() && impl_->moves_gpu_memory()) {
    return impl_->receive_on_gpu(context, tensor, from, tag);
  }
  const Tensor host = context.is_cuda() ? context.host().empty(tensor.shape(), tensor.dtype()) : tensor;
  {
    const WaitScope waiting;
    impl_->receive(bytes_of(host), host.nbytes(), from, tag);
  }
  if (context.is_cuda()) copy(context, host, tensor);
}

void Group::receive(Context& context, const Tensor& tensor, int from, int tag) const {
  check_receive(context, tensor, from, tag);
  const TrafficCall call = record("receive", tensor.nbytes(), from, tag);
  receive_now(context, tensor, from, tag);
}

namespace {

// What is done where it is waited for.
class LaterRequest final : public CommRequest::Impl {
 public:
  explicit LaterRequest(std::function<void()> act) : act_(std::move(act)) {}
  void wait() override { act_(); }

 private:
  std::function<void()> act_;
};

}  // namespace

CommRequest Group::start_receive(Context& context, const Tensor& tensor, int from, int tag) const {
  check_receive(context, tensor, from, tag);
  Started started = record_start("receive", tensor.nbytes(), from, tag);
  if (context.device() != DeviceKind::cpu || size() == 1) {
    const auto receive = [group = *this, &context, tensor, from, tag] {
      group.receive_now(context, tensor, from, tag);
    };
    return accounted(context, std::move(started), std::make_unique<LaterRequest>(receive));
  }
  const TraceScope scope = trace(context, "receive", tensor.nbytes());
  auto transfer = impl_->start_receive(bytes_of(tensor), tensor.nbytes(), from, tag);
  return accounted(
      context, std::move(started),
      detail::start_transfer(context, progress_, std::move(transfer), std::make_shared<Tensor>(tensor)));
}

CommRequest Group::start_gather(Context& context, std::span<const double> mine,
                                std::vector<double>& all) const {
  const size_t count = mine.size();
  all.clear();
  for (int r = 0; r < size(); ++r) all.insert(all.end(), mine.begin(), mine.end());
  if (size() == 1) return {};
  const auto bytes = static_cast<int64_t>(mine.size_bytes());
  Started started = record_start("control", bytes);
  if (is_meta()) return accounted(context, std::move(started), nullptr);
  auto kept = std::make_shared<std::vector<double>>(mine.begin(), mine.end());
  std::vector<detail::Outgoing> sends;
  std::vector<detail::Incoming> receives;
  for (const int peer : peers_of(*impl_)) {
    sends.push_back({peer, reinterpret_cast<const std::byte*>(kept->data()), bytes});
    double* theirs = all.data() + static_cast<size_t>(peer) * count;
    receives.push_back({peer, reinterpret_cast<std::byte*>(theirs), bytes});
  }
  auto transfer = impl_->start_exchange(sends, receives, impl_->next_exchange());
  return accounted(context, std::move(started),
                   detail::start_transfer(context, progress_, std::move(transfer), std::move(kept)));
}

void Group::barrier() const {
  if (size() == 1) return;
  const TrafficCall call = record("barrier", 0);
  const WaitScope waiting;
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
  const WaitScope waiting;
  impl_->exchange(sends, receives, impl_->next_exchange());
  return all;
}

std::vector<std::string> Group::all_gather_text(const std::string& mine) const {
  const TrafficCall call = size() > 1 ? record("control", static_cast<int64_t>(mine.size())) : TrafficCall();
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
  const WaitScope waiting;
  impl_->exchange(sends, receives, impl_->next_exchange());
  return all;
}

double Group::all_reduce(double value, ReduceOp op) const {
  if (size() == 1) return value;
  const TrafficCall call = record("control", sizeof value);
  const std::vector<double> all = gather_values(value);
  return op == ReduceOp::sum ? std::accumulate(all.begin() + 1, all.end(), all.front())
                             : std::accumulate(all.begin() + 1, all.end(), all.front(), larger_or_nan);
}

int64_t Group::all_reduce_sum(int64_t value) const {
  if (size() == 1) return value;
  const TrafficCall call = record("control", sizeof value);
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
  Group made(std::move(impl), {std::move(name), std::move(world)}, ledger_);
  made.progress_ = progress_;
  return made;
}

}  // namespace normformer
