#include "normformer/training/statistics.h"

#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace normformer {
namespace {

// Expected values are numpy's: percentile, mean, std and histogram.
TEST(Distribution, HasNumpysNumbers) {
  const std::vector<double> values = {0.3, 1.5, -2.25, 0.75, 4.0, 0.3, 1.0, -0.5, 2.0, 0.125, 3.5};
  const Distribution d = distribution_of("x", values);
  EXPECT_EQ(d.name, "x");
  EXPECT_EQ(d.count, 11);
  EXPECT_EQ(d.min, -2.25);
  EXPECT_EQ(d.max, 4.0);
  EXPECT_NEAR(d.p5, -1.375, 1e-15);
  EXPECT_NEAR(d.p25, 0.2125, 1e-15);
  EXPECT_NEAR(d.p50, 0.75, 1e-15);
  EXPECT_NEAR(d.p75, 1.75, 1e-15);
  EXPECT_NEAR(d.p95, 3.75, 1e-15);
  EXPECT_NEAR(d.mean, 0.975, 1e-15);
  EXPECT_NEAR(d.std, 1.6818212530684487, 1e-15);
  EXPECT_THAT(d.counts, testing::ElementsAre(1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 0, 1, 1, 0, 0, 1, 0, 1, 0,
                                             0, 0, 0, 0, 0, 1, 0, 1));
  ASSERT_EQ(d.edges.size(), 31u);
  EXPECT_EQ(d.edges.front(), -2.25);
  EXPECT_NEAR(d.edges[7], -2.25 + 7 * 6.25 / 30, 1e-14);
  EXPECT_EQ(d.edges.back(), 4.0);
}

TEST(Distribution, OfEqualValuesIsOneBin) {
  const std::vector<double> ones(48, 1.0);
  const Distribution d = distribution_of("gain", ones);
  EXPECT_THAT(d.edges, testing::ElementsAre(1.0, 1.0));
  EXPECT_THAT(d.counts, testing::ElementsAre(48));
  EXPECT_EQ(d.std, 0.0);
  EXPECT_EQ(d.p5, 1.0);
}

TEST(Scales, AreGainsAndScalesAlone) {
  for (const char* name :
       {"decoder.layers.3.c_attn", "decoder.layers.3.attn_ln.weight", "decoder.layers.0.ffn_layernorm.weight",
        "decoder.layers.11.w_resid", "decoder.layers.2.self_attn_layer_norm.weight",
        "decoder.layers.2.final_layer_norm.weight", "decoder.layer_norm.weight",
        "decoder.layers.2.self_attn.q_ln.weight"})
    EXPECT_TRUE(is_scale(name)) << name;
  for (const char* name : {"decoder.layers.3.attn_ln.bias", "decoder.layers.3.fc2.weight",
                           "decoder.embed_tokens.weight", "decoder.layers.3.self_attn.q_proj.weight"})
    EXPECT_FALSE(is_scale(name)) << name;
}

TEST(StatisticsFile, ResumingDropsWhatAnUninterruptedRunWouldNotHave) {
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / fmt::format("normformer_statistics_{}.jsonl", getpid());
  const std::vector<std::string> names = {"a", "b"};
  const std::vector<ParameterNorms> norms = {{1.5, 0.5}, {2.5, std::numeric_limits<double>::infinity()}};
  const Distribution d = distribution_of("c", std::vector<double>{1.0, 2.0});
  {
    StatisticsFile file(path, {});
    for (int64_t i = 1; i <= 3; ++i) file.write_gradients({.batch_index = i, .updates = i}, names, norms);
    EXPECT_TRUE(file.write_distributions({.batch_index = 3, .updates = 3, .tokens = 30}, {&d, 1}));
  }
  {
    StatisticsFile again(path, {.batch_index = 3, .updates = 3});
    EXPECT_FALSE(again.write_distributions({.batch_index = 3, .updates = 3}, {&d, 1}));
  }
  StatisticsFile(path, {.batch_index = 2}).write_gradients({.batch_index = 3, .updates = 3}, names, norms);
  std::vector<nlohmann::json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  std::filesystem::remove(path);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[2]["kind"], "gradients");
  EXPECT_EQ(lines[2]["parameters"]["a"], (nlohmann::json{{"l1", 1.5}, {"l2", 0.5}}));
  EXPECT_TRUE(lines[2]["parameters"]["b"]["l2"].is_null());
}

}  // namespace
}  // namespace normformer
