#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "normformer/planning/plan.h"
#include "normformer/training/run_data.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

struct PlanOptions {
  std::string config;
  std::vector<std::string> overrides;
  int64_t ranks = 0;
};

// A plan needs no corpus where the vocabulary is known, and the classes of a classifier.
RunConfig with_planned_vocabulary(const RunConfig& config) {
  const bool knows_classes = config.model.head != OutputHead::classification || config.model.classes > 0;
  if (config.model.vocab > 0 && knows_classes) return config;
  try {
    return with_vocabulary(config);
  } catch (const Error& e) {
    throw ConfigError(
        fmt::format("{} (a plan needs no corpus where --set model.vocab=N says how many tokens there are{})",
                    e.what(), knows_classes ? "" : ", and --set model.classes=N how many classes"));
  }
}

int plan(const PlanOptions& options) {
  RunConfig config = load_run_config(options.config, options.overrides);
  // First what needs no corpus.
  resolve_layout(config, options.ranks);
  config = resolve_layout(with_planned_vocabulary(config), options.ranks);
  const Plan made = make_plan(config, options.ranks);
  fmt::print("{} on {} rank{}\n{}", options.config, options.ranks, options.ranks == 1 ? "" : "s",
             describe(made));
  return made.order.violation.empty() ? 0 : static_cast<int>(ExitCode::internal);
}

}  // namespace

void add_plan_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command = app.add_subcommand(
      "plan",
      "What a run will take on so many ranks: memory, traffic, FLOPs and idle time, without running it");
  command->add_option("config", options->config, "The run's configuration, a TOML file")->required();
  command->add_option("-n,--ranks", options->ranks, "The number of ranks")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  command
      ->add_option(
          "--set", options->overrides,
          "Replace keys of the configuration: one by section.key=value, those of a TOML file by @FILE")
      ->take_all()
      ->allow_extra_args(false);
  command->callback([options, &chosen] {
    chosen = [options](int*, char***) {
      require_single_process("plan");
      return plan(*options);
    };
  });
}

}  // namespace normformer
