#include "normformer/evaluation/task_scores.h"

#include <array>
#include <cstdlib>
#include <fstream>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/evaluation/generation.h"
#include "normformer/evaluation/perplexity.h"

#include "small_model.h"

namespace normformer {
namespace {

using testing_support::small_config;
using testing_support::SmallModel;

std::filesystem::path reference_data() {
  const char* const given = std::getenv("NORMFORMER_TEST_DATA");
  return std::filesystem::path(given != nullptr ? given : NORMFORMER_TEST_DATA_DEFAULT) / "data";
}

// Recorded from the harness' model by tests/peers/record_harness_requests.py.
TEST(EncodeRequest, GivesTheHarnessTokens) {
  if (!std::filesystem::exists(reference_data())) {
    GTEST_SKIP() << "no reference data at " << reference_data()
                 << "; name its folder in the environment variable NORMFORMER_TEST_DATA";
  }
  const auto tokenizer = BpeTokenizer::load(reference_data() / "gpt2-bpe");
  BpeEncoder encoder(tokenizer);
  const auto recorded = nlohmann::json::parse(
      std::ifstream(std::filesystem::path(NORMFORMER_TEST_FIXTURES) / "evaluation" / "harness.json"));
  for (const auto& test : recorded["encoded"]) {
    const ContinuationRequest request{test["request"][0], test["request"][1]};
    auto expected = test["context"].get<std::vector<int32_t>>();
    const auto continuation = test["continuation"].get<std::vector<int32_t>>();
    if (continuation.empty()) {  // the harness ends with a failed assertion
      EXPECT_THROW(encode_request(encoder, request, 50256, 99, "f line 1"), DataError) << test;
      continue;
    }
    expected.insert(expected.end(), continuation.begin(), continuation.end());
    const EncodedRequest encoded = encode_request(encoder, request, 50256, 99, "f line 1");
    EXPECT_EQ(encoded.tokens, expected) << test;
    EXPECT_EQ(encoded.continuation, static_cast<int64_t>(continuation.size())) << test;
  }
}

// Bytes alone, and <|endoftext|>.
BpeTokenizer byte_tokenizer() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.emplace_back("<|endoftext|>");
  return {tokens, {}};
}

TEST(EncodeRequest, TakesTheLastTokensThatTheModelReads) {
  const BpeTokenizer tokenizer = byte_tokenizer();
  BpeEncoder encoder(tokenizer);
  const auto encode = [&](const char* context, const char* continuation) {
    return encode_request(encoder, {context, continuation}, 256, 4, "f line 7");
  };
  EXPECT_EQ(encode("abcdef", "gh").tokens, (std::vector<int32_t>{'d', 'e', 'f', 'g', 'h'}));
  EXPECT_EQ(encode("abcdef", "gh").continuation, 2);
  EXPECT_EQ(encode("ab", "cdef").tokens, (std::vector<int32_t>{'b', 'c', 'd', 'e', 'f'}));
  EXPECT_EQ(encode("", "cdef").tokens, (std::vector<int32_t>{256, 'c', 'd', 'e', 'f'}));
  EXPECT_EQ(encode(" ", "c").tokens, (std::vector<int32_t>{256, ' ', 'c'}));
  EXPECT_EQ(encode(" ", "c").continuation, 2);
  try {
    encode("ab", "cdefg");
    FAIL() << "a continuation longer than the model";
  } catch (const DataError& e) {
    EXPECT_STREQ(e.what(), "f line 7 has a continuation of 5 tokens, and the model reads 4");
  }
}

int32_t token_at(const RunConfig& config, int64_t request, int64_t place) {
  return static_cast<int32_t>((request * 17 + place * place * 5 + place) % config.model.vocab);
}

int32_t likeliest_behind(SmallModel& small, const std::vector<int32_t>& text) {
  return generate(small.model, std::array{text}, {.max_tokens = 1, .temperature = 0.0})[0].tokens[0];
}

// Contexts of every length that a model reads; the continuations of every third are what the model writes.
std::vector<EncodedRequest> requests_of(SmallModel& small) {
  std::vector<EncodedRequest> requests;
  for (int64_t i = 0; i < 13; ++i) {
    EncodedRequest request{.tokens = {}, .continuation = 1 + i % 4};
    const int64_t context = 1 + i * 5 % (small.config.model.length - 3);
    for (int64_t t = 0; t < context; ++t) request.tokens.push_back(token_at(small.config, i, t));
    for (int64_t t = 0; t < request.continuation; ++t) {
      const bool is_written = i % 3 == 0 || t + 1 < request.continuation;
      request.tokens.push_back(is_written ? likeliest_behind(small, request.tokens)
                                          : token_at(small.config, i, context + t));
    }
    requests.push_back(request);
  }
  return requests;
}

double alone(SmallModel& small, const EncodedRequest& request) {
  const std::span<const int32_t> targets = std::span(request.tokens).subspan(1);
  const TextScore score = score_tokens(small.model, small.config, targets, request.tokens[0], true);
  return -std::accumulate(score.nll.end() - request.continuation, score.nll.end(), 0.0);
}

TEST(ScoreRequests, GivesWhatEachRequestHasAlone) {
  SmallModel small(small_config(Precision::fp64), DeviceKind::cpu, make_self_world());
  const std::vector<EncodedRequest> requests = requests_of(small);
  const auto scores = score_requests(small.model, small.config, requests);
  ASSERT_EQ(scores.size(), requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_NEAR(scores[i].log_likelihood, alone(small, requests[i]), 1e-12) << i;
    EXPECT_EQ(scores[i].tokens, requests[i].continuation);
    EXPECT_TRUE(i % 3 != 0 || scores[i].is_greedy) << i;
  }
  EXPECT_EQ(std::count_if(scores.begin(), scores.end(), [](const auto& score) { return !score.is_greedy; }),
            8);
}

struct Layout {
  MeshDegrees degrees;
  bool sequence = false;
  int64_t micro_batch = 2;
};

TEST(ScoreRequests, IsTheSameUnderEveryLayout) {
  std::vector<EncodedRequest> requests;
  std::vector<ContinuationScore> expected;
  {
    SmallModel small(small_config(Precision::fp64), DeviceKind::cpu, make_self_world());
    requests = requests_of(small);
    expected = score_requests(small.model, small.config, requests);
  }
  const std::vector<Layout> layouts{
      {.degrees = {.tensor = 2}},
      {.degrees = {.tensor = 3}, .sequence = true, .micro_batch = 3},
      {.degrees = {.context = 2}},
      {.degrees = {.context = 3}, .micro_batch = 1},
      {.degrees = {.data = 3}, .micro_batch = 4},
      {.degrees = {.pipeline = 3}},
      {.degrees = {.tensor = 2, .context = 2, .data = 2}},
      {.degrees = {.tensor = 2, .data = 2, .pipeline = 2}, .sequence = true},
  };
  for (const Layout& layout : layouts) {
    run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
      RunConfig config = small_config(Precision::fp64);
      config.train.micro_batch = layout.micro_batch;
      config.parallel.tensor = layout.degrees.tensor;
      config.parallel.sequence = layout.sequence;
      config.parallel.context = layout.degrees.context;
      config.parallel.data = layout.degrees.data;
      config.parallel.pipeline = layout.degrees.pipeline;
      SmallModel small(config, DeviceKind::cpu, world, layout.degrees);
      const auto scores = score_requests(small.model, config, requests);
      for (size_t i = 0; i < requests.size(); ++i) {
        EXPECT_NEAR(scores[i].log_likelihood, expected[i].log_likelihood, 1e-12) << to_string(layout.degrees);
        EXPECT_EQ(scores[i].is_greedy, expected[i].is_greedy) << to_string(layout.degrees) << " " << i;
      }
    });
  }
}

}  // namespace
}  // namespace normformer
