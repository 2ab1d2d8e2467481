// Ranks as threads. Everything is made of one thing: a message posted by one rank and copied, straight from
// the sender's memory, by the rank that takes it. A sender waits until its messages have been copied.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// Messages of exchanges have tags of their own.
constexpr int tag_of_exchange(int number) { return -1 - number; }

struct Message {
  enum class State { posted, copying, copied };
  const std::byte* data;
  int64_t bytes;
  Tensor keep_alive;  // undefined where the sender outwaits the copy
  State state = State::posted;
};

// Where a message waits to be taken; ranks are world ranks.
struct Address {
  int group;
  int from;
  int to;
  int tag;
  auto operator<=>(const Address&) const = default;

  std::string describe() const {
    return tag < 0 ? fmt::format("a collective's message from rank {}", from)
                   : fmt::format("a message with tag {} from rank {}", tag, from);
  }
};

// What all threads of a world share. A rank waits on a condition variable of its own.
class LocalWorld {
 public:
  explicit LocalWorld(int ranks) : wake_(static_cast<size_t>(ranks)), waiting_(static_cast<size_t>(ranks)) {}

  // The number of the group of `first_member` that came from the `split`-th split of group `parent`; the same
  // for all its ranks, whichever asks first.
  int group_number(int parent, int split, int first_member) {
    const std::lock_guard lock(mutex_);
    const auto next = static_cast<int>(groups_.size()) + 1;
    return groups_.try_emplace({parent, split, first_member}, next).first->second;
  }

  void post(const Address& address, const std::shared_ptr<Message>& message) {
    const std::lock_guard lock(mutex_);
    mail_[address].push_back(message);
    wake_[static_cast<size_t>(address.to)].notify_all();
  }

  // Waits for the next message at `address` and copies it.
  void take(const Address& address, std::byte* data, int64_t bytes) {
    std::unique_lock lock(mutex_);
    wait(
        lock, address.to, [&] { return mail_.contains(address); }, [&] { return address.describe(); });
    copy_next(lock, address, data, bytes);
  }

  // Copies the next message at `address` if it is there; says whether it was.
  bool take_if_there(const Address& address, std::byte* data, int64_t bytes) {
    std::unique_lock lock(mutex_);
    throw_failure(address.to);
    if (!mail_.contains(address)) return false;
    copy_next(lock, address, data, bytes);
    return true;
  }

  bool is_copied(const Address& address, const Message& message) {
    const std::lock_guard lock(mutex_);
    throw_failure(address.from);
    return message.state == Message::State::copied;
  }

  // Counts what ranks have started and look after without waiting: as long as there is any, a rank that waits
  // may yet be helped.
  void count_transfers(int change) {
    const std::lock_guard lock(mutex_);
    transfers_ += change;
    fail_if_nobody_can_go_on();
  }

  // Waits until somebody has copied what this rank posted at `address`.
  void await_copied(const Address& address, const Message& message) {
    std::unique_lock lock(mutex_);
    wait(
        lock, address.from, [&] { return message.state == Message::State::copied; },
        [&] { return fmt::format("rank {} to take what it sent", address.to); });
  }

  // Waits out a copy under way, so that the memory can go. Nobody begins one once the world has failed.
  void await_untouched(int rank, const Message& message) {
    std::unique_lock lock(mutex_);
    wake_[static_cast<size_t>(rank)].wait(lock, [&] { return message.state != Message::State::copying; });
  }

  // Every rank's wait ends now. Keeps the first failure.
  void fail(int rank, const std::exception_ptr& failure, const std::string& what) {
    const std::lock_guard lock(mutex_);
    fail_locked(failure, fmt::format("rank {} failed: {}", rank, what));
  }

  // A rank's body has ended; nobody will hear from it again.
  void finish() {
    const std::lock_guard lock(mutex_);
    ++finished_;
    fail_if_nobody_can_go_on();
  }

  std::exception_ptr failure() {
    const std::lock_guard lock(mutex_);
    return failure_;
  }

 private:
  struct Waiter {
    std::function<bool()> ready;
    std::function<std::string()> what;
  };

  void throw_failure(int rank) const {
    if (failure_) throw CommError(fmt::format("rank {} stops waiting: {}", rank, why_));
  }

  // Gives up the lock while it copies.
  void copy_next(std::unique_lock<std::mutex>& lock, const Address& address, std::byte* data, int64_t bytes) {
    const auto found = mail_.find(address);
    const std::shared_ptr<Message> message = found->second.front();
    if (message->bytes != bytes) {
      throw CommError(fmt::format("rank {} takes {}: {} bytes where it expects {}", address.to,
                                  address.describe(), message->bytes, bytes));
    }
    found->second.pop_front();
    if (found->second.empty()) mail_.erase(found);
    message->state = Message::State::copying;
    lock.unlock();
    if (bytes > 0) std::memcpy(data, message->data, static_cast<size_t>(bytes));
    lock.lock();
    message->state = Message::State::copied;
    wake_[static_cast<size_t>(address.from)].notify_all();
  }

