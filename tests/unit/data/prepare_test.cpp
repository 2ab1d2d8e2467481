#include "normformer/data/prepare.h"

#include <functional>
#include <map>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/data/indexed_dataset.h"

#include "random_text.h"
#include "reference_data.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

/// A folder with a tokenizer of plain bytes and room for inputs and outputs.
class Prepare : public ::testing::Test {
 protected:
  Prepare() {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    tokens.emplace_back("<|endoftext|>");
    BpeTokenizer(tokens, {}).save(folder_ / "bytes");
  }

  PrepareOptions options(std::vector<std::filesystem::path> inputs) const {
    PrepareOptions options;
    options.inputs = std::move(inputs);
    options.output = folder_ / "out/corpus";
    options.tokenizer = folder_ / "bytes";
    options.show_progress = false;
    return options;
  }

  std::filesystem::path input(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories((folder_ / name).parent_path());
    write_bytes(folder_ / name, text);
    return folder_ / name;
  }

  /// The documents of a dataset as text, end-of-document tokens included.
  std::vector<std::string> documents(const std::string& name = "out/corpus") const {
    const IndexedDataset dataset(folder_ / name);
    const BpeTokenizer tokenizer = load_corpus_tokenizer(folder_ / name);
    std::vector<std::string> texts;
    for (int64_t i = 0; i < dataset.num_documents(); ++i) {
      std::vector<int32_t> tokens(dataset.document(i).size());
      dataset.read(dataset.document(i).begin, tokens);
      texts.push_back(tokenizer.decode(tokens));
    }
    return texts;
  }

  std::vector<std::string> prepared(const PrepareOptions& options) const {
    prepare_corpus(options);
    return documents();
  }

  TemporaryFolder folder_;
};

const std::string kEnd = "<|endoftext|>";

TEST_F(Prepare, EveryTextFileIsADocument) {
  EXPECT_THAT(prepared(options({input("a.txt", "one\n\ntwo\n"), input("b", "three")})),
              ElementsAre("one\n\ntwo\n" + kEnd, "three" + kEnd));
}

TEST_F(Prepare, FoldersAreReadInOrderOfTheirPaths) {
  input("texts/b.txt", "b");
  input("texts/a/z.txt", "z");
  input("texts/a.txt", "a");
  input("texts/.hidden", "h");
  input("texts/.git/config", "h");
  input("texts/c.jsonl", "{\"text\": \"c\"}");
  // '.' sorts before '/'.
  EXPECT_THAT(prepared(options({folder_ / "texts"})),
              ElementsAre("a" + kEnd, "z" + kEnd, "b" + kEnd, "c" + kEnd));
}

TEST_F(Prepare, TextIsCutAtBlankLines) {
  auto o = options({input("a.txt", "\n\none\nstill one\n \t\n\r\ntwo\n\n\n"), input("b.txt", "three")});
  o.documents = DocumentRule::blank_lines;
  EXPECT_THAT(prepared(o), ElementsAre("one\nstill one" + kEnd, "two" + kEnd, "three" + kEnd));
}

TEST_F(Prepare, TextIsCutAtSeparatorLines) {
  auto o = options({input("a.txt", "one\n\nstill one\n---\n---\n\n---\r\n --- two\n---")});
  o.documents = DocumentRule::separator;
  o.separator = "---";
  EXPECT_THAT(prepared(o), ElementsAre("one\n\nstill one" + kEnd, " --- two" + kEnd));
}

TEST_F(Prepare, JsonLinesGiveOneDocumentEach) {
  auto o = options({input("a.jsonl",
                          "{\"body\": \"caf\\u00e9 \\ud83d\\ude00\", \"n\": 1}\n\n{\"body\": \"\"}\n"
                          "  {\"body\": \"two\\nlines\"}")});
  o.json_key = "body";
  EXPECT_THAT(prepared(o), ElementsAre("caf\u00e9 \U0001F600" + kEnd, "two\nlines" + kEnd));
}

TEST_F(Prepare, TheEndOfDocumentTokenCanBeLeftOut) {
  auto o = options({input("a.txt", "one")});
  o.append_end_of_document = false;
  const CorpusManifest manifest = prepare_corpus(o);
  EXPECT_THAT(documents(), ElementsAre("one"));
  EXPECT_EQ(manifest.end_of_document, std::nullopt);
}

