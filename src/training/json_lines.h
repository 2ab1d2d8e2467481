#pragma once

#include <filesystem>
#include <fstream>
#include <functional>

#include <nlohmann/json.hpp>

namespace normformer {

/// What JSON has for a number: null for one that is not finite.
nlohmann::ordered_json json_number(double value);

/// A file of JSON objects, one a line, each of which tells its "batch". Flushed line by line, so that a
/// killed run leaves at most one torn line, which the next opening drops.
class JsonLines {
 public:
  using Visit = std::function<void(const nlohmann::json& line)>;

  /// Opens for appending. Lines of batches behind `batch_index` and lines that are no such objects are
  /// dropped, so that a resumed run leaves the file that an uninterrupted one would; `kept` is shown the
  /// others. Throws IoError.
  JsonLines(std::filesystem::path path, int64_t batch_index, const Visit& kept = {});

  /// Metrics are not worth a run: that a line could not be written is said, and nothing thrown.
  void write(const nlohmann::ordered_json& line);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace normformer
