#include "normformer/data/bpe_tokenizer.h"

#include <random>
#include <set>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "normformer/core/error.h"
#include "normformer/data/pretokenizer.h"

#include "naive_bpe.h"
#include "random_text.h"
#include "reference_data.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::string> byte_tokens() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  return tokens;
}

/// A vocabulary with merges of random pairs of what there is, in any order: also tokens that two merges make,
/// and merges that stand before those that make their parts.
BpeTokenizer random_tokenizer(std::mt19937& random, std::string_view alphabet, int merges) {
  std::vector<std::string> tokens = byte_tokens();
  std::vector<int32_t> usable;
  for (const char c : alphabet) usable.push_back(static_cast<unsigned char>(c));
  std::map<std::string, int32_t> ids;
  for (std::size_t i = 0; i < tokens.size(); ++i) ids[tokens[i]] = static_cast<int32_t>(i);
  std::set<std::pair<int32_t, int32_t>> pairs;
  std::vector<BpeMerge> list;
  for (int i = 0; i < merges; ++i) {
    const int32_t left = usable[random() % usable.size()];
    const int32_t right = usable[random() % usable.size()];
    if (!pairs.insert({left, right}).second) continue;
    const std::string result = tokens[left] + tokens[right];
    if (ids.emplace(result, static_cast<int32_t>(tokens.size())).second) {
      usable.push_back(static_cast<int32_t>(tokens.size()));
      tokens.push_back(result);
    }
    list.push_back({left, right});
  }
  if (random() % 2 == 0) std::shuffle(list.begin(), list.end(), random);
  return BpeTokenizer(tokens, list);
}

std::string random_word(std::mt19937& random, std::string_view alphabet, std::size_t length) {
  std::string word;
  for (std::size_t i = 0; i < length; ++i) word.push_back(alphabet[random() % alphabet.size()]);
  return word;
}

TEST(BpeTokenizer, AgreesWithTheNaiveAlgorithmOnRandomVocabularies) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    const std::string_view alphabet = round % 3 == 0 ? "a" : round % 3 == 1 ? "ab" : "abcde";
    const BpeTokenizer tokenizer = random_tokenizer(random, alphabet, 2 + static_cast<int>(random() % 40));
    BpeEncoder encoder(tokenizer);
    for (int word = 0; word < 30; ++word) {
      const std::string text = random_word(random, alphabet, 1 + random() % (word < 20 ? 32 : 200));
      const auto expected = naive_merges(tokenizer, text);
      ASSERT_EQ(tokenizer.encode(text), expected) << text;
      for (int again = 0; again < 2; ++again) {
        std::vector<int32_t> ids;
        encoder.encode(text, ids);
        ASSERT_EQ(ids, expected) << text;
      }
    }
  }
}

TEST(BpeTokenizer, DecodeInvertsEncodeForAnyBytes) {
  std::mt19937 random(12);
  const BpeTokenizer tokenizer = random_tokenizer(random, std::string("\0 \xFF\x80\xE3\x81\n'se", 10), 200);
  BpeEncoder encoder(tokenizer);
  for (int round = 0; round < 3000; ++round) {
    const std::string text = round % 2 == 0 ? random_bytes(random, random() % 100) : random_text(random, 30);
    std::vector<int32_t> ids;
    encoder.encode(text, ids);
    ASSERT_EQ(tokenizer.decode(ids), text);
  }
}

TEST(BpeTokenizer, AVeryLongWordIsEncodedInTime) {
  const std::string word(1 << 20, 'a');
  std::vector<std::string> tokens = byte_tokens();
  tokens.push_back("aa");
  tokens.push_back("aaaa");
  const BpeTokenizer tokenizer(tokens, {{'a', 'a'}, {256, 256}});
  EXPECT_EQ(tokenizer.encode(word), std::vector<int32_t>(1 << 18, 257));
}

TEST(BpeTokenizer, TheCacheStaysRightWhenItOverflows) {
  std::mt19937 random(13);
  const BpeTokenizer tokenizer = random_tokenizer(random, "0123456789", 300);
  BpeEncoder encoder(tokenizer);
  for (int i = 0; i < 600000; ++i) {
    const std::string word = std::to_string(i);
    std::vector<int32_t> ids;
    encoder.encode(word, ids);
    ASSERT_EQ(tokenizer.decode(ids), word);
  }
  std::vector<int32_t> ids;
  encoder.encode("12345", ids);
  EXPECT_EQ(ids, naive_merges(tokenizer, "12345"));
}

