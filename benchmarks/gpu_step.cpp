// A whole training step, optimizer included, on one GPU, for the paper's sizes, baseline and NormFormer:
// tokens/s, model FLOP/s (causal) and their share of the 989 TFLOP/s (bf16, dense) of an H100 or H200, the
// median of the steps' times with their 10th and 90th percentiles, and the GPU's memory beside what the meta
// device foretells. Two ceilings are measured first: a copy in the GPU's memory, and one large product.
//
//   bench_gpu_step [--size 125M|355M|1.3B|2.7B ...] [--model baseline|normformer] [--length 2048] [--dropout
//   0.1]
//                  [--micro-batch M] [--micro-batches N] [--steps 10] [--dtype bf16|fp32] [--untuned]
//                  [--graphs]
//   bench_gpu_step --layers 2 --width 64 --heads 4 --vocab 512 --length 64 --ceiling 0      a size of one's
//   own
//
// Unless said otherwise a micro-batch is as large as memory allows, up to 16,384 tokens, and a step has
// 65,536. torch_step.py prints the same columns for PyTorch. Without a GPU it says so and ends with 0.

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "normformer/core/error.h"
#include "normformer/model/parts.h"
#include "normformer/ops/matmul.h"
#include "normformer/ops/random_fill.h"
#include "normformer/training/trainer.h"

#include "training_step.h"

