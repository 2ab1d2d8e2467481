#include <array>
#include <chrono>
#include <cstring>
#include <exception>
#include <thread>

#include <cuda_runtime.h>
#include <nccl.h>

#include "normformer/comm/nccl.h"
#include "normformer/core/error.h"

#include "nccl_watch.h"

namespace normformer {

namespace {

using detail::GroupImpl;
using detail::Incoming;
using detail::Outgoing;
using detail::Transfer;

void check(cudaError_t result) {
  if (result != cudaSuccess) throw CommError(fmt::format("CUDA: {}", cudaGetErrorString(result)));
}

void check(ncclResult_t result) {
  if (result != ncclSuccess && result != ncclInProgress) {
    throw CommError(fmt::format("NCCL: {} ({})", ncclGetErrorString(result), ncclGetLastError(nullptr)));
  }
}

/// A communicator, and the queue of its own that messages work in. It never blocks a call: failures come
/// later, to the watch.
class Channel {
 public:
  Channel(ncclComm_t communicator, std::shared_ptr<NcclWatch> watch, const char* kind)
      : communicator_(communicator), watch_(std::move(watch)) {
    wait_until_ready();
    watch_->add(communicator_, kind);
  }

  ~Channel() {
    watch_->remove(communicator_);
    // After a failure other ranks may never send what the queue waits for; the process is about to end.
    if (std::uncaught_exceptions() > exceptions_) return;
    if (stream_ != nullptr) give_up_queue();
    ncclCommFinalize(communicator_);
    ncclResult_t state = ncclInProgress;
    for (int i = 0; i < kMostPolls && state == ncclInProgress; ++i) {
      if (ncclCommGetAsyncError(communicator_, &state) != ncclSuccess) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    state == ncclSuccess ? ncclCommDestroy(communicator_) : ncclCommAbort(communicator_);
  }

  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  ncclComm_t communicator() const { return communicator_; }

  /// Runs `enqueue(communicator, stream)` in the GPU's own queue.
  template <class Enqueue>
  void run(const Gpu& gpu, const char* what, Enqueue&& enqueue) {
    run_in(compute_of(gpu), what, enqueue);
  }

  /// The same beside the GPU's own queue, behind what that has been given so far; traces show it on `lane`.
  template <class Enqueue>
  void start(Context& context, TraceLane lane, const char* what, Enqueue&& enqueue) {
    if (stream_ == nullptr) make_queue();
    check(cudaEventRecord(before_, compute_of(context.gpu())));
    check(cudaStreamWaitEvent(stream_, before_, 0));
    const TraceScope scope(context, TraceKind::communication, what, {}, {}, lane, stream_);
    run_in(stream_, what, enqueue);
  }

  /// What the GPU is given later waits for what has been started.
  void finish(const Gpu& gpu) {
    check(cudaEventRecord(after_, stream_));
    check(cudaStreamWaitEvent(compute_of(gpu), after_, 0));
  }

  /// A part of this communicator's ranks as a new channel; null for ranks outside (color < 0).
  std::unique_ptr<Channel> split(int color, int key, const char* kind) const {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    // What shares resources runs one after the other: messages up would hold up those down.
    config.splitShare = 0;
    ncclComm_t made = nullptr;
    {
      const auto held = watch_->hold();
      check(ncclCommSplit(communicator_, color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, &made, &config));
    }
    wait_until_ready();
    return made == nullptr ? nullptr : std::make_unique<Channel>(made, watch_, kind);
  }

  const std::shared_ptr<NcclWatch>& watch() const { return watch_; }

 private:
  static constexpr int kMostPolls = 10000;
  static constexpr std::chrono::seconds kReadyTimeout{300};

  static cudaStream_t compute_of(const Gpu& gpu) { return static_cast<cudaStream_t>(gpu.stream()); }

  template <class Enqueue>
  void run_in(cudaStream_t stream, const char* what, Enqueue&& enqueue) {
    {
      const auto held = watch_->hold();
      check(ncclGroupStart());
      enqueue(communicator_, stream);
      check(ncclGroupEnd());
    }
    wait_until_ready();
    watch_->expect(stream, what);
  }

  // Only where messages are sent: the driver has few queues, and streams that share one wait for each other.
  void make_queue() {
    int least = 0;
    int greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
    check(cudaEventCreateWithFlags(&before_, cudaEventDisableTiming));
    check(cudaEventCreateWithFlags(&after_, cudaEventDisableTiming));
  }

  void give_up_queue() {
    cudaStreamSynchronize(stream_);
    cudaEventDestroy(before_);
    cudaEventDestroy(after_);
    cudaStreamDestroy(stream_);
  }

  void wait_until_ready() const {
    const auto start = std::chrono::steady_clock::now();
    ncclResult_t state = ncclInProgress;
    while (state == ncclInProgress) {
      {
        const auto held = watch_->hold();
        check(ncclCommGetAsyncError(communicator_, &state));
      }
      if (state != ncclInProgress) break;
      if (std::chrono::steady_clock::now() - start > kReadyTimeout) {
        throw CommError("NCCL: the other ranks of a group did not come within 300 s");
      }
      std::this_thread::yield();
    }
    check(state);
  }

  ncclComm_t communicator_;
  std::shared_ptr<NcclWatch> watch_;
  int exceptions_ = std::uncaught_exceptions();
  cudaStream_t stream_ = nullptr;
  cudaEvent_t before_ = nullptr;
  cudaEvent_t after_ = nullptr;
};

/// The channels of a group; none in a group of one. Messages up (to a higher rank) and down have channels of
/// their own: each is a chain from rank to rank, in which a rank that waits holds up nothing that the other
/// direction needs.
struct Channels {
  std::unique_ptr<Channel> collective;
  std::unique_ptr<Channel> up;
  std::unique_ptr<Channel> down;
};

/// A message under way: its tensor lives until the GPU's own queue is behind it.
class NcclSend final : public CommRequest::Impl {
 public:
  NcclSend(Channel& channel, const Gpu& gpu, Tensor tensor)
      : channel_(channel), gpu_(gpu), tensor_(std::move(tensor)) {}
  void wait() override {
    channel_.finish(gpu_);
    tensor_ = {};
  }

