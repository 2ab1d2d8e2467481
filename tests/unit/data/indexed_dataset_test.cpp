#include "normformer/data/indexed_dataset.h"

#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Documents [1,2,3] and [4,5] as 16-bit tokens, as the writers of Megatron-LM and fairseq lay them out.
const std::string kTokens = from_hex("01000200030004000500");
const std::string kMegatronIndex = from_hex(
    "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600"
    "000000000000000000000000000001000000000000000200000000000000");
const std::string kFairseqIndex = from_hex(
    "4d4d494449445800000100000000000000080200000000000000030000000200000000000000000000000600000000000000");

std::vector<int32_t> all_tokens(const IndexedDataset& dataset) {
  std::vector<int32_t> tokens(dataset.num_tokens());
  dataset.read(0, tokens);
  return tokens;
}

template <class T>
void put_at(std::string& bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(T));
}

TEST(IndexedDatasetWriter, WritesTheGoldenBytesOfMegatron) {
  const TemporaryFolder folder;
  IndexedDatasetWriter writer(folder / "golden", 50257);
  writer.add_document(std::vector<int32_t>{1, 2, 3});
  writer.append(std::vector<int32_t>{4});
  writer.append(std::vector<int32_t>{5});
  writer.end_document();
  EXPECT_FALSE(std::filesystem::exists(folder / "golden.bin"));
  const WrittenDataset written = writer.finish();
  EXPECT_EQ(written.num_documents, 2);
  EXPECT_EQ(written.num_tokens, 5);
  EXPECT_EQ(read_bytes(folder / "golden.bin"), kTokens);
  EXPECT_EQ(read_bytes(folder / "golden.idx"), kMegatronIndex);
}

TEST(IndexedDatasetWriter, LeavesNothingBehindUnlessFinished) {
  const TemporaryFolder folder;
  {
    IndexedDatasetWriter writer(folder / "lost", 100);
    writer.add_document(std::vector<int32_t>{1});
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(IndexedDatasetWriter, RefusesTokensOutsideTheVocabulary) {
  const TemporaryFolder folder;
  IndexedDatasetWriter writer(folder / "x", 100);
  EXPECT_THROW(writer.append(std::vector<int32_t>{100}), LogicError);
  EXPECT_THROW(writer.append(std::vector<int32_t>{-1}), LogicError);
}

TEST(IndexedDatasetWriter, NamesTheFolderThatItCannotWriteTo) {
  const TemporaryFolder folder;
  const auto prefix = folder / "absent/corpus";
  EXPECT_THAT(NF_SENTENCE_OF(IoError, IndexedDatasetWriter(prefix, 100)), HasSubstr(prefix.string()));
}

TEST(IndexedDataset, ReadsMegatronsGoldenBytes) {
  const TemporaryFolder folder;
  write_bytes(folder / "golden.bin", kTokens);
  write_bytes(folder / "golden.idx", kMegatronIndex);
  const IndexedDataset dataset(folder / "golden");
  EXPECT_EQ(dataset.form(), DatasetForm::megatron);
  EXPECT_EQ(dataset.token_type(), TokenType::u16);
  EXPECT_EQ(dataset.num_documents(), 2);
  EXPECT_EQ(dataset.document(0), (Range{0, 3}));
  EXPECT_EQ(dataset.document(1), (Range{3, 5}));
  EXPECT_EQ(dataset.document_at(2), 0);
  EXPECT_EQ(dataset.document_at(3), 1);
  EXPECT_THAT(all_tokens(dataset), ElementsAre(1, 2, 3, 4, 5));
  std::vector<int32_t> middle(2);
  dataset.read(2, middle);
  EXPECT_THAT(middle, ElementsAre(3, 4));
}

TEST(IndexedDataset, ReadsFairseqsGoldenBytes) {
  const TemporaryFolder folder;
  write_bytes(folder / "golden.bin", kTokens);
  write_bytes(folder / "golden.idx", kFairseqIndex);
  const IndexedDataset dataset(folder / "golden.idx");
  EXPECT_EQ(dataset.form(), DatasetForm::fairseq);
  EXPECT_EQ(dataset.num_documents(), 2);
  EXPECT_EQ(dataset.document(1), (Range{3, 5}));
  EXPECT_THAT(all_tokens(dataset), ElementsAre(1, 2, 3, 4, 5));
}

TEST(IndexedDataset, ReadsTokenFilesOfLlmc) {
  const TemporaryFolder folder;
  std::string bytes(1024, '\0');
  put_at<int32_t>(bytes, 0, 20240520);
  put_at<int32_t>(bytes, 4, 1);
  put_at<int32_t>(bytes, 8, 5);
  write_bytes(folder / "shard.bin", bytes + kTokens);
  const IndexedDataset dataset(folder / "shard.bin", 50257);
  EXPECT_EQ(dataset.form(), DatasetForm::llmc);
  EXPECT_EQ(dataset.num_documents(), 1);
  EXPECT_EQ(dataset.document(0), (Range{0, 5}));
  EXPECT_THAT(all_tokens(dataset), ElementsAre(1, 2, 3, 4, 5));

  write_bytes(folder / "short.bin", bytes + kTokens.substr(2));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, IndexedDataset(folder / "short.bin")), HasSubstr("5 tokens"));
  put_at<int32_t>(bytes, 4, 7);
  write_bytes(folder / "new.bin", bytes + kTokens);
  EXPECT_THAT(NF_SENTENCE_OF(DataError, IndexedDataset(folder / "new.bin")), HasSubstr("version 7"));
}

