#include "record.h"

#include <charconv>
#include <utility>

#include "normformer/core/error.h"

namespace normformer {

Record::Record(nlohmann::json object, std::string place)
    : object_(std::move(object)), place_(std::move(place)) {
  if (!object_.is_object()) fail("is not a JSON object");
}

void Record::fail(const std::string& what) const { throw DataError(fmt::format("{} {}", place_, what)); }

void Record::fail_type(const std::string& key, const char* wanted) const {
  fail(fmt::format("has no {} under \"{}\", but {}", wanted, key, object_.at(key).dump()));
}

const nlohmann::json& Record::at(const std::string& key) const {
  const auto found = object_.find(key);
  if (found != object_.end()) return *found;
  std::string keys;
  for (const auto& item : object_.items()) {
    keys += fmt::format("{}\"{}\"", keys.empty() ? "" : ", ", item.key());
  }
  fail(fmt::format("has no \"{}\" (it has {})", key, keys.empty() ? "nothing" : keys));
}

std::string Record::text(const std::string& key) const {
  if (!at(key).is_string()) fail_type(key, "text");
  return at(key).get<std::string>();
}

std::vector<std::string> Record::texts(const std::string& key) const {
  if (!at(key).is_array()) fail_type(key, "list of texts");
  std::vector<std::string> result;
  for (const auto& element : at(key)) {
    if (!element.is_string()) fail_type(key, "list of texts");
    result.push_back(element.get<std::string>());
  }
  return result;
}

int64_t Record::number(const std::string& key) const {
  if (at(key).is_number_integer()) return at(key).get<int64_t>();
  if (!at(key).is_string()) fail_type(key, "whole number");
  const std::string text = at(key).get<std::string>();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) fail_type(key, "whole number");
  return value;
}

Record Record::object(const std::string& key) const {
  if (!at(key).is_object()) fail_type(key, "object");
  return {at(key), place_};
}

std::vector<Record> Record::objects(const std::string& key) const {
  if (!at(key).is_array()) fail_type(key, "list of objects");
  std::vector<Record> result;
  for (const auto& element : at(key)) {
    if (!element.is_object()) fail_type(key, "list of objects");
    result.emplace_back(element, place_);
  }
  return result;
}

}  // namespace normformer
