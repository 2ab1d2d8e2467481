// GLUE's measures against scikit-learn 1.9.1's matthews_corrcoef and f1_score.
#include <gtest/gtest.h>

#include "normformer/evaluation/classification.h"

namespace normformer {
namespace {

std::vector<int32_t> classes_of(int64_t texts, int64_t classes) {
  std::vector<int32_t> made;
  for (int64_t i = 0; i < texts; ++i)
    made.push_back(static_cast<int32_t>((i * i * 3 + i * 5) % 17 % classes));
  return made;
}

// A third of them as good as drawn, the rest right.
std::vector<int32_t> predictions_of(const std::vector<int32_t>& targets, int64_t classes) {
  std::vector<int32_t> made = targets;
  for (size_t i = 0; i < made.size(); i += 3)
    made[i] = static_cast<int32_t>((i * 7 + i / 4) % static_cast<size_t>(classes));
  return made;
}

ClassScores scores_of(int64_t texts, int64_t classes) {
  const std::vector<int32_t> targets = classes_of(texts, classes);
  return score_classes(targets, predictions_of(targets, classes), classes);
}

TEST(ClassScores, AreScikitLearns) {
  const ClassScores two = scores_of(40, 2);
  EXPECT_NEAR(two.matthews, 0.6904248749404296, 1e-14);
  ASSERT_TRUE(two.f1.has_value());
  EXPECT_NEAR(*two.f1, 0.7857142857142857, 1e-14);
  EXPECT_NEAR(scores_of(50, 3).matthews, 0.6065080880528717, 1e-14);
  EXPECT_NEAR(scores_of(60, 5).matthews, 0.596925030692624, 1e-14);
  EXPECT_FALSE(scores_of(60, 5).f1.has_value());
}

TEST(ClassScores, OfOneClassOnlyAreZero) {
  const std::vector<int32_t> none{0, 0, 0}, some{0, 0, 1}, all{1, 1, 1};
  EXPECT_EQ(score_classes(some, none, 2).matthews, 0.0);
  EXPECT_EQ(score_classes(none, some, 2).matthews, 0.0);
  EXPECT_EQ(score_classes(all, all, 2).matthews, 0.0);
  EXPECT_EQ(score_classes(none, none, 2).f1, 0.0);
  EXPECT_EQ(score_classes(all, all, 2).f1, 1.0);
}

TEST(ClassScores, OfPredictionsThatAreAllWrongAreNegative) {
  const std::vector<int32_t> targets{0, 1, 0, 1}, predictions{1, 0, 1, 0};
  EXPECT_EQ(score_classes(targets, predictions, 2).matthews, -1.0);
}

}  // namespace
}  // namespace normformer
