#include "normformer/data/labelled_dataset.h"

#include <algorithm>
#include <functional>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int32_t kMark = 256;

/// Bytes are their own ids.
BpeTokenizer bytes_tokenizer(bool with_mark = true) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  if (with_mark) tokens.emplace_back("<|endoftext|>");
  return {tokens, {}};
}

std::vector<int32_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

std::vector<int32_t> joined(const std::vector<std::string>& texts, int64_t length) {
  std::vector<std::vector<int32_t>> encoded;
  for (const std::string& text : texts) encoded.push_back(bytes_of(text));
  return join_texts(encoded, kMark, length);
}

// As transformers 4.30's RobertaTokenizer(a, b, truncation="longest_first", max_length=...) has them, with
// these bytes and <|endoftext|> as every special token.
TEST(JoinTexts, IsWhatTransformersGives) {
  EXPECT_THAT(joined({"ab"}, 8), ElementsAre(256, 97, 98, 256));
  EXPECT_THAT(joined({"abcdefgh"}, 6), ElementsAre(256, 97, 98, 99, 100, 256));
  EXPECT_THAT(joined({"abc", "xyz"}, 16), ElementsAre(256, 97, 98, 99, 256, 256, 120, 121, 122, 256));
  EXPECT_THAT(joined({"abcdefgh", "xy"}, 10), ElementsAre(256, 97, 98, 99, 100, 256, 256, 120, 121, 256));
  EXPECT_THAT(joined({"ab", "uvwxyz"}, 9), ElementsAre(256, 97, 98, 256, 256, 117, 118, 119, 256));
  EXPECT_THAT(joined({"abcde", "vwxyz"}, 11),
              ElementsAre(256, 97, 98, 99, 100, 256, 256, 118, 119, 120, 256));
  EXPECT_THAT(joined({"abcde", "vwxyz"}, 12),
              ElementsAre(256, 97, 98, 99, 100, 256, 256, 118, 119, 120, 121, 256));
  EXPECT_THAT(joined({"abcde", "z"}, 6), ElementsAre(256, 97, 256, 256, 122, 256));
  EXPECT_THAT(joined({"a b", " c"}, 20), ElementsAre(256, 97, 32, 98, 256, 256, 32, 99, 256));
  EXPECT_THROW(joined({"a"}, 2), LogicError);
  EXPECT_THROW(joined({"a", "b"}, 5), LogicError);
}

/// Texts of 1 to 9 letters with labels "a", "b", "c".
std::vector<LabelledText> some_texts(int64_t count) {
  std::vector<LabelledText> texts;
  for (int64_t i = 0; i < count; ++i) {
    const std::string text(static_cast<size_t>(1 + i * i % 9), static_cast<char>('A' + i % 26));
    texts.push_back({{text}, std::string(1, static_cast<char>('a' + i % 3)), i + 2});
  }
  return texts;
}

LabelledDatasetOptions options_of(SampleSequence sequence, int64_t batch = 0) {
  return {.path = "some.tsv",
          .classes = {"a", "b", "c"},
          .length = 30,
          .sequence = sequence,
          .seed = 5,
          .batch = batch};
}

TEST(LabelledDataset, TextsStandAtTheEndsOfTheirRows) {
  LabelledDatasetOptions options = options_of(SampleSequence::sequential);
  const std::vector<LabelledText> texts{{{"abcdefg"}, "c", 2}, {{"xy"}, "b", 3}};
  const Batch batch = LabelledDataset(options, texts, bytes_tokenizer()).read_batch(0, 2);
  ASSERT_EQ(batch.seq_len, 16);  // of 9 and 4 tokens
  EXPECT_EQ(std::vector<int32_t>(batch.inputs.begin() + 6, batch.inputs.begin() + 16),
            (std::vector<int32_t>{kMark, kMark, 97, 98, 99, 100, 101, 102, 103, kMark}));
  EXPECT_THAT(std::vector<int32_t>(batch.inputs.begin() + 28, batch.inputs.end()),
              ElementsAre(kMark, 'x', 'y', kMark));
  for (size_t i = 0; i < 32; ++i) {
    const bool padding = i < 7 || (i >= 16 && i < 28);
    EXPECT_EQ(batch.document_start[i], padding ? 0 : i < 16 ? 7 : 12) << i;
    EXPECT_EQ(batch.loss_mask[i], i == 7 || i == 28 ? 1 : 0) << i;
    EXPECT_EQ(batch.targets[i], i == 7 ? 2 : i == 28 ? 1 : 0) << i;
  }
  options.reads_last_token = true;
  const Batch causal = LabelledDataset(options, texts, bytes_tokenizer()).read_batch(0, 2);
  EXPECT_EQ(causal.inputs, batch.inputs);
  for (size_t i = 0; i < 32; ++i) EXPECT_EQ(causal.loss_mask[i], i % 16 == 15 ? 1 : 0) << i;
  EXPECT_EQ(causal.targets[15], 2);
  EXPECT_EQ(causal.targets[31], 1);
}

/// Tokens before the longest text of a batch.
int32_t least_padding(const Batch& batch) {
  int32_t least = INT32_MAX;
  for (auto row = batch.document_start.begin(); row != batch.document_start.end(); row += batch.seq_len)
    least = std::min(least, *std::max_element(row, row + batch.seq_len));
  return least;
}

