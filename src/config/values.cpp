#include "values.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "suggest.h"

namespace normformer {

namespace {

void check_prefix(const std::string& name, const std::string& prefix, const toml::node& node,
                  const Origin& origin) {
  if (prefix.empty()) refuse(origin.place(node), fmt::format("{} must not be empty", name));
  for (const std::string_view ending : {".bin", ".idx"}) {
    if (!prefix.ends_with(ending)) continue;
    const std::string stem = prefix.substr(0, prefix.size() - ending.size());
    refuse(origin.place(node),
           fmt::format("{} names a data set without its extension; write {} in place of {}", name,
                       quoted(stem), quoted(prefix)));
  }
}

double read_weight(const std::string& name, const toml::node& node, const Origin& origin) {
  const std::optional<double> value = node.is_number() ? node.value<double>() : std::nullopt;
  if (!value || !std::isfinite(*value) || *value <= 0) {
    refuse(origin.place(node), fmt::format("{} must be a number above 0, not {}", name, describe(node)));
  }
  return *value;
}

DataSource read_source_table(const std::string& name, const toml::table& table, const Origin& origin) {
  DataSource source;
  for (const auto& [key, value] : table) {
    const std::string full = fmt::format("{}.{}", name, key.str());
    if (key.str() == "prefix") {
      if (!value.is_string()) {
        refuse(origin.place(value), fmt::format("{} must be a string, not {}", full, describe(value)));
      }
      source.prefix = value.as_string()->get();
      check_prefix(full, source.prefix, value, origin);
    } else if (key.str() == "weight") {
      source.weight = read_weight(full, value, origin);
    } else {
      const std::string near = nearest(key.str(), {"prefix", "weight"});
      refuse(origin.place(key.source()), fmt::format("{} is not a key; {}", full,
                                                     near.empty() ? "a data set has prefix and weight"
                                                                  : fmt::format("did you mean {}?", near)));
    }
  }
  if (!table.contains("prefix")) {
    refuse(origin.place(table),
           fmt::format("{} has no prefix; write {{ prefix = \"...\", weight = 1.0 }}", name));
  }
  return source;
}

DataSource read_source(const std::string& name, const toml::node& node, const Origin& origin) {
  if (const auto* table = node.as_table()) return read_source_table(name, *table, origin);
  const auto* text = node.as_string();
  if (text == nullptr) {
    refuse(origin.place(node),
           fmt::format("{} must be a string or a table of prefix and weight, not {}", name, describe(node)));
  }
  check_prefix(name, text->get(), node, origin);
  return {text->get(), 1.0};
}

}  // namespace

std::string kind_of(const Integers& range) {
  if (range.high == std::numeric_limits<int64_t>::max())
    return fmt::format("an integer of at least {}", range.low);
  return fmt::format("an integer from {} to {}", range.low, range.high);
}

std::string kind_of(const Reals& range) {
  const std::string low = fmt::format("{} {}", range.above ? "above" : "of at least", range.low);
  return std::isinf(range.high) ? "a number " + low
                                : fmt::format("a number {} and below {}", low, range.high);
}

void refuse_value(const Field& field, const toml::node& node, const Origin& origin, const std::string& cure) {
  refuse(origin.place(node),
         fmt::format("{} must be {}, not {}{}", field.name(), field.kind, describe(node), cure));
}

int64_t read_integer(const Field& field, const Integers& range, const toml::node& node,
                     const Origin& origin) {
  if (const auto* real = node.as_floating_point()) {
    const double value = real->get();
    const bool whole = std::abs(value) < 9e15 && value == std::floor(value);
    refuse_value(field, node, origin, whole ? fmt::format("; write {}", static_cast<int64_t>(value)) : "");
  }
  const auto* integer = node.as_integer();
  if (integer == nullptr || integer->get() < range.low || integer->get() > range.high)
    refuse_value(field, node, origin);
  return integer->get();
}

std::vector<int64_t> read_integers(const Field& field, const Integers& range, std::string_view none,
                                   const toml::node& node, const Origin& origin) {
  if (node.is_string() && node.as_string()->get() == none) return {};
  const toml::array* array = node.as_array();
  if (array == nullptr || array->empty()) refuse_value(field, node, origin);
  std::vector<int64_t> values;
  for (const toml::node& entry : *array) values.push_back(read_integer(field, range, entry, origin));
  return values;
}

double read_real(const Field& field, const Reals& range, const toml::node& node, const Origin& origin) {
  const std::optional<double> value = node.is_number() ? node.value<double>() : std::nullopt;
  if (!value || !std::isfinite(*value)) refuse_value(field, node, origin);
  const bool low_enough = *value < range.high;
  const bool high_enough = range.above ? *value > range.low : *value >= range.low;
  if (!low_enough || !high_enough) refuse_value(field, node, origin);
  return *value;
}

std::string write_real(double value) {
  const std::string text = fmt::format("{}", value);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

size_t read_word(const Field& field, const std::vector<std::string>& words, const toml::node& node,
                 const Origin& origin) {
  const auto* text = node.as_string();
  if (text == nullptr) refuse_value(field, node, origin);
  const auto found = std::find(words.begin(), words.end(), text->get());
  if (found != words.end()) return static_cast<size_t>(found - words.begin());
  const std::string near = nearest(text->get(), words);
  refuse_value(field, node, origin, near.empty() ? "" : fmt::format("; did you mean {}?", quoted(near)));
}

std::vector<DataSource> read_sources(const Field& field, const toml::node& node, const Origin& origin) {
  const auto* array = node.as_array();
  if (array == nullptr) {
    if (!node.is_string()) refuse_value(field, node, origin);
    return {read_source(field.name(), node, origin)};
  }
  std::vector<DataSource> sources;
  for (size_t i = 0; i < array->size(); ++i) {
    sources.push_back(read_source(fmt::format("{}[{}]", field.name(), i), *array->get(i), origin));
  }
  return sources;
}

std::vector<std::string> read_texts(const Field& field, size_t most, const toml::node& node,
                                    const Origin& origin) {
  std::vector<std::string> texts;
  const auto add = [&](const toml::node& item) {
    if (!item.is_string() || item.as_string()->get().empty()) refuse_value(field, item, origin);
    texts.push_back(item.as_string()->get());
  };
  if (const auto* array = node.as_array()) {
    for (const toml::node& item : *array) add(item);
  } else {
    add(node);
  }
  if (texts.empty() || texts.size() > most) refuse_value(field, node, origin);
  return texts;
}

std::string write_texts(const std::vector<std::string>& texts) {
  std::vector<std::string> items;
  for (const std::string& text : texts) items.push_back(quoted(text));
  return fmt::format("[{}]", fmt::join(items, ", "));
}

std::string write_sources(const std::vector<DataSource>& sources) {
  const bool plain =
      std::all_of(sources.begin(), sources.end(), [](const DataSource& s) { return s.weight == 1.0; });
  std::vector<std::string> items;
  for (const DataSource& source : sources) {
    const std::string prefix = quoted(source.prefix);
    items.push_back(plain ? prefix
                          : fmt::format("{{ prefix = {}, weight = {} }}", prefix, write_real(source.weight)));
  }
  return fmt::format("[{}]", fmt::join(items, ", "));
}

}  // namespace normformer
