#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <fmt/chrono.h>
#include <fmt/ranges.h>

#include "normformer/comm/ledger_file.h"
#include "normformer/training/run.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

struct LedgerOptions {
  std::filesystem::path run;
  size_t calls = 8;
};

// "14:03:07.123", UTC.
std::string time_of_day(int64_t ns) {
  const auto seconds = static_cast<std::time_t>(ns / 1'000'000'000);
  return fmt::format("{:%H:%M:%S}.{:03}", fmt::gmtime(seconds), ns / 1'000'000 % 1000);
}

// "0-3, 8"
std::string short_list(const std::vector<int>& ranks) {
  std::vector<std::string> parts;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    parts.push_back(end - i == 1 ? std::to_string(ranks[i]) : fmt::format("{}-{}", ranks[i], ranks[end - 1]));
    i = end;
  }
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::string describe(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", short_list(ranks));
}

std::string describe(const LedgerCall& call, const LedgerGroup& group) {
  const GroupMembers& members = group.members;
  if (is_message(call.kind))
    return fmt::format("{} of {} bytes, number {} {} rank {} ({}, tag {})", call.kind, call.bytes,
                       call.ordinal, call.kind == "send" ? "to" : "from",
                       members.world_ranks[static_cast<size_t>(call.peer)], members.name, call.tag);
  return fmt::format("{} of {} bytes, number {} of group {} ({})", call.kind, call.bytes, call.ordinal,
                     members.name, describe(members.world_ranks));
}

std::string describe(const RankLedger& ledger, const LedgerCall& call) {
  const std::string what =
      call.group < 0 ? fmt::format("{} of {} bytes in a group without a name here", call.kind, call.bytes)
                     : describe(call, ledger.groups[static_cast<size_t>(call.group)]);
  return call.place.empty() ? what : fmt::format("{}, in {}", what, call.place);
}

std::string state_of(const LedgerCall& call) {
  if (!call.is_done()) return "NOT DONE";
  return fmt::format("{:.3f} ms", 1e-6 * static_cast<double>(call.done_ns - call.issued_ns));
}

// What this host's system says of a rank's process, where it is one of this host's; "" where all is well.
std::string state_of_process(const RankLedger& ledger) {
  if (ledger.ended_ns != 0 || ledger.host != host_name()) return "";
  std::ifstream file(fmt::format("/proc/{}/stat", ledger.process));
  std::string stat;
  std::getline(file, stat);
  const size_t name_end = stat.rfind(") ");  // proc(5): the state follows the name
  const char state = name_end == std::string::npos ? 'X' : stat[name_end + 2];
  if (state == 'T') return " (stopped)";
  return state == 'X' || state == 'Z' ? " (not running)" : "";
}

std::string name_of(const RankLedger& ledger) {
  const std::string where = ledger.ended_ns != 0 ? "has ended in good order"
                            : ledger.update == 0 ? "before its first update"
                                                 : fmt::format("in update {}", ledger.update);
  return fmt::format("rank {} on {}, process {}{}, {}", ledger.rank, ledger.host, ledger.process,
                     state_of_process(ledger), where);
}

void print_rank(const RankLedger& ledger, size_t most) {
  fmt::print("{}\n", name_of(ledger));
  const size_t first = ledger.calls.size() - std::min(most, ledger.calls.size());
  for (size_t i = first; i < ledger.calls.size(); ++i) {
    const LedgerCall& call = ledger.calls[i];
    fmt::print("  {:>8}  {}  {:>12}  {}\n", call.number, time_of_day(call.issued_ns), state_of(call),
               describe(ledger, call));
  }
}

void print_wait(const LedgerWait& wait) {
  const std::string place = wait.call.place.empty() ? "" : fmt::format(", in {}", wait.call.place);
  const std::string others =
      wait.not_issued.empty() ? "begun by all" : fmt::format("not begun by {}", describe(wait.not_issued));
  fmt::print("{} wait{} in {}{}; {}\n", describe(wait.waiting), wait.waiting.size() == 1 ? "s" : "",
             describe(wait.call, wait.group), place, others);
}

std::string last_words(const std::vector<RankLedger>& ledgers, int rank) {
  const auto found = std::find_if(ledgers.begin(), ledgers.end(),
                                  [&](const RankLedger& ledger) { return ledger.rank == rank; });
  if (found == ledgers.end()) return fmt::format("rank {}, which has no ledger here", rank);
  if (found->calls.empty()) return fmt::format("{}, without a call", name_of(*found));
  const LedgerCall& last = found->calls.back();
  return fmt::format("{}; its last call, at {}, was {}{}", name_of(*found), time_of_day(last.issued_ns),
                     describe(*found, last), last.is_done() ? ", done" : ", not done");
}

void print_diagnosis(const std::vector<RankLedger>& ledgers) {
  const LedgerDiagnosis diagnosis = diagnose(ledgers);
  for (const LedgerWait& wait : diagnosis.waits) print_wait(wait);
  for (const int rank : diagnosis.missing) fmt::print("missing: {}\n", last_words(ledgers, rank));
  if (!diagnosis.missing.empty()) return;
  fmt::print("missing: nobody; {}\n",
             diagnosis.waits.empty()
                 ? "no call waits"
                 : "a rank that was stopped inside a call that all have begun looks like one that waits");
}

int show_ledgers(const LedgerOptions& options) {
  const std::vector<RankLedger> ledgers = read_ledgers(RunFolder{options.run}.ledgers());
  fmt::print("{} of {} ranks, read at {} UTC\n", ledgers.size(), ledgers.front().world_size,
             time_of_day(std::chrono::system_clock::now().time_since_epoch() / std::chrono::nanoseconds(1)));
  for (const RankLedger& ledger : ledgers) print_rank(ledger, options.calls);
  print_diagnosis(ledgers);
  return 0;
}

}  // namespace

void add_ledger_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<LedgerOptions>();
  CLI::App* command =
      app.add_subcommand("ledger", "What every rank of a run is doing, or did last, and who is missing");
  command->add_option("run", options->run, "A run's folder")->required();
  command->add_option("--calls", options->calls, "So many last calls of each rank, 256 at most")
      ->capture_default_str()
      ->check(CLI::Range(0, 256));
  command->callback([options, &chosen] {
    chosen = [options](int*, char***) {
      require_single_process("ledger");
      return show_ledgers(*options);
    };
  });
}

}  // namespace normformer
