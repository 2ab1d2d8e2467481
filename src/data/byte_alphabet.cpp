#include "byte_alphabet.h"

#include "normformer/data/unicode.h"

namespace normformer {

namespace {

constexpr int kPrintable = 188;
constexpr char32_t kFirstStandIn = 0x100;

constexpr bool is_printable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

constexpr std::array<uint8_t, 256> make_order() {
  std::array<uint8_t, 256> order{};
  std::size_t next = 0;
  for (const bool printable : {true, false}) {
    for (int byte = 0; byte < 256; ++byte) {
      if (is_printable(byte) == printable) order[next++] = static_cast<uint8_t>(byte);
    }
  }
  return order;
}

constexpr std::array<uint8_t, 256> kOrder = make_order();

constexpr std::array<char32_t, 256> make_alphabet() {
  std::array<char32_t, 256> alphabet{};
  for (int id = 0; id < 256; ++id) {
    alphabet[kOrder[id]] =
        id < kPrintable ? kOrder[id] : kFirstStandIn + static_cast<char32_t>(id - kPrintable);
  }
  return alphabet;
}

constexpr std::array<char32_t, 256> kAlphabet = make_alphabet();

std::optional<uint8_t> byte_of(char32_t character) {
  if (character >= kFirstStandIn) {
    const char32_t id = character - kFirstStandIn + kPrintable;
    return id < 256 ? std::optional<uint8_t>(kOrder[id]) : std::nullopt;
  }
  return is_printable(static_cast<int>(character)) ? std::optional<uint8_t>(static_cast<uint8_t>(character))
                                                   : std::nullopt;
}

}  // namespace

const std::array<uint8_t, 256>& byte_order() { return kOrder; }

std::string to_alphabet(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) append_utf8(kAlphabet[static_cast<uint8_t>(byte)], text);
  return text;
}

std::optional<std::string> from_alphabet(std::string_view text) {
  std::string bytes;
  for (std::size_t position = 0; position < text.size();) {
    const DecodedChar c = decode_utf8(text, position);
    const auto byte = c.valid ? byte_of(c.code_point) : std::nullopt;
    if (!byte) return std::nullopt;
    bytes.push_back(static_cast<char>(*byte));
    position += c.length;
  }
  return bytes;
}

}  // namespace normformer
