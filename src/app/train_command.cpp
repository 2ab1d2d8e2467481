#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/core/mapped_file.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run.h"
#include "normformer/training/run_data.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

struct TrainOptions {
  std::string config;
  std::vector<std::string> overrides;
  std::string profile;
  RunOptions run;
};

ProfiledUpdates profiled_updates(const std::string& text, const RunConfig& config) {
  if (text.empty()) return {};
  const ProfiledUpdates updates = parse_profiled_updates(text);
  if (updates.last > config.train.updates) {
    throw ConfigError(
        fmt::format("--profile {}: the run has {} updates (train.updates)", text, config.train.updates));
  }
  return updates;
}

// The version and a hash of the program's own file.
std::string build_of_program() {
  const MappedFile file("/proc/self/exe");
  return fmt::format("version {}, {} bytes, hash {:016x}", NORMFORMER_VERSION, file.size(),
                     std::hash<std::string_view>{}(file.text()));
}

int train(const TrainOptions& options, const RankProcess& process) {
  RunConfig config;
  RunOptions run = options.run;
  run_agreed(process.world, [&] {
    config = with_vocabulary(load_run_config(options.config, options.overrides));
    config = resolve_layout(config, process.world.size());
    run.profile = profiled_updates(options.profile, config);
  });
  require_same(process.world, "build of the program", build_of_program());
  require_same(process.world, "configuration", to_toml(config));
  const RankDevice device = make_rank_device(config, process);
  // mpirun gives its ranks no time on Ctrl-C; a process on its own can take its time.
  run.stop_on_terminal_signals = std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr;
  return run_on_device(
      process, [&] { return static_cast<int>(run_training(config, run, *device.context, device.world)); });
}

}  // namespace

void add_train_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command = app.add_subcommand("train", "Train a model: mpirun -n N normformer train CONFIG.toml");
  command->add_option("config", options->config, "The run's configuration, a TOML file")->required();
  command->add_flag_callback(
      "--keys",
      [] {
        std::fputs(describe_config_keys().c_str(), stdout);
        throw CLI::Success();
      },
      "List every key of the configuration with its meaning, and end");
  command
      ->add_option(
          "--set", options->overrides,
          "Replace keys of the configuration: one by section.key=value, those of a TOML file by @FILE")
      ->take_all()
      ->allow_extra_args(false);
  command->add_flag("--resume", options->run.resume,
                    "Go on from the newest checkpoint of the run's folder, or start where there is none");
  command->add_option("--profile", options->profile,
                      "Trace these updates (12, or 10-12) on all ranks into trace_10-12.json of the run's "
                      "folder, for ui.perfetto.dev");
  command->add_option("--dump-gradients", options->run.dump_gradients,
                      "Write the next step's gradients, gathered, as a safetensors file, and end");
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv, [&](const RankProcess& process) { return train(*options, process); });
    };
  });
}

}  // namespace normformer
