#include "normformer/tensor/tensor.h"

#include <bit>
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

TEST(F16, EveryValueIsWhatItsBitsSay) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    f16 half;
    half.bits = static_cast<uint16_t>(bits);
    const auto value = static_cast<float>(half);
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    if (exponent == 31 && fraction != 0) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_EQ(f16(value).bits, bits | 0x200) << bits;  // quiet, with its other bits
      continue;
    }
    const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    const auto expected = static_cast<float>(bits >= 0x8000 ? -magnitude : magnitude);
    EXPECT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(expected)) << bits;
    EXPECT_EQ(f16(value).bits, bits);
  }
}

#ifdef __FLT16_MANT_DIG__
// The compiler's own half precision, over floats of every exponent, and next to where rounding turns.
TEST(F16, RoundsAsTheCompilerRounds) {
  __extension__ using Half = _Float16;
  const auto expect_alike = [](uint32_t bits) {
    const auto value = std::bit_cast<float>(bits);
    const auto expected = std::bit_cast<uint16_t>(static_cast<Half>(value));
    ASSERT_EQ(f16(value).bits, expected) << value << ", bits " << bits;
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 2039) expect_alike(static_cast<uint32_t>(bits));
  for (uint32_t half = 0; half < 0x7C00; ++half) {
    f16 below, above;
    below.bits = static_cast<uint16_t>(half);
    above.bits = static_cast<uint16_t>(half + 1);
    const float top = half == 0x7BFF ? 65536.0f : static_cast<float>(above);
    const auto middle = std::bit_cast<uint32_t>((static_cast<float>(below) + top) / 2);
    for (const uint32_t sign : {0u, 0x80000000u}) {
      for (const uint32_t bits : {middle - 1, middle, middle + 1}) expect_alike(sign | bits);
    }
  }
}
#endif

TEST(F16, ConvertsAtCompileTime) {
  static_assert(f16(65504.0f).bits == 0x7BFF && f16(65520.0f).bits == 0x7C00 && f16(-0.0f).bits == 0x8000);
  static_assert(f16(0x1p-24f).bits == 1 && f16(0x1p-25f).bits == 0 && f16(0x1.8p-24f).bits == 2);
  static_assert(static_cast<float>(f16(0x1.004p-14f)) == 0x1.004p-14f);
  EXPECT_EQ(size_of(dtype_of<f16>()), 2);
  EXPECT_EQ(name_of(dtype_of<f16>()), "f16");
  EXPECT_EQ(accumulator_of(dtype_of<f16>()), DType::f32);
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
