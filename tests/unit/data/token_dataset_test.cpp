#include "normformer/data/token_dataset.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenDatasetTest : public ::testing::Test {
 protected:
  /// Writes tokens first, first + 1, ... as one document.
  TokenSource counting(const char* name, int32_t first, int64_t count, double weight = 1) {
    std::vector<int32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    return documents(name, {tokens}, weight);
  }

  TokenSource documents(const char* name, const std::vector<std::vector<int32_t>>& all, double weight = 1) {
    IndexedDatasetWriter writer(folder_ / name, 60000);
    for (const auto& document : all) writer.add_document(document);
    writer.finish();
    return {folder_ / name, weight};
  }

  TemporaryFolder folder_;
};

std::vector<int32_t> sample(const TokenDataset& data, int64_t index) {
  std::vector<int32_t> tokens(data.seq_len() + 1);
  data.read_sample(index, tokens);
  return tokens;
}

TEST_F(TokenDatasetTest, SequentialSamplesShareOneTokenAndDropTheRest) {
  const TokenDataset data(
      {.sources = {counting("a", 0, 12)}, .seq_len = 5, .sequence = SampleSequence::sequential});
  EXPECT_EQ(data.num_samples(), 2);
  EXPECT_THAT(sample(data, 0), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(sample(data, 1), ElementsAre(5, 6, 7, 8, 9, 10));
  EXPECT_THAT(sample(data, 2), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST_F(TokenDatasetTest, AFullLastSampleNeedsOneTokenMore) {
  const auto samples = [&](int64_t tokens) {
    return TokenDataset({.sources = {counting("a", 0, tokens)}, .seq_len = 5}).num_samples();
  };
  EXPECT_EQ(samples(6), 1);
  EXPECT_EQ(samples(10), 1);
  EXPECT_EQ(samples(11), 2);
}

TEST_F(TokenDatasetTest, SequentialSourcesFollowOneAnother) {
  const TokenDataset data({.sources = {counting("a", 0, 9, 5.0), counting("b", 100, 5, 0.1)},
                           .seq_len = 4,
                           .sequence = SampleSequence::sequential});
  EXPECT_EQ(data.num_samples(), 3);
  EXPECT_EQ(data.num_tokens(), 14);
  EXPECT_EQ(sample(data, 1)[0], 4);
  EXPECT_EQ(sample(data, 2)[0], 100);
  EXPECT_EQ(sample(data, 3)[0], 0);
}

TEST_F(TokenDatasetTest, EveryEpochOfAShuffledSourceTakesEachSampleOnce) {
  const TokenDataset data({.sources = {counting("a", 0, 1001)}, .seq_len = 10, .seed = 3});
  ASSERT_EQ(data.num_samples(), 100);
  std::vector<std::vector<int32_t>> epochs(2);
  for (int64_t i = 0; i < 200; ++i) epochs[i / 100].push_back(sample(data, i)[0]);
  EXPECT_NE(epochs[0], epochs[1]);
  for (auto& firsts : epochs) {
    EXPECT_FALSE(std::is_sorted(firsts.begin(), firsts.end()));
    std::sort(firsts.begin(), firsts.end());
    for (int32_t i = 0; i < 100; ++i) ASSERT_EQ(firsts[i], 10 * i);
  }
}

TEST_F(TokenDatasetTest, BlendsByWeightAndRepeatsSmallSources) {
  const TokenDataset data(
      {.sources = {counting("a", 0, 1001, 3), counting("b", 20000, 51, 1)}, .seq_len = 10});
  std::vector<int> from_b;
  std::multiset<int32_t> b_samples;
  for (int64_t i = 0; i < 400; ++i) {
    const int32_t first = sample(data, i)[0];
    from_b.push_back(first >= 20000);
    if (first >= 20000) b_samples.insert(first);
  }
  EXPECT_EQ(std::accumulate(from_b.begin(), from_b.end(), 0), 100);
  // 100 turns over 5 samples: 20 epochs.
  for (int32_t i = 0; i < 5; ++i) EXPECT_EQ(b_samples.count(20000 + 10 * i), 20u);
  EXPECT_DOUBLE_EQ(data.epochs(400)[0], 3.0);
  EXPECT_DOUBLE_EQ(data.epochs(400)[1], 20.0);
}

TEST_F(TokenDatasetTest, AnyPartOfABatchIsTheSameHoweverItIsCut) {
  const TokenDataset data(
      {.sources = {counting("a", 0, 1001, 3), counting("b", 20000, 501, 2)}, .seq_len = 10, .seed = 11});
  const Batch whole = data.read_batch(32, 16);
  ASSERT_EQ(whole.inputs.size(), 160u);
  EXPECT_TRUE(whole.document_start.empty());
  EXPECT_TRUE(whole.loss_mask.empty());
  for (const int64_t part : {1, 2, 4, 16}) {
    std::vector<int32_t> inputs;
    std::vector<int32_t> targets;
    for (int64_t first = 0; first < 16; first += part) {
      const Batch piece = data.read_batch(32 + first, part);
      inputs.insert(inputs.end(), piece.inputs.begin(), piece.inputs.end());
      targets.insert(targets.end(), piece.targets.begin(), piece.targets.end());
    }
    EXPECT_EQ(inputs, whole.inputs);
    EXPECT_EQ(targets, whole.targets);
  }
  for (std::size_t i = 0; i < whole.inputs.size(); ++i) ASSERT_EQ(whole.targets[i], whole.inputs[i] + 1);
  EXPECT_TRUE(data.read_batch(5, 0).inputs.empty());
}

TEST_F(TokenDatasetTest, TheDocumentMaskKeepsDocumentsApart) {
  const int32_t end = 99;
  const TokenDataset data({.sources = {documents("a", {{1, 2, end}, {end}, {3, 4, 5, end}, {6, end}})},
                           .seq_len = 9,
                           .vocab_size = 100,
                           .sequence = SampleSequence::sequential,
                           .document_mask_token = end});
  const Batch batch = data.read_batch(0, 1);
  EXPECT_THAT(batch.inputs, ElementsAre(1, 2, end, end, 3, 4, 5, end, 6));
  EXPECT_THAT(batch.targets, ElementsAre(2, end, end, 3, 4, 5, end, 6, end));
  EXPECT_THAT(batch.document_start, ElementsAre(0, 0, 0, 3, 4, 4, 4, 4, 8));
  EXPECT_THAT(batch.loss_mask, ElementsAre(1, 1, 0, 0, 1, 1, 1, 0, 1));
}

TEST_F(TokenDatasetTest, SaysWhatIsWrongWithItsOptions) {
  const auto sentence = [](TokenDatasetOptions options) {
    return NF_SENTENCE_OF(Error, TokenDataset{options});
  };
  const TokenSource source = counting("a", 0, 5);
  EXPECT_THAT(sentence({.seq_len = 4}), HasSubstr("no dataset"));
  EXPECT_THAT(sentence({.sources = {source}, .seq_len = 0}), HasSubstr("sequence length of 0"));
  EXPECT_THAT(sentence({.sources = {source}, .seq_len = 5}), HasSubstr("holds 5 tokens, too few"));
  EXPECT_THAT(sentence({.sources = {source}, .seq_len = 4, .vocab_size = 10, .document_mask_token = 10}),
              HasSubstr("end-of-document token 10"));
}

TEST_F(TokenDatasetTest, RefusesTokensThatTheModelLacks) {
  const TokenDataset data({.sources = {counting("a", 0, 11)}, .seq_len = 5, .vocab_size = 10});
  EXPECT_THAT(NF_SENTENCE_OF(DataError, data.read_batch(0, 2)), HasSubstr("token 10 at position 10"));
}

TEST_F(TokenDatasetTest, TheFingerprintChangesWithEverythingThatMatters) {
  const TokenSource a = counting("a", 0, 100);
  const TokenSource b = counting("b", 1, 100);
  const TokenDatasetOptions base{.sources = {a}, .seq_len = 5, .seed = 1};
  const uint64_t fingerprint = TokenDataset(base).fingerprint();
  EXPECT_EQ(TokenDataset(base).fingerprint(), fingerprint);
  std::vector<TokenDatasetOptions> others(6, base);
  others[0].seed = 2;
  others[1].seq_len = 6;
  others[2].sources = {b};
  others[3].sequence = SampleSequence::sequential;
  others[4].document_mask_token = 7;
  others[5].sources = {a, b};
  for (const auto& other : others) EXPECT_NE(TokenDataset(other).fingerprint(), fingerprint);
}

MaskingRule masking_rule() {
  return {.probability = 0.5,
          .kept = 0.0,
          .random = 0.0,
          .mask_token = 99,
          .start_token = 98,
          .ordinary_tokens = 98,
          .stream = RandomStream{4}.with("masking")};
}

TEST_F(TokenDatasetTest, MaskedSamplesBeginWithTheStartTokenAndFollowOneAnother) {
  const TokenDataset data({.sources = {counting("a", 0, 12)},
                           .seq_len = 5,
                           .sequence = SampleSequence::sequential,
                           .masking = masking_rule()});
  ASSERT_EQ(data.num_samples(), 3);
  const Batch batch = data.read_batch(0, 3);
  EXPECT_THAT(batch.targets, ElementsAre(98, 0, 1, 2, 3, 98, 4, 5, 6, 7, 98, 8, 9, 10, 11));
  int64_t predicted = 0;
  for (size_t i = 0; i < batch.inputs.size(); ++i) {
    EXPECT_EQ(batch.inputs[i], batch.loss_mask[i] == 1 ? 99 : batch.targets[i]);
    predicted += batch.loss_mask[i];
  }
  EXPECT_GT(predicted, 0);
  EXPECT_LT(predicted, 12);
}

// Who reads which part of a batch changes nothing; another epoch, or another seed, does.
TEST_F(TokenDatasetTest, MasksBelongToTheGlobalSample) {
  const TokenDatasetOptions options{
      .sources = {counting("a", 0, 90)}, .seq_len = 10, .seed = 3, .masking = masking_rule()};
  const TokenDataset data(options);
  const Batch all = data.read_batch(0, 20);
  for (int64_t i = 0; i < 20; ++i) {
    const Batch one = data.read_batch(i, 1);
    EXPECT_TRUE(std::equal(one.inputs.begin(), one.inputs.end(), all.inputs.begin() + 10 * i));
    EXPECT_TRUE(std::equal(one.loss_mask.begin(), one.loss_mask.end(), all.loss_mask.begin() + 10 * i));
  }
  std::set<std::vector<uint8_t>> masks;
  for (int64_t i = 0; i < 20; ++i) masks.insert(data.read_batch(i, 1).loss_mask);
  EXPECT_GT(masks.size(), 15U);
  TokenDatasetOptions other = options;
  other.masking->stream = RandomStream{5}.with("masking");
  EXPECT_NE(TokenDataset(other).fingerprint(), data.fingerprint());
  other.masking.reset();
  EXPECT_NE(TokenDataset(other).fingerprint(), data.fingerprint());
}

TEST_F(TokenDatasetTest, AMaskedSampleNeedsRoomBesideItsStartToken) {
  EXPECT_THROW(TokenDataset({.sources = {counting("a", 0, 12)}, .seq_len = 1, .masking = masking_rule()}),
               ConfigError);
}

}  // namespace
}  // namespace normformer
