#include "normformer/config/run_config.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <system_error>
#include <utility>

#include <fmt/format.h>
#include <toml++/toml.h>

#include "normformer/config/overrides.h"
#include "normformer/core/error.h"

#include "field.h"
#include "suggest.h"

namespace normformer {

namespace {

constexpr uintmax_t largest_file = uintmax_t{1} << 20;
/// Each may begin a table within a table, and the TOML library destroys those by recursion.
constexpr std::ptrdiff_t most_dots = 10'000;

std::vector<std::string> all_keys() {
  std::vector<std::string> names;
  for (const Field& field : fields()) names.push_back(field.name());
  return names;
}

std::vector<std::string> keys_of(std::string_view section) {
  std::vector<std::string> keys;
  for (const Field& field : fields()) {
    if (field.section == section) keys.push_back(field.key);
  }
  return keys;
}

/// The full name of the key that `key` of `section` most likely stands for; "" where nothing is near. The
/// same name in another section comes first, then a near one in this section, then a near one anywhere.
std::string nearest_key(std::string_view section, std::string_view key) {
  for (const Field& field : fields()) {
    if (field.key == key) return field.name();
  }
  const std::string here = nearest(key, keys_of(section));
  if (!here.empty()) return fmt::format("{}.{}", section, here);
  std::vector<std::string> keys;
  for (const Field& field : fields()) keys.push_back(field.key);
  const std::string elsewhere = nearest(key, keys);
  if (elsewhere.empty()) return "";
  for (const Field& field : fields()) {
    if (field.key == elsewhere) return field.name();
  }
  return "";
}

std::string unknown_key(std::string_view section, std::string_view key) {
  const std::string start = fmt::format("{}.{} is not a key; ", section, key);
  const std::string near = nearest_key(section, key);
  if (!near.empty()) return fmt::format("{}did you mean {}?", start, near);
  return fmt::format("{}the keys of {} are {}", start, section, join(keys_of(section)));
}

std::string unknown_section(std::string_view section) {
  const std::string near = nearest(section, section_names());
  if (!near.empty()) return fmt::format("[{}] is not a section; did you mean [{}]?", section, near);
  return fmt::format("[{}] is not a section; the sections are {}", section, join(section_names()));
}

/// Reads values into a configuration and remembers where each was written.
class Reader {
 public:
  void read_file(const toml::table& root, const Origin& origin) {
    for (const auto& [key, node] : root) read_section(key, node, origin);
  }

  void read_override(const std::string& text);

  /// The configuration, once its keys are known to fit together.
  RunConfig finish() const {
    check_combinations(config_, [this](const std::string& key) {
      const auto found = places_.find(key);
      return found == places_.end() ? std::string() : found->second;
    });
    return config_;
  }

  /// What has been written so far, sorted.
  std::vector<std::string> keys() const {
    std::vector<std::string> names;
    for (const auto& [name, place] : places_) names.push_back(name);
    return names;
  }

 private:
  void read_section(const toml::key& key, const toml::node& node, const Origin& origin) {
    const std::vector<std::string> sections = section_names();
    const bool known = std::find(sections.begin(), sections.end(), key.str()) != sections.end();
    const std::string place = origin.place(key.source());
    if (!known && !node.is_table()) {
      const std::string near = nearest_key("", key.str());
      refuse(place,
             fmt::format("{} stands outside any section; {}", key.str(),
                         near.empty() ? "the sections are " + join(sections) : "did you mean " + near + "?"));
    }
    if (!known) refuse(place, unknown_section(key.str()));
    const auto* table = node.as_table();
    if (table == nullptr) {
      refuse(place, fmt::format("{} is a section and must be a table, not {}", key.str(), describe(node)));
    }
    for (const auto& [name, value] : *table) {
      const Field* field = find_field(key.str(), name.str());
      if (field == nullptr) refuse(origin.place(name.source()), unknown_key(key.str(), name.str()));
      read_value(*field, value, origin);
    }
  }

  void read_value(const Field& field, const toml::node& node, const Origin& origin) {
    field.read(config_, node, origin);
    places_[field.name()] = origin.place(node);
  }