TEST(IndexedDataset, ReadsEveryIntegerType) {
  const TemporaryFolder folder;
  const std::vector<std::pair<uint8_t, int>> types = {{1, 1}, {2, 1}, {3, 2}, {4, 4},
                                                      {5, 8}, {8, 2}, {9, 4}, {10, 8}};
  for (const auto& [code, bytes] : types) {
    std::string tokens(5 * bytes, '\0');
    for (int i = 0; i < 5; ++i) tokens[i * bytes] = static_cast<char>(i + 1);
    std::string index = kFairseqIndex;
    index[17] = static_cast<char>(code);
    put_at<int64_t>(index, 42, 3 * bytes);
    write_bytes(folder / "typed.bin", tokens);
    write_bytes(folder / "typed.idx", index);
    EXPECT_THAT(all_tokens(IndexedDataset(folder / "typed")), ElementsAre(1, 2, 3, 4, 5)) << int{code};
  }
}

TEST(IndexedDataset, RefusesTypesThatAreNotTokensOfThatForm) {
  const TemporaryFolder folder;
  write_bytes(folder / "x.bin", kTokens);
  const auto sentence = [&](std::string index, uint8_t code) {
    index[17] = static_cast<char>(code);
    write_bytes(folder / "x.idx", index);
    return NF_SENTENCE_OF(DataError, IndexedDataset(folder / "x"));
  };
  for (const uint8_t code : {6, 7}) {
    EXPECT_THAT(sentence(kMegatronIndex, code), HasSubstr("floating-point"));
    EXPECT_THAT(sentence(kFairseqIndex, code), HasSubstr("floating-point"));
  }
  EXPECT_THAT(sentence(kMegatronIndex, 9), HasSubstr("type code 9"));
  EXPECT_THAT(sentence(kMegatronIndex, 0), HasSubstr("type code 0"));
  EXPECT_THAT(sentence(kFairseqIndex, 11), HasSubstr("type code 11"));
}

struct Damage {
  const char* name;
  std::function<void(std::string& index, std::string& tokens)> apply;
  const char* sentence;
};

class DamagedDataset : public ::testing::TestWithParam<Damage> {};

