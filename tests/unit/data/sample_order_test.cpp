#include "normformer/data/sample_order.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

std::vector<int64_t> images(const Permutation& permutation) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < permutation.size(); ++i) result.push_back(permutation(i));
  return result;
}

TEST(Permutation, IsABijectionForEverySize) {
  std::vector<int64_t> sizes;
  for (int64_t size = 1; size <= 300; ++size) sizes.push_back(size);
  for (const int64_t size : {1023, 1024, 1025, 65521, 65536, 100000}) sizes.push_back(size);
  for (const int64_t size : sizes) {
    std::vector<int64_t> sorted = images(Permutation(RandomStream{42}, size));
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 0; i < size; ++i) ASSERT_EQ(sorted[i], i) << size;
  }
}

TEST(Permutation, ReachesFarIntoHugeDomains) {
  const int64_t size = (int64_t{1} << 62) - 57;
  const Permutation permutation(RandomStream{1}, size);
  std::set<int64_t> seen;
  int64_t high = 0;
  for (int64_t i = 0; i < 1000; ++i) {
    const int64_t image = permutation(i);
    ASSERT_GE(image, 0);
    ASSERT_LT(image, size);
    ASSERT_TRUE(seen.insert(image).second);
    high += image >= size / 2;
  }
  EXPECT_GT(high, 400);
  EXPECT_LT(high, 600);
}

TEST(Permutation, AllPermutationsOfFourAreEquallyLikely) {
  std::map<std::vector<int64_t>, int> counts;
  const int trials = 48000;
  for (int i = 0; i < trials; ++i) ++counts[images(Permutation(RandomStream{7}.with(uint64_t(i)), 4))];
  ASSERT_EQ(counts.size(), 24u);
  double chi_square = 0;
  const double expected = trials / 24.0;
  for (const auto& [permutation, count] : counts) {
    chi_square += (count - expected) * (count - expected) / expected;
  }
  EXPECT_LT(chi_square, 56.0);  // the 99.99 % point for 23 degrees of freedom is 56.0
}

TEST(Permutation, NeighboursEndUpApart) {
  // Of all pairs of neighbours in 1000 elements, about two in a thousand stay neighbours under a random
  // permutation.
  const std::vector<int64_t> order = images(Permutation(RandomStream{3}, 1000));
  int neighbours = 0;
  for (std::size_t i = 0; i + 1 < order.size(); ++i) neighbours += std::abs(order[i] - order[i + 1]) == 1;
  EXPECT_LE(neighbours, 10);
}

TEST(SampleOrder, EveryEpochTakesEachSampleOnceInItsOwnOrder) {
  const auto order = SampleOrder::shuffled(RandomStream{9}, 97);
  std::vector<std::vector<int64_t>> epochs(3);
  for (int64_t i = 0; i < 3 * 97; ++i) epochs[i / 97].push_back(order.at(i));
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
  for (auto& epoch : epochs) {
    std::sort(epoch.begin(), epoch.end());
    for (int64_t i = 0; i < 97; ++i) ASSERT_EQ(epoch[i], i);
  }
}

TEST(SampleOrder, DependsOnTheSeed) {
  const auto take = [](uint64_t seed) {
    const auto order = SampleOrder::shuffled(RandomStream{seed}, 50);
    std::vector<int64_t> result;
    for (int64_t i = 0; i < 50; ++i) result.push_back(order.at(i));
    return result;
  };
  EXPECT_EQ(take(1), take(1));
  EXPECT_NE(take(1), take(2));
}

TEST(SampleOrder, SequentialStartsAgainAtTheEnd) {
  const auto order = SampleOrder::sequential(3);
  std::vector<int64_t> taken;
  for (int64_t i = 0; i < 7; ++i) taken.push_back(order.at(i));
  EXPECT_THAT(taken, ::testing::ElementsAre(0, 1, 2, 0, 1, 2, 0));
}

TEST(SampleOrder, RefusesWhatHasNoMeaning) {
  EXPECT_THROW(SampleOrder::sequential(0), LogicError);
  EXPECT_THROW(SampleOrder::sequential(5).at(-1), LogicError);
  EXPECT_THROW(Permutation(RandomStream{1}, 0), LogicError);
  EXPECT_THROW(Permutation(RandomStream{1}, 5)(5), LogicError);
}

}  // namespace
}  // namespace normformer
