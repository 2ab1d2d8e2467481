#include "collective.h"

#include <utility>

#include "wait_scope.h"

namespace normformer::detail {

namespace {

std::byte* bytes_of(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

bool moves(const Tensor& tensor) { return tensor.device() != DeviceKind::meta && tensor.numel() > 0; }

void combine_inbox(Context& context, ReduceOp op, const Inbox& inbox, const Tensor& out) {
  const std::vector<Tensor> pieces = inbox.all();
  if (pieces.size() == 1) return copy(context, pieces.front(), out);
  op == ReduceOp::sum ? sum_in_order(context, pieces, out) : max_in_order(context, pieces, out);
}

}  // namespace

std::vector<int> peers_of(const GroupImpl& impl) {
  std::vector<int> peers;
  for (int i = 1; i < impl.size(); ++i) peers.push_back((impl.rank() + i) % impl.size());
  return peers;
}

Inbox::Inbox(Context& context, const GroupImpl& impl, const Tensor& own)
    : rank_(impl.rank()),
      size_(impl.size()),
      own_(own.flat(0, own.numel())),
      rows_(context.empty({impl.size() - 1, own.numel()}, own.dtype(), MemoryUse::communication)) {}

Tensor Inbox::from(int peer) const {
  if (peer == rank_) return own_;
  const int64_t row = peer < rank_ ? peer : peer - 1;
  return rows_.flat(row * own_.numel(), own_.numel());
}

std::vector<Tensor> Inbox::all() const {
  std::vector<Tensor> pieces;
  for (int r = 0; r < size_; ++r) pieces.push_back(from(r));
  return pieces;
}

// The number is taken even where nothing moves here: others may have something to move.
Round::Round(Context& context, GroupImpl& impl)
    : context_(&context),
      impl_(&impl),
      number_(impl.next_exchange()),
      stages_(context.is_cuda() && !impl.moves_gpu_memory()) {}

void Round::send(int to, const Tensor& tensor) {
  if (moves(tensor)) departing_.emplace_back(to, tensor);
}

void Round::receive(int from, const Tensor& tensor) {
  if (moves(tensor)) arriving_.emplace_back(from, tensor);
}

// Where tensors go by way of the host they are copied there now: the round before may have changed them.
void Round::list_moves() {
  for (auto& [to, tensor] : departing_) {
    if (stages_) tensor = staged(tensor);
    sends_.push_back({to, bytes_of(tensor), tensor.nbytes()});
  }
  for (auto& [from, tensor] : arriving_) {
    if (stages_) {
      const Tensor host = context_->host().empty(tensor.shape(), tensor.dtype(), MemoryUse::communication);
      landings_.emplace_back(host, tensor);
      tensor = host;
    }
    receives_.push_back({from, bytes_of(tensor), tensor.nbytes()});
  }
}

// A tensor that goes to several ranks is copied once.
Tensor Round::staged(const Tensor& tensor) {
  for (const auto& [gpu, host] : copies_) {
    if (gpu.raw() == tensor.raw() && gpu.nbytes() == tensor.nbytes()) return host;
  }
  copies_.emplace_back(tensor, on_host(*context_, tensor));
  return copies_.back().second;
}

void Round::combine(ReduceOp op, Inbox inbox, Tensor out) {
  combinations_.push_back({op, std::move(inbox), std::move(out)});
}

void Round::run(Context& context) {
  list_moves();
  if (!sends_.empty() || !receives_.empty()) {
    const WaitScope waiting;
    if (context.is_cuda() && !stages_)
      impl_->exchange_on_gpu(context, sends_, receives_);
    else
      impl_->exchange(sends_, receives_, number_);
  }
  for (const auto& [host, gpu] : landings_) copy(context, host, gpu);
  combine_all(context);
}

void Round::start(Context& context) {
  started_ = true;
  list_moves();
  if (sends_.empty() && receives_.empty()) return;
  transfer_ = context_->is_cuda() ? impl_->start_exchange_on_gpu(context, sends_, receives_)
                                  : impl_->start_exchange(sends_, receives_, number_);
}

void Round::combine_all(Context& context) const {
  for (const Combination& c : combinations_) combine_inbox(context, c.op, c.inbox, c.out);
}

void Collective::run(Context& context) {
  while (!rounds_.empty()) {
    rounds_.front().run(context);
    rounds_.pop_front();
  }
}

namespace {

class CollectiveFlight final : public Flight {
 public:
  CollectiveFlight(std::shared_ptr<GroupImpl> impl, Collective collective)
      : impl_(std::move(impl)), collective_(std::move(collective)) {}

  bool step(Context& context) override {
    for (; at_ < collective_.rounds().size(); ++at_) {
      Round& round = collective_.rounds()[at_];
      if (!round.is_started()) round.start(context);
      if (!round.test()) return false;
      round.combine_all(context);
    }
    return true;
  }

