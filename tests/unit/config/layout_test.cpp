#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/config/run_config.h"
#include "normformer/core/error.h"

namespace normformer {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

RunConfig small() {
  RunConfig config;
  config.model.layers = 4;
  config.model.width = 64;
  config.model.heads = 4;
  config.train.global_batch = 8;
  return config;
}

std::string refusal(const RunConfig& config, int64_t world) {
  try {
    resolve_layout(config, world);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

RunConfig with_degrees(int64_t tensor, int64_t pipeline, int64_t data) {
  RunConfig config = small();
  config.parallel.tensor = tensor;
  config.parallel.pipeline = pipeline;
  config.parallel.data = data;
  return config;
}

TEST(ResolveLayout, FillsInWhatIsLeftOver) {
  const RunConfig done = resolve_layout(with_degrees(2, 2, 0), 12);
  EXPECT_EQ(done.parallel.data, 3);
  EXPECT_EQ(done.model.ffn, 256);
}

TEST(ResolveLayout, KeepsWhatWasGiven) {
  RunConfig config = with_degrees(2, 3, 2);
  config.model.ffn = 100;
  EXPECT_EQ(resolve_layout(config, 12), config);
}

TEST(ResolveLayout, NeitherTheBatchNorTheHeadsNeedDivide) {
  RunConfig config = with_degrees(3, 1, 0);
  config.train.global_batch = 7;
  config.train.micro_batch = 2;
  EXPECT_EQ(resolve_layout(config, 15).parallel.data, 5);
}

TEST(ResolveLayout, LeftOverMustBeWhole) {
  EXPECT_EQ(
      refusal(with_degrees(3, 1, 0), 8),
      "parallel.tensor x context x pipeline = 3 x 1 x 1 = 3 does not divide the number of ranks, 8; layouts "
      "of this model that fit 8 ranks (parallel.tensor x context x pipeline x data): 4 x 1 x 1 x 2, "
      "2 x 1 x 1 x 4, 4 x 1 x 2 x 1, 1 x 1 x 1 x 8");
}

TEST(ResolveLayout, ProductMustBeTheNumberOfRanks) {
  const std::string message = refusal(with_degrees(2, 2, 3), 8);
  EXPECT_THAT(
      message,
      StartsWith(
          "parallel.tensor x context x pipeline x data = 2 x 1 x 2 x 3 is not the number of ranks, 8; "));
  EXPECT_THAT(message,
              HasSubstr("(parallel.tensor x context x pipeline x data): 2 x 1 x 2 x 2, 1 x 1 x 2 x 4"));
  EXPECT_THAT(refusal(with_degrees(1, 1, 1), 2),
              StartsWith("parallel.tensor x context x pipeline x data = 1 x 1 x 1 x 1 is not"));
  EXPECT_THAT(refusal(with_degrees(4, 4, 1 << 20), 2),
              StartsWith("parallel.tensor x context x pipeline x data = 4 x 1 x 4 x"));
}

TEST(ResolveLayout, SequencesAreSplitNoFurtherThanWasAskedFor) {
  RunConfig config = with_degrees(1, 1, 0);
  config.parallel.context = 4;
  EXPECT_EQ(resolve_layout(config, 8).parallel.data, 2);
  EXPECT_THAT(refusal(config, 6),
              StartsWith("parallel.tensor x context x pipeline = 1 x 4 x 1 = 4 does not"));
  EXPECT_EQ(nearest_layout(config, 6).parallel.context, 3);
  EXPECT_EQ(nearest_layout(config, 2).parallel.context, 2);
  EXPECT_EQ(nearest_layout(with_degrees(1, 1, 1), 8).parallel.context, 1);
}

TEST(ResolveLayout, EachRankNeedsAHeadAFeatureAndAWord) {
  EXPECT_THAT(refusal(with_degrees(8, 1, 0), 8),
              StartsWith("parallel.tensor = 8 is more than model.heads = 4"));
  RunConfig narrow = with_degrees(4, 1, 0);
  narrow.model.ffn = 3;
  EXPECT_THAT(refusal(narrow, 4), StartsWith("parallel.tensor = 4 is more than model.ffn = 3; "));
  RunConfig few_words = with_degrees(4, 1, 0);
  few_words.model.vocab = 2;
  EXPECT_THAT(refusal(few_words, 4), StartsWith("parallel.tensor = 4 is more than model.vocab = 2; "));
}

TEST(ResolveLayout, EachStageNeedsALayer) {
  EXPECT_THAT(refusal(with_degrees(1, 8, 0), 8),
              StartsWith("model.layers = 4 are too few layers for the stages of parallel.pipeline = 8; "));
}

TEST(ResolveLayout, EachReplicaNeedsASequence) {
  const std::string message = refusal(with_degrees(1, 1, 0), 16);
  EXPECT_THAT(message, StartsWith("train.global_batch = 8 is too small for 16 data-parallel replicas; "));
  EXPECT_THAT(
      message,
      HasSubstr("fit 16 ranks (parallel.tensor x context x pipeline x data): 1 x 1 x 2 x 8, 2 x 1 x 1 x 8"));
}

TEST(ResolveLayout, ShardingGroupsMakeUpTheReplicas) {
  RunConfig config = with_degrees(2, 1, 0);
  config.parallel.context = 2;
  for (const int64_t fits : {0, 1, 2, 4}) {
    config.parallel.shard_group = fits;
    EXPECT_EQ(resolve_layout(config, 8).parallel.shard_group, fits);
  }
  config.parallel.shard_group = 3;
  EXPECT_EQ(
      refusal(config, 8),
      "parallel.shard_group = 3 does not divide the number of replicas, parallel.data x context = 2 x 2 = "
      "4; what does: 1, 2, 4");
  config.parallel.shard_group = 8;
  EXPECT_THAT(refusal(config, 8), StartsWith("parallel.shard_group = 8 does not divide"));
}

TEST(ResolveLayout, SaysHowManyRanksWouldDo) {
  RunConfig config = small();
  config.model.heads = 1;
  config.model.layers = 2;
  config.train.global_batch = 2;
  EXPECT_THAT(refusal(config, 7), HasSubstr("; no layout of this model fits 7 ranks; 4 ranks would"));
  EXPECT_THAT(refusal(config, 3), HasSubstr("; no layout of this model fits 3 ranks; 2 ranks would"));
  EXPECT_THAT(refusal(config, 1'000'000'007), HasSubstr("; 4 ranks would"));
}

TEST(ResolveLayout, EveryLayoutThatIsOfferedFits) {
  for (int64_t world = 1; world <= 48; ++world) {
    RunConfig asked = with_degrees(7, 1, 0);
    asked.parallel.context = 1 + world % 5;
    const std::string message = refusal(asked, world);
    const size_t list = message.find("data): ");
    if (list == std::string::npos) continue;
    std::string rest = message.substr(list + 7);
    int64_t t = 0, c = 0, p = 0, d = 0;
    int read = 0;
    while (std::sscanf(rest.c_str(), "%ld x %ld x %ld x %ld%n", &t, &c, &p, &d, &read) == 4) {
      RunConfig offered = with_degrees(t, p, d);
      offered.parallel.context = c;
      EXPECT_EQ(resolve_layout(offered, world).parallel.data, d) << world << ": " << message;
      rest = rest.size() > static_cast<size_t>(read) + 2 ? rest.substr(static_cast<size_t>(read) + 2) : "";
    }
    EXPECT_TRUE(rest.empty()) << message;
  }
}

TEST(NearestLayout, KeepsWhatFitsAndElseTakesTheNearest) {
  EXPECT_EQ(nearest_layout(with_degrees(2, 2, 1), 4), resolve_layout(with_degrees(2, 2, 1), 4));
  const RunConfig one = nearest_layout(with_degrees(2, 2, 1), 1);
  EXPECT_EQ(one, resolve_layout(with_degrees(1, 1, 1), 1));
  const RunConfig two = nearest_layout(with_degrees(4, 1, 1), 2);
  EXPECT_EQ(two, resolve_layout(with_degrees(2, 1, 1), 2));
  EXPECT_THROW(nearest_layout(with_degrees(1, 1, 1), 1'000'000'007), ConfigError);
}

TEST(NearestLayout, KeepsShardingGroupsWhereTheyFit) {
  RunConfig config = with_degrees(1, 1, 4);
  config.parallel.shard_group = 2;
  EXPECT_EQ(nearest_layout(config, 4), resolve_layout(config, 4));
  EXPECT_EQ(nearest_layout(config, 8).parallel.shard_group, 2);
  EXPECT_EQ(nearest_layout(config, 1).parallel.shard_group, 0);
  config.parallel.data = 0;
  EXPECT_EQ(nearest_layout(config, 3).parallel.data, 3);
  EXPECT_EQ(nearest_layout(config, 3).parallel.shard_group, 0);
}

}  // namespace
}  // namespace normformer