TEST_F(Prepare, TextCannotSmuggleInTheEndOfDocument) {
  prepare_corpus(options({input("a.txt", "a" + kEnd + "b")}));
  const IndexedDataset dataset(folder_ / "out/corpus");
  std::vector<int32_t> tokens(dataset.num_tokens());
  dataset.read(0, tokens);
  EXPECT_EQ(std::count(tokens.begin(), tokens.end(), 256), 1);
  EXPECT_EQ(tokens.back(), 256);
}

TEST_F(Prepare, TheManifestSaysWhatWasMade) {
  const CorpusManifest made = prepare_corpus(options({input("a.txt", "abc"), input("b.txt", "de")}));
  const CorpusManifest read = read_corpus_manifest(folder_ / "out/corpus.json");
  ASSERT_EQ(read.splits.size(), 1u);
  EXPECT_EQ(read.splits[0].name, "all");
  EXPECT_EQ(read.splits[0].dataset, "corpus");
  EXPECT_EQ(read.splits[0].documents, 2);
  EXPECT_EQ(read.splits[0].tokens, 7);
  EXPECT_EQ(read.splits[0].bytes, 5);
  EXPECT_EQ(read.vocab_size, 257);
  EXPECT_EQ(read.end_of_document, 256);
  EXPECT_EQ(read.unicode_version, "15.0");
  EXPECT_EQ(read.tokenizer, "corpus_tokenizer");
  EXPECT_EQ(read.tokenizer_hash, BpeTokenizer::load(folder_ / "bytes").hash());
  EXPECT_EQ(read.tokenizer_hash, made.tokenizer_hash);
  EXPECT_EQ(read.folder, folder_ / "out");
  EXPECT_NO_THROW(verify_corpus(folder_ / "out/corpus"));
}

TEST_F(Prepare, TheOutputDoesNotDependOnThreads) {
  std::mt19937 random(31);
  std::string text;
  while (text.size() < 2500000) text += random_text(random, 1000) + (random() % 30 == 0 ? "\n\n" : " ");
  std::string lines;
  for (int i = 0; i < 500; ++i) lines += nlohmann::json{{"text", random_text(random, 50)}}.dump() + "\n";
  input("texts/long.txt", text);
  input("texts/lines.jsonl", lines);

  std::map<int, std::vector<std::string>> outputs;
  for (const int threads : {1, 2, 5}) {
    auto o = options({folder_ / "texts"});
    o.threads = threads;
    o.tokenizer.clear();
    o.train_vocab_size = 400;
    o.valid_fraction = 0.1;
    prepare_corpus(o);
    for (const char* name : {"corpus_train.bin", "corpus_train.idx", "corpus_valid.bin", "corpus_valid.idx",
                             "corpus.json", "corpus_tokenizer/vocab.json", "corpus_tokenizer/merges.txt"}) {
      outputs[threads].push_back(read_bytes(folder_ / "out" / name));
    }
  }
  EXPECT_TRUE(outputs[1] == outputs[2]);
  EXPECT_TRUE(outputs[1] == outputs[5]);
}

TEST_F(Prepare, ALongDocumentIsEncodedAsIfInOnePiece) {
  std::mt19937 random(32);
  std::string text;
  while (text.size() < 3500000) text += random_text(random, 1000);
  EXPECT_TRUE(prepared(options({input("long.txt", text)})) == std::vector<std::string>{text + kEnd});

  const std::string plain(3500000, 'x');  // nowhere to cut
  EXPECT_TRUE(prepared(options({input("plain.txt", plain)})) == std::vector<std::string>{plain + kEnd});
}

