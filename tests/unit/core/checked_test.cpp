#include "normformer/core/checked.h"

#include <gtest/gtest.h>

namespace normformer {
namespace {

TEST(Checked, OverflowThrows) {
  EXPECT_EQ(checked_mul(1LL << 31, 1LL << 31), 1LL << 62);
  EXPECT_THROW(checked_mul(1LL << 32, 1LL << 31), LogicError);
  EXPECT_THROW(checked_add(INT64_MAX, 1), LogicError);
}

TEST(Checked, EvenPartsCoverOnceAndDifferByOneAtMost) {
  for (const int64_t total : {0, 1, 5, 7, 50257}) {
    for (const int64_t parts : {1, 2, 3, 4, 7}) {
      int64_t next = 0;
      for (int64_t i = 0; i < parts; ++i) {
        const Range r = even_part(total, parts, i);
        EXPECT_EQ(r.begin, next);
        EXPECT_GE(r.size(), total / parts);
        EXPECT_LE(r.size(), total / parts + 1);
        next = r.end;
      }
      EXPECT_EQ(next, total);
    }
  }
}

TEST(Checked, IntersectOfDisjointRangesIsEmpty) {
  EXPECT_TRUE(intersect({0, 3}, {5, 9}).empty());
  EXPECT_EQ(intersect({0, 7}, {5, 9}), (Range{5, 7}));
}

}  // namespace
}  // namespace normformer
