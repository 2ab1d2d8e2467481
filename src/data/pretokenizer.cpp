#include "normformer/data/pretokenizer.h"

#include <algorithm>
#include <array>

#include "normformer/data/unicode.h"

namespace normformer {

namespace {

struct ClassifiedChar {
  CharClass kind;
  std::size_t length;
};

std::array<CharClass, 128> make_ascii_classes() {
  std::array<CharClass, 128> classes{};
  for (char32_t c = 0; c < 128; ++c) classes[c] = char_class(c);
  return classes;
}

const std::array<CharClass, 128>& ascii_classes() {
  static const std::array<CharClass, 128> classes = make_ascii_classes();
  return classes;
}

ClassifiedChar classify(std::string_view text, std::size_t position,
                        const std::array<CharClass, 128>& ascii) {
  const auto byte = static_cast<unsigned char>(text[position]);
  if (byte < 0x80) return {ascii[byte], 1};
  const DecodedChar c = decode_utf8(text, position);
  return c.valid ? ClassifiedChar{char_class(c.code_point), c.length} : ClassifiedChar{CharClass::other, 1};
}

/// The bytes of the contraction at `begin`, or 0.
std::size_t contraction_length(std::string_view text, std::size_t begin) {
  if (text[begin] != '\'' || begin + 1 >= text.size()) return 0;
  const char first = text[begin + 1];
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if (begin + 2 >= text.size()) return 0;
  const char second = text[begin + 2];
  const bool two =
      (first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l');
  return two ? 3 : 0;
}

std::size_t run_end(std::string_view text, std::size_t begin, CharClass kind,
                    const std::array<CharClass, 128>& ascii) {
  std::size_t position = begin;
  while (position < text.size()) {
    const ClassifiedChar c = classify(text, position, ascii);
    if (c.kind != kind) break;
    position += c.length;
  }
  return position;
}

/// White space at `begin`: all of it at the end of the text, else all but the last character, which goes
/// with what follows, unless it is the only one.
std::size_t white_space_end(std::string_view text, std::size_t begin,
                            const std::array<CharClass, 128>& ascii) {
  std::size_t position = begin;
  std::size_t last = begin;
  while (position < text.size()) {
    const ClassifiedChar c = classify(text, position, ascii);
    if (c.kind != CharClass::white_space) return last > begin ? last : position;
    last = position;
    position += c.length;
  }
  return position;
}

/// Whether the last character is valid and not white space.
bool ends_in_text(std::string_view text, const std::array<CharClass, 128>& ascii) {
  std::size_t begin = text.size() - 1;
  while (begin > 0 && text.size() - begin < 4 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) {
    --begin;
  }
  const bool valid = decode_utf8(text, begin).valid && begin + decode_utf8(text, begin).length == text.size();
  return valid && classify(text, begin, ascii).kind != CharClass::white_space;
}

}  // namespace

std::size_t piece_end(std::string_view text, std::size_t begin) {
  const auto& ascii = ascii_classes();
  if (const std::size_t length = contraction_length(text, begin); length > 0) return begin + length;
  if (text[begin] == ' ' && begin + 1 < text.size()) {
    const ClassifiedChar next = classify(text, begin + 1, ascii);
    if (next.kind != CharClass::white_space) return run_end(text, begin + 1, next.kind, ascii);
  }
  const ClassifiedChar first = classify(text, begin, ascii);
  if (first.kind != CharClass::white_space) return run_end(text, begin, first.kind, ascii);
  return white_space_end(text, begin, ascii);
}

std::vector<std::string_view> split_pieces(std::string_view text) {
  std::vector<std::string_view> pieces;
  for_each_piece(text, [&](std::string_view piece) { pieces.push_back(piece); });
  return pieces;
}

std::size_t safe_cut(std::string_view text, std::size_t limit) {
  const auto& ascii = ascii_classes();
  for (std::size_t cut = std::min(limit, text.size()); cut > 0; --cut) {
    const bool space = cut < text.size() && classify(text, cut, ascii).kind == CharClass::white_space;
    if (space && ends_in_text(text.substr(0, cut), ascii)) return cut;
  }
  return text.size();
}

}  // namespace normformer
