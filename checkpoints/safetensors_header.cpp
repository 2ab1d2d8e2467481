#include "safetensors_header.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include <nlohmann/json.hpp>

#include "normformer/core/error.h"

#include "element.h"

namespace normformer {

namespace {

using Json = nlohmann::json;

/// Takes the events of the JSON parser, so that no tree is built of a hostile header. Every function returns
/// false to stop the parser, with the reason in `problem`.
class HeaderEvents : public nlohmann::json_sax<Json> {
 public:
  SafetensorsHeader header;
  std::string problem;

  bool null() override { return refuse("a null"); }
  bool boolean(bool) override { return refuse("a boolean"); }
  bool number_integer(Json::number_integer_t) override { return refuse("a negative number"); }
  bool number_float(Json::number_float_t, const std::string&) override {
    return refuse("a number that is not a 63-bit integer");
  }
  bool binary(Json::binary_t&) override { return refuse("binary data"); }

  bool number_unsigned(Json::number_unsigned_t value) override {
    if (numbers_ == nullptr) return refuse("a number");
    if (value > static_cast<uint64_t>(INT64_MAX)) return refuse("a number that is not a 63-bit integer");
    if (numbers_->size() == most_numbers_) {
      return stop(fmt::format("tensor '{}' has more than {} values in '{}'", name_, most_numbers_, field_));
    }
    numbers_->push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(std::string& text) override {
    if (place_ == Place::metadata) {
      header.metadata[field_] = text;
      return true;
    }
    if (place_ != Place::tensor || field_ != "dtype" || numbers_ != nullptr) return refuse("a text");
    type_ = find_stored_type(text);
    if (!type_) return stop(fmt::format("tensor '{}' has the unknown type '{}'", name_, text));
    return true;
  }

  bool start_object(size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::root;
    } else if (place_ == Place::root) {
      place_ = name_ == "__metadata__" ? Place::metadata : Place::tensor;
      fields_.clear();
      shape_.clear();
      offsets_.clear();
      type_.reset();
    } else {
      return refuse("an object");
    }
    return true;
  }

  bool key(std::string& text) override {
    if (place_ == Place::root) {
      name_ = text;
      field_.clear();
      return names_.insert(text).second || stop(fmt::format("'{}' stands there twice", text));
    }
    field_ = text;
    if (!fields_.insert(text).second) return stop(fmt::format("'{}' has '{}' twice", name_, text));
    const bool known =
        place_ == Place::metadata || text == "dtype" || text == "shape" || text == "data_offsets";
    return known || stop(fmt::format("tensor '{}' has the unknown key '{}'", name_, text));
  }

  bool end_object() override {
    if (place_ == Place::tensor && !add_tensor()) return false;
    place_ = place_ == Place::root ? Place::outside : Place::root;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::tensor || numbers_ != nullptr) return refuse("a list");
    if (field_ == "shape") {
      numbers_ = &shape_;
      most_numbers_ = Shape::kMaxRank;
    } else if (field_ == "data_offsets") {
      numbers_ = &offsets_;
      most_numbers_ = 2;
    } else {
      return refuse("a list");
    }
    return true;
  }

  bool end_array() override {
    numbers_ = nullptr;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return stop(fmt::format("it is not valid JSON at byte {}", position));
  }

 private:
  enum class Place { outside, root, metadata, tensor };

  bool stop(std::string why) {
    if (problem.empty()) problem = std::move(why);
    return false;
  }

  bool refuse(std::string_view what) {
    return stop(fmt::format("{} stands where none belongs{}", what,
                            name_.empty() ? std::string() : fmt::format(", in '{}'", name_)));
  }

  bool add_tensor() {
    if (!type_ || !fields_.contains("shape") || offsets_.size() != 2) {
      return stop(fmt::format("tensor '{}' lacks its dtype, its shape or its two data_offsets", name_));
    }
    // A zero must not hide that the product of the other extents overflows.
    int64_t bytes = type_->bytes;
    for (const int64_t extent : shape_) {
      if (__builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes)) {
        return stop(fmt::format("the size of tensor '{}' leaves 64 bits", name_));
      }
    }
    if (std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) bytes = 0;
    const Range place{offsets_[0], offsets_[1]};
    if (place.end < place.begin || place.size() != bytes) {
      return stop(fmt::format("tensor '{}' takes bytes {} to {}, but its shape and type take {} bytes", name_,
                              place.begin, place.end, bytes));
    }
    header.tensors.push_back(
        {name_, Shape(std::span<const int64_t>(shape_)), std::string(type_->name), type_->dtype, place});
    return true;
  }

  Place place_ = Place::outside;
  std::string name_;
  std::string field_;
  std::set<std::string> names_;
  std::set<std::string> fields_;
  std::vector<int64_t> shape_;
  std::vector<int64_t> offsets_;
  std::vector<int64_t>* numbers_ = nullptr;
  size_t most_numbers_ = 0;
  std::optional<StoredType> type_;
};

/// Why the tensors do not cover [0, data_bytes) one after another; "" where they do.
std::string find_gap(const std::vector<SafetensorsEntry>& sorted, int64_t data_bytes) {
  int64_t end = 0;
  for (const SafetensorsEntry& entry : sorted) {
    if (entry.bytes.begin != end) {
      return fmt::format("tensor '{}' begins at byte {} of the data, but the one before it ends at {}",
                         entry.name, entry.bytes.begin, end);
    }
    end = entry.bytes.end;
  }
  if (end == data_bytes) return "";
  return fmt::format("its tensors take {} bytes, but {} follow the header", end, data_bytes);
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json, int64_t data_bytes,
                                           const std::string& file) {
  const auto fail = [&](std::string_view why) {
    throw DataError(fmt::format("{} is not a valid safetensors file: {}", file, why));
  };
  if (json.empty() || json.front() != '{') fail("its header does not begin with '{'");
  HeaderEvents events;
  if (!Json::sax_parse(json, &events)) fail(events.problem);
  std::vector<SafetensorsEntry>& tensors = events.header.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.bytes.begin, a.bytes.end) < std::pair(b.bytes.begin, b.bytes.end);
  });
  if (const std::string gap = find_gap(tensors, data_bytes); !gap.empty()) fail(gap);
  return std::move(events.header);
}

std::string make_safetensors_header(const std::vector<SafetensorsPlan>& tensors,
                                    const std::map<std::string, std::string>& metadata) {
  std::string json = "{";
  if (!metadata.empty()) json += "\"__metadata__\":" + Json(metadata).dump();
  int64_t offset = 0;
  for (const SafetensorsPlan& tensor : tensors) {
    const StoredType type = stored_type_of(tensor.dtype);
    const int64_t end = checked_add(offset, checked_mul(tensor.shape.numel(), type.bytes));
    json +=
        fmt::format(R"({}{}:{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", json.size() > 1 ? "," : "",
                    Json(tensor.name).dump(), type.name,
                    Json(std::vector<int64_t>(tensor.shape.dims().begin(), tensor.shape.dims().end())).dump(),
                    offset, end);
    offset = end;
  }
  json += "}";
  json.resize(static_cast<size_t>(round_up(static_cast<int64_t>(json.size()), 8)), ' ');
  std::string header(8, '\0');
  for (size_t i = 0; i < 8; ++i) header[i] = static_cast<char>(json.size() >> (8 * i));
  return header + json;
}

}  // namespace normformer
