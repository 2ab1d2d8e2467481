#include "normformer/tensor/tensor.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "normformer/tensor/context.h"

namespace normformer {
namespace {

TEST(Bf16, RoundsToNearestEvenAndKeepsSpecialValues) {
  EXPECT_EQ(static_cast<float>(bf16(1.0f)), 1.0f);
  EXPECT_EQ(bf16(1.00390625f).bits, 0x3F80);  // halfway: to even, down
  EXPECT_EQ(bf16(1.01171875f).bits, 0x3F82);  // halfway: to even, up
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::nanf("")))));
  EXPECT_TRUE(std::isinf(static_cast<float>(bf16(std::numeric_limits<float>::max()))));
}

TEST(Tensor, SlicesShareMemory) {
  Context context(DeviceKind::cpu);
  const Tensor t = context.zeros({4, 3}, DType::f32);
  t.rows(1, 3).data<float>()[0] = 5;
  EXPECT_EQ(t.data<float>()[3], 5.0f);
  EXPECT_EQ(t.flat(3, 2).shape(), Shape({2}));
  EXPECT_EQ(t.view({2, 6}).data<float>()[3], 5.0f);
}

TEST(Tensor, WrongTypeShapeAndMetaAreRefused) {
  Context context(DeviceKind::cpu);
  const Tensor t = context.zeros({4, 3}, DType::f32);
  EXPECT_THROW(t.data<double>(), LogicError);
  EXPECT_THROW(t.view({5, 3}), LogicError);
  EXPECT_THROW(t.rows(3, 5), LogicError);
  EXPECT_THROW(Tensor().raw(), LogicError);
  Context meta(DeviceKind::meta);
  EXPECT_THROW(meta.empty({2}, DType::f32).data<float>(), LogicError);
}

TEST(Tensor, SumInOrderAddsInFp32AndRoundsOnce) {
  Context context(DeviceKind::cpu, 2);
  const std::vector<bf16> one(3, bf16(1.0f));
  const std::vector<bf16> tiny(3, bf16(0.00390625f));
  const Tensor a = from_host<bf16>(context, one, {3});
  const Tensor b = from_host<bf16>(context, tiny, {3});
  const Tensor pieces[] = {a, b, b};
  sum_in_order(context, pieces, a);  // pairwise rounding in bf16 would give 1
  EXPECT_EQ(static_cast<float>(a.data<bf16>()[2]), 1.0078125f);
}

TEST(Tensor, CopyConverts) {
  Context context(DeviceKind::cpu, 2);
  const std::vector<double> values{1.0, 1.0 + 1e-12, -3.5};
  const Tensor wide = from_host<double>(context, values, {3});
  const Tensor narrow = context.empty({3}, DType::f32);
  copy(context, wide, narrow);
  EXPECT_EQ(to_host(narrow), (std::vector<double>{1.0, 1.0, -3.5}));
}

}  // namespace
}  // namespace normformer
