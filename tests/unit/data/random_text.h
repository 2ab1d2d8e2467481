#pragma once

#include <array>
#include <cstddef>
#include <random>
#include <string>
#include <string_view>

#include "normformer/data/unicode.h"

namespace normformer {

/// Random text that is rich in what tokenizers stumble over: runs of white space of every kind, apostrophes
/// and contractions, digits, letters and marks of many scripts, unassigned code points.
inline std::string random_text(std::mt19937& random, std::size_t characters) {
  static constexpr std::array<std::string_view, 12> kParts = {" ",   "  ",  "\n",  "\t",  "'",  "'s",
                                                              "'re", "'LL", "the", "ing", "42", "..."};
  static constexpr std::array<char32_t, 24> kOdd = {
      0x85,   0xA0,   0x1680, 0x180E, 0x200A, 0x200B,  0x2028,  0x202F, 0x205F, 0x3000, 0xFEFF, 0x301,
      0x0660, 0x2167, 0x00BD, 0x3042, 0x6F22, 0x1F600, 0x1D400, 0x378,  0x0,    0x7F,   0x1C5,  0x10FFFF};
  const auto pick = [&random](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::string text;
  for (std::size_t i = 0; i < characters; ++i) {
    switch (pick(6)) {
      case 0:
      case 1:
        text += kParts[pick(kParts.size())];
        break;
      case 2:
        append_utf8(kOdd[pick(kOdd.size())], text);
        break;
      case 3:
        append_utf8(static_cast<char32_t>(32 + pick(95)), text);
        break;
      case 4:
        append_utf8(static_cast<char32_t>(0xA0 + pick(0x3000)), text);
        break;
      default: {
        const auto any = static_cast<char32_t>(pick(0x110000 - 0x800));
        append_utf8(any < 0xD800 ? any : any + 0x800, text);
      }
    }
  }
  return text;
}

/// Random bytes, valid UTF-8 only by accident.
inline std::string random_bytes(std::mt19937& random, std::size_t count) {
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

}  // namespace normformer
