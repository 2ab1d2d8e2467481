#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace normformer {

/// One row of a table of comma-separated values.
struct CsvRow {
  int64_t line = 1;  ///< where it begins
  std::vector<std::string> fields;
};

/// Reads a table (RFC 4180; white space before a field is skipped, empty lines are no rows). `name` says in a
/// DataError where a quote is left open.
std::vector<CsvRow> read_csv(std::string_view text, std::string_view name);

}  // namespace normformer
