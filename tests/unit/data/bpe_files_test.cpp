#include <map>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/data/bpe_tokenizer.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

/// A small vocabulary in files: the bytes, "he", " he" (as "\u0120he"), and a special token.
class BpeFiles : public ::testing::Test {
 protected:
  BpeFiles() {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    tokens.insert(tokens.end(), {"he", " he", "<|endoftext|>"});
    tokenizer_ = std::make_unique<BpeTokenizer>(tokens, std::vector<BpeMerge>{{'h', 'e'}, {' ', 256}});
    tokenizer_->save(folder_.path());
    vocabulary_ = Json::parse(read_bytes(folder_ / "vocab.json"));
  }

  Json tokenizer_json() const {
    Json root;
    root["added_tokens"] = Json::array({{{"id", 258}, {"content", "<|endoftext|>"}, {"special", true}}});
    root["normalizer"] = nullptr;
    root["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
    root["model"] = {{"type", "BPE"},
                     {"dropout", nullptr},
                     {"continuing_subword_prefix", ""},
                     {"vocab", vocabulary_},
                     {"merges", Json::array({"h e", "\u0120 he"})}};
    return root;
  }

  std::string refusal_of(const Json& root) {
    write_bytes(folder_ / "tokenizer.json", root.dump());
    return NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_ / "tokenizer.json"));
  }

  std::string refusal_of_vocabulary(const std::string& text) {
    write_bytes(folder_ / "vocab.json", text);
    return NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_.path()));
  }

  std::string refusal_of_merges(const std::string& text) {
    write_bytes(folder_ / "merges.txt", text);
    return NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_.path()));
  }

  TemporaryFolder folder_;
  std::unique_ptr<BpeTokenizer> tokenizer_;
  Json vocabulary_;
};

TEST_F(BpeFiles, SavesTheFormOfGpt2) {
  EXPECT_EQ(vocabulary_.size(), 259u);
  EXPECT_EQ(vocabulary_["\u0120he"], 257);
  EXPECT_EQ(vocabulary_["\u0100"], 0);  // the byte 0
  EXPECT_EQ(vocabulary_["<|endoftext|>"], 258);
  EXPECT_EQ(read_bytes(folder_ / "merges.txt"), "#version: 0.2\nh e\n\u0120 he\n");
}

TEST_F(BpeFiles, EveryFormGivesTheSameVocabulary) {
  EXPECT_EQ(BpeTokenizer::load(folder_.path()).hash(), tokenizer_->hash());

  const TemporaryFolder openai;
  std::filesystem::copy(folder_ / "vocab.json", openai / "encoder.json");
  std::filesystem::copy(folder_ / "merges.txt", openai / "vocab.bpe");
  EXPECT_EQ(BpeTokenizer::load(openai.path()).hash(), tokenizer_->hash());

  Json root = tokenizer_json();
  write_bytes(folder_ / "tokenizer.json", root.dump());
  EXPECT_EQ(BpeTokenizer::load(folder_ / "tokenizer.json").hash(), tokenizer_->hash());
  root["model"]["merges"] = Json::array({Json::array({"h", "e"}), Json::array({"\u0120", "he"})});
  root["model"]["vocab"].erase("<|endoftext|>");
  write_bytes(folder_ / "tokenizer.json", root.dump());
  EXPECT_EQ(BpeTokenizer::load(folder_.path()).hash(), tokenizer_->hash());
}

TEST_F(BpeFiles, MergesMayLackTheHeadingAndTheLastNewline) {
  for (const char* text : {"h e\n\u0120 he", "#version: 0.2\r\nh e\r\n\u0120 he\r\n"}) {
    write_bytes(folder_ / "merges.txt", text);
    EXPECT_EQ(BpeTokenizer::load(folder_.path()).hash(), tokenizer_->hash());
  }
}

TEST_F(BpeFiles, NamesTheLineOfABadMerge) {
  EXPECT_THAT(refusal_of_merges("#version: 0.2\nh e\nhe\n"),
              AllOf(HasSubstr("merges.txt line 3"), HasSubstr("\"he\"")));
  EXPECT_THAT(refusal_of_merges("h e\n\nh e\n"), HasSubstr("line 2"));
  EXPECT_THAT(refusal_of_merges("h e x\n"), HasSubstr("line 1"));
  EXPECT_THAT(refusal_of_merges("h e\nhe he\n"),
              AllOf(HasSubstr("line 2 needs the token \"hehe\""), HasSubstr("vocab.json")));
  EXPECT_THAT(refusal_of_merges("h e\nxyz e\n"), HasSubstr("line 2 needs the token \"xyz\""));
}

