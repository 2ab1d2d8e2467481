#include "normformer/training/metrics.h"

#include <filesystem>
#include <fstream>
#include <limits>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace normformer {
namespace {

std::vector<nlohmann::json> read_lines(const std::filesystem::path& path) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

class Metrics : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / fmt::format("normformer_metrics_{}", getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path file() const { return folder_ / "metrics.jsonl"; }

  std::filesystem::path folder_;
};

TEST_F(Metrics, ResumingDropsWhatAnUninterruptedRunWouldNotHave) {
  {
    MetricsFile metrics(file(), {});
    for (int64_t i = 1; i <= 5; ++i)
      metrics.write_step({{.loss = 1.0 * i}, {.batch_index = i, .updates = i}}, {});
    metrics.write_validation({.batch_index = 5, .updates = 5}, {.nll_sum = 6.0, .tokens = 3}, 0);
  }
  std::ofstream(file(), std::ios::app) << R"({"kind":"step","batch":6,"lo)";  // a torn line
  MetricsFile metrics(file(), {.batch_index = 3, .updates = 3});
  metrics.write_step({{.loss = 44.0}, {.batch_index = 4, .updates = 4}}, {});
  const auto lines = read_lines(file());
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[2]["loss"], 3.0);
  EXPECT_EQ(lines[3]["loss"], 44.0);
}

TEST_F(Metrics, AValidationThatIsMadeAgainIsTheSame) {
  EXPECT_TRUE(MetricsFile(file(), {}).write_validation({.batch_index = 5}, {.nll_sum = 6.0, .tokens = 3}, 0));
  MetricsFile resumed(file(), {.batch_index = 5});
  EXPECT_FALSE(resumed.write_validation({.batch_index = 5}, {.nll_sum = 6.0, .tokens = 3}, 0));
  resumed.write_validation({.batch_index = 6}, {.nll_sum = 5.0, .tokens = 3}, 0);
  EXPECT_EQ(read_lines(file()).size(), 2u);
}

TEST_F(Metrics, WhatIsTrainedIsSaidOnceAndTimeGoesOnWhereTheRunDoes) {
  {
    MetricsFile metrics(file(), {});
    metrics.write_run({}, 123, 456.0);
    metrics.write_validation({.batch_index = 1}, {.nll_sum = 6.0, .tokens = 3}, 1024);
  }
  std::ofstream(file(), std::ios::app) << R"({"kind":"step","batch":2,"elapsed":1000.5})" << '\n'
                                       << R"({"kind":"step","batch":3,"elapsed":5000.5})" << '\n';
  MetricsFile resumed(file(), {.batch_index = 2});
  resumed.write_run({.batch_index = 2}, 123, 456.0);
  resumed.write_step({{}, {.batch_index = 3}}, {});
  const auto lines = read_lines(file());
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[0]["parameters"], 123);
  EXPECT_EQ(lines[0]["flops_per_token"], 456.0);
  EXPECT_EQ(lines[1]["peak_memory"], 1024);
  EXPECT_GE(lines[3]["elapsed"], 1000.5);
  EXPECT_LT(lines[3]["elapsed"], 5000.5);
}

TEST_F(Metrics, InfinityBecomesNull) {
  MetricsFile metrics(file(), {});
  metrics.write_step({{.gradient_norm = std::numeric_limits<double>::infinity(),
                       .skipped = true,
                       .reason = SkipReason::nonfinite},
                      {.batch_index = 1}},
                     {});
  const auto lines = read_lines(file());
  EXPECT_TRUE(lines[0]["gradient_norm"].is_null());
  EXPECT_EQ(lines[0]["skipped"], true);
  EXPECT_EQ(lines[0]["reason"], "nonfinite");
  EXPECT_FALSE(lines[0].contains("slowest_rank"));
}

TEST_F(Metrics, SaysWhoIsSlowestAndWhereTheRunWentBack) {
  MetricsFile metrics(file(), {});
  metrics.write_step(
      {.report = {.skipped = true, .reason = SkipReason::spike, .spike = SpikeScores{9.0, 1.0, 8}},
       .counters = {.batch_index = 7, .updates = 6},
       .compute_seconds = {0.5, 0.75, 0.25}},
      {});
  metrics.write_rollback({{.reason = SkipReason::spike}, {.batch_index = 7, .updates = 6}},
                         {.batch_index = 7, .updates = 4, .tokens = 40}, 5);
  const auto lines = read_lines(file());
  EXPECT_EQ(lines[0]["reason"], "spike");
  EXPECT_EQ(lines[0]["spike"], true);
  EXPECT_EQ(lines[0]["compute_median"], 0.5);
  EXPECT_EQ(lines[0]["compute_max"], 0.75);
  EXPECT_EQ(lines[0]["slowest_rank"], 1);
  const nlohmann::json expected = {{"kind", "rollback"}, {"batch", 7},        {"update", 4},
                                   {"tokens", 40},       {"reason", "spike"}, {"from_update", 6},
                                   {"first_left_out", 5}};
  EXPECT_EQ(lines[1], expected);
}

TEST_F(Metrics, AScaledLossIsInTheLine) {
  MetricsFile metrics(file(), {});
  const TrainingCounters counters{.batch_index = 1, .loss_scale = {.value = 32, .overflows = 3}};
  metrics.write_step({{.skipped = true, .loss_scale = 64, .reason = SkipReason::overflow}, counters}, {});
  metrics.write_step({{}, {.batch_index = 2}}, {});
  const auto lines = read_lines(file());
  EXPECT_EQ(lines[0]["loss_scale"], 64.0);  // what the step was computed with
  EXPECT_EQ(lines[0]["overflows"], 3);
  EXPECT_FALSE(lines[1].contains("loss_scale"));
}

TEST_F(Metrics, AFolderThatIsMissingIsNamed) {
  try {
    MetricsFile metrics(folder_ / "absent" / "metrics.jsonl", {});
    FAIL() << "did not throw";
  } catch (const IoError& e) {
    EXPECT_NE(std::string(e.what()).find("absent"), std::string::npos);
  }
}

TEST(Texts, PrefixesAndDurations) {
  EXPECT_EQ(with_prefix(789.0), "789");
  EXPECT_EQ(with_prefix(12345.0), "12.3 k");
  EXPECT_EQ(with_prefix(1.5e12, "FLOP/s"), "1.5 TFLOP/s");
  EXPECT_EQ(duration_text(12.4), "12 s");
  EXPECT_EQ(duration_text(245), "4 min 5 s");
  EXPECT_EQ(duration_text(11520), "3 h 12 min");
}

}  // namespace
}  // namespace normformer
