#include "hang_report.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <fmt/chrono.h>
#include <unistd.h>

#include "normformer/comm/ledger_report.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

using std::chrono::milliseconds;

constexpr auto kPollTime = milliseconds(50);
constexpr auto kTimeForOthers = milliseconds(5000);  // to find the hang too and to write their stacks
constexpr size_t kRanksOnTerminal = 16;              // whose calls are shown there, too

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

std::string time_for_name() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  return fmt::format("{:%Y%m%dT%H%M%SZ}", fmt::gmtime(now));
}

void print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

// False, with a word on stderr, where the disk refuses.
bool write(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::trunc);
  file << text;
  if (file.flush()) return true;
  print(fmt::format("{}cannot write {}: {}\n", rank_prefix(), path.string(), system_reason()));
  return false;
}

std::filesystem::path stacks_of(const Hang& hang, int rank) {
  return hang.run_folder / fmt::format("stacks-rank-{:05}.txt", rank);
}

// Made by the one rank that reports; no longer empty once it has.
std::filesystem::path claim_of(const Hang& hang) { return hang.ledgers / "hang-report"; }

enum class Claim { mine, of_another, impossible };

Claim claim_report(const Hang& hang) {
  if (hang.ledgers.empty()) return Claim::impossible;
  const int file = open(claim_of(hang).c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
  if (file < 0) return errno == EEXIST ? Claim::of_another : Claim::impossible;
  close(file);
  return Claim::mine;
}

// The hang's own limit is longer than anything that clocks and network file systems do.
int64_t silent_after_ns(const Hang& hang) { return static_cast<int64_t>(0.5e9 * hang.limit_seconds); }

struct WholeRun {
  std::vector<RankLedger> ledgers;
  std::string problem;  // why they are not there
};

WholeRun read_run(const Hang& hang) {
  if (hang.ledgers.empty()) return {{}, "ranks have no ledgers yet"};
  try {
    return {read_ledgers(hang.ledgers), ""};
  } catch (const std::exception& e) {
    return {{}, e.what()};
  }
}

// Other ranks that will find the hang too: those that run and have not moved on, either.
std::vector<int> ranks_to_wait_for(const Hang& hang, const std::vector<RankLedger>& ledgers) {
  std::vector<int> others;
  const std::vector<AbsentRank> absent = find_absent(ledgers, silent_after_ns(hang));
  for (const RankLedger& ledger : ledgers) {
    const bool is_absent = std::any_of(absent.begin(), absent.end(),
                                       [&](const AbsentRank& rank) { return rank.rank == ledger.rank; });
    const double lacks = hang.limit_seconds - 1e-9 * static_cast<double>(ledger.still_ns);
    const bool finds_it_in_time =
        lacks < std::min(hang.limit_seconds / 2.0, std::chrono::duration<double>(kTimeForOthers).count());
    if (!is_absent && ledger.rank != hang.rank && ledger.ended_ns == 0 && finds_it_in_time)
      others.push_back(ledger.rank);
  }
  return others;
}

bool has_written_stacks(const Hang& hang, int rank, std::filesystem::file_time_type since) {
  std::error_code error;
  const auto time = std::filesystem::last_write_time(stacks_of(hang, rank), error);
  return !error && time >= since;
}

void wait_for_stacks(const Hang& hang, const std::vector<int>& ranks) {
  const auto recently = std::filesystem::file_time_type::clock::now() - std::chrono::minutes(1);
  const auto deadline = std::chrono::steady_clock::now() + kTimeForOthers;
  for (const int rank : ranks) {
    while (!has_written_stacks(hang, rank, recently) && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(kPollTime);
  }
}

void report_run(const Hang& hang, const std::string& stacks) {
  const WholeRun run = read_run(hang);
  const std::string diagnosis =
      run.problem.empty() ? report_diagnosis(run.ledgers, silent_after_ns(hang)) : run.problem + "\n";
  constexpr size_t kFewCalls = 4;
  const std::string calls = report_calls(run.ledgers, kFewCalls);
  const std::string begin = fmt::format("normformer: {}; the job ends\n{}", sentence_of(hang), diagnosis);
  const std::string end = fmt::format("What rank {} is in:\n{}", hang.rank, stacks);
  const std::filesystem::path path = hang.run_folder / fmt::format("hang-{}.txt", time_for_name());
  const bool written = write(path, begin + calls + end);
  print(begin + (run.ledgers.size() <= kRanksOnTerminal ? calls : "") + end +
        (written ? fmt::format("all of it is in {}, and what other ranks are in beside it, in "
                               "stacks-rank-*.txt\n",
                               path.string())
                 : ""));
  wait_for_stacks(hang, ranks_to_wait_for(hang, run.ledgers));
  write(claim_of(hang), path.filename().string() + "\n");
}

void wait_for_report(const Hang& hang) {
  constexpr auto kMost = 2 * kTimeForOthers;
  const auto deadline = std::chrono::steady_clock::now() + kMost;
  std::error_code error;
  while (std::filesystem::file_size(claim_of(hang), error) == 0 && !error &&
         std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(kPollTime);
}

}  // namespace

std::string sentence_of(const Hang& hang) {
  return fmt::format(
      "rank {} has made no progress for {:.1f} s (health.watchdog_seconds is {}), {} after update {}",
      hang.rank, hang.seconds, hang.limit_seconds, name_of(hang.phase), hang.update);
}

void tell_hang(const Hang& hang, const std::string& stacks) {
  const std::string text = fmt::format("{}, process {} on {}, at {} UTC\n{}", sentence_of(hang), getpid(),
                                       host_name(), time_of_day(now_ns()), stacks);
  if (!hang.ledgers.empty()) write(stacks_of(hang, hang.rank), text);
  switch (claim_report(hang)) {
    case Claim::mine:
      return report_run(hang, stacks);
    case Claim::of_another:
      return wait_for_report(hang);
    case Claim::impossible:
      return print("normformer: " + text);
  }
}

}  // namespace normformer
