// Rates of causal attention, counting what the mask lets through, against the library's rate for a product of
// 1024 x 1024 x 1024 elements of the same type: no attention can be faster than its products.
// Usage: ops_attention [threads [seconds for each shape]]

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "normformer/ops/attention.h"
#include "normformer/ops/matmul.h"

#include "best_time.h"
#include "library_gemm.h"

namespace {

using namespace normformer;
using benchmarks::best_times;
using ops::AttentionShape;
using ops::Dropout;

struct Bench {
  int threads;
  double seconds;
  benchmarks::Clock clock() const {
    return threads == 1 ? benchmarks::Clock::thread : benchmarks::Clock::wall;
  }
};

Tensor random_tensor(Context& context, const Shape& shape, DType dtype) {
  std::vector<float> values(static_cast<size_t>(shape.numel()));
  uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  }
  const Tensor wide = from_host<float>(context, values, shape);
  const Tensor made = context.empty(shape, dtype);
  copy(context, wide, made);
  return made;
}

void run(const Bench& bench, DType dtype, const AttentionShape& shape, double dropout_probability) {
  Context context(DeviceKind::cpu, bench.threads);
  const int64_t tokens = shape.batch * shape.length;
  const int64_t channels = shape.heads * shape.head_size;
  const Tensor qkv = random_tensor(context, {tokens, 3 * channels}, dtype);
  const Tensor dout = random_tensor(context, {tokens, channels}, dtype);
  const Tensor out = context.empty({tokens, channels}, dtype);
  const Tensor dqkv = context.empty({tokens, 3 * channels}, dtype);
  const Tensor lse = context.empty({shape.batch, shape.heads, shape.length}, DType::f32);
  Dropout dropout;
  dropout.probability = dropout_probability;

  constexpr int64_t kEdge = 1024;
  const Tensor a = random_tensor(context, {kEdge, kEdge}, dtype);
  const Tensor c = context.empty({kEdge, kEdge}, dtype);
  const auto library = [&] {
    benchmarks::library_gemm(bench.threads, benchmarks::forward_shape(kEdge, kEdge, kEdge), a, a, c);
  };
  const double library_flops = 2.0 * kEdge * kEdge * kEdge;
  const auto print = [&](const char* name, double flops, const benchmarks::BestTimes& times) {
    const double ours = flops / times.ours / 1e9;
    const double ceiling = library_flops / times.ceiling / 1e9;
    std::printf(
        "%-4s batch %2ld length %4ld heads %2ld size %3ld dropout %.1f %-8s %7.1f GFLOP/s of %7.1f: %.3f\n",
        name_of(dtype).data(), static_cast<long>(shape.batch), static_cast<long>(shape.length),
        static_cast<long>(shape.heads), static_cast<long>(shape.head_size), dropout_probability, name, ours,
        ceiling, ours / ceiling);
  };
  const auto flops = static_cast<double>(ops::attention_forward_flops(shape));
  const auto forward = [&] { ops::attention_forward(context, shape, qkv, Tensor(), dropout, out, lse); };
  print("forward", flops, best_times(bench.clock(), bench.seconds, forward, library));
  const auto backward = [&] {
    ops::attention_backward(context, shape, dout, qkv, Tensor(), dropout, out, lse, dqkv);
  };
  print("backward", 2.5 * flops, best_times(bench.clock(), bench.seconds, backward, library));
}

}  // namespace

int main(int argc, char** argv) {
  const Bench bench{argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 ? std::atof(argv[2]) : 1.0};
  std::printf("%s, %d threads\n", ops::describe_matmul().c_str(), bench.threads);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (dtype == DType::bf16 && !ops::has_native_bf16()) continue;
    run(bench, dtype, {.batch = 1, .length = 1024, .heads = 12, .head_size = 64}, 0.0);
    run(bench, dtype, {.batch = 1, .length = 1024, .heads = 12, .head_size = 64}, 0.1);
    run(bench, dtype, {.batch = 1, .length = 2048, .heads = 8, .head_size = 128}, 0.0);
    run(bench, dtype, {.batch = 8, .length = 128, .heads = 12, .head_size = 64}, 0.0);
    run(bench, dtype, {.batch = 1, .length = 1024, .heads = 2, .head_size = 64}, 0.0);
  }
}
