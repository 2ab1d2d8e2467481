#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace normformer {

/// The end of the piece that begins at `begin` < text.size(), when text is cut as GPT-2 cuts it before
/// byte-pair merging, by the pattern
///
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
///
/// where \s is the Unicode property White_Space. Never looks back before `begin`, so a text may be cut at
/// the end of any piece and the rest be split by itself. A byte that is not UTF-8 counts as a character that
/// is neither white space, letter nor number. Pieces cover the text.
/// Source of the pattern: encoder.py of GPT-2 (Radford et al. 2019).
std::size_t piece_end(std::string_view text, std::size_t begin);

/// Calls `use(std::string_view piece)` for each piece in order.
template <class Use>
void for_each_piece(std::string_view text, Use&& use) {
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = piece_end(text, begin);
    use(text.substr(begin, end - begin));
    begin = end;
  }
}

/// All pieces, as views into `text`.
std::vector<std::string_view> split_pieces(std::string_view text);

/// The largest position <= `limit` at which `text` may be cut into two texts whose pieces are those of the
/// whole, or text.size() where there is none after 0: in front of white space that follows something else.
std::size_t safe_cut(std::string_view text, std::size_t limit);

}  // namespace normformer
