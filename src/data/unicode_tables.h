#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace normformer::unicode_tables {

struct CodePointRange {
  uint32_t first;
  uint32_t last;  ///< inclusive
};

/// Every `stride`th code point of a range, which becomes another one.
struct CaseRange {
  uint32_t first;
  uint32_t last;  ///< inclusive
  uint32_t stride;
  int32_t difference;
};

/// A code point that becomes several.
struct LongCase {
  uint32_t code_point;
  std::u32string_view text;
};

// Written by tests/tools/make_unicode_tables.cpp from ICU, in ascending order.
extern const std::string_view kVersion;
extern const std::span<const CodePointRange> kLetters;
extern const std::span<const CodePointRange> kNumbers;
extern const std::span<const CodePointRange> kWhiteSpace;
extern const std::span<const CodePointRange> kCased;
extern const std::span<const CodePointRange> kCaseIgnorable;
extern const std::span<const CaseRange> kLowerCase;
extern const std::span<const LongCase> kLongLowerCase;
extern const std::span<const CaseRange> kTitleCase;
extern const std::span<const LongCase> kLongTitleCase;

}  // namespace normformer::unicode_tables
