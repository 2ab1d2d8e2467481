#include "normformer/data/pretokenizer.h"

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pcre2.h>

#include "normformer/data/unicode.h"

#include "random_text.h"
#include "reference_data.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAreArray;

/// The pattern by PCRE2. Its \s also matches U+180E, so the property is named.
class PcreSplitter {
 public:
  PcreSplitter() {
    const char* const pattern =
        R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|)"
        R"(\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    if (!code_) throw std::runtime_error("pcre2_compile: " + std::to_string(error));
    match_.reset(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  }

  std::vector<std::string_view> split(std::string_view text) const {
    std::vector<std::string_view> pieces;
    for (std::size_t begin = 0; begin < text.size();) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                    begin, PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, match_.get(), nullptr);
      if (found < 0) throw std::runtime_error("pcre2_match: " + std::to_string(found));
      const std::size_t end = pcre2_get_ovector_pointer(match_.get())[1];
      pieces.push_back(text.substr(begin, end - begin));
      begin = end;
    }
    return pieces;
  }

 private:
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code_{nullptr, pcre2_code_free};
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match_{nullptr, pcre2_match_data_free};
};

TEST(SplitPieces, MatchesTheReferenceRegexOnTrickyTexts) {
  // As Python's `regex` splits them by GPT-2's pattern.
  const std::vector<std::pair<std::string, std::vector<std::string>>> golden = {
      {"  a", {" ", " a"}},
      {"a  ", {"a", "  "}},
      {"a \n b", {"a", " \n", " b"}},
      {"don't I'LL we've 'tis", {"don", "'t", " I", "'", "LL", " we", "'ve", " '", "tis"}},
      {"''s", {"''", "s"}},
      {"a'sb", {"a", "'s", "b"}},
      {"\u00a0\u00a0x", {"\u00a0", "\u00a0", "x"}},
      {"\u00bd \u2167 \u00b2", {"\u00bd", " \u2167", " \u00b2"}},
      {"e\u0301", {"e", "\u0301"}},
      {"\u200bx", {"\u200b", "x"}},
      {"1,234.5", {"1", ",", "234", ".", "5"}},
      {"", {}},
      {" ", {" "}},
      {"'", {"'"}},
      {"'r", {"'", "r"}},
  };
  for (const auto& [text, pieces] : golden) EXPECT_THAT(split_pieces(text), ElementsAreArray(pieces)) << text;
}

/// Whether the tables here and in PCRE2 class every character of the text alike: their Unicode versions may
/// differ in letters assigned lately.
bool known_to_both(const PcreSplitter& pcre, std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const DecodedChar c = decode_utf8(text, i);
    std::string between = "x";
    between.append(text.substr(i, c.length));
    between.push_back('1');
    if (split_pieces(between) != pcre.split(between)) return false;
    i += c.length;
  }
  return true;
}

TEST(SplitPieces, AgreesWithPcre2OnRandomText) {
  const PcreSplitter pcre;
  std::mt19937 random(2024);
  int compared = 0;
  for (int round = 0; round < 20000; ++round) {
    const std::string text = random_text(random, 1 + random() % 30);
    const auto ours = split_pieces(text);
    if (ours == pcre.split(text)) {
      ++compared;
      continue;
    }
    ASSERT_FALSE(known_to_both(pcre, text)) << ::testing::PrintToString(ours) << " of " << text;
  }
  EXPECT_GT(compared, 19000);
}

TEST(SplitPieces, AgreesWithPcre2OnRealText) {
  NF_NEED_REFERENCE_DATA();
  const PcreSplitter pcre;
  for (const char* name : {"utf8/blns.txt", "utf8/commonmark-spec.txt", "utf8/udhr_multilingual.txt",
                           "utf8/wagahai_japanese_excerpt.txt", "utf8/whitespace_code_selfmade.txt",
                           "tinyshakespeare/input.txt"}) {
    const std::string text = read_bytes(reference_data() / name);
    EXPECT_TRUE(split_pieces(text) == pcre.split(text)) << name;
  }
}

TEST(SplitPieces, CoversArbitraryBytes) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_bytes(random, random() % 60);
    std::string joined;
    for (const auto piece : split_pieces(text)) {
      ASSERT_FALSE(piece.empty());
      joined += piece;
    }
    ASSERT_EQ(joined, text);
  }
}

TEST(SplitPieces, InvalidBytesFormRunsOfTheirOwn) {
  EXPECT_THAT(split_pieces("ab \xFF\xFE"
                           "c \x80"),
              ElementsAreArray({"ab", " \xFF\xFE", "c", " \x80"}));
}

TEST(SafeCut, NeverChangesThePieces) {
  std::mt19937 random(4);
  int cuts = 0;
  for (int round = 0; round < 5000; ++round) {
    const std::string text = random_text(random, 1 + random() % 40);
    const auto whole = split_pieces(text);
    const std::size_t cut = safe_cut(text, random() % (text.size() + 1));
    auto pieces = split_pieces(std::string_view(text).substr(0, cut));
    const auto rest = split_pieces(std::string_view(text).substr(cut));
    pieces.insert(pieces.end(), rest.begin(), rest.end());
    ASSERT_EQ(pieces, whole) << text;
    cuts += cut < text.size();
  }
  EXPECT_GT(cuts, 2000);
}

TEST(SafeCut, TakesTheLastPlaceWithinTheLimit) {
  EXPECT_EQ(safe_cut("one two three", 9), 7u);
  EXPECT_EQ(safe_cut("one two three", 3), 3u);
  EXPECT_EQ(safe_cut("one two three", 2), 13u);
  EXPECT_EQ(safe_cut("one  \ntwo", 5), 3u);
  EXPECT_EQ(safe_cut("\u3042\u3044 x", 7), 6u);
  EXPECT_EQ(safe_cut("", 5), 0u);
}

}  // namespace
}  // namespace normformer
