#include "block.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <source_location>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "faults.h"
#include "fibers.h"
#include "shared_arena.h"
#include "simt/kernel.h"
#include "symbols.h"

namespace simt {

namespace {

using detail::Meeting;

/// Lanes of one warp that meet under one mask. No lane can come to the next meeting but one before all have
/// come to the next, and so have read what was handed in at this one: two buffers are enough.
struct Group {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned line = 0;
  Meeting what = Meeting::sync;
  bool odd = false;  ///< which buffer the meeting under way fills; the other may still be read
  uint32_t bytes = 0;
  std::unique_ptr<std::byte[]> buffers;

  static constexpr size_t kBuffer = kWarp * detail::kMostBytes;
};

struct Warp {
  std::vector<Group> groups;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  enum class State : uint8_t { unstarted, ready, at_barrier, at_meeting, exited };

  State state = State::unstarted;
  Fiber* fiber = nullptr;
  uint3 index{};
  std::source_location where;
  std::vector<Copy> copies;
};

std::string_view name_of(Meeting what) {
  switch (what) {
    case Meeting::sync:
      return "__syncwarp";
    case Meeting::shuffle:
      return "__shfl_sync";
    case Meeting::shuffle_up:
      return "__shfl_up_sync";
    case Meeting::shuffle_down:
      return "__shfl_down_sync";
    case Meeting::shuffle_xor:
      return "__shfl_xor_sync";
    case Meeting::vote:
      return "a vote";
    case Meeting::exchange:
      return "a warp's instruction";
  }
  return "?";
}

std::string to_string(const std::source_location& where) {
  return fmt::format("{}:{}", where.file_name(), where.line());
}

// "0-31, 40": numbers in ascending order.
std::string list_of(const std::vector<unsigned>& numbers) {
  std::string list;
  for (size_t begin = 0; begin < numbers.size();) {
    size_t end = begin + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!list.empty()) list += ", ";
    list += end - begin == 1 ? fmt::format("{}", numbers[begin])
                             : fmt::format("{}-{}", numbers[begin], numbers[end - 1]);
    begin = end;
  }
  return list;
}

std::string describe_waiting(const Thread& thread) {
  switch (thread.state) {
    case Thread::State::at_barrier:
      return "wait at __syncthreads in " + to_string(thread.where);
    case Thread::State::at_meeting:
      return "wait for lanes of their warp in " + to_string(thread.where);
    default:
      return "have exited";
  }
}

/// Runs blocks one after another on one host thread. A fiber runs threads one after another until one has to
/// wait; that thread keeps the fiber, and another fiber goes on with the threads not yet started.
class Runner {
 public:
  void run(const Launch& launch);

  void wait_for_block(std::source_location where);
  const void* meet(Meeting what, unsigned mask, const void* mine, size_t bytes, std::source_location where);
  std::vector<Copy>& copies() { return threads_[detail::thread_number].copies; }
  void* shared() const { return arena_.data(); }
  std::thread::id host_thread() const { return host_thread_; }
  std::string describe_thread(unsigned number) const;
  std::string describe_address(const void* address) const;

 private:
  static void run_threads_on_fiber(void* runner) { static_cast<Runner*>(runner)->run_threads(); }

  void start_block();
  void run_block();
  void check_block();
  [[noreturn]] void run_threads();
  void run_thread(unsigned number);
  uint3 index_of(unsigned number) const;

  void enter(unsigned number);
  Fiber& next_fiber();
  Fiber* take_idle();
  void wait(Thread::State state, std::source_location where);
  void make_ready(unsigned number);
  template <class Numbers>
  void release(unsigned self, Thread::State state, unsigned first, unsigned count, const Numbers& takes_part);
  Group& group(unsigned warp, unsigned mask);
  void start_meeting(Group& group, Meeting what, size_t bytes, std::source_location where);
  void check_meeting(const Group& group, Meeting what, size_t bytes, std::source_location where) const;
  unsigned lanes_of_warp(unsigned warp) const;
  bool has_ready() const { return ready_begin_ != ready_end_; }

  [[noreturn]] void rethrow_failure();
  [[noreturn]] void fail_waiting();
  void forget_waiting();
  void restart_fibers();
  std::string describe_block() const;

  const Launch* launch_ = nullptr;
  unsigned count_ = 0;  ///< threads of the block
  unsigned started_ = 0;
  unsigned exited_ = 0;
  bool backwards_ = false;  ///< the order in which threads start
  unsigned phase_ = 0;      ///< changes the order at every meeting

