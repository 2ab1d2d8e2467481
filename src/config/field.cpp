#include "field.h"

#include <fmt/format.h>

#include "normformer/core/error.h"

namespace normformer {

std::string Origin::place(const toml::source_region& region) const {
  return has_lines_ ? fmt::format("{}:{}:{}", name_, region.begin.line, region.begin.column) : name_;
}

void refuse(const std::string& place, const std::string& sentence) {
  throw ConfigError(fmt::format("{}: {}", place, sentence));
}

std::string describe(const toml::node& node) {
  constexpr size_t longest = 60;
  if (const auto* text = node.as_string()) {
    const std::string& value = text->get();
    return "the string " +
           (value.size() <= longest ? quoted(value) : quoted(value.substr(0, longest)) + "...");
  }
  if (const auto* integer = node.as_integer()) return fmt::format("the integer {}", integer->get());
  if (const auto* real = node.as_floating_point()) return fmt::format("the number {}", real->get());
  if (const auto* boolean = node.as_boolean()) return fmt::format("{}", boolean->get());
  if (node.is_array()) return "an array";
  return node.is_table() ? "a table" : "a date or time";
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7F) {
      out += fmt::format("\\u{:04X}", byte);
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace normformer
