#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <toml++/toml.h>

#include "normformer/config/run_config.h"

namespace normformer {

/// Where values come from, as messages name it: a file with lines and columns, or one override.
class Origin {
 public:
  static Origin file(std::string name) { return {std::move(name), true}; }
  static Origin override_option(std::string_view text) { return {"--set " + std::string(text), false}; }

  /// "configs/x.toml:12:3", or "--set model.layers=0".
  std::string place(const toml::source_region& region) const;
  std::string place(const toml::node& node) const { return place(node.source()); }
  bool is_file() const { return has_lines_; }

 private:
  Origin(std::string name, bool has_lines) : name_(std::move(name)), has_lines_(has_lines) {}
  std::string name_;
  bool has_lines_;
};

/// One key of the configuration: everything that reading, writing, suggestions and documentation know about
/// it.
struct Field {
  std::string section;
  std::string key;
  std::string kind;  ///< what may be written, as "must be <kind>" reads
  std::string doc;
  bool text;  ///< an unquoted override is text, even where it reads as a number
  std::function<void(RunConfig&, const toml::node&, const Origin&)> read;
  std::function<std::string(const RunConfig&)> write;  ///< the value as TOML
  ResumePolicy on_resume = ResumePolicy::told;

  std::string name() const { return section + "." + key; }
};

/// Every key, section by section: the one place where a key exists.
const std::vector<Field>& fields();

/// The names of the sections, in the order of fields().
std::vector<std::string> section_names();

/// The field of that name, or null.
const Field* find_field(std::string_view section, std::string_view key);

/// Throws ConfigError "place: sentence".
[[noreturn]] void refuse(const std::string& place, const std::string& sentence);

/// What stands in a file, for "not <this>": `the integer 3`, `the string "four"`, `an array`.
std::string describe(const toml::node& node);

/// The text as a TOML basic string, with quotes and escapes.
std::string quoted(std::string_view text);

/// Throws ConfigError where two keys cannot stand together. `place_of` gives where a key was written, ""
/// where it was not.
void check_combinations(const RunConfig& config,
                        const std::function<std::string(const std::string& key)>& place_of);

}  // namespace normformer
