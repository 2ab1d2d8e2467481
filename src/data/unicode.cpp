#include "normformer/data/unicode.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "normformer/core/error.h"

#include "unicode_tables.h"

namespace normformer {

namespace {

constexpr char32_t kEndOfUnicode = 0x110000;

/// One byte for each code point, made once from the ranges.
class ClassTable {
 public:
  ClassTable() : classes_(kEndOfUnicode, CharClass::other) {
    fill(unicode_tables::kLetters, CharClass::letter);
    fill(unicode_tables::kNumbers, CharClass::number);
    fill(unicode_tables::kWhiteSpace, CharClass::white_space);
  }
  CharClass of(char32_t code_point) const { return classes_[code_point]; }

 private:
  void fill(std::span<const unicode_tables::CodePointRange> ranges, CharClass kind) {
    for (const auto& range : ranges) {
      for (uint32_t c = range.first; c <= range.last; ++c) classes_[c] = kind;
    }
  }

  std::vector<CharClass> classes_;
};

struct LeadByte {
  std::size_t length;         ///< of the whole sequence; 0 where no character begins with this byte
  unsigned char second_low;   ///< the second byte's own bounds exclude overlong forms, surrogates and
  unsigned char second_high;  ///< everything above U+10FFFF
};

constexpr LeadByte lead_byte(unsigned char byte) {
  if (byte >= 0xC2 && byte <= 0xDF) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

/// The number of ASCII bytes at `position`, in steps of eight where possible.
std::size_t ascii_run(std::string_view text, std::size_t position) {
  const std::size_t begin = position;
  while (position + 8 <= text.size()) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + position, 8);
    if ((word & 0x8080808080808080ull) != 0) break;
    position += 8;
  }
  while (position < text.size() && static_cast<unsigned char>(text[position]) < 0x80) ++position;
  return position - begin;
}

std::u32string code_points(std::string_view text) {
  std::u32string result;
  for (std::size_t position = 0; position < text.size();) {
    const DecodedChar c = decode_utf8(text, position);
    NF_CHECK(c.valid, "a text is not UTF-8 at byte {}", position);
    result.push_back(c.code_point);
    position += c.length;
  }
  return result;
}

/// The element of sorted ranges that may hold a code point, or null.
template <class Range>
const Range* range_of(std::span<const Range> ranges, char32_t code_point) {
  const auto above = std::upper_bound(ranges.begin(), ranges.end(), code_point,
                                      [](char32_t c, const Range& range) { return c < range.first; });
  return above == ranges.begin() || code_point > (above - 1)->last ? nullptr : &*(above - 1);
}

std::u32string mapped(char32_t code_point, std::span<const unicode_tables::CaseRange> ranges,
                      std::span<const unicode_tables::LongCase> texts) {
  const auto* range = range_of(ranges, code_point);
  if (range != nullptr && (code_point - range->first) % range->stride == 0) {
    return {static_cast<char32_t>(static_cast<int32_t>(code_point) + range->difference)};
  }
  for (const auto& text : texts) {
    if (text.code_point == code_point) return std::u32string(text.text);
  }
  return {code_point};
}

/// Whether the first of these characters that is not ignored is a cased one.
template <class Characters>
bool begins_cased(const Characters& characters) {
  for (const char32_t c : characters) {
    if (range_of(unicode_tables::kCaseIgnorable, c) == nullptr) {
      return range_of(unicode_tables::kCased, c) != nullptr;
    }
  }
  return false;
}

/// The lower case of one character of a text.
std::u32string lower_at(std::u32string_view text, std::size_t place) {
  constexpr char32_t kSigma = U'\u03A3';
  constexpr char32_t kSmallFinalSigma = U'\u03C2';
  if (text[place] != kSigma) {
    return mapped(text[place], unicode_tables::kLowerCase, unicode_tables::kLongLowerCase);
  }
  const auto before = text.substr(0, place);
  const bool ends_word =
      begins_cased(std::u32string(before.rbegin(), before.rend())) && !begins_cased(text.substr(place + 1));
  return {ends_word ? kSmallFinalSigma : U'\u03C3'};
}

void append_all(std::u32string_view text, std::string& out) {
  for (const char32_t c : text) append_utf8(c, out);
}

}  // namespace

std::string lower_case(std::string_view text) {
  const std::u32string characters = code_points(text);
  std::string result;
  for (std::size_t i = 0; i < characters.size(); ++i) append_all(lower_at(characters, i), result);
  return result;
}

std::string capitalized(std::string_view text) {
  const std::u32string characters = code_points(text);
  std::string result;
  for (std::size_t i = 0; i < characters.size(); ++i) {
    append_all(i == 0 ? mapped(characters[0], unicode_tables::kTitleCase, unicode_tables::kLongTitleCase)
                      : lower_at(characters, i),
               result);
  }
  return result;
}

std::string_view name_of(InvalidUtf8 policy) {
  switch (policy) {
    case InvalidUtf8::refuse:
      return "refuse";
    case InvalidUtf8::replace:
      return "replace";
    case InvalidUtf8::bytes:
      return "bytes";
  }
  return "";
}

DecodedChar decode_utf8(std::string_view text, std::size_t position) {
  const auto byte_at = [&](std::size_t i) { return static_cast<unsigned char>(text[position + i]); };
  const unsigned char first = byte_at(0);
  if (first < 0x80) return {first, 1, true};
  const LeadByte lead = lead_byte(first);
  if (lead.length == 0) return {0, 1, false};
  const std::size_t available = text.size() - position;
  char32_t code_point = first & (0xFFu >> (lead.length + 1));
  for (std::size_t i = 1; i < lead.length; ++i) {
    if (i >= available) return {0, i, false};
    const unsigned char next = byte_at(i);
    const unsigned char low = i == 1 ? lead.second_low : 0x80;
    const unsigned char high = i == 1 ? lead.second_high : 0xBF;
    if (next < low || next > high) return {0, i, false};
    code_point = (code_point << 6) | (next & 0x3Fu);
  }
  return {code_point, lead.length, true};
}

std::optional<std::size_t> find_invalid_utf8(std::string_view text) {
  std::size_t position = 0;
  while (true) {
    position += ascii_run(text, position);
    if (position == text.size()) return std::nullopt;
    const DecodedChar c = decode_utf8(text, position);
    if (!c.valid) return position;
    position += c.length;
  }
}

std::string replace_invalid_utf8(std::string_view text, int64_t* replaced) {
  std::string result;
  result.reserve(text.size());
  std::size_t position = 0;
  while (position < text.size()) {
    const auto valid = find_invalid_utf8(text.substr(position));
    result.append(text.substr(position, valid.value_or(text.size() - position)));
    if (!valid) break;
    position += *valid;
    position += decode_utf8(text, position).length;
    append_utf8(U'\uFFFD', result);
    if (replaced != nullptr) ++*replaced;
  }
  return result;
}

void append_utf8(char32_t code_point, std::string& out) {
  NF_CHECK(code_point < kEndOfUnicode && (code_point < 0xD800 || code_point > 0xDFFF),
           "U+{:04X} is not a character", static_cast<uint32_t>(code_point));
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

CharClass char_class(char32_t code_point) {
  static const ClassTable table;
  return code_point < kEndOfUnicode ? table.of(code_point) : CharClass::other;
}

std::string_view unicode_version() { return unicode_tables::kVersion; }

}  // namespace normformer