 private:
  Channel& channel_;
  const Gpu& gpu_;
  Tensor tensor_;
};

/// What enqueues all of an exchange in a channel.
auto enqueue_exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  return [sends, receives](ncclComm_t communicator, cudaStream_t stream) {
    for (const Outgoing& s : sends) {
      check(ncclSend(s.data, static_cast<size_t>(s.bytes), ncclInt8, s.to, communicator, stream));
    }
    for (const Incoming& r : receives) {
      check(ncclRecv(r.data, static_cast<size_t>(r.bytes), ncclInt8, r.from, communicator, stream));
    }
  };
}

/// An exchange in its channel's own queue.
class NcclTransfer final : public Transfer {
 public:
  NcclTransfer(Channel& channel, const Gpu& gpu) : channel_(channel), gpu_(gpu) {}
  bool test() override {
    channel_.finish(gpu_);
    return true;
  }

 private:
  Channel& channel_;
  const Gpu& gpu_;
};

class NcclGroup final : public GroupImpl {
 public:
  NcclGroup(Context& context, std::unique_ptr<GroupImpl> host, Channels channels)
      : context_(context), host_(std::move(host)), channels_(std::move(channels)) {}

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }

  void exchange(std::span<const Outgoing> sends, std::span<const Incoming> receives, int number) override {
    host_->exchange(sends, receives, number);
  }
  std::unique_ptr<Transfer> start_exchange(std::span<const Outgoing> sends,
                                           std::span<const Incoming> receives, int number) override {
    return host_->start_exchange(sends, receives, number);
  }
  void broadcast(std::byte* data, int64_t bytes, int root) override { host_->broadcast(data, bytes, root); }
  void barrier() override {
    // As on the host: everything that was enqueued before is done.
    context_.gpu().synchronize();
    host_->barrier();
  }
  std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int to, int tag) override {
    return host_->send(tensor, to, tag);
  }
  void receive(std::byte* data, int64_t bytes, int from, int tag) override {
    host_->receive(data, bytes, from, tag);
  }
  std::unique_ptr<Transfer> start_receive(std::byte* data, int64_t bytes, int from, int tag) override {
    return host_->start_receive(data, bytes, from, tag);
  }

  bool moves_gpu_memory() const override { return true; }

  void exchange_on_gpu(Context& context, std::span<const Outgoing> sends,
                       std::span<const Incoming> receives) override {
    channels_.collective->run(context.gpu(), "an exchange", enqueue_exchange(sends, receives));
  }

  std::unique_ptr<Transfer> start_exchange_on_gpu(Context& context, std::span<const Outgoing> sends,
                                                  std::span<const Incoming> receives) override {
    channels_.collective->start(context, TraceLane::gpu_collectives, "exchange",
                                enqueue_exchange(sends, receives));
    return std::make_unique<NcclTransfer>(*channels_.collective, context.gpu());
  }

