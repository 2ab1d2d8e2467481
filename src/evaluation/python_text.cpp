#include "python_text.h"

#include <algorithm>

#include "normformer/core/error.h"
#include "normformer/data/unicode.h"

namespace normformer {

namespace {

bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

std::size_t last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && continues_character(text[at])) --at;
  return at;
}

// str.isspace() also takes the four separators of ASCII.
bool is_space(std::string_view text, std::size_t at) {
  const char32_t c = decode_utf8(text, at).code_point;
  return char_class(c) == CharClass::white_space || (c >= 0x1C && c <= 0x1F);
}

}  // namespace

std::string_view strip_end(std::string_view text) {
  while (!text.empty() && is_space(text, last_character(text))) {
    text = text.substr(0, last_character(text));
  }
  return text;
}

std::string_view strip(std::string_view text) {
  while (!text.empty() && is_space(text, 0)) text.remove_prefix(decode_utf8(text, 0).length);
  return strip_end(text);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  NF_CHECK(!from.empty(), "nothing is to be replaced");
  std::string result;
  for (std::size_t found = text.find(from); found != std::string_view::npos; found = text.find(from)) {
    result.append(text.substr(0, found)).append(to);
    text.remove_prefix(found + from.size());
  }
  return result.append(text);
}

// Where a bracket is not closed, no later one of its line is: each byte is looked at twice.
std::string without_brackets(std::string_view text) {
  std::string result;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t begin = std::min(text.size(), text.find('[', at));
    const std::size_t end = std::min(text.size(), text.find_first_of("]\n", begin));
    result.append(text.substr(at, begin - at));
    const bool is_closed = end < text.size() && text[end] == ']';
    if (!is_closed) result.append(text.substr(begin, end - begin));
    at = is_closed ? end + 1 : end;
  }
  return result;
}

int64_t length_in_characters(std::string_view text) {
  return static_cast<int64_t>(text.size()) - std::count_if(text.begin(), text.end(), continues_character);
}

std::string_view without_last_character(std::string_view text) {
  return text.empty() ? text : text.substr(0, last_character(text));
}

std::string with_small_first(std::string_view text) {
  NF_CHECK(!text.empty(), "a text without a first character");
  const std::size_t first = decode_utf8(text, 0).length;
  return lower_case(text.substr(0, first)).append(text.substr(first));
}

}  // namespace normformer
