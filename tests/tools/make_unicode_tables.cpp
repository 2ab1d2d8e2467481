// Writes src/data/unicode_tables.cpp to standard output: which code points are letters, numbers and white
// space, and what they are in other cases, according to the ICU that this program is linked with.
//
//   make_unicode_tables > src/data/unicode_tables.cpp

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <unicode/ucasemap.h>
#include <unicode/uchar.h>
#include <unicode/uset.h>
#include <unicode/ustring.h>

namespace {

void write_ranges(const char* name, const char* pattern) {
  UErrorCode status = U_ZERO_ERROR;
  UChar wide[64];
  u_uastrcpy(wide, pattern);
  USet* const set = uset_openPattern(wide, -1, &status);
  if (U_FAILURE(status)) {
    std::fprintf(stderr, "%s: %s\n", pattern, u_errorName(status));
    std::exit(1);
  }
  std::printf("constexpr CodePointRange k%sRanges[] = {", name);
  const int32_t ranges = uset_getRangeCount(set);
  for (int32_t i = 0; i < ranges; ++i) {
    UChar32 first = 0;
    UChar32 last = 0;
    uset_getItem(set, i, &first, &last, nullptr, 0, &status);
    std::printf("%s{0x%X, 0x%X},", i % 5 == 0 ? "\n    " : " ", static_cast<unsigned>(first),
                static_cast<unsigned>(last));
  }
  std::printf("\n};\n\n");
  uset_close(set);
}

struct Mapped {
  UChar32 from;
  std::u32string to;
};

// What every code point becomes that does not stay as it is; all by itself, in no language's way.
template <class Convert>
std::vector<Mapped> mapped_by(const char* name, Convert convert) {
  std::vector<Mapped> found;
  for (UChar32 c = 0; c <= 0x10FFFF; ++c) {
    if (U_IS_SURROGATE(c)) continue;
    UErrorCode status = U_ZERO_ERROR;
    UChar source[2];
    int32_t length = 0;
    U16_APPEND_UNSAFE(source, length, c);
    UChar wide[16];
    const int32_t made = convert(wide, 16, source, length, &status);
    UChar32 text[16];
    int32_t count = 0;
    u_strToUTF32(text, 16, &count, wide, made, &status);
    if (U_FAILURE(status)) {
      std::fprintf(stderr, "%s: %s\n", name, u_errorName(status));
      std::exit(1);
    }
    const std::u32string to(text, text + count);
    if (to != std::u32string(1, static_cast<char32_t>(c))) found.push_back({c, to});
  }
  return found;
}

void write_case(const char* name, const std::vector<Mapped>& mapped) {
  struct Run {
    UChar32 first, last, stride, difference;
  };
  std::vector<Run> runs;
  for (const Mapped& m : mapped) {
    if (m.to.size() > 1) continue;
    const UChar32 difference = static_cast<UChar32>(m.to[0]) - m.from;
    Run* last = runs.empty() ? nullptr : &runs.back();
    const UChar32 step = last == nullptr ? 0 : m.from - last->last;
    const bool is_new = last == nullptr || last->difference != difference || step > 2;
    if (is_new || (last->first != last->last && last->stride != step)) {
      runs.push_back({m.from, m.from, 1, difference});
    } else {
      last->last = m.from;
      last->stride = step;
    }
  }
  std::printf("constexpr CaseRange k%sRanges[] = {", name);
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& r = runs[i];
    std::printf("%s{0x%X, 0x%X, %d, %d},", i % 4 == 0 ? "\n    " : " ", static_cast<unsigned>(r.first),
                static_cast<unsigned>(r.last), r.stride, r.difference);
  }
  std::printf("\n};\n\nconstexpr LongCase kLong%sTexts[] = {", name);
  int written = 0;
  for (const Mapped& m : mapped) {
    if (m.to.size() == 1) continue;
    std::printf("%s{0x%X, U\"", written++ % 4 == 0 ? "\n    " : " ", static_cast<unsigned>(m.from));
    for (const char32_t c : m.to) std::printf(c < 0x80 ? "%c" : "\\u%04X", static_cast<unsigned>(c));
    std::printf("\"},");
  }
  std::printf("\n};\n\n");
}

std::vector<Mapped> lower_case() {
  return mapped_by("lower case", [](UChar* to, int32_t room, const UChar* from, int32_t length,
                                    UErrorCode* e) { return u_strToLower(to, room, from, length, "", e); });
}

// Without adjustment, which leaves alone what it takes for no beginning of a word.
std::vector<Mapped> title_case() {
  UErrorCode status = U_ZERO_ERROR;
  UCaseMap* const map = ucasemap_open("", U_TITLECASE_NO_BREAK_ADJUSTMENT, &status);
  const auto found = mapped_by(
      "title case", [map](UChar* to, int32_t room, const UChar* from, int32_t length, UErrorCode* e) {
        return ucasemap_toTitle(map, to, room, from, length, e);
      });
  ucasemap_close(map);
  return found;
}

}  // namespace

int main() {
  UVersionInfo version;
  u_getUnicodeVersion(version);
  std::printf("// Written by tests/tools/make_unicode_tables.cpp from ICU %s. Do not edit.\n", U_ICU_VERSION);
  std::printf("// Data: the Unicode Character Database, (c) Unicode, Inc., Unicode License v3.\n\n");
  std::printf("#include \"unicode_tables.h\"\n\n// clang-format off\n\n");
  std::printf("namespace normformer::unicode_tables {\n\nnamespace {\n\n");
  write_ranges("Letter", "[:L:]");
  write_ranges("Number", "[:N:]");
  write_ranges("WhiteSpace", "[:White_Space:]");
  write_ranges("Cased", "[:Cased:]");
  write_ranges("CaseIgnorable", "[:Case_Ignorable:]");
  write_case("LowerCase", lower_case());
  write_case("TitleCase", title_case());
  std::printf("}  // namespace\n\n");
  std::printf("const std::string_view kVersion = \"%d.%d\";\n", version[0], version[1]);
  std::printf("const std::span<const CodePointRange> kLetters = kLetterRanges;\n");
  std::printf("const std::span<const CodePointRange> kNumbers = kNumberRanges;\n");
  std::printf("const std::span<const CodePointRange> kWhiteSpace = kWhiteSpaceRanges;\n");
  std::printf("const std::span<const CodePointRange> kCased = kCasedRanges;\n");
  std::printf("const std::span<const CodePointRange> kCaseIgnorable = kCaseIgnorableRanges;\n");
  std::printf("const std::span<const CaseRange> kLowerCase = kLowerCaseRanges;\n");
  std::printf("const std::span<const LongCase> kLongLowerCase = kLongLowerCaseTexts;\n");
  std::printf("const std::span<const CaseRange> kTitleCase = kTitleCaseRanges;\n");
  std::printf("const std::span<const LongCase> kLongTitleCase = kLongTitleCaseTexts;\n\n");
  std::printf("}  // namespace normformer::unicode_tables\n");
  return 0;
}
