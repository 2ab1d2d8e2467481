#pragma once

#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <toml++/toml.h>

#include "normformer/config/run_config.h"

#include "field.h"

namespace normformer {

/// Allowed integers, both ends included.
struct Integers {
  int64_t low;
  int64_t high = std::numeric_limits<int64_t>::max();
};

/// Allowed numbers: from `low` (itself allowed unless `above`) to below `high`.
struct Reals {
  double low;
  double high = std::numeric_limits<double>::infinity();
  bool above = false;
};

/// The range in words, as "must be <kind>" reads.
std::string kind_of(const Integers& range);
std::string kind_of(const Reals& range);

/// Throws ConfigError: the key must be of its kind and is not; then the cure, where there is one.
[[noreturn]] void refuse_value(const Field& field, const toml::node& node, const Origin& origin,
                               const std::string& cure = "");

int64_t read_integer(const Field& field, const Integers& range, const toml::node& node, const Origin& origin);
/// The string `none` is an empty list.
std::vector<int64_t> read_integers(const Field& field, const Integers& range, std::string_view none,
                                   const toml::node& node, const Origin& origin);
double read_real(const Field& field, const Reals& range, const toml::node& node, const Origin& origin);
/// A string alone is a list of one.
std::vector<std::string> read_texts(const Field& field, size_t most, const toml::node& node,
                                    const Origin& origin);
std::vector<DataSource> read_sources(const Field& field, const toml::node& node, const Origin& origin);

/// The place of the string in `words`; throws ConfigError with the nearest word where it is none of them.
size_t read_word(const Field& field, const std::vector<std::string>& words, const toml::node& node,
                 const Origin& origin);

/// The shortest TOML number that reads back as `value`.
std::string write_real(double value);
std::string write_texts(const std::vector<std::string>& texts);
std::string write_sources(const std::vector<DataSource>& sources);

}  // namespace normformer
