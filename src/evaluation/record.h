#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace normformer {

/// One JSON object of a task's file; whatever is not as it must be is a DataError that begins with its place.
class Record {
 public:
  /// `place` is "FILE line N".
  Record(nlohmann::json object, std::string place);

  const std::string& place() const { return place_; }
  bool has(const std::string& key) const { return object_.contains(key); }

  /// Puts a text in.
  void set(const std::string& key, const std::string& value) { object_[key] = value; }

  std::string text(const std::string& key) const;
  std::vector<std::string> texts(const std::string& key) const;

  /// A whole number, which may be written as a text.
  int64_t number(const std::string& key) const;

  Record object(const std::string& key) const;
  std::vector<Record> objects(const std::string& key) const;
  bool is_list(const std::string& key) const { return at(key).is_array(); }

  [[noreturn]] void fail(const std::string& what) const;

 private:
  const nlohmann::json& at(const std::string& key) const;
  [[noreturn]] void fail_type(const std::string& key, const char* wanted) const;

  nlohmann::json object_;
  std::string place_;
};

}  // namespace normformer
