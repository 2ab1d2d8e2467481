// Writes src/data/unicode_tables.cpp to standard output: which code points are letters, numbers and white
// space, according to the ICU that this program is linked with.
//
//   make_unicode_tables > src/data/unicode_tables.cpp

#include <cstdio>
#include <cstdlib>

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
  std::printf("}  // namespace\n\n");
  std::printf("const std::string_view kVersion = \"%d.%d\";\n", version[0], version[1]);
  std::printf("const std::span<const CodePointRange> kLetters = kLetterRanges;\n");
  std::printf("const std::span<const CodePointRange> kNumbers = kNumberRanges;\n");
  std::printf("const std::span<const CodePointRange> kWhiteSpace = kWhiteSpaceRanges;\n\n");
  std::printf("}  // namespace normformer::unicode_tables\n");
  return 0;
}