TEST_P(DamagedDataset, IsRefusedWithAReason) {
  const TemporaryFolder folder;
  std::string index = kMegatronIndex;
  std::string tokens = kTokens;
  GetParam().apply(index, tokens);
  write_bytes(folder / "damaged.bin", tokens);
  write_bytes(folder / "damaged.idx", index);
  const std::string sentence = NF_SENTENCE_OF(DataError, IndexedDataset(folder / "damaged"));
  EXPECT_THAT(sentence, HasSubstr(GetParam().sentence));
  EXPECT_THAT(sentence, HasSubstr((folder / "damaged").string()));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, DamagedDataset,
    ::testing::Values(
        Damage{"Magic", [](auto& i, auto&) { i[0] = 'X'; }, "MMIDIDX"},
        Damage{"Version", [](auto& i, auto&) { i[9] = 2; }, "version 2"},
        Damage{"OneByteShort", [](auto& i, auto&) { i.pop_back(); }, "cut short"},
        Damage{"OneByteLong", [](auto& i, auto&) { i.push_back(0); }, "cut short"},
        Damage{"Empty", [](auto& i, auto&) { i.clear(); }, "not a dataset index"},
        Damage{"HugeCounts", [](auto& i, auto&) { put_at(i, 18, ~uint64_t{0} / 12 + 4); }, "cut short"},
        Damage{"HugeDocuments", [](auto& i, auto&) { put_at(i, 26, (uint64_t{1} << 61) + 3); }, "cut short"},
        Damage{"Multimodal", [](auto& i, auto&) { i.append(2, '\0'); }, "multimodal"},
        Damage{"NegativeLength", [](auto& i, auto&) { put_at<int32_t>(i, 34, -1); },
               "sequence 0 has the length -1"},
        Damage{"Offset", [](auto& i, auto&) { put_at<int64_t>(i, 50, 4); }, "sequence 1 begins at byte 4"},
        Damage{"LastLength", [](auto& i, auto&) { put_at<int32_t>(i, 38, 3); }, "incomplete"},
        Damage{"ShortTokens", [](auto&, auto& tokens) { tokens.pop_back(); }, "incomplete"},
        Damage{"DocumentsBegin", [](auto& i, auto&) { put_at<int64_t>(i, 58, 1); }, "begins with sequence 1"},
        Damage{"DocumentsGoBack", [](auto& i, auto&) { put_at<int64_t>(i, 66, 3); },
               "goes back from sequence 3 to 2"},
        Damage{"DocumentsEnd", [](auto& i, auto&) { put_at<int64_t>(i, 74, 1); }, "ends at sequence 1 of 2"}),
    [](const auto& test) { return test.param.name; });

TEST(IndexedDataset, SurvivesEveryFlippedBitOfAnIndex) {
  const TemporaryFolder folder;
  write_bytes(folder / "x.bin", kTokens);
  int accepted = 0;
  for (const std::string& good : {kMegatronIndex, kFairseqIndex}) {
    for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
      std::string index = good;
      index[bit / 8] = static_cast<char>(index[bit / 8] ^ (1 << (bit % 8)));
      write_bytes(folder / "x.idx", index);
      try {
        const IndexedDataset dataset(folder / "x");
        for (int64_t d = 0; d < dataset.num_documents(); ++d) ASSERT_LE(dataset.document(d).end, 5);
        all_tokens(dataset);
        ++accepted;
      } catch (const Error&) {
      }
    }
  }
  // Only a shorter last sequence, another split into documents or another 16-bit type is still consistent.
  EXPECT_LE(accepted, 8);
}

TEST(IndexedDataset, NamesDocumentAndPositionOfATokenThatTheVocabularyLacks) {
  const TemporaryFolder folder;
  write_bytes(folder / "x.bin", kTokens);
  write_bytes(folder / "x.idx", kMegatronIndex);
  EXPECT_NO_THROW(all_tokens(IndexedDataset(folder / "x", 6)));
  const IndexedDataset dataset(folder / "x", 5);
  std::vector<int32_t> tokens(4);
  EXPECT_NO_THROW(dataset.read(0, tokens));
  EXPECT_THAT(NF_SENTENCE_OF(DataError, dataset.read(1, tokens)),
              HasSubstr("token 5 at position 1 of document 1 is outside of the vocabulary of 5"));
}

TEST(IndexedDataset, RefusesNegativeTokens) {
  const TemporaryFolder folder;
  std::string index = kMegatronIndex;
  index[17] = 3;
  write_bytes(folder / "x.bin", from_hex("0100feff030004000500"));
  write_bytes(folder / "x.idx", index);
  EXPECT_THAT(NF_SENTENCE_OF(DataError, all_tokens(IndexedDataset(folder / "x"))),
              HasSubstr("token -2 at position 1 of document 0"));
}

