#include "normformer/model/parts.h"

#include <algorithm>
#include <numeric>

#include <gtest/gtest.h>

namespace normformer {
namespace {

ModelConfig model_of(int64_t layers, int64_t width, int64_t vocab) {
  ModelConfig model;
  model.layers = layers;
  model.width = width;
  model.ffn = 4 * width;
  model.vocab = vocab;
  model.length = 128;
  return model;
}

// Multiply-adds a token of the slowest part.
int64_t slowest(const ModelConfig& m, const std::vector<int64_t>& split) {
  const int64_t of_layer = m.width * (12 * m.width + m.length);
  int64_t most = 0;
  for (size_t i = 0; i < split.size(); ++i) {
    most = std::max(most, split[i] * of_layer + (i + 1 == split.size() ? m.width * m.vocab : 0));
  }
  return most;
}

// The least that any way to give every part a layer reaches, by trying them all.
int64_t best_of_all(const ModelConfig& m, std::vector<int64_t>& split, size_t part, int64_t left) {
  if (part + 1 == split.size()) {
    split[part] = left;
    return slowest(m, split);
  }
  int64_t best = INT64_MAX;
  for (int64_t n = 1; n <= left - static_cast<int64_t>(split.size() - part - 1); ++n) {
    split[part] = n;
    best = std::min(best, best_of_all(m, split, part + 1, left - n));
  }
  return best;
}

TEST(BalancedSplit, NoOtherSplitHasAFasterSlowestPart) {
  for (int64_t layers = 1; layers <= 12; ++layers) {
    for (int64_t parts = 1; parts <= std::min<int64_t>(layers, 4); ++parts) {
      for (const int64_t vocab : {1, 500, 3000, 100'000}) {
        const ModelConfig m = model_of(layers, 64, vocab);
        const std::vector<int64_t> split = balanced_split(m, parts);
        EXPECT_EQ(std::accumulate(split.begin(), split.end(), int64_t{0}), layers);
        EXPECT_GE(*std::min_element(split.begin(), split.end()), 1);
        std::vector<int64_t> tried(static_cast<size_t>(parts));
        EXPECT_EQ(slowest(m, split), best_of_all(m, tried, 0, layers))
            << layers << " layers, " << parts << " parts, vocabulary " << vocab;
      }
    }
  }
  EXPECT_EQ(balanced_split(model_of(8, 64, 1), 4), (std::vector<int64_t>{2, 2, 2, 2}));
  EXPECT_EQ(balanced_split(model_of(5, 64, 100'000), 2), (std::vector<int64_t>{4, 1}));
  EXPECT_THROW(balanced_split(model_of(3, 64, 1), 4), LogicError);
}

// Every layer lies in one part, and the ends where the schedule has them.
TEST(PartsOfStage, CoverTheModelOnce) {
  RunConfig config;
  config.model = model_of(13, 64, 700);
  for (const auto schedule :
       {PipelineSchedule::gpipe, PipelineSchedule::one_f_one_b, PipelineSchedule::interleaved,
        PipelineSchedule::zb_h1, PipelineSchedule::zb_h2, PipelineSchedule::zb_v}) {
    config.parallel.schedule = schedule;
    config.parallel.virtual_stages = schedule == PipelineSchedule::interleaved ? 3 : 1;
    for (int64_t stages = 1; stages <= 4; ++stages) {
      std::vector<int> times(13);
      int firsts = 0;
      int lasts = 0;
      for (int64_t stage = 0; stage < stages; ++stage) {
        const std::vector<StagePart> parts = parts_of_stage(config, stages, stage);
        ASSERT_EQ(static_cast<int64_t>(parts.size()), config.parallel.parts_of_rank());
        for (const StagePart& part : parts) {
          for (int64_t l = part.layers.begin; l < part.layers.end; ++l) ++times[static_cast<size_t>(l)];
          firsts += part.first ? 1 : 0;
          lasts += part.last ? 1 : 0;
          EXPECT_EQ(part.first, part.layers.begin == 0);
          EXPECT_EQ(part.last, part.layers.end == 13);
          EXPECT_EQ(part.holds_both_ends, stages == 1 || schedule == PipelineSchedule::zb_v);
        }
      }
      EXPECT_EQ(times, std::vector<int>(13, 1));
      EXPECT_EQ(firsts, 1);
      EXPECT_EQ(lasts, 1);
    }
  }
}

TEST(PartsOfStage, FollowAGivenSplit) {
  RunConfig config;
  config.model = model_of(7, 64, 700);
  config.parallel.schedule = PipelineSchedule::zb_v;
  config.parallel.split = {1, 2, 3, 1};
  const auto layers = [&](int64_t stage, size_t chunk) {
    return parts_of_stage(config, 2, stage)[chunk].layers;
  };
  EXPECT_EQ(layers(0, 0), (Range{0, 1}));
  EXPECT_EQ(layers(1, 0), (Range{1, 3}));
  EXPECT_EQ(layers(1, 1), (Range{3, 6}));
  EXPECT_EQ(layers(0, 1), (Range{6, 7}));
}

}  // namespace
}  // namespace normformer
