#include "normformer/core/unique_handle.h"

#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

namespace normformer {
namespace {

std::vector<int> closed;

struct NumberTraits {
  using Handle = int;
  static Handle none() noexcept { return -1; }
  static void close(Handle handle) noexcept { closed.push_back(handle); }
};
using Number = UniqueHandle<NumberTraits>;

static_assert(!std::is_copy_constructible_v<Number> && !std::is_copy_assignable_v<Number>);

class UniqueHandleTest : public testing::Test {
 protected:
  void SetUp() override { closed.clear(); }
};

TEST_F(UniqueHandleTest, ClosesOnceAndNeverTheEmptyOne) {
  {
    const Number empty;
    const Number seven(7);
    EXPECT_FALSE(empty);
    EXPECT_TRUE(seven);
    EXPECT_EQ(seven.get(), 7);
  }
  EXPECT_EQ(closed, std::vector<int>{7});
}

TEST_F(UniqueHandleTest, MovingLeavesTheSourceEmpty) {
  {
    Number a(1);
    const Number b(std::move(a));
    EXPECT_FALSE(a);  // NOLINT(bugprone-use-after-move): what a move leaves is the contract
    EXPECT_EQ(b.get(), 1);
    EXPECT_TRUE(closed.empty());
  }
  EXPECT_EQ(closed, std::vector<int>{1});
}

TEST_F(UniqueHandleTest, AssigningClosesWhatWasHeld) {
  {
    Number a(1);
    Number b(2);
    a = std::move(b);
    EXPECT_EQ(closed, std::vector<int>{1});
    EXPECT_EQ(a.get(), 2);
  }
  EXPECT_EQ(closed, (std::vector<int>{1, 2}));
}

TEST_F(UniqueHandleTest, AssigningToItselfKeepsTheHandle) {
  {
    Number a(1);
    Number& same = a;
    a = std::move(same);
    EXPECT_EQ(a.get(), 1);
    EXPECT_TRUE(closed.empty());
  }
  EXPECT_EQ(closed, std::vector<int>{1});
}

TEST_F(UniqueHandleTest, ReleaseGivesTheHandleUp) {
  {
    Number a(5);
    EXPECT_EQ(a.release(), 5);
    EXPECT_FALSE(a);
  }
  EXPECT_TRUE(closed.empty());
}

}  // namespace
}  // namespace normformer
