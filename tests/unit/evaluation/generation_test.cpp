#include "normformer/evaluation/generation.h"

#include <cmath>
#include <limits>
#include <map>

#include <gtest/gtest.h>

namespace normformer {
namespace {

const std::vector<double> kLogits{0.0, 2.0, 1.0, 2.0, -5.0};

std::map<int32_t, int> draw(const GenerationOptions& options, int draws) {
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) ++counts[sample_token(kLogits, options, RandomStream{3}, i)];
  return counts;
}

TEST(SampleToken, TemperatureZeroTakesTheLikeliestWithTheSmallestId) {
  EXPECT_EQ(draw({.temperature = 0.0}, 20), (std::map<int32_t, int>{{1, 20}}));
}

TEST(SampleToken, TopKAndTopPCutTheTail) {
  EXPECT_EQ(draw({.top_k = 1}, 20).size(), 1u);
  for (const auto& [id, count] : draw({.top_k = 2}, 200)) EXPECT_TRUE(id == 1 || id == 3);
  // p(1) = p(3) = 0.399, p(2) = 0.147: two tokens reach 0.7, three 0.9.
  EXPECT_EQ(draw({.top_p = 0.7}, 500).size(), 2u);
  EXPECT_EQ(draw({.top_p = 0.9}, 500).size(), 3u);
  EXPECT_EQ(draw({.top_p = 1e-9}, 20).size(), 1u);
}

TEST(SampleToken, FrequenciesFollowTheSoftmax) {
  constexpr int kDraws = 20000;
  double total = 0.0;
  for (const double l : kLogits) total += std::exp(l / 1.5);
  const auto counts = draw({.temperature = 1.5}, kDraws);
  for (size_t id = 0; id < kLogits.size(); ++id) {
    const double p = std::exp(kLogits[id] / 1.5) / total;
    const double sigma = std::sqrt(p * (1 - p) * kDraws);
    EXPECT_NEAR(counts.at(static_cast<int32_t>(id)), p * kDraws, 5 * sigma);
  }
}

TEST(SampleToken, LogitsThatAreNoNumbersAreRefused) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const std::vector<double>& logits :
       {std::vector<double>{0.0, nan}, std::vector<double>{nan, 0.0}, std::vector<double>{0.0, infinity},
        std::vector<double>{-infinity, -infinity}}) {
    for (const double temperature : {0.0, 1.0})
      EXPECT_THROW(sample_token(logits, {.temperature = temperature}, RandomStream{}, 0), NumericError);
  }
}

}  // namespace
}  // namespace normformer