  void broadcast_on_gpu(Context& context, std::byte* data, int64_t bytes, int root) override {
    channels_.collective->run(
        context.gpu(), "a broadcast", [&](ncclComm_t communicator, cudaStream_t stream) {
          check(ncclBroadcast(data, data, static_cast<size_t>(bytes), ncclInt8, root, communicator, stream));
        });
  }

  std::unique_ptr<CommRequest::Impl> send_on_gpu(Context& context, const Tensor& tensor, int to,
                                                 int) override {
    if (to == rank()) return keep_for_self(tensor);
    const bool up = to > rank();
    Channel& channel = up ? *channels_.up : *channels_.down;
    channel.start(context, lane_of(up), "send", [&](ncclComm_t communicator, cudaStream_t stream) {
      check(ncclSend(tensor.raw(), static_cast<size_t>(tensor.nbytes()), ncclInt8, to, communicator, stream));
    });
    return std::make_unique<NcclSend>(channel, context.gpu(), tensor);
  }

  void receive_on_gpu(Context& context, const Tensor& tensor, int from, int) override {
    if (from == rank()) return take_from_self(context, tensor);
    const bool up = from < rank();
    Channel& channel = up ? *channels_.up : *channels_.down;
    channel.start(context, lane_of(up), "receive", [&](ncclComm_t communicator, cudaStream_t stream) {
      check(
          ncclRecv(tensor.raw(), static_cast<size_t>(tensor.nbytes()), ncclInt8, from, communicator, stream));
    });
    channel.finish(context.gpu());
  }

  std::unique_ptr<GroupImpl> subgroup(std::span<const int> members) override {
    auto host = host_->subgroup(members);
    const auto mine = std::find(members.begin(), members.end(), rank());
    // A group of one has nobody to talk to: a communicator would take memory and time for nothing.
    const int color = members.size() < 2 ? -1 : members.front();
    const int key = static_cast<int>(mine - members.begin());
    Channels channels;
    if (size() > 1) {
      channels = {.collective = channels_.collective->split(color, key, "collectives"),
                  .up = channels_.collective->split(color, key, "messages up"),
                  .down = channels_.collective->split(color, key, "messages down")};
    }
    if (host == nullptr) return nullptr;
    return std::make_unique<NcclGroup>(context_, std::move(host), std::move(channels));
  }

 private:
  static TraceLane lane_of(bool up) { return up ? TraceLane::gpu_messages_up : TraceLane::gpu_messages_down; }

  class Kept final : public CommRequest::Impl {
   public:
    void wait() override {}
  };

  std::unique_ptr<CommRequest::Impl> keep_for_self(const Tensor& tensor) {
    const Tensor copied = context_.empty(tensor.shape(), tensor.dtype(), MemoryUse::communication);
    copy(context_, tensor, copied);
    to_self_.push_back(copied);
    return std::make_unique<Kept>();
  }

  void take_from_self(Context& context, const Tensor& tensor) {
    NF_CHECK(!to_self_.empty(), "a message to itself was awaited that was not sent");
    copy(context, to_self_.front(), tensor);
    to_self_.pop_front();
  }

  Context& context_;
  std::unique_ptr<GroupImpl> host_;
  Channels channels_;
  std::deque<Tensor> to_self_;
};

std::unique_ptr<Channel> join_world(GroupImpl& host, const std::shared_ptr<NcclWatch>& watch) {
  ncclUniqueId id{};
  if (host.rank() == 0) check(ncclGetUniqueId(&id));
  host.broadcast(reinterpret_cast<std::byte*>(&id), sizeof(id), 0);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t made = nullptr;
  check(ncclCommInitRankConfig(&made, host.size(), id, host.rank(), &config));
  return std::make_unique<Channel>(made, watch, "the world's collectives");
}

}  // namespace

std::string describe_nccl() {
  int version = 0;
  check(ncclGetVersion(&version));
  return fmt::format("NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

bool has_nccl() { return true; }

Group make_nccl_world(Context& context, const Group& over, double timeout_seconds) {
  auto host = over.duplicate_transport();
  const auto watch = std::make_shared<NcclWatch>(timeout_seconds);
  Channels channels{.collective = join_world(*host, watch), .up = nullptr, .down = nullptr};
  channels.up = channels.collective->split(0, host->rank(), "the world's messages up");
  channels.down = channels.collective->split(0, host->rank(), "the world's messages down");
  auto impl = std::make_unique<NcclGroup>(context, std::move(host), std::move(channels));
  return Group(std::move(impl), {over.name(), over.world_ranks()}, over.shared_ledger());
}

}  // namespace normformer
