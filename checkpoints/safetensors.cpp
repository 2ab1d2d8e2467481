#include "normformer/checkpoints/safetensors.h"

#include <algorithm>
#include <cstring>

#include "normformer/core/error.h"

#include "element.h"
#include "safetensors_header.h"

namespace normformer {

namespace {

constexpr int64_t kBufferBytes = int64_t{1} << 20;
constexpr int64_t kLengthBytes = 8;

std::filesystem::path follow_links(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::path target = std::filesystem::canonical(path, error);
  return error ? path : target;
}

/// A tensor's shape as a matrix.
std::pair<int64_t, int64_t> matrix_of(const Shape& shape) {
  if (shape.rank() == 0) return {1, 1};
  int64_t columns = 1;
  for (int i = 1; i < shape.rank(); ++i) columns *= shape[i];
  return {shape[0], columns};
}

StoredType type_of(const SafetensorsEntry& entry) { return *find_stored_type(entry.stored_type); }

/// The order of the safetensors library: wide types first, among them integers before floating point.
int order_of(DType dtype) {
  switch (dtype) {
    case DType::i64:
      return 0;
    case DType::f64:
      return 1;
    case DType::f32:
      return 2;
    case DType::i32:
      return 3;
    case DType::bf16:
      return 4;
    case DType::f16:
      return 5;
    case DType::u8:
      return 6;
  }
  return 7;
}

}  // namespace

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path)
    : SafetensorsReader(*make_system_files(), follow_links(path)) {
  path_ = path;
}

SafetensorsReader::SafetensorsReader(FileSystem& files, const std::filesystem::path& path)
    : path_(path), file_(files.open(path)) {
  const auto refuse = [&](std::string_view why) {
    throw DataError(fmt::format("{} is not a valid safetensors file: {}", path.string(), why));
  };
  uint64_t header_bytes = 0;
  if (file_->size() < kLengthBytes) refuse("it is shorter than 8 bytes");
  file_->read(0, std::as_writable_bytes(std::span(&header_bytes, 1)));
  if (header_bytes > static_cast<uint64_t>(kMaxSafetensorsHeader)) {
    refuse(fmt::format("its header claims {} bytes; {} is the most", header_bytes, kMaxSafetensorsHeader));
  }
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(header_bytes);
  if (data_begin > file_->size()) refuse(fmt::format("it ends within its header of {} bytes", header_bytes));
  std::string json(header_bytes, '\0');
  file_->read(kLengthBytes, std::as_writable_bytes(std::span(json)));
  SafetensorsHeader header = parse_safetensors_header(json, file_->size() - data_begin, path.string());
  tensors_ = std::move(header.tensors);
  metadata_ = std::move(header.metadata);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    Range& bytes = tensors_[i].bytes;
    bytes = {bytes.begin + data_begin, bytes.end + data_begin};
    by_name_[tensors_[i].name] = i;
  }
}

SafetensorsReader::~SafetensorsReader() = default;

bool SafetensorsReader::contains(std::string_view name) const { return by_name_.contains(name); }

const SafetensorsEntry& SafetensorsReader::tensor(std::string_view name) const {
  const auto found = by_name_.find(name);
  if (found != by_name_.end()) return tensors_[found->second];
  const auto next = by_name_.lower_bound(name);
  const std::string near = by_name_.empty()
                               ? "it has none"
                               : fmt::format("among its {} tensors is '{}'", tensors_.size(),
                                             next == by_name_.end() ? by_name_.rbegin()->first : next->first);
  throw DataError(fmt::format("{} has no tensor '{}'; {}", path_.string(), name, near));
}

Tensor SafetensorsReader::read(Context& context, std::string_view name, MemoryUse use) const {
  const SafetensorsEntry& entry = tensor(name);
  if (!entry.dtype) {
    throw DataError(fmt::format("{}: tensor '{}' has type {}, which cannot be read here", path_.string(),
                                name, entry.stored_type));
  }
  const Tensor into = context.empty(entry.shape, *entry.dtype, use);
  read_elements(entry, {0, entry.shape.numel()}, into, 0);
  return into;
}

void SafetensorsReader::expect(std::string_view name, int64_t rows, int64_t columns) const {
  const Shape& shape = tensor(name).shape;
  const auto [stored_rows, stored_columns] = matrix_of(shape);
  if (rows == stored_rows && columns == stored_columns) return;
  throw DataError(fmt::format("{}: tensor '{}' is a matrix of {} x {} ({}), where {} x {} is wanted",
                              path_.string(), name, stored_rows, stored_columns, to_string(shape), rows,
                              columns));
}

