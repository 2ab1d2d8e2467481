#include "normformer/training/watchdog.h"

#include <algorithm>
#include <climits>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include "normformer/core/error.h"
#include "normformer/core/stack_traces.h"

#include "hang_report.h"

namespace normformer {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// How often one looks: ten times a limit, and once a second at least.
nanoseconds interval_of(double limit_seconds) {
  if (limit_seconds <= 0.0) return std::chrono::seconds(1);
  return nanoseconds(static_cast<int64_t>(1e9 * std::clamp(limit_seconds / 10.0, 0.01, 1.0)));
}

void become_part_of(int rank) {
  set_rank_label(rank, host_name());
  pthread_setname_np(pthread_self(), "watchdog");  // left out of what threads are in
}

// What `work` returns, if it does so in time; else it is left behind.
template <class Work>
auto within(nanoseconds most, int rank, Work work) -> std::optional<decltype(work())> {
  std::packaged_task<decltype(work())()> task([rank, work] {
    become_part_of(rank);
    return work();
  });
  auto result = task.get_future();
  std::thread(std::move(task)).detach();
  if (result.wait_for(most) != std::future_status::ready) return std::nullopt;
  return result.get();
}

// Prints as much as can be printed without waiting for who reads it.
void print_if_read(std::string_view text) {
  pollfd stream{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  while (!text.empty() && poll(&stream, 1, 0) == 1 && (stream.revents & POLLOUT) != 0) {
    const ssize_t written = write(STDERR_FILENO, text.data(), std::min<size_t>(text.size(), PIPE_BUF));
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

// mpirun drops what a rank has written and it has not read when the job is aborted.
constexpr auto kLastWords = milliseconds(200);

}  // namespace

Watchdog::Watchdog(WatchdogOptions options)
    : options_(std::move(options)), heartbeat_file_(options_.run_folder / "heartbeat.json") {
  prepare_stack_traces();
  count_activity_in(&activity_);
  if (options_.limit_seconds > 0.0) looking_ = std::thread([this] { look(); });
  giving_signs_ = std::thread([this] { give_signs(); });
}

Watchdog::~Watchdog() {
  RunState expected = RunState::running;
  state_.compare_exchange_strong(expected, RunState::failed);
  tell(run_is_over_);
  giving_signs_.join();  // which may wait for a disk, while the other looks
  tell(signs_are_given_);
  if (looking_.joinable()) looking_.join();
  count_activity_in(nullptr);
}

void Watchdog::tell(bool& what) {
  {
    const std::lock_guard lock(mutex_);
    what = true;
  }
  wake_.notify_all();
}

// False once `until` is true.
bool Watchdog::wait(nanoseconds time, const bool& until) {
  std::unique_lock lock(mutex_);
  return !wake_.wait_for(lock, time, [&] { return until; });
}

void Watchdog::open(std::shared_ptr<LedgerFile> ledger) {
  owned_ledger_ = std::move(ledger);
  if (owned_ledger_) owned_ledger_->enter_phase(phase_);
  ledger_.store(owned_ledger_.get(), std::memory_order_release);
  has_folder_.store(true, std::memory_order_release);
}

RunPhase Watchdog::enter(RunPhase phase) noexcept {
  note_activity();
  if (LedgerFile* ledger = ledger_.load(std::memory_order_acquire)) ledger->enter_phase(phase);
  return phase_.exchange(phase, std::memory_order_relaxed);
}

void Watchdog::finish_update(int64_t update, double loss) noexcept {
  note_activity();
  loss_.store(loss, std::memory_order_relaxed);
  update_.store(update, std::memory_order_release);
}

void Watchdog::end(RunState state) noexcept { state_.store(state, std::memory_order_relaxed); }

uint64_t Watchdog::progress() const noexcept {
  const LedgerFile* ledger = ledger_.load(std::memory_order_acquire);
  return activity_.load(std::memory_order_relaxed) + (ledger == nullptr ? 0 : ledger->activity());
}

Heartbeat Watchdog::heartbeat() const noexcept {
  const int64_t update = update_.load(std::memory_order_acquire);
  return {.state = state_, .phase = phase_, .update = update, .updates = options_.updates, .loss = loss_};
}

void Watchdog::write_heartbeat() {
  const std::lock_guard lock(heartbeat_mutex_);
  heartbeat_file_.write(heartbeat());
}

void Watchdog::look() {
  become_part_of(options_.rank);
  const nanoseconds interval = interval_of(options_.limit_seconds);
  uint64_t known = progress();
  nanoseconds still{0};
  Clock::time_point before = Clock::now();
  while (wait(interval, signs_are_given_)) {
    const Clock::time_point now = Clock::now();
    // A longer wait than asked for: this process did not run, or hardly; nothing could go on then.
    still += std::min(nanoseconds(now - before), 2 * interval);
    before = now;
    if (const uint64_t progressed = progress(); progressed != known) {
      known = progressed;
      still = nanoseconds(0);
    }
    still_ns_.store(still.count(), std::memory_order_relaxed);
    const double seconds = std::chrono::duration<double>(still).count();
    if (seconds >= options_.limit_seconds) end_job(seconds);
  }
}

void Watchdog::give_signs() {
  become_part_of(options_.rank);
  constexpr auto kAfterUpdate = std::chrono::seconds(1);
  constexpr auto kAtMost = std::chrono::seconds(5);
  Heartbeat written;
  Clock::time_point written_at{};
  for (bool goes_on = true; goes_on;) {
    goes_on =
        wait(std::min(nanoseconds(kAfterUpdate) / 2, interval_of(options_.limit_seconds)), run_is_over_);
    if (LedgerFile* ledger = ledger_.load(std::memory_order_acquire)) ledger->sign_of_life(still_ns_);
    if (options_.rank != 0 || !has_folder_.load(std::memory_order_acquire)) continue;
    const Heartbeat now = heartbeat();
    const auto age = Clock::now() - written_at;
    const bool is_news = now.update != written.update || now.phase != written.phase;
    if (goes_on && age < (is_news ? kAfterUpdate : kAtMost)) continue;
    write_heartbeat();
    written = now;
    written_at = Clock::now();
  }
}

// Whatever a disk or a terminal does, the job ends: what may wait for one has a thread of its own and so much
// time.
void Watchdog::end_job(double seconds) {
  const bool has_folder = has_folder_.load(std::memory_order_acquire);
  const Hang hang{.run_folder = options_.run_folder,
                  .ledgers = has_folder ? options_.ledgers : std::filesystem::path(),
                  .rank = options_.rank,
                  .limit_seconds = options_.limit_seconds,
                  .seconds = seconds,
                  .phase = phase_,
                  .update = update_};
  state_ = RunState::hang;
  const nanoseconds patience(static_cast<int64_t>(1e9 * options_.patience_seconds));
  const std::string stacks = within(patience, options_.rank, [] {
                               return stack_traces("watchdog");
                             }).value_or("this could not be found out\n");
  const bool told = within(patience, options_.rank, [this, hang, stacks] {
                      if (hang.rank == 0 && !hang.ledgers.empty()) write_heartbeat();
                      tell_hang(hang, stacks);
                      return true;
                    }).value_or(false);
  if (!told) {
    print_if_read(
        fmt::format("normformer: {}; the job ends. The disk of {} does not answer. Rank {} is in:\n{}",
                    sentence_of(hang), hang.run_folder.string(), hang.rank, stacks));
  }
  std::this_thread::sleep_for(kLastWords);
  _exit(static_cast<int>(ExitCode::hang));
}

}  // namespace normformer
