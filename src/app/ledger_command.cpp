#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "normformer/comm/ledger_file.h"
#include "normformer/comm/ledger_report.h"
#include "normformer/training/run.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

struct LedgerOptions {
  std::filesystem::path run;
  size_t calls = 8;
};

// Beyond what clocks of hosts differ by, and what a network file system keeps back.
constexpr int64_t kSilentAfterNs = 45'000'000'000;

int show_ledgers(const LedgerOptions& options) {
  const std::vector<RankLedger> ledgers = read_ledgers(RunFolder{options.run}.ledgers());
  fmt::print("{} of {} ranks, read at {} UTC\n", ledgers.size(), ledgers.front().world_size,
             time_of_day(std::chrono::system_clock::now().time_since_epoch() / std::chrono::nanoseconds(1)));
  fmt::print("{}{}", report_calls(ledgers, options.calls), report_diagnosis(ledgers, kSilentAfterNs));
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