  bool may_be_dropped() const override {
    return at_ == collective_.rounds().size() || collective_.rounds()[at_].may_be_dropped();
  }

  void release() {
    collective_.rounds().clear();
    impl_.reset();
  }

 private:
  std::shared_ptr<GroupImpl> impl_;
  mutable Collective collective_;
  size_t at_ = 0;
};

// A flight that a rank waits for. Memory goes in wait(), on the rank's own thread, so that what memory a rank
// holds does not depend on timing.
template <class AnyFlight>
class FlightRequest final : public CommRequest::Impl {
 public:
  FlightRequest(Context& context, std::shared_ptr<Progress> progress, std::shared_ptr<AnyFlight> flight)
      : context_(&context), progress_(std::move(progress)), flight_(std::move(flight)) {
    progress_->launch(flight_, context);
  }
  void wait() override {
    progress_->wait(*flight_, *context_);
    flight_->release();
  }

 private:
  Context* context_;
  std::shared_ptr<Progress> progress_;
  std::shared_ptr<AnyFlight> flight_;
};

template <class AnyFlight>
std::unique_ptr<CommRequest::Impl> launch(Context& context, const std::shared_ptr<Progress>& progress,
                                          std::shared_ptr<AnyFlight> flight) {
  return std::make_unique<FlightRequest<AnyFlight>>(context, progress, std::move(flight));
}

// The first round moves beside the GPU's own queue; the rest is enqueued where it is waited for.
class CollectiveOnGpu final : public CommRequest::Impl {
 public:
  CollectiveOnGpu(Context& context, std::shared_ptr<GroupImpl> impl, Collective collective)
      : context_(&context), impl_(std::move(impl)), collective_(std::move(collective)) {
    collective_.rounds().front().start(context);
  }
  void wait() override {
    Round& first = collective_.rounds().front();
    first.test();
    first.combine_all(*context_);
    collective_.rounds().pop_front();
    collective_.run(*context_);
  }

 private:
  Context* context_;
  std::shared_ptr<GroupImpl> impl_;
  Collective collective_;
};

// What was done at once, or only accounted: it holds its memory as long as one that is on its way.
class DoneCollective final : public CommRequest::Impl {
 public:
  explicit DoneCollective(Collective collective) : collective_(std::move(collective)) {}
  void wait() override { collective_.rounds().clear(); }

 private:
  Collective collective_;
};

class MessageFlight final : public Flight {
 public:
  explicit MessageFlight(std::unique_ptr<CommRequest::Impl> message) : message_(std::move(message)) {}
  bool step(Context&) override { return message_->test(); }
  // Its own destructor sees to its memory.
  bool may_be_dropped() const override { return true; }
  void release() {
    message_->wait();
    message_.reset();
  }

 private:
  std::unique_ptr<CommRequest::Impl> message_;
};

class TransferFlight final : public Flight {
 public:
  TransferFlight(std::unique_ptr<Transfer> transfer, std::shared_ptr<void> kept)
      : kept_(std::move(kept)), transfer_(std::move(transfer)) {}
  bool step(Context&) override { return transfer_->test(); }
  bool may_be_dropped() const override { return transfer_->may_be_dropped(); }
  void release() { kept_.reset(); }

 private:
  std::shared_ptr<void> kept_;
  std::unique_ptr<Transfer> transfer_;
};

}  // namespace

std::unique_ptr<CommRequest::Impl> start_collective(Context& context, const std::shared_ptr<GroupImpl>& impl,
                                                    const std::shared_ptr<Progress>& progress,
                                                    Collective collective) {
  if (context.is_cuda() && impl->moves_gpu_memory())
    return std::make_unique<CollectiveOnGpu>(context, impl, std::move(collective));
  if (context.is_cuda() || context.is_meta() || impl->size() == 1) {
    for (Round& round : collective.rounds()) round.run(context);
    return std::make_unique<DoneCollective>(std::move(collective));
  }
  collective.rounds().front().start(context);
  return launch(context, progress, std::make_shared<CollectiveFlight>(impl, std::move(collective)));
}

std::unique_ptr<CommRequest::Impl> watch_message(Context& context, const std::shared_ptr<Progress>& progress,
                                                 std::unique_ptr<CommRequest::Impl> message) {
  return launch(context, progress, std::make_shared<MessageFlight>(std::move(message)));
}

std::unique_ptr<CommRequest::Impl> start_transfer(Context& context, const std::shared_ptr<Progress>& progress,
                                                  std::unique_ptr<Transfer> transfer,
                                                  std::shared_ptr<void> kept) {
  return launch(context, progress, std::make_shared<TransferFlight>(std::move(transfer), std::move(kept)));
}

}  // namespace normformer::detail