TEST(LabelledDataset, AllRowsOfAGlobalBatchAreAsLong) {
  const LabelledDataset data(options_of(SampleSequence::shuffled, 4), some_texts(23), bytes_tokenizer());
  std::set<int64_t> lengths;
  for (int64_t batch = 0; batch < 30; ++batch) {
    const Batch whole = data.read_batch(4 * batch, 4);
    EXPECT_EQ(whole.seq_len % 8, 0);
    EXPECT_EQ(data.row_length(4 * batch + 3), whole.seq_len);
    EXPECT_LT(least_padding(whole), 8);
    lengths.insert(whole.seq_len);
    for (int64_t i = 0; i < 4; ++i) {
      const Batch one = data.read_batch(4 * batch + i, 1);
      EXPECT_EQ(one.seq_len, whole.seq_len);
      EXPECT_TRUE(std::equal(one.inputs.begin(), one.inputs.end(), whole.inputs.begin() + i * whole.seq_len));
      EXPECT_TRUE(
          std::equal(one.targets.begin(), one.targets.end(), whole.targets.begin() + i * whole.seq_len));
    }
    EXPECT_EQ(data.read_batch(4 * batch + 2, 0).sequences, 0);
  }
  EXPECT_EQ(lengths, (std::set<int64_t>{8, 16}));
}

TEST(LabelledDataset, RowsAreNeverLongerThanTheModel) {
  LabelledDatasetOptions options = options_of(SampleSequence::sequential);
  options.length = 11;
  const LabelledDataset data(options, {{{std::string(100, 'x')}, "a", 2}}, bytes_tokenizer());
  EXPECT_EQ(data.read_batch(0, 1).seq_len, 11);
  EXPECT_EQ(data.num_tokens(), 11);
}

TEST(LabelledDataset, EveryEpochHasEachTextOnceInAnOrderOfItsOwn) {
  const int64_t count = 40;
  const LabelledDataset data(options_of(SampleSequence::shuffled, 8), some_texts(count), bytes_tokenizer());
  const auto epoch = [&](int64_t number) {
    std::vector<std::vector<int32_t>> rows;
    for (int64_t i = 0; i < count; ++i) {
      const Batch batch = data.read_batch(number * count + i, 1);
      const auto begin =
          batch.inputs.begin() + *std::max_element(batch.document_start.begin(), batch.document_start.end());
      rows.emplace_back(begin, batch.inputs.end());
    }
    return rows;
  };
  auto first = epoch(0);
  auto second = epoch(1);
  EXPECT_NE(first, second);
  std::sort(first.begin(), first.end());
  std::sort(second.begin(), second.end());
  EXPECT_EQ(first, second);
}

TEST(LabelledDataset, RefusesWhatItCannotRead) {
  const BpeTokenizer tokenizer = bytes_tokenizer();
  const auto refusal = [&](const LabelledDatasetOptions& options, const std::vector<LabelledText>& texts,
                           const BpeTokenizer& with) -> std::string {
    try {
      const LabelledDataset data(options, texts, with);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  LabelledDatasetOptions options = options_of(SampleSequence::sequential);
  EXPECT_THAT(refusal(options, {{{"x"}, "d", 7}}, tokenizer),
              HasSubstr("some.tsv line 7: the label \"d\" is none of the classes trained on: a, b, c"));
  EXPECT_THAT(refusal(options, some_texts(2), bytes_tokenizer(false)), HasSubstr("<|endoftext|>"));
  options.length = 2;
  EXPECT_THAT(refusal(options, some_texts(2), tokenizer), HasSubstr("at least 3 tokens"));
  options.length = 5;
  EXPECT_THAT(refusal(options, {{{"x", "y"}, "a", 2}}, tokenizer), HasSubstr("at least 6 tokens"));
  options.classes.clear();
  EXPECT_EQ(refusal(options, {{{"x"}, "", 2}}, tokenizer), "accepted");
}

TEST(LabelledDataset, ItsFingerprintTellsWhatItReturns) {
  const BpeTokenizer tokenizer = bytes_tokenizer();
  const LabelledDatasetOptions options = options_of(SampleSequence::shuffled, 4);
  std::vector<LabelledText> texts = some_texts(9);
  std::set<uint64_t> different;
  const auto enter = [&](const LabelledDatasetOptions& of) {
    different.insert(LabelledDataset(of, texts, tokenizer).fingerprint());
  };
  enter(options);
  enter(options);
  EXPECT_EQ(different.size(), 1U);
  for (const auto& change : std::vector<std::function<void(LabelledDatasetOptions&)>>{
           [](auto& o) { o.seed = 6; }, [](auto& o) { o.length = 29; },
           [](auto& o) { o.reads_last_token = true; },
           [](auto& o) { o.sequence = SampleSequence::sequential; },
           [](auto& o) {
             o.classes = {"c", "b", "a"};
           },
           [](auto& o) { o.classes.emplace_back("d"); }}) {
    LabelledDatasetOptions changed = options;
    change(changed);
    enter(changed);
  }
  texts[3].texts[0] += "x";
  enter(options);
  texts[4].label = "b";
  EXPECT_EQ(different.size(), 8U);
}

}  // namespace
}  // namespace normformer