  unsigned at_barrier_ = 0;
  unsigned barrier_line_ = 0;

  std::array<Thread, kMostThreads> threads_;
  std::array<Warp, kMostThreads / kWarp> warps_;
  // Threads that can go on, oldest first.
  std::array<uint16_t, kMostThreads> ready_{};
  unsigned ready_begin_ = 0;
  unsigned ready_end_ = 0;

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::optional<Fiber> host_;
  Fiber* running_ = nullptr;
  std::thread::id host_thread_;
  std::exception_ptr failure_;
  unsigned failed_thread_ = 0;
  SharedArena arena_;
};

thread_local constinit Runner* current = nullptr;

uint3 Runner::index_of(unsigned number) const {
  const dim3& block = launch_->block;
  if (block.y == 1 && block.z == 1) return {number, 0, 0};
  return {number % block.x, number / block.x % block.y, number / block.x / block.y};
}

std::string Runner::describe_block() const {
  return fmt::format("kernel {}, block ({}, {}, {})", name_of_function(launch_->kernel), blockIdx.x,
                     blockIdx.y, blockIdx.z);
}

std::string Runner::describe_thread(unsigned number) const {
  const uint3 index = index_of(number);
  return fmt::format("{}, thread ({}, {}, {})", describe_block(), index.x, index.y, index.z);
}

std::string Runner::describe_address(const void* address) const {
  if (arena_.guards(address)) {
    return fmt::format(": outside of its {} bytes of dynamic shared memory", launch_->shared_bytes);
  }
  const bool stack =
      std::any_of(fibers_.begin(), fibers_.end(), [=](const auto& f) { return f->guards(address); });
  return stack ? ": out of its stack" : "";
}

void Runner::run(const Launch& launch) {
  launch_ = &launch;
  host_.emplace();
  count_ = launch.block.x * launch.block.y * launch.block.z;
  blockDim = launch.block;
  gridDim = launch.grid;
  // Fibers that served another host thread know the addresses of its thread-local variables.
  if (std::exchange(host_thread_, std::this_thread::get_id()) != std::this_thread::get_id()) restart_fibers();
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = launch.backwards ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(block % launch.grid.x),
                static_cast<unsigned>(block / launch.grid.x % launch.grid.y),
                static_cast<unsigned>(block / launch.grid.x / launch.grid.y)};
    backwards_ = (block & 1) != 0;
    start_block();
    run_block();
    check_block();
  }
}

void Runner::start_block() {
  started_ = exited_ = at_barrier_ = phase_ = 0;
  ready_begin_ = ready_end_ = 0;
  for (unsigned t = 0; t < count_; ++t) threads_[t].state = Thread::State::unstarted;
  arena_.prepare(launch_->shared_bytes);
}

void Runner::run_block() {
  running_ = take_idle();
  running_->switch_from(*host_);
}

void Runner::check_block() {
  if (failure_ != nullptr) {
    forget_waiting();
    rethrow_failure();
  }
  if (exited_ != count_) fail_waiting();
  if (!arena_.intact()) {
    throw std::logic_error(fmt::format("{} wrote outside of its {} bytes of dynamic shared memory",
                                       describe_block(), launch_->shared_bytes));
  }
}

void Runner::rethrow_failure() {
  const std::string thread = describe_thread(failed_thread_);
  try {
    std::rethrow_exception(std::exchange(failure_, nullptr));
  } catch (const std::exception& e) {
    std::throw_with_nested(std::logic_error(thread + ": " + e.what()));
  } catch (...) {
    std::throw_with_nested(std::logic_error(thread + ": an exception of unknown type"));
  }
}

// "threads 0-31 wait at __syncthreads in f.cu:12; threads 32-63 have exited"
void Runner::fail_waiting() {
  std::map<std::string, std::vector<unsigned>> alike;
  for (unsigned t = 0; t < count_; ++t) alike[describe_waiting(threads_[t])].push_back(t);
  std::string text;
  for (const auto& [doing, numbers] : alike) {
    text += fmt::format("{}threads {} {}", text.empty() ? "" : "; ", list_of(numbers), doing);
  }
  forget_waiting();
  throw std::logic_error(fmt::format("{} waits for ever: {}", describe_block(), text));
}

// Threads of a failed block keep what they had on their stacks; fibers and warps start afresh.
void Runner::forget_waiting() {
  restart_fibers();
  for (Warp& warp : warps_) warp.groups.clear();
}

