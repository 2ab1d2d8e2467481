#include "normformer/tensor/memory.h"

#include <gtest/gtest.h>

#include "normformer/tensor/context.h"

namespace normformer {
namespace {

TEST(Allocator, SizeClassesCoverAndWasteLittle) {
  for (const int64_t bytes :
       {1LL, 511LL, 512LL, 513LL, 100'000LL, 1LL << 20, (1LL << 20) + 1, 123'456'789LL}) {
    EXPECT_GE(Allocator::size_class(bytes), bytes);
    EXPECT_LE(Allocator::size_class(bytes), bytes + std::max<int64_t>(512, bytes / 16 + 1));
  }
}

TEST(Allocator, ReusesFreedBlocksAndKeepsTheHighWaterMark) {
  Context context(DeviceKind::cpu);
  void* first = nullptr;
  {
    const Tensor a = context.empty({1024}, DType::f32);
    first = a.raw();
  }
  const Tensor b = context.empty({1024}, DType::f32, MemoryUse::gradients);
  EXPECT_EQ(b.raw(), first);
  const MemoryReport report = context.memory().report();
  EXPECT_EQ(report.reserved, 4096);
  EXPECT_EQ(report.peak_live, 4096);
  EXPECT_EQ(report.live_by_use[static_cast<size_t>(MemoryUse::gradients)], 4096);
  EXPECT_EQ(report.live_by_use[static_cast<size_t>(MemoryUse::activations)], 0);
}

TEST(Allocator, MetaCountsExactlyAsCpuDoes) {
  Context cpu(DeviceKind::cpu);
  Context meta(DeviceKind::meta);
  for (Context* c : {&cpu, &meta}) {
    const Tensor kept = c->empty({1000, 33}, DType::bf16, MemoryUse::parameters);
    for (int i = 0; i < 3; ++i) {
      const Tensor temporary = c->zeros({77, 1001 + i}, DType::f64);
      const Tensor other = c->empty({5}, DType::u8);
    }
  }
  const auto a = cpu.memory().report();
  const auto b = meta.memory().report();
  EXPECT_EQ(a.peak_live, b.peak_live);
  EXPECT_EQ(a.peak_reserved, b.peak_reserved);
  EXPECT_EQ(a.at_peak_by_use, b.at_peak_by_use);
  EXPECT_GT(a.peak_live, 77 * 1001 * 8);
}

TEST(Allocator, TensorsOutliveTheirContext) {
  Tensor t;
  {
    Context context(DeviceKind::cpu);
    t = context.zeros({8}, DType::f64);
  }
  EXPECT_EQ(t.data<double>()[7], 0.0);
}

}  // namespace
}  // namespace normformer