BpeTokenizer with_special_tokens() {
  std::vector<std::string> tokens = byte_tokens();
  tokens.insert(tokens.end(), {"he", "<|end|>", "<|end", "<|endoftext|>"});
  return BpeTokenizer(tokens, {{'h', 'e'}});
}

TEST(BpeTokenizer, SpecialTokensAreTextUnlessAllowed) {
  const BpeTokenizer tokenizer = with_special_tokens();
  EXPECT_THAT(tokenizer.special_tokens(), ElementsAre(257, 258, 259));
  EXPECT_EQ(tokenizer.end_of_text(), 259);
  EXPECT_THAT(tokenizer.encode("<|end|>"), ElementsAre('<', '|', 'e', 'n', 'd', '|', '>'));
  EXPECT_THAT(tokenizer.encode("he<|end|>he<|end<|endoftext|>", SpecialText::as_token),
              ElementsAre(256, 257, 256, 258, 259));
  EXPECT_THAT(tokenizer.encode("<|en", SpecialText::as_token), ElementsAre('<', '|', 'e', 'n'));
  EXPECT_THAT(tokenizer.encode("", SpecialText::as_token), ElementsAre());
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{256, 257}), "he<|end|>");
}

TEST(BpeTokenizer, RefusesUnsoundVocabularies) {
  const auto sentence = [](std::vector<std::string> more, std::vector<BpeMerge> merges) {
    std::vector<std::string> tokens = byte_tokens();
    tokens.insert(tokens.end(), more.begin(), more.end());
    return NF_SENTENCE_OF(DataError, BpeTokenizer(tokens, merges, "here"));
  };
  EXPECT_THAT(sentence({"ab", "ab"}, {}), HasSubstr("here: tokens 256 and 257 are the same, \"ab\""));
  EXPECT_THAT(sentence({""}, {}), HasSubstr("token 256 is empty"));
  EXPECT_THAT(sentence({}, {{'a', 'b'}}), HasSubstr("merge 0 makes \"ab\", which the vocabulary lacks"));
  EXPECT_THAT(sentence({"ab"}, {{'a', 'b'}, {'a', 'b'}}), HasSubstr("merges 0 and 1 are the same"));
  EXPECT_THAT(sentence({"ab"}, {{'a', 300}}), HasSubstr("merge 0 names token 300 of 257"));
  EXPECT_THAT(sentence({"<x>", "<x>a"}, {{256, 'a'}}), HasSubstr("neither a byte nor a merge makes"));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, BpeTokenizer({"a"}, {}, "here")),
              HasSubstr("no token for the byte 0x00"));
}

TEST(BpeTokenizer, RefusesIdsOutsideOfTheVocabulary) {
  const BpeTokenizer tokenizer(byte_tokens(), {});
  EXPECT_THAT(NF_SENTENCE_OF(DataError, tokenizer.decode(std::vector<int32_t>{256})), HasSubstr("token 256"));
  EXPECT_THROW(tokenizer.decode(std::vector<int32_t>{-1}), DataError);
}

TEST(BpeTokenizer, TheHashCoversTokensAndMerges) {
  std::vector<std::string> tokens = byte_tokens();
  tokens.insert(tokens.end(), {"ab", "cd"});
  const uint64_t hash = BpeTokenizer(tokens, {{'a', 'b'}, {'c', 'd'}}).hash();
  EXPECT_EQ(BpeTokenizer(tokens, {{'a', 'b'}, {'c', 'd'}}).hash(), hash);
  EXPECT_NE(BpeTokenizer(tokens, {{'c', 'd'}, {'a', 'b'}}).hash(), hash);
  EXPECT_NE(BpeTokenizer(tokens, {{'a', 'b'}}).hash(), hash);
  std::swap(tokens[256], tokens[257]);
  EXPECT_NE(BpeTokenizer(tokens, {{'a', 'b'}, {'c', 'd'}}).hash(), hash);
}

class Gpt2 : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (std::filesystem::exists(reference_data())) {
      tokenizer_ = std::make_unique<BpeTokenizer>(BpeTokenizer::load(reference_data() / "gpt2-bpe"));
    }
  }
  static void TearDownTestSuite() { tokenizer_.reset(); }
  void SetUp() override { NF_NEED_REFERENCE_DATA(); }

  static std::unique_ptr<BpeTokenizer> tokenizer_;
};