void Runner::restart_fibers() {
  idle_.clear();
  for (const auto& fiber : fibers_) {
    fiber->restart(&Runner::run_threads_on_fiber, this);
    idle_.push_back(fiber.get());
  }
}

void Runner::run_threads() {
  for (;;) {
    if (failure_ == nullptr && !has_ready() && started_ < count_) {
      const unsigned number = backwards_ ? count_ - 1 - started_ : started_;
      ++started_;
      run_thread(number);
    } else {
      Fiber& self = *running_;
      idle_.push_back(&self);
      Fiber& next = failure_ == nullptr && has_ready() ? next_fiber() : *host_;
      running_ = &next;
      next.switch_from(self);
    }
  }
}

void Runner::run_thread(unsigned number) {
  Thread& thread = threads_[number];
  thread.index = index_of(number);
  thread.fiber = running_;
  thread.state = Thread::State::ready;
  thread.copies.clear();
  enter(number);
  try {
    launch_->call->run_thread();
  } catch (...) {
    failure_ = std::current_exception();
    failed_thread_ = number;
  }
  thread.state = Thread::State::exited;
  ++exited_;
}

void Runner::enter(unsigned number) {
  threadIdx = threads_[number].index;
  detail::thread_number = number;
}

// The fiber of the oldest thread that can go on, its thread entered.
Fiber& Runner::next_fiber() {
  const unsigned number = ready_[ready_begin_++ % kMostThreads];
  enter(number);
  return *threads_[number].fiber;
}

Fiber* Runner::take_idle() {
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(static_cast<int>(fibers_.size())));
    fibers_.back()->restart(&Runner::run_threads_on_fiber, this);
    return fibers_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void Runner::make_ready(unsigned number) {
  threads_[number].state = Thread::State::ready;
  ready_[ready_end_++ % kMostThreads] = static_cast<uint16_t>(number);
}

void Runner::wait(Thread::State state, std::source_location where) {
  Thread& self = threads_[detail::thread_number];
  self.state = state;
  self.where = where;
  Fiber& next = has_ready() ? next_fiber() : started_ < count_ ? *take_idle() : *host_;
  running_ = &next;
  next.switch_from(*self.fiber);
}

template <class Numbers>
void Runner::release(unsigned self, Thread::State state, unsigned first, unsigned count,
                     const Numbers& takes_part) {
  const bool backwards = (++phase_ & 1) != 0;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned number = first + (backwards ? count - 1 - i : i);
    if (number != self && threads_[number].state == state && takes_part(number)) make_ready(number);
  }
}

void Runner::wait_for_block(std::source_location where) {
  if (at_barrier_ == 0) {
    barrier_line_ = where.line();
  } else if (barrier_line_ != where.line()) {
    throw std::logic_error(fmt::format("waits at __syncthreads in {} while others wait at the one in line {}",
                                       to_string(where), barrier_line_));
  }
  if (++at_barrier_ < count_) {
    wait(Thread::State::at_barrier, where);
  } else {
    at_barrier_ = 0;
    release(detail::thread_number, Thread::State::at_barrier, 0, count_, [](unsigned) { return true; });
  }
}

unsigned Runner::lanes_of_warp(unsigned warp) const {
  const unsigned lanes = count_ - warp * kWarp;
  return lanes >= kWarp ? ~0u : (1u << lanes) - 1;
}

Group& Runner::group(unsigned warp, unsigned mask) {
  std::vector<Group>& groups = warps_[warp].groups;
  for (Group& g : groups) {
    if (g.mask == mask) return g;
  }
  Group made;
  made.mask = mask;
  made.buffers = std::make_unique_for_overwrite<std::byte[]>(2 * Group::kBuffer);
  groups.push_back(std::move(made));
  return groups.back();
}

void Runner::start_meeting(Group& group, Meeting what, size_t bytes, std::source_location where) {
  const unsigned number = detail::thread_number;
  if ((group.mask >> number % kWarp & 1u) == 0) {
    throw std::logic_error(fmt::format("lane {} calls {} for the lanes of mask {:#x} in {}", number % kWarp,
                                       name_of(what), group.mask, to_string(where)));
  }
  if ((group.mask & ~lanes_of_warp(number / kWarp)) != 0) {
    throw std::logic_error(fmt::format("{} for mask {:#x} in {}, but the block's last warp has only {} lanes",
                                       name_of(what), group.mask, to_string(where), count_ % kWarp));
  }
  if (bytes > detail::kMostBytes) {
    throw std::logic_error(fmt::format("{} bytes from each lane in {}", bytes, to_string(where)));
  }
  group.what = what;
  group.bytes = static_cast<uint32_t>(bytes);
  group.line = where.line();
}