namespace {

using namespace normformer;
using benchmarks::foretold_bytes;
using benchmarks::seconds_of;
using benchmarks::Setup;

struct Size {
  std::string name;
  int64_t layers = 0;
  int64_t width = 0;
  int64_t heads = 0;
};

const std::vector<Size> paper_sizes{
    {"125M", 12, 768, 12}, {"355M", 24, 1024, 16}, {"1.3B", 24, 2048, 32}, {"2.7B", 32, 2560, 32}};

struct Options {
  std::vector<std::string> sizes;
  std::string model;
  Size own{"own"};
  int64_t vocab = 51200;
  int64_t length = 2048;
  int64_t micro_batch = 0;
  int64_t micro_batches = 0;
  double dropout = 0.0;
  std::string dtype = "bf16";
  int steps = 10;
  int64_t ceiling = 8192;
  bool tune = true;
  bool graphs = false;
};

constexpr double kPeakFlops = 989e12;
constexpr double kGiB = 1 << 30;
constexpr int64_t kTokensOfStep = 65536;
constexpr int64_t kTokensOfMicroBatch = 16384;
constexpr int kWarmUpSteps = 3;

RunConfig make_config(const Options& options, const Size& size, bool normformer, int64_t micro_batch) {
  RunConfig c;
  c.model.layers = size.layers;
  c.model.width = size.width;
  c.model.heads = size.heads;
  c.model.ffn = 4 * size.width;
  c.model.vocab = options.vocab;
  c.model.length = options.length;
  c.model.embedding_dropout = c.model.residual_dropout = c.model.attention_dropout = options.dropout;
  if (normformer) {
    c.model.head_scale = HeadScale::paper;
    c.model.post_attention_norm = true;
    c.model.ffn_norm = true;
  }
  const int64_t micro_batches = options.micro_batches > 0
                                    ? options.micro_batches
                                    : std::max<int64_t>(1, kTokensOfStep / (micro_batch * options.length));
  c.train.micro_batch = micro_batch;
  c.train.global_batch = micro_batch * micro_batches;
  c.train.precision = options.dtype == "bf16" ? Precision::bf16 : Precision::fp32;
  c.parallel.data = 1;
  c.device.kind = DeviceChoice::cuda;
  c.device.cuda_graphs = options.graphs;
  return c;
}

// The micro-batch asked for, or the largest whose run is foretold to take at most `bytes`.
RunConfig choose_micro_batch(const Options& options, const Size& size, bool normformer, int64_t bytes) {
  if (options.micro_batch > 0) return make_config(options, size, normformer, options.micro_batch);
  int64_t micro_batch = std::max<int64_t>(1, kTokensOfMicroBatch / options.length);
  RunConfig config = make_config(options, size, normformer, micro_batch);
  while (micro_batch > 1 && foretold_bytes(config) > bytes) {
    micro_batch /= 2;
    config = make_config(options, size, normformer, micro_batch);
  }
  return config;
}

// The same few batches at every step: drawing tokens is not what is measured.
BatchSource repeating_source(const RunConfig& config) {
  return [config, drawn = std::map<int64_t, Batch>()](int64_t first, int64_t count) mutable {
    const int64_t at = first % config.train.global_batch;
    auto found = drawn.find(at);
    if (found == drawn.end()) found = drawn.emplace(at, benchmarks::random_batch(config, at, count)).first;
    return found->second;
  };
}

double percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

int64_t used_bytes(const Gpu& gpu) { return gpu.memory().total - gpu.memory().free; }

// Seconds of one of many calls of `enqueue`, after a few that warm up.
template <class Enqueue>
double seconds_on(Gpu& gpu, Enqueue&& enqueue) {
  constexpr int kCalls = 10;
  for (int i = 0; i < 3; ++i) enqueue();
  gpu.synchronize();
  return seconds_of([&] {
           for (int i = 0; i < kCalls; ++i) enqueue();
           gpu.synchronize();
         }) /
         kCalls;
}

void print_ceilings(int64_t extent, DType dtype) {
  Context context(DeviceKind::cuda);
  const Rectangle whole{{0, extent}, {0, extent}, extent, extent};
  const Tensor x = context.empty({extent, extent}, dtype);
  const Tensor w = context.empty({extent, extent}, dtype);
  const Tensor y = context.empty({extent, extent}, dtype);
  // Zeros would multiply faster: they cost less power.
  ops::fill_normal(context, x, whole, RandomStream{1}, 1.0);
  ops::fill_normal(context, w, whole, RandomStream{2}, 1.0);
  const double product = seconds_on(context.gpu(), [&] { ops::linear_forward(context, x, w, {}, y); });
  const int64_t bytes = 32 * x.nbytes();  // 4 GiB at the extent of 8192 in bf16
  const Tensor from = context.zeros({bytes}, DType::u8);
  const Tensor to = context.empty({bytes}, DType::u8);
  const double copied = seconds_on(context.gpu(), [&] { context.gpu().copy(to.raw(), from.raw(), bytes); });
  const auto side = static_cast<double>(extent);
  std::printf(
      "ceilings: a copy of %.1f GiB moves %.2f TB/s (read and written), a %s product of %ld^3 %.0f TFLOP/s\n",
      static_cast<double>(bytes) / kGiB, 2.0 * static_cast<double>(bytes) / copied / 1e12,
      std::string(name_of(dtype)).c_str(), static_cast<long>(extent),
      2.0 * side * side * side / product / 1e12);
}

void print_header() {
  std::printf("%-6s %-11s %6s %6s %5s %9s %9s %8s %7s %9s %8s %8s %9s %9s %8s\n", "size", "model", "batch",
              "length", "drop", "params/M", "tok/s", "TFLOP/s", "of 989", "ms/step", "p10", "p90", "peak GiB",
              "meta GiB", "loss");
}

void run_variant(const Options& options, const Size& size, bool normformer, Gpu& gpu) {
  constexpr double kShareToFill = 0.9;  // fragments and the libraries' own memory take the rest
  const auto available = static_cast<int64_t>(kShareToFill * static_cast<double>(gpu.memory().free));
  const RunConfig config = choose_micro_batch(options, size, normformer, available);
  const int64_t foretold = foretold_bytes(config);
  const int64_t before = used_bytes(gpu);
  Setup setup(config, DeviceKind::cuda, 1, repeating_source(config));
  setup.context.gpu().tune_products(options.tune);
  setup.trainer.initialise();
  StepReport report;
  const auto step = [&] {
    report = setup.trainer.step();
    setup.context.gpu().synchronize();
  };
  for (int i = 0; i < kWarmUpSteps; ++i) step();
  std::vector<double> times;
  for (int i = 0; i < options.steps; ++i) times.push_back(seconds_of(step));
  const auto peak = static_cast<double>(used_bytes(gpu) - before);

  const double median = percentile(times, 0.5);
  const double tokens = static_cast<double>(config.train.global_batch * config.model.length);
  const double flops = tokens * training_flops_per_token(config) / median;
  const std::string batch = std::to_string(config.train.micro_batch) + "x" +
                            std::to_string(config.train.global_batch / config.train.micro_batch);
  std::printf("%-6s %-11s %6s %6ld %5g %9.1f %9.0f %8.1f %6.1f%% %9.2f %8.2f %8.2f %9.2f %9.2f %8.4f\n",
              size.name.c_str(), normformer ? "normformer" : "baseline", batch.c_str(),
              static_cast<long>(config.model.length), options.dropout,
              static_cast<double>(setup.model.count_parameters()) / 1e6, tokens / median, flops / 1e12,
              100.0 * flops / kPeakFlops, 1e3 * median, 1e3 * percentile(times, 0.1),
              1e3 * percentile(times, 0.9), peak / kGiB, static_cast<double>(foretold) / kGiB, report.loss);
  std::fflush(stdout);
}

std::vector<Size> chosen_sizes(const Options& options) {
  if (options.own.layers > 0) return {options.own};
  if (options.sizes.empty()) return paper_sizes;
  std::vector<Size> chosen;
  std::copy_if(paper_sizes.begin(), paper_sizes.end(), std::back_inserter(chosen), [&](const Size& s) {
    return std::find(options.sizes.begin(), options.sizes.end(), s.name) != options.sizes.end();
  });
  return chosen;
}

// Whether every variant ran; one that does not fit leaves the others their turn.
bool run_all(const Options& options) {
  const auto gpu = std::make_unique<Gpu>(0);
  const GpuDescription& found = gpu->description();
  std::printf("%s, %.0f GiB, %s\n", found.name.c_str(), static_cast<double>(found.memory) / kGiB,
              describe_cuda().c_str());
  if (options.ceiling > 0) {
    print_ceilings(options.ceiling, options.dtype == "bf16" ? DType::bf16 : DType::f32);
  }
  print_header();
  bool all_ran = true;
  for (const Size& size : chosen_sizes(options)) {
    for (const bool normformer : {false, true}) {
      if (!options.model.empty() && (options.model == "normformer") != normformer) continue;
      try {
        run_variant(options, size, normformer, *gpu);
      } catch (const std::exception& e) {
        std::printf("%-6s %-11s failed: %s\n", size.name.c_str(), normformer ? "normformer" : "baseline",
                    e.what());
        all_ran = false;
      }
    }
  }
  return all_ran;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"A whole training step on one GPU"};
  std::vector<std::string> names;
  for (const Size& s : paper_sizes) names.push_back(s.name);
  app.add_option("--size", options.sizes, "sizes of the paper; all where none is named")
      ->check(CLI::IsMember(names));
  app.add_option("--model", options.model, "both where empty")
      ->check(CLI::IsMember({"baseline", "normformer"}));
  app.add_option("--layers", options.own.layers, "a size of one's own, with --width and --heads");
  app.add_option("--width", options.own.width);
  app.add_option("--heads", options.own.heads);
  app.add_option("--vocab", options.vocab)->capture_default_str();
  app.add_option("--length", options.length, "tokens of a sequence")->capture_default_str();
  app.add_option("--micro-batch", options.micro_batch, "sequences at a time; 0: as memory allows");
  app.add_option("--micro-batches", options.micro_batches, "of a step; 0: as many as make 65,536 tokens");
  app.add_option("--dropout", options.dropout, "on embeddings, sub-layers and attention");
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"bf16", "fp32"}))->capture_default_str();
  app.add_option("--steps", options.steps, "that are measured")->check(CLI::PositiveNumber);
  app.add_option("--ceiling", options.ceiling, "extent of the large product; 0: measure no ceilings");
  app.add_flag("!--untuned", options.tune, "products as cuBLASLt's heuristic has them");
  app.add_flag("--graphs", options.graphs, "passes of micro-batches as CUDA graphs");
  CLI11_PARSE(app, argc, argv);
  if (list_gpus().empty()) {
    std::printf("skipped: no GPU (%s)\n", describe_cuda().c_str());
    return 0;
  }
  return run_all(options) ? 0 : 1;
}
