#include "normformer/ops/dropout.h"

#include "ops/cpu/dropout_mask.h"
#include "support.h"

namespace normformer::ops {
namespace {

TEST(DropoutMask, IsTheContractWordForWord) {
  const RandomStream stream = RandomStream{}.with(3).with("mask");
  for (const int64_t first : {0, 1, 2, 3, 4, 63, 1021}) {
    for (const int64_t count : {0, 1, 2, 3, 5, 31, 64, 65, 200}) {
      for (const double probability : {0.1, 0.5, 0.999}) {
        std::vector<float> narrow(static_cast<size_t>(count) + 1, -1.0f);
        std::vector<double> wide(static_cast<size_t>(count) + 1, -1.0);
        const int64_t sample = (int64_t{1} << 33) + 7;
        cpu::dropout_multipliers(stream, sample, first, count, probability, narrow.data());
        cpu::dropout_multipliers(stream, sample, first, count, probability, wide.data());
        for (int64_t j = 0; j < count; ++j) {
          const auto i = static_cast<uint64_t>(first + j);
          const uint32_t word = stream.words(i / 4, static_cast<uint64_t>(sample))[i % 4];
          const double want =
              static_cast<double>(word) >= probability * 0x1p32 ? 1.0 / (1.0 - probability) : 0.0;
          ASSERT_EQ(wide[static_cast<size_t>(j)], want) << first << " + " << j;
          ASSERT_EQ(narrow[static_cast<size_t>(j)], static_cast<float>(want)) << first << " + " << j;
        }
        EXPECT_EQ(narrow.back(), -1.0f) << "written beyond the run";
        EXPECT_EQ(wide.back(), -1.0) << "written beyond the run";
      }
    }
  }
}

TEST(DropoutMask, CountersBeyond32BitsAreNotCut) {
  const RandomStream stream = RandomStream{}.with(4);
  const int64_t first = (int64_t{1} << 34) - 6;  // its blocks step over 2^32
  std::vector<double> multipliers(40);
  cpu::dropout_multipliers(stream, 1, first, 40, 0.5, multipliers.data());
  for (size_t j = 0; j < multipliers.size(); ++j) {
    const uint64_t i = static_cast<uint64_t>(first) + j;
    EXPECT_EQ(multipliers[j], stream.words(i / 4, 1)[i % 4] >= 0x80000000u ? 2.0 : 0.0);
  }
}

TEST(DropoutMask, AWordBelowTheProbabilityByHalfIsDropped) {
  const RandomStream stream = RandomStream{}.with(5);
  for (uint64_t i = 0; i < 4; ++i) {
    const double word = stream.words(0)[i];
    double multiplier = -1.0;
    cpu::dropout_multipliers(stream, 0, static_cast<int64_t>(i), 1, (word + 0.5) * 0x1p-32, &multiplier);
    EXPECT_EQ(multiplier, 0.0);
    cpu::dropout_multipliers(stream, 0, static_cast<int64_t>(i), 1, word * 0x1p-32, &multiplier);
    EXPECT_EQ(multiplier, 1.0 / (1.0 - word * 0x1p-32));
  }
}

TEST(DropoutMask, KeepsTheShareThatItShould) {
  constexpr int64_t kCount = 1 << 20;
  std::vector<float> multipliers(kCount);
  cpu::dropout_multipliers(RandomStream{}.with(9), 0, 0, kCount, 0.1, multipliers.data());
  int64_t dropped = 0;
  for (const float m : multipliers) dropped += m == 0.0f ? 1 : 0;
  // Binomial: standard deviation sqrt(0.1 * 0.9 / 2^20) = 2.9e-4; five of them.
  EXPECT_NEAR(static_cast<double>(dropped) / kCount, 0.1, 1.5e-3);
}

}  // namespace
}  // namespace normformer::ops