  RunConfig config_;
  std::map<std::string, std::string> places_;
};

/// "value = <text>" as a table of one key; empty where the text is not one TOML value.
toml::table parse_value(std::string_view text) {
  try {
    toml::table table = toml::parse(fmt::format("value = {}", text));
    return table.size() == 1 ? std::move(table) : toml::table{};
  } catch (const toml::parse_error&) {
    return {};
  }
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view blanks = " \t";
  const size_t begin = text.find_first_not_of(blanks);
  if (begin == std::string_view::npos) return "";
  return text.substr(begin, text.find_last_not_of(blanks) - begin + 1);
}

/// The field that "section.key" names.
const Field& override_field(std::string_view name, const Origin& origin) {
  const std::string place = origin.place(toml::source_region{});
  const size_t dot = name.find('.');
  const std::string_view section = name.substr(0, dot);
  const std::vector<std::string> sections = section_names();
  const bool known = std::find(sections.begin(), sections.end(), section) != sections.end();
  if (dot == std::string_view::npos) {
    if (known) {
      refuse(place,
             fmt::format("{} is a section; name one of its keys: {}", section, join(keys_of(section))));
    }
    const std::string near = nearest_key("", name);
    refuse(place, fmt::format("{} is not a key; {}", name,
                              near.empty() ? "write section.key=value" : "did you mean " + near + "?"));
  }
  const Field* field = find_field(section, name.substr(dot + 1));
  if (field != nullptr) return *field;
  if (known) refuse(place, unknown_key(section, name.substr(dot + 1)));
  const std::string near = nearest(name, all_keys());
  refuse(place,
         fmt::format("{} is not a key; {}", name,
                     near.empty() ? "the sections are " + join(sections) : "did you mean " + near + "?"));
}

void Reader::read_override(const std::string& text) {
  const Origin origin = Origin::override_option(text);
  const size_t equals = text.find('=');
  if (equals == std::string::npos) {
    refuse(origin.place(toml::source_region{}), "an override is written section.key=value");
  }
  const Field& field = override_field(trimmed(std::string_view(text).substr(0, equals)), origin);
  const std::string_view value = trimmed(std::string_view(text).substr(equals + 1));
  toml::table table = parse_value(value);
  const toml::node* node = table.get("value");
  const bool as_text = node == nullptr || (field.text && !node->is_string() && !node->is_array());
  if (as_text) {
    table = parse_value(quoted(value));
    node = table.get("value");
  }
  if (node == nullptr) refuse(origin.place(toml::source_region{}), "the value is not valid UTF-8");
  read_value(field, *node, origin);
}

void refuse_large(const std::string& name, uintmax_t bytes) {
  if (bytes <= largest_file) return;
  refuse(name, fmt::format("{} bytes are more than a configuration may have ({})", bytes, largest_file));
}

void refuse_deep(const std::string& name, std::string_view text) {
  if (std::count(text.begin(), text.end(), '.') <= most_dots) return;
  refuse(name, fmt::format("more than {} dots could be tables as deep in each other", most_dots));
}

/// The file's name with another of its folder's .toml files that it may stand for.
std::string missing_file(const std::filesystem::path& path) {
  std::error_code ignored;
  std::vector<std::string> names;
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    if (entry.path().extension() == ".toml") names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  const std::string near = nearest(path.filename().string(), names);
  if (near.empty()) return "there is no such file";
  return fmt::format("there is no such file; did you mean {}?", (path.parent_path() / near).string());
}

std::string read_text(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) refuse(path, missing_file(path));
  if (status.type() == std::filesystem::file_type::directory) refuse(path, "is a folder; name a TOML file");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw IoError(fmt::format("{}: cannot be opened: {}", path, system_reason()));
  std::string text(largest_file + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) throw IoError(fmt::format("{}: cannot be read: {}", path, system_reason()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > largest_file)
    refuse(path, fmt::format("is larger than a configuration may be ({} bytes)", largest_file));
  return text;
}

void read_toml(Reader& reader, const std::string& text, const std::string& name) {
  refuse_large(name, text.size());
  refuse_deep(name, text);
  try {
    reader.read_file(toml::parse(text), Origin::file(name));
  } catch (const toml::parse_error& error) {
    refuse(Origin::file(name).place(error.source()), std::string(error.description()));
  }
}

void read_override(Reader& reader, const std::string& text) {
  refuse_deep("--set", text);
  reader.read_override(text);
}

void read_overrides(Reader& reader, const std::vector<std::string>& overrides) {
  for (const std::string& text : overrides) {
    if (text.starts_with('@'))
      read_toml(reader, read_text(text.substr(1)), text.substr(1));
    else
      read_override(reader, text);
  }
}

}  // namespace

RunConfig parse_run_config(const std::string& text, const std::string& name,
                           const std::vector<std::string>& overrides) {
  Reader reader;
  read_toml(reader, text, name);
  for (const std::string& text_of_one : overrides) read_override(reader, text_of_one);
  return reader.finish();
}

RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides) {
  Reader reader;
  read_toml(reader, read_text(path), path);
  read_overrides(reader, overrides);
  return reader.finish();
}

std::vector<std::string> overridden_keys(const std::vector<std::string>& overrides) {
  Reader reader;
  read_overrides(reader, overrides);
  return reader.keys();
}

std::string to_toml(const RunConfig& config) {
  std::string out;
  std::string section;
  for (const Field& field : fields()) {
    if (field.section != section) {
      out += fmt::format("{}[{}]\n", section.empty() ? "" : "\n", field.section);
      section = field.section;
    }
    out += fmt::format("{} = {}\n", field.key, field.write(config));
  }
  return out;
}

std::string toml_value(const RunConfig& config, const std::string& key) {
  const size_t dot = key.find('.');
  const Field* field =
      dot == std::string::npos ? nullptr : find_field(key.substr(0, dot), key.substr(dot + 1));
  NF_CHECK(field != nullptr, "there is no key {}", key);
  return field->write(config);
}

std::vector<ConfigKey> config_keys() {
  const RunConfig defaults;
  std::vector<ConfigKey> keys;
  for (const Field& field : fields())
    keys.push_back({field.name(), field.kind, field.write(defaults), field.doc, field.on_resume});
  return keys;
}

std::string describe_config_keys() {
  std::string out;
  for (const ConfigKey& key : config_keys()) {
    out +=
        fmt::format("{} = {}\n    {}\n    {}\n{}", key.name, key.default_value, key.doc, key.kind,
                    key.on_resume == ResumePolicy::must_equal ? "    the same for the whole of a run\n" : "");
  }
  return out;
}

}  // namespace normformer
