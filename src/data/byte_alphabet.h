#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace normformer {

/// The 256 bytes in the order of their ids in GPT-2's vocabulary: printable Latin-1 first ('!' is 0), then
/// the other 68 in increasing order.
const std::array<uint8_t, 256>& byte_order();

/// Bytes written in the printable alphabet of byte-level BPE files: the byte with id i of byte_order() is
/// itself for i < 188, else U+0100 + i - 188. So a space is written as U+0120.
std::string to_alphabet(std::string_view bytes);

/// The inverse; nothing where a character is not of the alphabet or the text is not UTF-8.
std::optional<std::string> from_alphabet(std::string_view text);

}  // namespace normformer
