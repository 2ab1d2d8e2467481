// Rates of the products of a linear layer, each against one call of the library over all of the matrix with
// as many threads of its own: what the library itself reaches. Usage: ops_matmul [threads [seconds for each
// product]]

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "normformer/ops/matmul.h"

#include "best_time.h"
#include "library_gemm.h"

namespace {

using namespace normformer;
using benchmarks::best_times;
using benchmarks::library_gemm;

struct Bench {
  int threads;
  double seconds;
  benchmarks::Clock clock() const {
    return threads == 1 ? benchmarks::Clock::thread : benchmarks::Clock::wall;
  }
};

void run(const Bench& bench, DType dtype, int64_t n, int64_t k, int64_t m) {
  Context context(DeviceKind::cpu, bench.threads);
  const Tensor x = context.zeros({n, k}, dtype);
  const Tensor w = context.zeros({m, k}, dtype);
  const Tensor bias = context.zeros({m}, dtype);
  const Tensor y = context.zeros({n, m}, dtype);
  const Tensor dw = context.zeros({m, k}, accumulator_of(dtype));
  const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(m);
  const auto print = [&](const char* name, const benchmarks::BestTimes& times) {
    std::printf("%-4s %5ld x %4ld -> %5ld  %-16s %7.1f GFLOP/s of %7.1f: %.3f\n", name_of(dtype).data(),
                static_cast<long>(n), static_cast<long>(k), static_cast<long>(m), name,
                flops / times.ours / 1e9, flops / times.ceiling / 1e9, times.ceiling / times.ours);
  };
  print("forward + bias",
        best_times(
            bench.clock(), bench.seconds, [&] { ops::linear_forward(context, x, w, bias, y); },
            [&] { library_gemm(bench.threads, benchmarks::forward_shape(n, k, m), x, w, y); }));
  print("backward input",
        best_times(
            bench.clock(), bench.seconds, [&] { ops::linear_backward_input(context, y, w, x); },
            [&] { library_gemm(bench.threads, benchmarks::backward_input_shape(n, k, m), y, w, x); }));
  print("backward weight",
        best_times(
            bench.clock(), bench.seconds, [&] { ops::linear_backward_weight(context, y, x, dw); },
            [&] { library_gemm(bench.threads, benchmarks::backward_weight_shape(n, k, m), y, x, dw); }));
}

}  // namespace

int main(int argc, char** argv) {
  const Bench bench{argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 ? std::atof(argv[2]) : 1.0};
  std::printf("%s, %d threads\n", ops::describe_matmul().c_str(), bench.threads);
  const std::vector<std::pair<int64_t, int64_t>> layers{
      {768, 2304}, {768, 768}, {768, 3072}, {3072, 768}, {768, 50257}};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (dtype == DType::bf16 && !ops::has_native_bf16()) continue;
    for (const int64_t n : {1024, 8192}) {
      for (const auto& [k, m] : layers) run(bench, dtype, n, k, m);
    }
  }
}