TEST_F(Prepare, AShareOfTheDocumentsGoesToValidation) {
  std::string lines;
  std::vector<std::string> all;
  for (int i = 0; i < 1000; ++i) {
    lines += fmt::format("{{\"text\": \"document {}\"}}\n", i);
    all.push_back(fmt::format("document {}{}", i, kEnd));
  }
  auto o = options({input("a.jsonl", lines)});
  o.valid_fraction = 0.02;
  const CorpusManifest manifest = prepare_corpus(o);
  const auto train = documents("out/corpus_train");
  const auto valid = documents("out/corpus_valid");
  EXPECT_EQ(valid.size(), 20u);
  ASSERT_EQ(manifest.splits.size(), 2u);
  EXPECT_EQ(manifest.splits[1].documents, 20);

  std::vector<std::string> together(all.size());
  std::vector<std::string> merged;
  std::merge(train.begin(), train.end(), valid.begin(), valid.end(), std::back_inserter(merged),
             [&](const auto& a, const auto& b) {
               return std::find(all.begin(), all.end(), a) < std::find(all.begin(), all.end(), b);
             });
  EXPECT_EQ(merged, all);
  // One out of every fifty: spread over the whole corpus.
  for (int i = 0; i < 20; ++i) {
    const auto place = std::find(all.begin(), all.end(), valid[i]) - all.begin();
    EXPECT_EQ(place / 50, i);
  }

  o.seed = 1;
  prepare_corpus(o);
  EXPECT_NE(documents("out/corpus_valid"), valid);
  o.seed = 0;
  prepare_corpus(o);
  EXPECT_EQ(documents("out/corpus_valid"), valid);
}

TEST_F(Prepare, ValidationMayHaveFilesOfItsOwn) {
  auto o = options({input("a.txt", "train")});
  o.valid_inputs = {input("b.txt", "valid")};
  prepare_corpus(o);
  EXPECT_THAT(documents("out/corpus_train"), ElementsAre("train" + kEnd));
  EXPECT_THAT(documents("out/corpus_valid"), ElementsAre("valid" + kEnd));
}

TEST_F(Prepare, AVocabularyIsTrainedOnTrainingDocumentsOnly) {
  auto o = options({input("a.txt", "abab abab abab")});
  o.valid_inputs = {input("b.txt", "xyxy xyxy xyxy")};
  o.tokenizer.clear();
  o.train_vocab_size = 258;
  const CorpusManifest manifest = prepare_corpus(o);
  EXPECT_EQ(manifest.vocab_size, 258);
  EXPECT_EQ(load_corpus_tokenizer(folder_ / "out/corpus_train").token(256), "ab");
}

TEST_F(Prepare, InvalidUtf8IsRefusedReplacedOrKept) {
  auto o = options({input("a.txt", "one\nt\xFFwo")});
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(o)),
              AllOf(HasSubstr("a.txt is not UTF-8 at byte 5 (line 2): 0xFF"), HasSubstr("replace")));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/corpus.bin"));
  o.invalid_utf8 = InvalidUtf8::replace;
  EXPECT_EQ(prepare_corpus(o).replaced, 1);
  EXPECT_THAT(documents(), ElementsAre("one\nt\uFFFDwo" + kEnd));
  o.invalid_utf8 = InvalidUtf8::bytes;
  EXPECT_THAT(prepared(o), ElementsAre("one\nt\xFFwo" + kEnd));

  auto json = options({input("b.jsonl", "{\"text\": \"ok\"}\n{\"text\": \"t\xFFwo\"}")});
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(json)),
              HasSubstr("b.jsonl is not UTF-8 at byte 26 (line 2)"));
  json.invalid_utf8 = InvalidUtf8::bytes;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(json)), HasSubstr("not UTF-8"));
  json.invalid_utf8 = InvalidUtf8::replace;
  EXPECT_THAT(prepared(json), ElementsAre("ok" + kEnd, "t\uFFFDwo" + kEnd));
}

TEST_F(Prepare, NamesTheLineOfBadJson) {
  const auto sentence = [&](const std::string& line) {
    return NF_SENTENCE_OF(DataError,
                          prepare_corpus(options({input("a.jsonl", "{\"text\": \"ok\"}\n" + line)})));
  };
  EXPECT_THAT(sentence("{\"text\": "), HasSubstr("a.jsonl line 2 is not valid JSON"));
  EXPECT_THAT(sentence("[1]"), HasSubstr("a.jsonl line 2 is not a JSON object"));
  EXPECT_THAT(sentence("{\"body\": \"x\", \"id\": 1}"),
              AllOf(HasSubstr("line 2 has no \"text\" (it has \"body\", \"id\")"), HasSubstr("--json-key")));
  EXPECT_THAT(sentence("{\"text\": 5}"), HasSubstr("line 2: \"text\" is not a string"));
  EXPECT_THAT(sentence("{\"text\": \"\\ud800\"}"), HasSubstr("line 2 is not valid JSON"));
  const auto nested = [](int levels) { return std::string(levels, '[') + std::string(levels, ']'); };
  EXPECT_THAT(sentence("{\"text\": 5, \"\\\"]\":" + nested(255) + "}"),
              HasSubstr("\"text\" is not a string"));
  EXPECT_THAT(sentence("{\"text\": 5, \"\\\"]\":" + nested(256) + "}"),
              HasSubstr("a.jsonl line 2 is nested more than 256 levels deep"));
}

