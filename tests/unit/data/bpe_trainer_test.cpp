#include "normformer/data/bpe_trainer.h"

#include <map>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/data/pretokenizer.h"

#include "random_text.h"
#include "reference_data.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;

using NamedMerges = std::vector<std::pair<std::string, std::string>>;

NamedMerges named_merges(const BpeTokenizer& tokenizer) {
  NamedMerges merges;
  for (const auto& [left, right] : tokenizer.merges()) {
    merges.emplace_back(tokenizer.token(left), tokenizer.token(right));
  }
  return merges;
}

/// The algorithm as it is defined: count all pairs of all words, merge the most frequent, start over.
/// Bytes and tokens are ordered as `trained` numbers them.
NamedMerges naive_training(const std::string& text, const BpeTokenizer& trained, int64_t vocab_size,
                           int64_t min_count) {
  std::vector<std::vector<std::string>> words;
  for_each_piece(text, [&](std::string_view piece) {
    words.emplace_back();
    for (const char byte : piece) words.back().emplace_back(1, byte);
  });
  std::map<std::string, int32_t> ids;
  for (int32_t id = 0; id < 256; ++id) ids[trained.token(id)] = id;
  NamedMerges merges;
  while (static_cast<int64_t>(ids.size()) < vocab_size - 1) {
    std::map<std::pair<int32_t, int32_t>, int64_t> counts;
    std::map<std::pair<int32_t, int32_t>, std::pair<std::string, std::string>> names;
    for (const auto& word : words) {
      for (std::size_t i = 0; i + 1 < word.size(); ++i) {
        const std::pair pair{ids[word[i]], ids[word[i + 1]]};
        ++counts[pair];
        names[pair] = {word[i], word[i + 1]};
      }
    }
    std::pair<int32_t, int32_t> best;
    int64_t best_count = 0;
    for (const auto& [pair, count] : counts) {
      if (count > best_count) std::tie(best, best_count) = std::tie(pair, count);
    }
    if (best_count < min_count) break;
    const auto [left, right] = names[best];
    if (std::find(merges.begin(), merges.end(), names[best]) == merges.end())
      merges.emplace_back(left, right);
    ids.emplace(left + right, static_cast<int32_t>(ids.size()));
    for (auto& word : words) {
      for (std::size_t i = 0; i + 1 < word.size(); ++i) {
        if (word[i] != left || word[i + 1] != right) continue;
        word[i] += right;
        word.erase(word.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      }
    }
  }
  return merges;
}

WordCounts counts_of(std::string_view text) {
  WordCounts counts;
  counts.add(text);
  return counts;
}

TEST(TrainBpe, MakesTheMergesOfTheNaiveAlgorithm) {
  std::mt19937 random(21);
  for (int round = 0; round < 30; ++round) {
    std::string text;
    const std::string_view alphabet = round % 2 == 0 ? "ab " : "abcde '\n1";
    for (int i = 0; i < 400; ++i) text.push_back(alphabet[random() % alphabet.size()]);
    if (round % 5 == 0) text += random_text(random, 100);
    const int64_t vocab_size = 257 + 60;
    const int64_t min_count = 1 + round % 3;
    const BpeTokenizer trained =
        train_bpe(counts_of(text), {.vocab_size = vocab_size, .min_pair_count = min_count});
    ASSERT_EQ(named_merges(trained), naive_training(text, trained, vocab_size, min_count)) << text;
  }
}

TEST(TrainBpe, NumbersTokensAsGpt2Does) {
  const BpeTokenizer trained = train_bpe(counts_of("aaaa bbb"), {.vocab_size = 259, .min_pair_count = 1});
  EXPECT_EQ(trained.vocab_size(), 259);
  EXPECT_EQ(trained.find("!"), 0);
  EXPECT_EQ(trained.find(" "), 220);
  EXPECT_EQ(trained.token(256), "aa");
  EXPECT_EQ(trained.end_of_text(), 258);
  EXPECT_THAT(trained.special_tokens(), ::testing::ElementsAre(258));
}

TEST(TrainBpe, StopsWherePairsRunOut) {
  const BpeTokenizer trained = train_bpe(counts_of("ab ab xy"), {.vocab_size = 1000});
  // "ab" occurs twice, " ab", " xy" and "xy" once; the space before the second "ab" makes it another piece.
  EXPECT_EQ(trained.vocab_size(), 258);
  EXPECT_EQ(trained.token(256), "ab");
}

TEST(TrainBpe, DoesNotDependOnHowTheTextWasCut) {
  std::mt19937 random(22);
  const std::string text = random_text(random, 5000);
  WordCounts parts;
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t cut = safe_cut(rest, 1 + random() % 300);
    WordCounts part;
    part.add(rest.substr(0, cut));
    parts.add(part);
    rest.remove_prefix(cut);
  }
  EXPECT_EQ(parts.sorted(), counts_of(text).sorted());
  EXPECT_EQ(train_bpe(parts, {.vocab_size = 400}).hash(),
            train_bpe(counts_of(text), {.vocab_size = 400}).hash());
}

TEST(TrainBpe, SaysWhyItCannot) {
  EXPECT_THAT(NF_SENTENCE_OF(ConfigError, train_bpe(counts_of("a"), {.vocab_size = 256})), HasSubstr("257"));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, train_bpe(WordCounts(), {.vocab_size = 300})), HasSubstr("no text"));
}

TEST(TrainBpe, MakesTheMergesOfHuggingFace) {
  NF_NEED_REFERENCE_DATA();
  const auto recorded = nlohmann::json::parse(read_bytes(fixture("bpe_training.json")));
  for (const auto& record : recorded["trainings"]) {
    const std::string text = read_bytes(reference_data() / record["text"].get<std::string>());
    const BpeTokenizer trained =
        train_bpe(counts_of(text), {.vocab_size = record["vocab_size"].get<int64_t>() + 1});
    const TemporaryFolder folder;
    trained.save(folder.path());
    EXPECT_EQ(read_bytes(folder / "merges.txt"), record["merges"].get<std::string>()) << record["text"];
    EXPECT_EQ(trained.decode(trained.encode(text)), text);
  }
}

}  // namespace
}  // namespace normformer