std::unique_ptr<BpeTokenizer> Gpt2::tokenizer_;

TEST_F(Gpt2, HasItsKnownTokens) {
  EXPECT_EQ(tokenizer_->vocab_size(), 50257);
  EXPECT_EQ(tokenizer_->find("!"), 0);
  EXPECT_EQ(tokenizer_->find(" the"), 262);
  EXPECT_EQ(tokenizer_->end_of_text(), 50256);
  EXPECT_THAT(tokenizer_->special_tokens(), ElementsAre(50256));
  for (std::size_t i = 0; i < tokenizer_->merges().size(); ++i) {
    const auto [left, right] = tokenizer_->merges()[i];
    ASSERT_EQ(tokenizer_->token(left) + tokenizer_->token(right), tokenizer_->token(256 + i));
  }
  EXPECT_THAT(tokenizer_->encode("Hello world"), ElementsAre(15496, 995));
  EXPECT_THAT(tokenizer_->encode("<|endoftext|>", SpecialText::as_token), ElementsAre(50256));
  EXPECT_EQ(tokenizer_->encode("<|endoftext|>").size(), 7u);
}

TEST_F(Gpt2, GivesTheIdsOfTiktokenAndHuggingFace) {
  const auto recorded = nlohmann::json::parse(read_bytes(fixture("gpt2_ids.json")));
  BpeEncoder encoder(*tokenizer_);
  for (const auto& record : recorded["texts"]) {
    const auto name = record["text"].get<std::string>();
    const std::string text = read_bytes(reference_data() / name);
    ASSERT_EQ(text.size(), record["bytes"].get<std::size_t>()) << name;
    std::vector<int32_t> ids;
    encoder.encode(text, ids);
    const auto first = record["first"].get<std::vector<int32_t>>();
    ASSERT_EQ(std::vector<int32_t>(ids.begin(), ids.begin() + first.size()), first) << name;
    EXPECT_EQ(ids.size(), record["ids"].get<std::size_t>()) << name;
    EXPECT_EQ(fmt::format("{:016x}", XXH3_64bits(ids.data(), ids.size() * sizeof(int32_t))),
              record["xxh3"].get<std::string>())
        << name;
    EXPECT_TRUE(tokenizer_->decode(ids) == text) << name;
  }
}

TEST_F(Gpt2, AgreesWithTheNaiveAlgorithmOnRandomText) {
  std::mt19937 random(14);
  std::vector<int32_t> expected;
  std::string text;
  for (int round = 0; round < 4; ++round) text += random_text(random, 6) + random_bytes(random, 4);
  for_each_piece(text, [&](std::string_view piece) {
    const auto ids = naive_merges(*tokenizer_, piece);
    expected.insert(expected.end(), ids.begin(), ids.end());
  });
  EXPECT_EQ(tokenizer_->encode(text), expected);
}

TEST_F(Gpt2, KeepsInvalidBytes) {
  const std::string bytes = read_bytes(reference_data() / "utf8/utf8tests_invalid.bin");
  EXPECT_TRUE(tokenizer_->decode(tokenizer_->encode(bytes)) == bytes);
}

TEST_F(Gpt2, SeveralThreadsEncodeWithOneVocabulary) {
  const std::string text = read_bytes(reference_data() / "utf8/commonmark-spec.txt");
  const auto expected = tokenizer_->encode(text);
  std::vector<std::vector<int32_t>> results(4);
  {
    std::vector<std::jthread> threads;
    for (auto& result : results) {
      threads.emplace_back([&result, &text] { BpeEncoder(*tokenizer_).encode(text, result); });
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, expected);
}

TEST_F(Gpt2, IsTheSameAfterSavingAndLoading) {
  const TemporaryFolder folder;
  tokenizer_->save(folder / "made/here");
  const BpeTokenizer loaded = BpeTokenizer::load(folder / "made/here");
  EXPECT_EQ(loaded.hash(), tokenizer_->hash());
  EXPECT_EQ(loaded.vocab_size(), 50257);
  EXPECT_EQ(nlohmann::json::parse(read_bytes(folder / "made/here/vocab.json")),
            nlohmann::json::parse(read_bytes(reference_data() / "gpt2-bpe/encoder.json")));
  EXPECT_TRUE(read_bytes(folder / "made/here/merges.txt") ==
              read_bytes(reference_data() / "gpt2-bpe/vocab.bpe"));
}

}  // namespace
}  // namespace normformer