TEST(IndexedDataset, ReadsBackWhatWasWrittenAtBothWidths) {
  const TemporaryFolder folder;
  std::mt19937 random(7);
  for (const int64_t vocab : {65499, 65500}) {
    std::vector<std::vector<int32_t>> documents(300);
    IndexedDatasetWriter writer(folder / "random", vocab);
    for (auto& document : documents) {
      document.resize(random() % 4 == 0 ? 0 : random() % 5000);
      for (auto& token : document) token = static_cast<int32_t>(random() % vocab);
      writer.add_document(document);
    }
    writer.finish();
    const IndexedDataset dataset(folder / "random", vocab);
    EXPECT_EQ(dataset.token_type(), vocab == 65499 ? TokenType::u16 : TokenType::i32);
    ASSERT_EQ(dataset.num_documents(), 300);
    for (int64_t d = 0; d < 300; ++d) {
      const Range range = dataset.document(d);
      std::vector<int32_t> tokens(range.size());
      dataset.read(range.begin, tokens);
      ASSERT_EQ(tokens, documents[d]);
      if (!range.empty()) {
        ASSERT_EQ(dataset.document_at(range.begin), d);
        ASSERT_EQ(dataset.document_at(range.end - 1), d);
      }
    }
  }
}

TEST(IndexedDataset, LongDocumentsTakeSeveralSequences) {
  const TemporaryFolder folder;
  IndexedDatasetWriter writer(folder / "long", 100, 4);
  std::vector<int32_t> document(11);
  for (int i = 0; i < 11; ++i) document[i] = i;
  writer.add_document(document);
  writer.add_document(std::vector<int32_t>{50, 51, 52, 53});
  writer.finish();
  EXPECT_EQ(read_bytes(folder / "long.idx").size(), 34u + 12 * 4 + 8 * 3);
  const IndexedDataset dataset(folder / "long");
  ASSERT_EQ(dataset.num_documents(), 2);
  EXPECT_EQ(dataset.document(0), (Range{0, 11}));
  EXPECT_EQ(dataset.document(1), (Range{11, 15}));
}

TEST(IndexedDataset, AnEmptyCorpusIsWrittenAndRead) {
  const TemporaryFolder folder;
  IndexedDatasetWriter(folder / "empty", 100).finish();
  const IndexedDataset dataset(folder / "empty");
  EXPECT_EQ(dataset.num_documents(), 0);
  EXPECT_EQ(dataset.num_tokens(), 0);
}

TEST(IndexedDataset, SaysWhatIsMissing) {
  const TemporaryFolder folder;
  EXPECT_THAT(NF_SENTENCE_OF(IoError, IndexedDataset(folder / "gone")), HasSubstr("gone.bin does not exist"));
  write_bytes(folder / "corpus_train.bin", "");
  EXPECT_THAT(NF_SENTENCE_OF(IoError, IndexedDataset(folder / "corpus")), HasSubstr("_train"));
  write_bytes(folder / "alone.bin", kTokens);
  EXPECT_THAT(NF_SENTENCE_OF(DataError, IndexedDataset(folder / "alone")), HasSubstr("alone.idx"));
}

TEST(IndexedDataset, FingerprintsTellCorporaApart) {
  const TemporaryFolder folder;
  const auto write = [&](const char* name, std::vector<int32_t> first, std::vector<int32_t> second) {
    IndexedDatasetWriter writer(folder / name, 100);
    writer.add_document(first);
    writer.add_document(second);
    writer.finish();
    return IndexedDataset(folder / name).fingerprint();
  };
  const uint64_t base = write("a", {1, 2, 3}, {4, 5});
  EXPECT_EQ(write("same", {1, 2, 3}, {4, 5}), base);
  EXPECT_NE(write("token", {1, 2, 3}, {4, 6}), base);
  EXPECT_NE(write("split", {1, 2}, {3, 4, 5}), base);
}

}  // namespace
}  // namespace normformer
