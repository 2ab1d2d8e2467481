#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace normformer::unicode_tables {

struct CodePointRange {
  uint32_t first;
  uint32_t last;  ///< inclusive
};

// Written by tests/tools/make_unicode_tables.cpp from ICU, in ascending order.
extern const std::string_view kVersion;
extern const std::span<const CodePointRange> kLetters;
extern const std::span<const CodePointRange> kNumbers;
extern const std::span<const CodePointRange> kWhiteSpace;

}  // namespace normformer::unicode_tables
