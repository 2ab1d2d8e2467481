#include "normformer/comm/ledger_report.h"

#include <algorithm>
#include <ctime>
#include <fstream>

#include <fmt/chrono.h>
#include <fmt/ranges.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

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

// Nothing where all is well, or where nothing is known.
std::string in_brackets(const RankLedger& ledger) {
  if (ledger.ended_ns != 0) return "";
  const ProcessState state = state_of_process(ledger);
  if (state == ProcessState::stopped) return " (stopped)";
  return state == ProcessState::gone ? " (not running)" : "";
}

std::string describe(const LedgerWait& wait) {
  const std::string place = wait.call.place.empty() ? "" : fmt::format(", in {}", wait.call.place);
  const std::string others = wait.call.kind == "send" ? "which is not there to receive it"
                             : wait.not_issued.empty()
                                 ? "begun by all"
                                 : fmt::format("not begun by {}", describe(wait.not_issued));
  return fmt::format("{} wait{} in {}{}; {}\n", describe(wait.waiting), wait.waiting.size() == 1 ? "s" : "",
                     describe(wait.call, wait.group), place, others);
}

std::string last_words(std::span<const RankLedger> ledgers, int rank) {
  const auto found = std::find_if(ledgers.begin(), ledgers.end(),
                                  [&](const RankLedger& ledger) { return ledger.rank == rank; });
  if (found == ledgers.end()) return fmt::format("rank {}, which has no ledger here", rank);
  if (found->calls.empty()) return fmt::format("{}, without a call", describe_rank(*found));
  const LedgerCall& last = found->calls.back();
  return fmt::format("{}; its last call, at {}, was {}{}", describe_rank(*found), time_of_day(last.issued_ns),
                     describe(*found, last), last.is_done() ? ", done" : ", not done");
}

}  // namespace

std::string time_of_day(int64_t ns) {
  const auto seconds = static_cast<std::time_t>(ns / 1'000'000'000);
  return fmt::format("{:%H:%M:%S}.{:03}", fmt::gmtime(seconds), ns / 1'000'000 % 1000);
}

ProcessState state_of_process(const RankLedger& ledger) {
  if (ledger.host != host_name()) return ProcessState::unknown;
  std::ifstream file(fmt::format("/proc/{}/stat", ledger.process));
  std::string stat;
  std::getline(file, stat);
  const size_t name_end = stat.rfind(") ");  // proc(5): the state follows the name
  const char state = name_end == std::string::npos ? 'X' : stat[name_end + 2];
  if (state == 'T' || state == 't') return ProcessState::stopped;
  return state == 'X' || state == 'Z' ? ProcessState::gone : ProcessState::running;
}

std::vector<AbsentRank> find_absent(std::span<const RankLedger> ledgers, int64_t silent_after_ns) {
  std::vector<ProcessState> states;
  int64_t newest = 0;
  for (const RankLedger& ledger : ledgers) {
    states.push_back(ledger.ended_ns != 0 ? ProcessState::unknown : state_of_process(ledger));
    newest = std::max(newest, ledger.alive_ns);
  }
  // Where nothing runs any more, that a process is gone says nothing of what it was that ended the run.
  const bool some_run = std::find(states.begin(), states.end(), ProcessState::running) != states.end();
  std::vector<AbsentRank> absent;
  for (size_t i = 0; i < ledgers.size(); ++i) {
    const RankLedger& ledger = ledgers[i];
    const int64_t silent_ns = newest - ledger.alive_ns;
    if (some_run && states[i] == ProcessState::stopped)
      absent.push_back({ledger.rank, "stopped"});
    else if (some_run && states[i] == ProcessState::gone)
      absent.push_back({ledger.rank, "not running"});
    else if (ledger.ended_ns == 0 && ledger.alive_ns != 0 && silent_ns > silent_after_ns)
      absent.push_back(
          {ledger.rank, fmt::format("not alive since {}, {:.1f} s before others",
                                    time_of_day(ledger.alive_ns), 1e-9 * static_cast<double>(silent_ns))});
  }
  return absent;
}

std::string describe_rank(const RankLedger& ledger) {
  std::string where = ledger.ended_ns != 0 ? "has ended in good order"
                      : ledger.update == 0 ? "before its first update"
                                           : fmt::format("in update {}", ledger.update);
  if (ledger.ended_ns == 0 && ledger.phase != RunPhase::training)
    where += fmt::format(", {}", name_of(ledger.phase));
  constexpr int64_t kWorthTelling = 1'000'000'000;
  if (ledger.ended_ns == 0 && ledger.still_ns > kWorthTelling)
    where += fmt::format(", without progress for {:.1f} s", 1e-9 * static_cast<double>(ledger.still_ns));
  return fmt::format("rank {} on {}, process {}{}, {}", ledger.rank, ledger.host, ledger.process,
                     in_brackets(ledger), where);
}

std::string report_calls(std::span<const RankLedger> ledgers, size_t calls) {
  std::string text;
  for (const RankLedger& ledger : ledgers) {
    text += describe_rank(ledger) + "\n";
    const size_t first = ledger.calls.size() - std::min(calls, ledger.calls.size());
    for (size_t i = first; i < ledger.calls.size(); ++i) {
      const LedgerCall& call = ledger.calls[i];
      text += fmt::format("  {:>8}  {}  {:>12}  {}\n", call.number, time_of_day(call.issued_ns),
                          state_of(call), describe(ledger, call));
    }
  }
  return text;
}

std::string report_diagnosis(std::span<const RankLedger> ledgers, int64_t silent_after_ns) {
  const std::vector<AbsentRank> absent = find_absent(ledgers, silent_after_ns);
  std::vector<int> absent_ranks;
  for (const AbsentRank& rank : absent) absent_ranks.push_back(rank.rank);
  const LedgerDiagnosis diagnosis = diagnose(ledgers, absent_ranks);
  std::string text;
  for (const LedgerWait& wait : diagnosis.waits) text += describe(wait);
  for (const int rank : diagnosis.missing) text += fmt::format("missing: {}\n", last_words(ledgers, rank));
  for (const AbsentRank& rank : absent) text += fmt::format("rank {} is {}\n", rank.rank, rank.why);
  if (!diagnosis.missing.empty()) return text;
  return text + fmt::format("missing: nobody; {}\n", diagnosis.waits.empty()
                                                         ? "no call waits"
                                                         : "all ranks are alive and have begun what waits");
}

}  // namespace normformer
