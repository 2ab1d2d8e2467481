#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/tensor/context.h"

#include "simt/control.h"

namespace normformer {
namespace {

constexpr int64_t kSizes[] = {1, 3, 7, 8, 31, 255, 256, 257, 4096, 5001, 70'003};

std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values.push_back((static_cast<float>(seed >> 8) / (1 << 24) - 0.5f) * 100.0f);
  }
  return values;
}

// Numbers of `dtype` on the context's device.
Tensor tensor_of(Context& context, DType dtype, int64_t count, uint32_t seed) {
  const std::vector<float> values = numbers(count, seed);
  const Tensor from = from_host<float>(context, values, {count});
  const Tensor made = context.empty({count}, dtype);
  copy(context, from, made);
  return made;
}

// What `compute` makes on the GPU is what it makes on the CPU, bit for bit.
template <class Compute>
void expect_same(const Compute& compute) {
  Context cpu(DeviceKind::cpu);
  Context cuda(DeviceKind::cuda);
  const Tensor expected = compute(cpu);
  const Tensor got = compute(cuda);
  ASSERT_EQ(got.nbytes(), expected.nbytes());
  std::vector<uint8_t> expected_bytes(static_cast<size_t>(expected.nbytes()));
  std::vector<uint8_t> got_bytes(expected_bytes.size());
  expected.copy_out(expected_bytes.data());
  got.copy_out(got_bytes.data());
  EXPECT_TRUE(got_bytes == expected_bytes);
}

TEST(CudaTensor, ElementsGoToTheDeviceAndBack) {
  Context context(DeviceKind::cuda);
  for (const int64_t count : kSizes) {
    const std::vector<float> values = numbers(count, 1);
    const Tensor on_device = from_host<float>(context, values, {count});
    EXPECT_EQ(to_host(on_device), std::vector<double>(values.begin(), values.end()));
  }
}

TEST(CudaTensor, ConvertsBetweenAllTypesAsTheCpuDoes) {
  for (const int64_t count : kSizes) {
    for (const DType from : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      for (const DType to : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
        expect_same([&](Context& context) {
          const Tensor made = context.empty({count}, to);
          copy(context, tensor_of(context, from, count, 2), made);
          return made;
        });
      }
    }
  }
}

TEST(CudaTensor, ScalesAsTheCpuDoes) {
  for (const int64_t count : kSizes) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      expect_same([&](Context& context) {
        const Tensor x = tensor_of(context, dtype, count, 3);
        scale(context, x, 1.0 / 3.0);
        return x;
      });
    }
  }
}

TEST(CudaTensor, ScalesUnalignedParts) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    expect_same([&](Context& context) {
      const Tensor x = tensor_of(context, dtype, 4099, 4);
      scale(context, x.flat(1, 4096), 3.0);
      return x;
    });
  }
}

TEST(CudaTensor, SumsInOrderAsTheCpuDoes) {
  for (const int64_t count : {1, 7, 256, 5001}) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      for (const uint32_t pieces : {1u, 2u, 5u, 16u}) {
        expect_same([&](Context& context) {
          std::vector<Tensor> terms;
          for (uint32_t p = 0; p < pieces; ++p) terms.push_back(tensor_of(context, dtype, count, 10 + p));
          const Tensor out = context.empty({count}, dtype);
          sum_in_order(context, terms, out);
          return out;
        });
      }
    }
  }
}

TEST(CudaTensor, SumsMorePiecesThanOnePassTakes) {
  expect_same([&](Context& context) {
    std::vector<Tensor> terms;
    for (uint32_t p = 0; p < 37; ++p) terms.push_back(tensor_of(context, DType::f32, 1001, 50 + p));
    const Tensor out = context.empty({1001}, DType::f32);
    sum_in_order(context, terms, out);
    return out;
  });
}

TEST(CudaTrace, WorkIsShownWhereItIsEnqueuedAndWhereItIsDone) {
  Context context(DeviceKind::cuda);
  context.trace().start(context);
  {
    const TraceScope module(context, TraceKind::module, "decoder.layers.0", "forward");
    EXPECT_EQ(simt::open_ranges(), 1);
    const Tensor some = context.zeros({1000}, DType::f32);
    scale(context, some, 2.0);
  }
  EXPECT_EQ(simt::open_ranges(), 0);
  const std::vector<TraceSpan> spans = context.trace().finish(context);
  const std::vector<std::string> names{"decoder.layers.0 forward", "fill_zero", "scale"};
  ASSERT_EQ(spans.size(), 2 * names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    const TraceSpan& host = spans[i];
    const TraceSpan& gpu = spans[names.size() + i];
    EXPECT_EQ(host.name, names[i]);
    EXPECT_EQ(gpu.name, names[i]);
    EXPECT_EQ(host.lane, TraceLane::host);
    EXPECT_EQ(gpu.lane, TraceLane::gpu_compute);
    EXPECT_GE(gpu.duration_us, 0.0);
    // Nothing is done before it is enqueued; the emulated GPU works only when it is waited for. Clocks that
    // count in different units may differ by one.
    EXPECT_GE(gpu.begin_us + 1.0, host.begin_us);
    EXPECT_TRUE(simt::range_names().contains(names[i]));
  }
}

TEST(CudaGraph, WorkIsDoneOnceAsIfItHadBeenEnqueued) {
  Context context(DeviceKind::cuda);
  const std::vector<float> values = numbers(500, 1);
  const Tensor x = from_host<float>(context, values, {500});
  GpuGraph graph;
  const auto before = simt::graph_counts();
  // The second and third differ from the first in arguments alone, the fourth in form.
  for (const double factor : {2.0, 4.0, 0.5}) {
    context.gpu().run_as_graph(graph, [&] {
      EXPECT_TRUE(context.gpu().is_capturing());
      const Tensor scratch = context.empty({500}, DType::f32);
      copy(context, x, scratch);
      scale(context, scratch, factor);
      copy(context, scratch, x);
    });
    EXPECT_FALSE(context.gpu().is_capturing());
  }
  context.gpu().run_as_graph(graph, [&] { scale(context, x, 2.0); });
  const auto after = simt::graph_counts();
  EXPECT_EQ(after.instantiated - before.instantiated, 2);
  EXPECT_EQ(after.updated - before.updated, 2);
  EXPECT_EQ(after.launched - before.launched, 4);
  const std::vector<double> got = to_host(x);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], static_cast<double>(values[i]) * 8.0) << i;
}

TEST(CudaGraph, WhatFailsOnTheWayLeavesTheQueueAsItWas) {
  Context context(DeviceKind::cuda);
  const Tensor x = from_host<float>(context, std::vector<float>{1.0f, 2.0f}, {2});
  GpuGraph graph;
  EXPECT_THROW(context.gpu().run_as_graph(graph,
                                          [&] {
                                            scale(context, x, 5.0);
                                            throw Error(ExitCode::internal, "no");
                                          }),
               Error);
  EXPECT_THROW(context.gpu().run_as_graph(graph, [&] { context.gpu().synchronize(); }), Error);
  EXPECT_THROW(context.gpu().run_as_graph(graph, [&] { context.gpu().run_as_graph(graph, [] {}); }),
               LogicError);
  EXPECT_FALSE(context.gpu().is_capturing());
  scale(context, x, 2.0);
  EXPECT_EQ(to_host(x), (std::vector<double>{2.0, 4.0}));
}

}  // namespace
}  // namespace normformer