void SafetensorsReader::read(std::string_view name, const Rectangle& part, const Tensor& into) const {
  const SafetensorsEntry& entry = tensor(name);
  const auto [rows, columns] = matrix_of(entry.shape);
  expect(name, part.global_rows, part.global_columns);
  if (!is_convertible(type_of(entry), into.dtype())) {
    throw DataError(fmt::format("{}: tensor '{}' has type {}, which cannot be read as {}", path_.string(),
                                name, entry.stored_type, name_of(into.dtype())));
  }
  NF_CHECK(into.numel() == part.numel() && part.rows.begin >= 0 && part.rows.end <= rows &&
               part.columns.begin >= 0 && part.columns.end <= columns,
           "part of '{}' of {} elements read into {}", name, part.numel(), to_string(into));
  if (part.columns.size() == columns) {
    read_elements(entry, {part.rows.begin * columns, part.rows.end * columns}, into, 0);
    return;
  }
  for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
    read_elements(entry, {row * columns + part.columns.begin, row * columns + part.columns.end}, into,
                  (row - part.rows.begin) * part.columns.size());
  }
}

void SafetensorsReader::read_elements(const SafetensorsEntry& entry, Range elements, const Tensor& into,
                                      int64_t at) const {
  const StoredType type = type_of(entry);
  const int64_t step = std::max<int64_t>(1, std::min(kBufferBytes / type.bytes, elements.size()));
  std::vector<std::byte> buffer(static_cast<size_t>(step * type.bytes));
  for (int64_t begin = elements.begin; begin < elements.end; begin += step) {
    const int64_t count = std::min(step, elements.end - begin);
    const std::span<std::byte> bytes(buffer.data(), static_cast<size_t>(count * type.bytes));
    file_->read(entry.bytes.begin + begin * type.bytes, bytes);
    convert_elements(type, bytes, into, at + begin - elements.begin);
  }
}

SafetensorsWriter::SafetensorsWriter(FileSystem& files, const std::filesystem::path& path,
                                     std::vector<SafetensorsPlan> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : files_(files), path_(path), temporary_(path.string() + ".tmp"), order_(std::move(tensors)) {
  const auto key = [](const SafetensorsPlan& t) {
    return std::pair(order_of(t.dtype), std::string_view(t.name));
  };
  std::sort(order_.begin(), order_.end(), [&](const auto& a, const auto& b) { return key(a) < key(b); });
  std::vector<std::string_view> names;
  for (const SafetensorsPlan& tensor : order_) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  NF_CHECK(twice == names.end(), "two tensors named '{}'", *twice);
  if (files_.exists(temporary_)) files_.remove_file(temporary_);
  file_ = files_.create(temporary_);
  file_->append(as_bytes(make_safetensors_header(order_, metadata)));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_ == nullptr) return;
  file_.reset();
  try {
    files_.remove_file(temporary_);
  } catch (const IoError&) {
    // Nothing more can be done about a file that cannot even be removed; the next writer replaces it.
  }
}

void SafetensorsWriter::write(std::string_view name, const Tensor& tensor) {
  NF_CHECK(file_ != nullptr && written_ < order_.size() && order_[written_].name == name,
           "tensor '{}' is not the next of {}", name, path_.string());
  const SafetensorsPlan& plan = order_[written_];
  const int64_t count = plan.shape.numel();
  NF_CHECK(tensor.numel() == count, "{} written as '{}' of {}", to_string(tensor), name,
           to_string(plan.shape));
  const std::span<const std::byte> source(static_cast<const std::byte*>(tensor.raw()),
                                          static_cast<size_t>(tensor.nbytes()));
  ++written_;
  if (tensor.dtype() == plan.dtype) {
    file_->append(source);
    return;
  }
  Context context(DeviceKind::cpu);
  const int64_t step = std::max<int64_t>(1, std::min(count, kBufferBytes / size_of(plan.dtype)));
  const Tensor buffer = context.empty({step}, plan.dtype, MemoryUse::workspace);
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t part = std::min(step, count - begin);
    copy(context, tensor.flat(begin, part), buffer.flat(0, part));
    file_->append(
        {static_cast<const std::byte*>(buffer.raw()), static_cast<size_t>(part * size_of(plan.dtype))});
  }
}

void SafetensorsWriter::finish() {
  NF_CHECK(file_ != nullptr && written_ == order_.size(), "{} of {} tensors of {} were written", written_,
           order_.size(), path_.string());
  file_->sync();
  file_->close();
  files_.rename(temporary_, path_);
  file_.reset();
  files_.sync_folder(path_.has_parent_path() ? path_.parent_path() : std::filesystem::path("."));
}

}  // namespace normformer