TEST_F(Prepare, TheFirstErrorIsReportedWhateverTheThreads) {
  std::string lines;
  for (int i = 0; i < 2000; ++i) lines += i < 700 ? "{\"text\": \"x\"}\n" : "{}\n";
  auto o = options({input("a.jsonl", lines)});
  o.threads = 4;
  for (int round = 0; round < 20; ++round) {
    ASSERT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(o)), HasSubstr("line 701 "));
  }
}

TEST_F(Prepare, SaysThatThereIsNoText) {
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(options({input("a.txt", "")}))),
              HasSubstr("the corpus is empty: there is no text in " + (folder_ / "a.txt").string()));
  auto blank = options({input("b.txt", "\n\n \n")});
  blank.documents = DocumentRule::blank_lines;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(blank)), HasSubstr("corpus is empty"));
  auto trained = blank;
  trained.tokenizer.clear();
  trained.train_vocab_size = 300;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(trained)), HasSubstr("there is no text in"));
  auto valid = options({input("c.txt", "c")});
  valid.valid_inputs = {folder_ / "a.txt"};
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(valid)), HasSubstr("validation corpus is empty"));
  std::filesystem::create_directory(folder_ / "nothing");
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(options({folder_ / "nothing"}))),
              HasSubstr("holds no files"));
  auto share = options({folder_ / "c.txt"});
  share.valid_fraction = 0.1;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(share)), HasSubstr("leaves none for"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/corpus.json"));
}

TEST_F(Prepare, SaysWhatIsWrongWithItsInputsAndOptions) {
  const auto text = input("a.txt", "text");
  EXPECT_THAT(NF_SENTENCE_OF(IoError, prepare_corpus(options({folder_ / "gone.txt"}))),
              HasSubstr("gone.txt does not exist"));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, prepare_corpus(options({input("a.jsonl.gz", "")}))),
              HasSubstr("a.jsonl.gz is compressed"));
  const auto refused = [&](const std::function<void(PrepareOptions&)>& change) {
    auto o = options({text});
    change(o);
    return NF_SENTENCE_OF(ConfigError, prepare_corpus(o));
  };
  EXPECT_THAT(refused([](auto& o) { o.inputs.clear(); }), HasSubstr("no input"));
  EXPECT_THAT(refused([](auto& o) { o.output = "folder/"; }), HasSubstr("folder/corpus"));
  EXPECT_THAT(refused([](auto& o) { o.tokenizer.clear(); }), HasSubstr("either a tokenizer"));
  EXPECT_THAT(refused([](auto& o) { o.train_vocab_size = 300; }), HasSubstr("either a tokenizer"));
  EXPECT_THAT(refused([](auto& o) { o.valid_fraction = 1; }), HasSubstr("share of 1"));
  EXPECT_THAT(refused([](auto& o) { o.valid_fraction = -0.1; }), HasSubstr("share of -0.1"));
  EXPECT_THAT(refused([&](auto& o) {
                o.valid_inputs = {text};
                o.valid_fraction = 0.1;
              }),
              HasSubstr("not both"));
  EXPECT_THAT(refused([](auto& o) { o.separator = "---"; }), HasSubstr("separator"));
  EXPECT_THAT(refused([](auto& o) { o.documents = DocumentRule::separator; }), HasSubstr("separator"));
  EXPECT_THAT(refused([](auto& o) { o.threads = -1; }), HasSubstr("threads"));

  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  BpeTokenizer(tokens, {}).save(folder_ / "endless");
  EXPECT_THAT(refused([&](auto& o) { o.tokenizer = folder_ / "endless"; }),
              HasSubstr("no token <|endoftext|>"));
}

