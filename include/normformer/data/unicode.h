#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace normformer {

/// What to do with bytes that are not UTF-8.
enum class InvalidUtf8 {
  refuse,   ///< an error that names the file and the offset
  replace,  ///< U+FFFD for each maximal invalid part, as Python's errors="replace" does
  bytes     ///< keep them: each byte is a character that is neither letter, number nor white space
};

/// "refuse", "replace" or "bytes".
std::string_view name_of(InvalidUtf8 policy);

/// One character decoded from UTF-8.
struct DecodedChar {
  char32_t code_point = 0;  ///< meaningless where not valid
  std::size_t length = 0;   ///< bytes consumed, at least 1; for an invalid part, all that one U+FFFD replaces
  bool valid = false;
};

/// Decodes the character at `position` < text.size(), strictly: no surrogates, no overlong forms, nothing
/// above U+10FFFF. An invalid part ends before the first byte that cannot continue it.
/// Source: The Unicode Standard 15.0, section 3.9, table 3-7 and "U+FFFD substitution of maximal subparts".
DecodedChar decode_utf8(std::string_view text, std::size_t position);

/// The offset of the first byte that is not UTF-8, or nothing where the whole text is valid.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// The text with U+FFFD for each invalid part; `replaced`, where given, is increased by their number.
std::string replace_invalid_utf8(std::string_view text, int64_t* replaced = nullptr);

/// Appends a code point (no surrogate, at most U+10FFFF) as UTF-8.
void append_utf8(char32_t code_point, std::string& out);

/// The classes of characters that byte-level BPE tells apart.
enum class CharClass : uint8_t {
  other = 0,
  letter = 1,      ///< general category L
  number = 2,      ///< general category N
  white_space = 3  ///< the property White_Space
};

/// The class of a code point; `other` for unassigned ones and those above U+10FFFF.
CharClass char_class(char32_t code_point);

/// The text in lower case, by no language's rules but with final sigma, as Python's str.lower() makes it.
/// `text` is valid UTF-8. Source: The Unicode Standard 15.0, section 3.13, full mappings.
std::string lower_case(std::string_view text);

/// Its first character in title case ("Ss" for "ss" that is one letter), the others in lower case, as
/// Python's str.capitalize() makes it. `text` is valid UTF-8.
std::string capitalized(std::string_view text);

/// The version of Unicode that all this follows, such as "15.0". Letters assigned later count as `other`.
std::string_view unicode_version();

}  // namespace normformer
