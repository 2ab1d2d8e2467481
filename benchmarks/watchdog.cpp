// What it costs that a rank is watched: nanoseconds of each sign of progress, and the processor's time of the
// watchdog's two threads. Held against the empty loop.
//
//   bench_watchdog FOLDER [--seconds 5]     the ledger and the heartbeat lie in the folder

#include "normformer/training/watchdog.h"

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include <CLI/CLI.hpp>

#include "normformer/comm/group.h"
#include "normformer/core/activity.h"

#include "best_time.h"

namespace {

using namespace normformer;
using benchmarks::Clock;

template <class Call>
void measure(const char* what, Call&& call) {
  constexpr int kCalls = 100000;
  const auto many = [&] {
    for (int i = 0; i < kCalls; ++i) {
      call();
      asm volatile("" ::: "memory");
    }
  };
  const auto nothing = [] {
    for (int i = 0; i < kCalls; ++i) asm volatile("" ::: "memory");
  };
  const auto best = benchmarks::best_times(Clock::thread, 1.0, many, nothing);
  std::printf("%-46s %7.1f ns\n", what, 1e9 * (best.ours - best.ceiling) / kCalls);
}

double process_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void run(const std::filesystem::path& folder, double seconds) {
  const auto ledger = std::make_shared<LedgerFile>(folder / ledger_file_name(0), 0, 2);
  const auto group = std::make_shared<GroupMembers>(GroupMembers{"world", {0, 1}});
  Context context(DeviceKind::meta);
  const auto span = [&] { const TraceScope scope(context, TraceKind::operation, "matmul"); };
  const auto call = [&] { ledger->complete(ledger->issue({group, "all_reduce", 64})); };
  measure("a span, not watched", span);
  Watchdog watchdog({.limit_seconds = 600.0, .run_folder = folder, .ledgers = folder, .updates = 1});
  watchdog.open(ledger);
  measure("a span, watched", span);
  measure("note_activity", note_activity);
  measure("a call entered in the ledger and marked done", call);
  measure("an update made", [&] { watchdog.finish_update(1, 2.0); });
  const double before = process_seconds();
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  std::printf("%-46s %7.1f microseconds of a processor a second\n", "the watchdog's threads",
              1e6 * (process_seconds() - before) / seconds);
  watchdog.end(RunState::finished);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"What it costs that a rank is watched"};
  std::string folder;
  double seconds = 5.0;
  app.add_option("folder", folder)->required()->check(CLI::ExistingDirectory);
  app.add_option("--seconds", seconds)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  run(folder, seconds);
  return 0;
}
