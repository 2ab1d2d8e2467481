// A whole training step, optimizer included, of the 125M baseline and NormFormer: tokens/s, model FLOP/s
// (causal), and the ratio to the rate at which the library alone computes matrix products of the same shapes,
// measured between the steps of the same run. Peak memory of the process stands beside what the meta device
// foretells.
//
//   bench_step [--threads 2] [--micro-batch 1] [--steps 3] [--batch 8] [--layers 12] [--dtype fp32|bf16]
//
// Each variant runs in a process of its own, so that its peak memory is its own.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <sys/wait.h>
#include <unistd.h>

#include "normformer/model/parts.h"
#include "normformer/ops/matmul.h"
#include "normformer/training/trainer.h"

#include "library_gemm.h"
#include "training_step.h"

namespace {

using namespace normformer;
using benchmarks::foretold_bytes;
using benchmarks::seconds_of;
using benchmarks::Setup;

struct Options {
  int threads = 2;
  int64_t micro_batch = 1;
  int64_t batch = 8;
  int64_t layers = 12;
  int steps = 3;
  std::string dtype;
};

RunConfig make_config(const Options& options, bool normformer, Precision precision) {
  RunConfig c;
  c.model.layers = options.layers;
  c.model.width = 768;
  c.model.heads = 12;
  c.model.ffn = 3072;
  c.model.vocab = 51200;
  c.model.length = 1024;
  if (normformer) {
    c.model.head_scale = HeadScale::paper;
    c.model.post_attention_norm = true;
    c.model.ffn_norm = true;
  }
  c.train.global_batch = options.batch;
  c.train.micro_batch = options.micro_batch;
  c.train.precision = precision;
  c.parallel.data = 1;
  return c;
}

// The matrix products of a step, each shape once with how often it occurs.
class Products {
 public:
  Products(const RunConfig& config, DType dtype, int threads) : threads_(threads), context_(DeviceKind::cpu) {
    const ModelConfig& m = config.model;
    const int64_t tokens = config.train.micro_batch * m.length;
    const auto micro_batches = static_cast<double>(config.train.global_batch / config.train.micro_batch);
    const auto layers = static_cast<double>(m.layers) * micro_batches;
    add(tokens, m.width, 3 * m.width, layers, dtype);
    add(tokens, m.width, m.width, layers, dtype);
    add(tokens, m.width, m.ffn, layers, dtype);
    add(tokens, m.ffn, m.width, layers, dtype);
    add(tokens, m.width, m.vocab, micro_batches, dtype);
  }

  /// Times every product once and keeps the best time of each.
  void measure() {
    for (Product& p : products_) {
      const double seconds = seconds_of([&] { benchmarks::library_gemm(threads_, p.shape, p.a, p.b, p.c); });
      p.best = std::min(p.best, seconds);
    }
  }

  /// FLOP/s of all products of a step at their best times.
  double rate() const {
    double flops = 0.0;
    double seconds = 0.0;
    for (const Product& p : products_) {
      flops += p.count * 2.0 * static_cast<double>(p.shape.m) * static_cast<double>(p.shape.n) *
               static_cast<double>(p.shape.k);
      seconds += p.count * p.best;
    }
    return flops / seconds;
  }

 private:
  struct Product {
    ops::cpu::GemmShape shape;
    double count;
    Tensor a, b, c;
    double best = 1e30;
  };

  void add(int64_t n, int64_t k, int64_t m, double count, DType dtype) {
    const Tensor x = context_.zeros({n, k}, dtype);
    const Tensor w = context_.zeros({m, k}, dtype);
    const Tensor y = context_.zeros({n, m}, dtype);
    const Tensor dw = context_.zeros({m, k}, accumulator_of(dtype));
    products_.push_back({benchmarks::forward_shape(n, k, m), count, x, w, y});
    products_.push_back({benchmarks::backward_input_shape(n, k, m), count, y, w, x});
    products_.push_back({benchmarks::backward_weight_shape(n, k, m), count, y, x, dw});
  }

  int threads_;
  Context context_;
  std::vector<Product> products_;
};

// "VmHWM" or "VmRSS" of this process, in bytes.
int64_t process_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  return 0;
}

void run_variant(const Options& options, bool normformer, Precision precision) {
  const RunConfig config = make_config(options, normformer, precision);
  const int64_t foretold = foretold_bytes(config);
  const int64_t before = process_bytes("VmRSS");
  double best = 1e30;
  int64_t peak = 0;
  double ceiling = 0.0;
  {
    Setup setup(config, DeviceKind::cpu, options.threads);
    setup.trainer.initialise();
    setup.trainer.step();  // allocations, primitives and page faults of a first step
    for (int i = 0; i < options.steps; ++i) best = std::min(best, seconds_of([&] { setup.trainer.step(); }));
    peak = process_bytes("VmHWM") - before;
    Products products(config, model_dtype(precision), options.threads);
    for (int i = 0; i < options.steps + 1; ++i) {
      best = std::min(best, seconds_of([&] { setup.trainer.step(); }));
      products.measure();
    }
    ceiling = products.rate();
  }
  const double tokens = static_cast<double>(config.train.global_batch * config.model.length);
  const double rate = tokens * training_flops_per_token(config) / best;
  constexpr double kMiB = 1 << 20;
  std::printf("%-11s %-5s %8.1f %9.1f %9.1f %6.3f   %8.0f %8.0f  %+.1f %%\n",
              normformer ? "normformer" : "baseline", precision == Precision::bf16 ? "bf16" : "fp32",
              tokens / best, rate / 1e9, ceiling / 1e9, rate / ceiling, static_cast<double>(peak) / kMiB,
              static_cast<double>(foretold) / kMiB,
              100.0 * (static_cast<double>(peak) / static_cast<double>(foretold) - 1.0));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"A whole training step against the library's matrix products"};
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--micro-batch", options.micro_batch)->capture_default_str();
  app.add_option("--batch", options.batch)->capture_default_str();
  app.add_option("--layers", options.layers)->capture_default_str();
  app.add_option("--steps", options.steps)->capture_default_str();
  app.add_option("--dtype", options.dtype, "fp32 or bf16; both where empty");
  CLI11_PARSE(app, argc, argv);
  std::printf("%s, %d threads, %ld sequences of 1024, micro-batch %ld, %ld layers, optimizer included\n",
              ops::describe_matmul().c_str(), options.threads, static_cast<long>(options.batch),
              static_cast<long>(options.micro_batch), static_cast<long>(options.layers));
  std::printf("model       type     tok/s   GFLOP/s   library  ratio   peak MiB     meta\n");
  std::fflush(stdout);
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    if (!options.dtype.empty() && (options.dtype == "bf16") != (precision == Precision::bf16)) continue;
    if (precision == Precision::bf16 && !ops::has_native_bf16()) {
      std::printf("no bf16 instructions here\n");
      continue;
    }
    for (const bool normformer : {false, true}) {
      const pid_t child = fork();
      if (child == 0) {
        run_variant(options, normformer, precision);
        std::_Exit(0);
      }
      int status = 0;
      waitpid(child, &status, 0);
      if (status != 0) return 1;
    }
  }
}