TEST_F(Prepare, ChangesAfterwardsAreFound) {
  prepare_corpus(options({input("a.txt", "some text that is long enough")}));
  const auto prefix = folder_ / "out/corpus";
  const std::string good = read_bytes(folder_ / "out/corpus.bin");
  std::string bad = good;
  bad[10] = static_cast<char>(bad[10] ^ 1);
  write_bytes(folder_ / "out/corpus.bin", bad);
  EXPECT_THAT(NF_SENTENCE_OF(DataError, verify_corpus(prefix)), HasSubstr("corpus.bin has changed"));
  write_bytes(folder_ / "out/corpus.bin", good);
  EXPECT_NO_THROW(verify_corpus(prefix));

  EXPECT_NO_THROW(load_corpus_tokenizer(prefix));
  const auto merges = read_bytes(folder_ / "out/corpus_tokenizer/merges.txt");
  auto vocabulary = nlohmann::json::parse(read_bytes(folder_ / "out/corpus_tokenizer/vocab.json"));
  std::swap(vocabulary["a"], vocabulary["b"]);
  write_bytes(folder_ / "out/corpus_tokenizer/vocab.json", vocabulary.dump());
  EXPECT_THAT(NF_SENTENCE_OF(DataError, load_corpus_tokenizer(prefix)), HasSubstr("not the one"));
}

TEST_F(Prepare, ManifestsAreFoundBesideTheirDatasetsOnly) {
  auto o = options({input("a.txt", "train")});
  o.valid_inputs = {input("b.txt", "valid")};
  prepare_corpus(o);
  EXPECT_TRUE(find_corpus_manifest(folder_ / "out/corpus_train"));
  EXPECT_TRUE(find_corpus_manifest(folder_ / "out/corpus_valid.bin"));
  EXPECT_FALSE(find_corpus_manifest(folder_ / "out/corpus"));
  EXPECT_FALSE(find_corpus_manifest(folder_ / "out/other"));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, load_corpus_tokenizer(folder_ / "out/other")),
              HasSubstr("has no manifest"));

  const auto path = folder_ / "out/corpus.json";
  auto json = nlohmann::json::parse(read_bytes(path));
  const auto refused = [&](const char* key, const nlohmann::json& value) {
    auto changed = json;
    changed[key] = value;
    write_bytes(path, changed.dump());
    return NF_SENTENCE_OF(DataError, read_corpus_manifest(path));
  };
  EXPECT_THAT(refused("format", "other"), HasSubstr("not the manifest"));
  EXPECT_THAT(refused("version", 2), HasSubstr("version 2"));
  EXPECT_THAT(refused("vocab_size", 0),
              HasSubstr("\"vocab_size\" is 0, not a whole number from 1 to 2147483648"));
  EXPECT_THAT(refused("vocab_size", "x"), HasSubstr("\"vocab_size\" is \"x\", not a whole number"));
  EXPECT_THAT(refused("vocab_size", nlohmann::json::array()), HasSubstr("not a whole number"));
  EXPECT_THAT(refused("version", 1e300), HasSubstr("\"version\" is 1e+300, not a whole number"));
  EXPECT_THAT(refused("replaced", -1), HasSubstr("\"replaced\" is -1, not a whole number"));
  EXPECT_THAT(refused("replaced", UINT64_MAX), HasSubstr("not a whole number"));
  EXPECT_THAT(refused("end_of_document", 1 << 30), HasSubstr("\"end_of_document\" is 1073741824, not"));
  EXPECT_THAT(refused("unicode_version", 3), HasSubstr("incomplete"));
  EXPECT_THAT(refused("tokenizer", "../other"), HasSubstr("names nothing in the manifest's folder"));
  EXPECT_THAT(refused("tokenizer", ".."), HasSubstr("names nothing in the manifest's folder"));
  EXPECT_THAT(refused("splits", {{{"name", "all"}, {"dataset", "/x"}}}), HasSubstr("\"/x\", which names"));
  EXPECT_THAT(refused("tokenizer_xxh3", "12z"), HasSubstr("not a hash"));
}

TEST_F(Prepare, Gpt2TokensOfARealBook) {
  NF_NEED_REFERENCE_DATA();
  auto o = options({reference_data() / "tinyshakespeare/input.txt"});
  o.tokenizer = reference_data() / "gpt2-bpe";
  const CorpusManifest manifest = prepare_corpus(o);
  EXPECT_EQ(manifest.splits[0].tokens, 338025 + 1);  // tiktoken's count, and the end of the document
  EXPECT_EQ(manifest.vocab_size, 50257);
  EXPECT_THAT(documents(), ElementsAreArray({read_bytes(o.inputs[0]) + kEnd}));
}

}  // namespace
}  // namespace normformer
