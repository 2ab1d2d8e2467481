#include "normformer/checkpoints/difference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <sstream>
#include <utility>

#include "normformer/tensor/context.h"

namespace normformer {

namespace {

using Key = std::pair<std::string, Role>;

/// Elements compared at a time.
constexpr int64_t kRun = int64_t{1} << 20;

std::map<Key, StoredTensorInfo> tensors_of(const CheckpointReader& reader) {
  std::map<Key, StoredTensorInfo> tensors;
  for (const StoredTensorInfo& info : reader.tensors()) tensors[{info.name, info.role}] = info;
  return tensors;
}

std::string describe(const StoredTensorInfo* info) {
  if (info == nullptr) return "missing";
  return fmt::format("{} {} x {}", name_of(info->dtype), info->rows, info->columns);
}

Tensor read_run(Context& context, const CheckpointReader& reader, const StoredTensorInfo& info, Range range) {
  const Rectangle whole{{0, info.rows}, {0, info.columns}, info.rows, info.columns};
  const TensorPiece piece{info.name, info.role, whole, range, context.empty({range.size()}, info.dtype)};
  reader.read({&piece, 1});
  return piece.data;
}

/// Sums of squares, beside what is reported.
struct Sums {
  double of_difference = 0.0;
  double of_first = 0.0;
};

void compare_run(const Tensor& a, const Tensor& b, TensorDifference& found, Sums& sums) {
  const std::vector<double> x = to_host(a);
  const std::vector<double> y = to_host(b);
  const auto size = static_cast<size_t>(size_of(a.dtype()));
  const auto* bits_of_a = static_cast<const std::byte*>(a.raw());
  const auto* bits_of_b = static_cast<const std::byte*>(b.raw());
  for (size_t i = 0; i < x.size(); ++i) {
    sums.of_first += x[i] * x[i];
    if (std::memcmp(bits_of_a + i * size, bits_of_b + i * size, size) == 0) continue;
    ++found.different;
    const double difference = std::abs(x[i] - y[i]);
    sums.of_difference += difference * difference;
    if (!(difference <= found.largest)) found.largest = difference;
  }
}

TensorDifference compare(Context& context, const CheckpointReader& a, const CheckpointReader& b,
                         const StoredTensorInfo& info) {
  TensorDifference found{.name = info.name, .role = info.role, .shape_fault = {}};
  found.elements = info.rows * info.columns;
  Sums sums;
  for (int64_t at = 0; at < found.elements; at += kRun) {
    const Range range{at, std::min(at + kRun, found.elements)};
    compare_run(read_run(context, a, info, range), read_run(context, b, info, range), found, sums);
  }
  if (found.different > 0) found.relative = std::sqrt(sums.of_difference / sums.of_first);
  return found;
}

void add_fault(std::vector<TensorDifference>& found, const Key& key, const StoredTensorInfo* a,
               const StoredTensorInfo* b) {
  found.push_back({.name = key.first,
                   .role = key.second,
                   .shape_fault = fmt::format("{} and {}", describe(a), describe(b))});
}

/// "[section] key = value" by line.
std::map<std::string, std::string> lines_of(const std::string& toml) {
  std::map<std::string, std::string> values;
  std::istringstream text(toml);
  std::string section;
  for (std::string line; std::getline(text, line);) {
    const size_t equals = line.find(" = ");
    if (line.starts_with("[")) section = line.substr(1, line.find(']') - 1) + ".";
    if (equals != std::string::npos) values[section + line.substr(0, equals)] = line.substr(equals + 3);
  }
  values.erase("checkpoint.folder");
  return values;
}

std::map<std::string, std::string> values_of(const CheckpointInfo& info) {
  std::map<std::string, std::string> values = lines_of(info.config_toml);
  values["update_count"] = fmt::format("{}", info.update_count);
  values["batch_index"] = fmt::format("{}", info.batch_index);
  values["skipped_in_a_row"] = fmt::format("{}", info.skipped_in_a_row);
  values["tokens_seen"] = fmt::format("{}", info.tokens_seen);
  values["consumed_samples"] = fmt::format("{}", info.consumed_samples);
  values["seed"] = fmt::format("{}", info.seed);
  values["tokenizer_hash"] = info.tokenizer_hash;
  values["loss_scale"] = fmt::format("{}", info.loss_scale);
  values["clean_updates"] = fmt::format("{}", info.clean_updates);
  values["overflows"] = fmt::format("{}", info.overflows);
  for (const auto& [name, value] : info.metrics) values["metrics." + name] = fmt::format("{}", value);
  for (const auto& [axis, degree] : info.layout) values["layout." + axis] = fmt::format("{}", degree);
  return values;
}

}  // namespace

std::vector<TensorDifference> compare_tensors(const CheckpointReader& a, const CheckpointReader& b) {
  Context context(DeviceKind::cpu);
  const std::map<Key, StoredTensorInfo> of_a = tensors_of(a);
  const std::map<Key, StoredTensorInfo> of_b = tensors_of(b);
  std::vector<TensorDifference> found;
  for (const auto& [key, info] : of_a) {
    const auto other = of_b.find(key);
    if (other == of_b.end() || describe(&info) != describe(&other->second)) {
      add_fault(found, key, &info, other == of_b.end() ? nullptr : &other->second);
      continue;
    }
    TensorDifference difference = compare(context, a, b, info);
    if (difference.different > 0) found.push_back(std::move(difference));
  }
  for (const auto& [key, info] : of_b) {
    if (!of_a.contains(key)) add_fault(found, key, nullptr, &info);
  }
  return found;
}

std::vector<std::string> compare_infos(const CheckpointInfo& a, const CheckpointInfo& b) {
  const std::map<std::string, std::string> of_b = values_of(b);
  std::map<std::string, std::string> of_a = values_of(a);
  for (const auto& [key, value] : of_b) of_a.try_emplace(key, "missing");
  std::vector<std::string> found;
  for (const auto& [key, value] : of_a) {
    const auto other = of_b.find(key);
    const std::string there = other == of_b.end() ? "missing" : other->second;
    if (value != there) found.push_back(fmt::format("{}: {} and {}", key, value, there));
  }
  return found;
}

}  // namespace normformer