TEST_F(BpeFiles, RefusesIdsThatAreNotDenseAndUnique) {
  Json twice = vocabulary_;
  twice["he"] = 5;
  EXPECT_THAT(refusal_of_vocabulary(twice.dump()), HasSubstr("the same id 5"));
  Json beyond = vocabulary_;
  beyond["he"] = 259;
  EXPECT_THAT(refusal_of_vocabulary(beyond.dump()),
              HasSubstr("token \"he\" has the id 259; the ids of 259 tokens are 0 to 258"));
  for (const Json& bad : {Json(-1), Json("3"), Json(1.5), Json(nullptr), Json(~uint64_t{0})}) {
    Json wrong = vocabulary_;
    wrong["he"] = bad;
    EXPECT_THAT(refusal_of_vocabulary(wrong.dump()), HasSubstr("token \"he\" has the id"));
  }
  EXPECT_THAT(refusal_of_vocabulary("[1]"), HasSubstr("one JSON object"));
  EXPECT_THAT(refusal_of_vocabulary("{\"a\": 0,\n"), AllOf(HasSubstr("vocab.json"), HasSubstr("line 2")));
}

TEST_F(BpeFiles, RefusesFilesThatAreTooLarge) {
  std::filesystem::resize_file(folder_ / "vocab.json", (64 << 20) + 1);
  EXPECT_THAT(NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_.path())),
              HasSubstr("67108864 is the most"));
}

// Values as deep as a file can hold would be written and copied by recursion.
TEST_F(BpeFiles, RefusesDeepValues) {
  const std::string deep = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  write_bytes(folder_ / "vocab.json", "{\"a\": " + deep + "}");
  EXPECT_THAT(NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_.path())),
              HasSubstr("is nested more than 256 levels deep"));
  write_bytes(folder_ / "tokenizer.json", "{\"model\": {\"vocab\": {\"a\": " + deep + "}, \"merges\": []}}");
  EXPECT_THAT(NF_SENTENCE_OF(DataError, BpeTokenizer::load(folder_.path())),
              HasSubstr("is nested more than 256 levels deep"));
}

TEST_F(BpeFiles, SaysWhatAFolderLacks) {
  const TemporaryFolder empty;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, BpeTokenizer::load(empty.path())), HasSubstr("holds no tokenizer"));
  EXPECT_THAT(NF_SENTENCE_OF(IoError, BpeTokenizer::load(empty / "gone")), HasSubstr("gone does not exist"));
}

TEST_F(BpeFiles, RefusesTokenizersThatWorkOtherwise) {
  const auto with = [this](const Json::json_pointer& where, const Json& value) {
    Json root = tokenizer_json();
    root[where] = value;
    return refusal_of(root);
  };
  using Pointer = Json::json_pointer;
  EXPECT_THAT(with(Pointer("/normalizer"), {{"type", "NFC"}}), HasSubstr("normalizer"));
  EXPECT_THAT(with(Pointer("/model/type"), "Unigram"), HasSubstr("Unigram"));
  EXPECT_THAT(with(Pointer("/model/byte_fallback"), true), HasSubstr("byte_fallback"));
  EXPECT_THAT(with(Pointer("/model/ignore_merges"), true), HasSubstr("ignore_merges"));
  EXPECT_THAT(with(Pointer("/model/dropout"), 0.1), HasSubstr("dropout"));
  EXPECT_THAT(with(Pointer("/model/end_of_word_suffix"), "</w>"), HasSubstr("end_of_word_suffix"));
  EXPECT_THAT(with(Pointer("/pre_tokenizer/add_prefix_space"), true), HasSubstr("otherwise than GPT-2"));
  EXPECT_THAT(with(Pointer("/pre_tokenizer/use_regex"), false), HasSubstr("otherwise than GPT-2"));
  EXPECT_THAT(with(Pointer("/pre_tokenizer/type"), "Metaspace"), HasSubstr("Metaspace"));
  EXPECT_THAT(with(Pointer("/pre_tokenizer"), nullptr), HasSubstr("otherwise than GPT-2"));
  EXPECT_THAT(with(Pointer("/added_tokens/0/id"), 3), HasSubstr("the ids 3 and 258"));
  EXPECT_THAT(with(Pointer("/added_tokens/0"), {{"id", 256}, {"content", "he"}}),
              HasSubstr("also an ordinary token"));
  EXPECT_THAT(with(Pointer("/model/merges/1"), 7), HasSubstr("merge 1 is 7"));
  EXPECT_THAT(with(Pointer("/model/vocab"), 7), HasSubstr("structure"));
  Json bare = tokenizer_json();
  bare.erase("model");
  EXPECT_THAT(refusal_of(bare), HasSubstr("has no \"model\""));
  EXPECT_THAT(refusal_of(Json::array()), HasSubstr("tokenizer.json"));
}

TEST_F(BpeFiles, RefusesAVocabularyThatIsNotByteLevel) {
  Json root = tokenizer_json();
  root["model"]["vocab"]["\u3042"] = 259;
  root["model"]["vocab"]["h\u3042"] = 260;
  root["model"]["merges"].push_back("h \u3042");
  EXPECT_THAT(refusal_of(root), HasSubstr("not a byte-level BPE"));
}

}  // namespace
}  // namespace normformer