  void fail_locked(const std::exception_ptr& failure, const std::string& why) {
    if (failure_) return;
    failure_ = failure;
    why_ = why;
    for (auto& wake : wake_) wake.notify_all();
  }

  void wait(std::unique_lock<std::mutex>& lock, int rank, std::function<bool()> ready,
            std::function<std::string()> what) {
    auto& mine = waiting_[static_cast<size_t>(rank)];
    if (!failure_ && !ready()) {
      mine = Waiter{ready, std::move(what)};
      ++blocked_;
      fail_if_nobody_can_go_on();
      wake_[static_cast<size_t>(rank)].wait(lock, [&] { return failure_ || ready(); });
      --blocked_;
      mine.reset();
    }
    throw_failure(rank);
  }

  void fail_if_nobody_can_go_on() {
    if (blocked_ == 0 || transfers_ > 0 || blocked_ + finished_ < static_cast<int>(waiting_.size())) return;
    std::string why = "every rank waits";
    for (size_t r = 0; r < waiting_.size(); ++r) {
      if (!waiting_[r]) {
        why += fmt::format("; rank {} has ended", r);
        continue;
      }
      if (waiting_[r]->ready()) return;
      why += fmt::format("; rank {} for {}", r, waiting_[r]->what());
    }
    fail_locked(std::make_exception_ptr(CommError(why)), why);
  }

  std::mutex mutex_;
  std::vector<std::condition_variable> wake_;   // by rank
  std::vector<std::optional<Waiter>> waiting_;  // by rank; whom nothing holds up has none
  std::map<Address, std::deque<std::shared_ptr<Message>>> mail_;
  std::map<std::tuple<int, int, int>, int> groups_;
  int blocked_ = 0;
  int finished_ = 0;
  int transfers_ = 0;
  std::exception_ptr failure_;
  std::string why_;
};

// Messages of a collective, in the memory of its caller: that memory must not go while one is being copied,
// even where the collective fails.
class PostedMessages {
 public:
  PostedMessages(LocalWorld& world, int rank) : world_(world), rank_(rank) {}
  PostedMessages(const PostedMessages&) = delete;
  PostedMessages& operator=(const PostedMessages&) = delete;
  ~PostedMessages() {
    for (const auto& [address, message] : posted_) world_.await_untouched(rank_, *message);
  }

  void post(const Address& address, const std::byte* data, int64_t bytes) {
    auto message = std::make_shared<Message>(Message{data, bytes, {}});
    world_.post(address, message);
    posted_.emplace_back(address, std::move(message));
  }

  void await_all() {
    for (const auto& [address, message] : posted_) world_.await_copied(address, *message);
  }

  bool are_copied() const {
    return std::all_of(posted_.begin(), posted_.end(),
                       [&](const auto& one) { return world_.is_copied(one.first, *one.second); });
  }

 private:
  LocalWorld& world_;
  int rank_;
  std::vector<std::pair<Address, std::shared_ptr<Message>>> posted_;
};

class LocalSend final : public CommRequest::Impl {
 public:
  LocalSend(std::shared_ptr<LocalWorld> world, const Address& address, std::shared_ptr<Message> message)
      : world_(std::move(world)), address_(address), message_(std::move(message)) {}
  void wait() override {
    world_->await_copied(address_, *message_);
    // The receiver may hold the message a little longer: its tensor goes here, on the sender's own thread, so
    // that what memory a rank holds does not depend on timing.
    message_->keep_alive = {};
  }

 private:
  std::shared_ptr<LocalWorld> world_;
  Address address_;
  std::shared_ptr<Message> message_;
};

// What a rank has started. Only test() copies into its memory; what it sends is called back with it.
class LocalTransfer final : public detail::Transfer {
 public:
  struct Arrival {
    Address address;
    std::byte* data;
    int64_t bytes;
  };

  LocalTransfer(std::shared_ptr<LocalWorld> world, int rank)
      : world_(std::move(world)), posted_(*world_, rank) {
    world_->count_transfers(1);
  }
  LocalTransfer(const LocalTransfer&) = delete;
  LocalTransfer& operator=(const LocalTransfer&) = delete;
  ~LocalTransfer() override {
    if (!done_) world_->count_transfers(-1);
  }

  void send(const Address& address, const std::byte* data, int64_t bytes) {
    posted_.post(address, data, bytes);
  }
  void receive(const Address& address, std::byte* data, int64_t bytes) {
    arrivals_.push_back({address, data, bytes});
  }

