// What it costs to watch a run's health, beside a step of the same model over data-parallel ranks (threads of
// this process, one each): the comparison of replicas in ns per byte of weights and as a share of the time at
// health.replica_check_every = 100, and the scores of spikes.
//
//   bench_health [--ranks 2] [--layers 4] [--width 768] [--vocab 8192] [--length 512] [--dtype bf16|fp32]

#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>

#include <CLI/CLI.hpp>

#include "normformer/training/replica_check.h"

#include "training_step.h"

namespace {

using namespace normformer;
using benchmarks::seconds_of;

struct Options {
  int ranks = 2;
  int64_t layers = 4;
  int64_t width = 768;
  int64_t vocab = 8192;
  int64_t length = 512;
  std::string dtype = "bf16";
};

RunConfig config_of(const Options& options) {
  RunConfig config;
  config.model.layers = options.layers;
  config.model.width = options.width;
  config.model.heads = options.width / 64;
  config.model.ffn = 4 * options.width;
  config.model.vocab = options.vocab;
  config.model.length = options.length;
  config.train.global_batch = options.ranks;
  config.train.micro_batch = 1;
  config.train.precision = options.dtype == "bf16" ? Precision::bf16 : Precision::fp32;
  config.parallel.data = options.ranks;
  return config;
}

void measure_comparison(const RunConfig& config, const Group& world) {
  constexpr int kRounds = 5;
  Context context(DeviceKind::cpu, 1);
  ModelInstance model(context, Mesh(world, {.data = world.size()}), config, true);
  Trainer trainer(model, config,
                  [&](int64_t f, int64_t n) { return benchmarks::random_batch(config, f, n); });
  trainer.initialise();
  trainer.step();
  double step = std::numeric_limits<double>::infinity();
  double check = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRounds; ++i) {
    step = std::min(step, seconds_of([&] { trainer.step(); }));
    world.barrier();
    check = std::min(check, seconds_of([&] { require_equal_replicas(trainer); }));
  }
  const auto bytes = static_cast<double>(model.store().flat_values().nbytes());
  if (world.rank() > 0) return;
  std::printf(
      "%.1f MB of weights a rank: a step %.3f s, a comparison %.2f ms (%.3f ns/byte), %.4f %% of the time\n",
      1e-6 * bytes, step, 1e3 * check, 1e9 * check / bytes, 100.0 * check / (100.0 * step));
}

void measure_scores() {
  constexpr int kRounds = 1000;
  const SpikeRule rule{6.0, 128};
  RecentBatches recent;
  double seconds = 0.0;
  for (int i = 0; i < kRounds; ++i) {
    const auto value = static_cast<double>(i * 7919 % 1000);
    seconds += seconds_of([&] {
      static_cast<void>(spike_scores(rule, recent, value, value));
      enter_batch(rule, recent, value, value);
    });
  }
  std::printf("scores over %lld batches: %.1f us a step\n", static_cast<long long>(rule.window),
              1e6 * seconds / kRounds);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"The cost of watching a run's health"};
  app.add_option("--ranks", options.ranks, "data-parallel ranks");
  app.add_option("--layers", options.layers);
  app.add_option("--width", options.width);
  app.add_option("--vocab", options.vocab);
  app.add_option("--length", options.length);
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"bf16", "fp32"}));
  CLI11_PARSE(app, argc, argv);
  const RunConfig config = config_of(options);
  run_local_world(options.ranks, [&](const Group& world) { measure_comparison(config, world); });
  measure_scores();
  return 0;
}
