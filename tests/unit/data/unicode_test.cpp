#include "normformer/data/unicode.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unicode/uchar.h>
#include <unicode/uversion.h>

#include "normformer/core/error.h"

#include "reference_data.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

TEST(DecodeUtf8, InvertsAppendForEveryCharacter) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string bytes;
    append_utf8(c, bytes);
    const DecodedChar decoded = decode_utf8(bytes, 0);
    ASSERT_TRUE(decoded.valid) << static_cast<uint32_t>(c);
    ASSERT_EQ(decoded.code_point, c);
    ASSERT_EQ(decoded.length, bytes.size());
    for (std::size_t cut = 1; cut < bytes.size(); ++cut) {
      const DecodedChar part = decode_utf8(std::string_view(bytes).substr(0, cut), 0);
      ASSERT_FALSE(part.valid);
      ASSERT_EQ(part.length, cut);
    }
  }
}

TEST(AppendUtf8, RefusesWhatIsNoCharacter) {
  std::string out;
  EXPECT_THROW(append_utf8(0xD800, out), LogicError);
  EXPECT_THROW(append_utf8(0x110000, out), LogicError);
}

struct Replacement {
  std::string bytes;
  std::size_t first_invalid;
  std::string replaced;
};

// The right-hand sides are what Python 3.11's bytes.decode("utf-8", errors="replace") gives; those of the
// third and fourth row are also table 3-8 and 3-11 of The Unicode Standard 15.0.
TEST(ReplaceInvalidUtf8, ReplacesMaximalInvalidParts) {
  const std::string r = "\xEF\xBF\xBD";
  const std::vector<Replacement> cases = {
      {"\x80", 0, r},
      {"ab\xFF"
       "c",
       2, "ab" + r + "c"},
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", 0, r + r + r + r + r + r + r + r + "A"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", 0, r + r + r + r + "A"},
      {"\xED\xA0\x80", 0, r + r + r},
      {"\xF4\x90\x80\x80", 0, r + r + r + r},
      {"\xF4\x8F\xBF\xBF", 4, "\xF4\x8F\xBF\xBF"},
      {"12345678\xE2\x82", 8, "12345678" + r},
      {"\xE2\x82\xAC\xE2\x82", 3, "\xE2\x82\xAC" + r},
  };
  for (const auto& test : cases) {
    const auto invalid = find_invalid_utf8(test.bytes);
    EXPECT_EQ(invalid.value_or(test.bytes.size()), test.first_invalid);
    EXPECT_EQ(replace_invalid_utf8(test.bytes), test.replaced);
  }
}

TEST(ReplaceInvalidUtf8, CountsWhatItReplaces) {
  int64_t replaced = 5;
  replace_invalid_utf8(
      "a\xFF\xFE"
      "b",
      &replaced);
  EXPECT_EQ(replaced, 7);
}

TEST(FindInvalidUtf8, ReadsTheCorpusOfValidAndInvalidFiles) {
  NF_NEED_REFERENCE_DATA();
  for (const char* name :
       {"blns.txt", "commonmark-spec.txt", "emoji-17.0-strings.txt", "udhr_multilingual.txt",
        "utf8_bmp_assigned_printable.txt", "wagahai_japanese_excerpt.txt"}) {
    EXPECT_EQ(find_invalid_utf8(read_bytes(reference_data() / "utf8" / name)), std::nullopt) << name;
  }
  // As Python 3.11 decodes the file; 27 replacement characters stand in it already.
  const std::string invalid = read_bytes(reference_data() / "utf8/utf8tests_invalid.bin");
  EXPECT_EQ(find_invalid_utf8(invalid), 308);
  int64_t replaced = 0;
  EXPECT_EQ(replace_invalid_utf8(invalid, &replaced).size(), 4832u);
  EXPECT_EQ(replaced, 454);
}

TEST(CharClass, AgreesWithIcuOnEveryCodePoint) {
  if (std::string_view(U_UNICODE_VERSION) != unicode_version()) {
    GTEST_SKIP() << "this ICU follows Unicode " << U_UNICODE_VERSION << ", the tables " << unicode_version();
  }
  for (char32_t c = 0; c < 0x110000; ++c) {
    const auto icu = static_cast<UChar32>(c);
    const uint32_t mask = U_MASK(u_charType(icu));
    const CharClass expected = (mask & U_GC_L_MASK) != 0                     ? CharClass::letter
                               : (mask & U_GC_N_MASK) != 0                   ? CharClass::number
                               : u_hasBinaryProperty(icu, UCHAR_WHITE_SPACE) ? CharClass::white_space
                                                                             : CharClass::other;
    ASSERT_EQ(char_class(c), expected) << "U+" << std::hex << static_cast<uint32_t>(c);
  }
  EXPECT_EQ(char_class(0x110000), CharClass::other);
}

uint64_t fnv1a(uint64_t hash, std::string_view bytes) {
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  return hash;
}

// Recorded from Python by tests/tools/record_python_text.py.
TEST(Cases, ArePythons) {
  const auto recorded = nlohmann::json::parse(read_bytes(fixture("python_text.json")));
  for (const auto& test : recorded["cases"]) {
    const auto text = test["text"].get<std::string>();
    EXPECT_EQ(lower_case(text), test["lower"].get<std::string>()) << text;
    EXPECT_EQ(capitalized(text), test["capitalized"].get<std::string>()) << text;
  }
  uint64_t lower = 0xcbf29ce484222325;
  uint64_t title = lower;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string bytes;
    append_utf8(c, bytes);
    lower = fnv1a(lower, lower_case("x" + bytes));
    title = fnv1a(title, capitalized(bytes + "X"));
  }
  EXPECT_EQ(fmt::format("{:016x}", lower), recorded["lower_of_all"].get<std::string>());
  EXPECT_EQ(fmt::format("{:016x}", title), recorded["capitalized_of_all"].get<std::string>());
}

}  // namespace
}  // namespace normformer