  bool test() override {
    if (done_) return true;
    std::erase_if(arrivals_,
                  [&](const Arrival& a) { return world_->take_if_there(a.address, a.data, a.bytes); });
    done_ = arrivals_.empty() && posted_.are_copied();
    if (done_) world_->count_transfers(-1);
    return done_;
  }

  bool may_be_dropped() const override { return true; }

 private:
  std::shared_ptr<LocalWorld> world_;
  PostedMessages posted_;
  std::vector<Arrival> arrivals_;
  bool done_ = false;
};

class LocalGroup final : public detail::GroupImpl {
 public:
  LocalGroup(std::shared_ptr<LocalWorld> world, int number, int rank, std::vector<int> members)
      : world_(std::move(world)), number_(number), rank_(rank), members_(std::move(members)) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }

  void exchange(std::span<const detail::Outgoing> sends, std::span<const detail::Incoming> receives,
                int number) override {
    const int tag = tag_of_exchange(number);
    PostedMessages posted(*world_, world_rank(rank_));
    for (const auto& out : sends) posted.post(address(rank_, out.to, tag), out.data, out.bytes);
    for (const auto& in : receives) world_->take(address(in.from, rank_, tag), in.data, in.bytes);
    posted.await_all();
  }

  std::unique_ptr<detail::Transfer> start_exchange(std::span<const detail::Outgoing> sends,
                                                   std::span<const detail::Incoming> receives,
                                                   int number) override {
    const int tag = tag_of_exchange(number);
    auto transfer = std::make_unique<LocalTransfer>(world_, world_rank(rank_));
    for (const auto& out : sends) transfer->send(address(rank_, out.to, tag), out.data, out.bytes);
    for (const auto& in : receives) transfer->receive(address(in.from, rank_, tag), in.data, in.bytes);
    return transfer;
  }

  std::unique_ptr<CommRequest::Impl> send(const Tensor& tensor, int to, int tag) override {
    auto message = std::make_shared<Message>(
        Message{static_cast<const std::byte*>(tensor.raw()), tensor.nbytes(), tensor});
    const Address there = address(rank_, to, tag);
    world_->post(there, message);
    return std::make_unique<LocalSend>(world_, there, std::move(message));
  }

  void receive(std::byte* data, int64_t bytes, int from, int tag) override {
    world_->take(address(from, rank_, tag), data, bytes);
  }

  std::unique_ptr<detail::Transfer> start_receive(std::byte* data, int64_t bytes, int from,
                                                  int tag) override {
    auto transfer = std::make_unique<LocalTransfer>(world_, world_rank(rank_));
    transfer->receive(address(from, rank_, tag), data, bytes);
    return transfer;
  }

  std::unique_ptr<detail::GroupImpl> subgroup(std::span<const int> members) override {
    const int split = splits_++;
    if (members.empty()) return nullptr;
    std::vector<int> world_members;
    int rank = -1;
    for (const int member : members) {
      if (member == rank_) rank = static_cast<int>(world_members.size());
      world_members.push_back(world_rank(member));
    }
    NF_CHECK(rank >= 0, "rank {} forms a group without itself", rank_);
    const int number = world_->group_number(number_, split, world_members.front());
    return std::make_unique<LocalGroup>(world_, number, rank, std::move(world_members));
  }

 private:
  int world_rank(int rank) const { return members_[static_cast<size_t>(rank)]; }
  Address address(int from, int to, int tag) const {
    return {number_, world_rank(from), world_rank(to), tag};
  }

  std::shared_ptr<LocalWorld> world_;
  int number_;
  int rank_;
  std::vector<int> members_;  // world ranks
  int splits_ = 0;
};

void run_rank(const std::shared_ptr<LocalWorld>& world, int rank, int ranks,
              const std::function<void(Group)>& body) {
  set_rank_label(rank, host_name());
  std::vector<int> everyone(static_cast<size_t>(ranks));
  std::iota(everyone.begin(), everyone.end(), 0);
  try {
    body(Group(std::make_unique<LocalGroup>(world, 0, rank, everyone), {"world", everyone},
               std::make_shared<TrafficLedger>()));
  } catch (const std::exception& e) {
    world->fail(rank, std::current_exception(), e.what());
  } catch (...) {
    world->fail(rank, std::current_exception(), "unknown exception");
  }
  world->finish();
}

}  // namespace

void run_local_world(int ranks, const std::function<void(Group)>& body) {
  NF_CHECK(ranks >= 1, "a world of {} ranks", ranks);
  const auto world = std::make_shared<LocalWorld>(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] { run_rank(world, rank, ranks, body); });
  }
  for (std::thread& thread : threads) thread.join();
  if (const auto failure = world->failure()) std::rethrow_exception(failure);
}

}  // namespace normformer
