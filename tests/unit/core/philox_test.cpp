#include "normformer/core/philox.h"

#include <set>

#include <gtest/gtest.h>

namespace normformer {
namespace {

// Known answers published with Random123 (kat_vectors, philox4x32 10).
TEST(Philox, MatchesPublishedVectors) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, FactsInAnotherOrderGiveAnotherStream) {
  const RandomStream root{7};
  std::set<uint64_t> keys{
      root.key,           root.with(1).with(2).key, root.with(2).with(1).key, root.with(1).key,
      root.with("a").key, root.with("b").key,       root.with("ab").key,      root.with("").key};
  EXPECT_EQ(keys.size(), 8u);
}

TEST(RandomStream, UnitIntervalIsOpen) {
  EXPECT_GT(to_unit_open(0), 0.0);
  EXPECT_LT(to_unit_open(0xffffffffu), 1.0);
}

}  // namespace
}  // namespace normformer