void Runner::check_meeting(const Group& group, Meeting what, size_t bytes, std::source_location where) const {
  if ((group.mask >> detail::thread_number % kWarp & 1u) == 0 || group.what != what || group.bytes != bytes ||
      group.line != where.line()) {
    throw std::logic_error(fmt::format("{} of {} bytes in {} meets {} of {} bytes in line {}", name_of(what),
                                       bytes, to_string(where), name_of(group.what), group.bytes,
                                       group.line));
  }
}

const void* Runner::meet(Meeting what, unsigned mask, const void* mine, size_t bytes,
                         std::source_location where) {
  const unsigned number = detail::thread_number;
  const unsigned lane = number % kWarp;
  Group& met = group(number / kWarp, mask);
  if (met.arrived == 0) {
    start_meeting(met, what, bytes, where);
  } else {
    check_meeting(met, what, bytes, where);
  }
  std::byte* all = met.buffers.get() + (met.odd ? Group::kBuffer : 0);
  if (bytes == 4) {
    std::memcpy(all + lane * 4, mine, 4);
  } else if (bytes != 0) {
    std::memcpy(all + lane * bytes, mine, bytes);
  }
  met.arrived |= 1u << lane;
  if (met.arrived != mask) {
    wait(Thread::State::at_meeting, where);
  } else {
    met.arrived = 0;
    met.odd = !met.odd;
    release(number, Thread::State::at_meeting, number - lane, std::min(kWarp, count_ - (number - lane)),
            [=](unsigned other) { return (mask >> other % kWarp & 1u) != 0; });
  }
  return all;
}

/// Runners that no host thread uses now.
class RunnerPool {
 public:
  /// The one that served this host thread last where it is there: it need not restart its fibers.
  std::unique_ptr<Runner> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Runner>();
    auto chosen = std::find_if(free_.begin(), free_.end(),
                               [](const auto& r) { return r->host_thread() == std::this_thread::get_id(); });
    if (chosen == free_.end()) chosen = std::prev(free_.end());
    std::unique_ptr<Runner> runner = std::move(*chosen);
    free_.erase(chosen);
    return runner;
  }

  void give(std::unique_ptr<Runner> runner) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(runner));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Runner>> free_;
};

RunnerPool& pool() {
  static RunnerPool runners;
  return runners;
}

/// A runner for this host thread while it runs a launch.
class Lease {
 public:
  Lease() : runner_(pool().take()) { current = runner_.get(); }
  ~Lease() {
    current = nullptr;
    pool().give(std::move(runner_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

 private:
  std::unique_ptr<Runner> runner_;
};

Runner& running() {
  if (current == nullptr) throw std::logic_error("a function of kernels was called outside of a kernel");
  return *current;
}

}  // namespace

void run(const Launch& launch) {
  explain_faults();
  const Lease lease;
  current->run(launch);
}

bool in_kernel() { return current != nullptr; }

std::string describe_running() { return running().describe_thread(detail::thread_number); }

std::string describe_address_of_block(const void* address) {
  return current == nullptr ? std::string() : current->describe_address(address);
}

void* dynamic_shared_memory() { return running().shared(); }

void warp_exchange(const void* mine, size_t bytes, void* all, std::source_location where) {
  std::memcpy(all, warp_view(mine, bytes, where), bytes * kWarp);
}

void begin_copy(void* to, const void* from, size_t bytes) {
  running().copies().push_back({to, from, bytes});
  std::memset(to, 0xFF, bytes);
}

void wait_for_copies() {
  for (const Copy& copy : std::exchange(running().copies(), {})) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

namespace detail {

void wait_for_block(std::source_location where) { running().wait_for_block(where); }

const void* meet(Meeting what, unsigned mask, const void* mine, size_t bytes, std::source_location where) {
  return running().meet(what, mask, mine, bytes, where);
}

void bad_source_lane(int source, unsigned mask, std::source_location where) {
  throw std::logic_error(
      fmt::format("lane {} is read in {}, which is not in mask {:#x}", source, to_string(where), mask));
}

}  // namespace detail

}  // namespace simt

unsigned __ballot_sync(unsigned mask, int predicate, std::source_location where) {
  const uint32_t mine = predicate != 0 ? 1 : 0;
  const auto* all = static_cast<const uint32_t*>(
      simt::detail::meet(simt::detail::Meeting::vote, mask, &mine, sizeof(mine), where));
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0) votes |= all[lane] << lane;
  }
  return votes;
}
