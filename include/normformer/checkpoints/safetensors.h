#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/core/file_system.h"
#include "normformer/tensor/context.h"
#include "normformer/tensor/rectangle.h"
#include "normformer/tensor/tensor.h"

namespace normformer {

/// One tensor of a safetensors file.
struct SafetensorsEntry {
  std::string name;
  Shape shape;
  /// What the file stores: "F32", "BF16", "F16", ...
  std::string stored_type;
  /// The type that read() gives. None where this program has no such type (I8, BOOL, ...); such a tensor is
  /// listed but cannot be read.
  std::optional<DType> dtype;
  /// Its bytes in the file.
  Range bytes;
};

/// A safetensors file (https://github.com/huggingface/safetensors) open for reading. The header is checked
/// completely before anything is read: at most 100 MB, no tensor named twice, offsets that follow one
/// another without hole or overlap and end with the file, sizes that agree with shapes. Tensors of more
/// than four dimensions are refused. Movable; tensors are read from the file on demand, through a small
/// buffer.
class SafetensorsReader {
 public:
  /// Throws IoError where the file cannot be read and DataError naming it where it breaks a rule.
  explicit SafetensorsReader(const std::filesystem::path& path);
  SafetensorsReader(FileSystem& files, const std::filesystem::path& path);
  SafetensorsReader(SafetensorsReader&&) noexcept = default;
  SafetensorsReader& operator=(SafetensorsReader&&) noexcept = default;
  ~SafetensorsReader();

  const std::filesystem::path& path() const { return path_; }

  /// Every tensor, in the order of their bytes.
  std::span<const SafetensorsEntry> tensors() const { return tensors_; }

  /// The texts of "__metadata__".
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  bool contains(std::string_view name) const;

  /// The tensor of that name; DataError naming the file and names that it has where there is none.
  const SafetensorsEntry& tensor(std::string_view name) const;

  /// DataError that tells both shapes where the tensor is no matrix of this size. A tensor [a] is the matrix
  /// [a, 1], [] is [1, 1], and [a, b, ...] is [a, b * ...].
  void expect(std::string_view name, int64_t rows, int64_t columns) const;

  /// The whole tensor, in the type of its entry.
  Tensor read(Context& context, std::string_view name, MemoryUse use = MemoryUse::parameters) const;

  /// The part `part` of a tensor into `into`, of part.numel() elements, row by row, converted to its type
  /// (between floating-point types, to nearest even; integers only to themselves). part.global_rows and
  /// part.global_columns are expected of it.
  void read(std::string_view name, const Rectangle& part, const Tensor& into) const;

 private:
  void read_elements(const SafetensorsEntry& entry, Range elements, const Tensor& into, int64_t at) const;

  std::filesystem::path path_;
  std::unique_ptr<ReadableFile> file_;
  std::vector<SafetensorsEntry> tensors_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, size_t, std::less<>> by_name_;
};

/// What a safetensors file will hold under one name.
struct SafetensorsPlan {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
};

/// Writes a safetensors file tensor by tensor, so that memory for one is enough. The file appears under its
/// name, complete and durable, with finish(); destroyed before that, the writer leaves nothing behind.
/// Tensors stand by type (I64, F64, F32, I32, BF16, F16, U8), then by name, as the safetensors library
/// writes them.
class SafetensorsWriter {
 public:
  /// Creates "`path`.tmp" and writes the header. LogicError where two tensors have one name. Throws IoError.
  SafetensorsWriter(FileSystem& files, const std::filesystem::path& path,
                    std::vector<SafetensorsPlan> tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  /// The tensors in the order in which write() wants them.
  std::span<const SafetensorsPlan> order() const { return order_; }

  /// The next tensor of order(), of as many elements, converted to its type (between floating-point types).
  /// LogicError where it is not the next. Throws IoError.
  void write(std::string_view name, const Tensor& tensor);

  /// Syncs the file and gives it its name. LogicError where a tensor is missing. Throws IoError.
  void finish();

 private:
  FileSystem& files_;
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::vector<SafetensorsPlan> order_;
  size_t written_ = 0;
  std::unique_ptr<WritableFile> file_;
};

}  // namespace normformer
