#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace normformer {

/// A whole file mapped read-only into memory, owned: the bytes live as long as the object. Movable.
/// The file must not be shortened while it is mapped; the system would end the process with SIGBUS.
class MappedFile {
 public:
  /// Maps `path`. Throws IoError where it cannot be opened, is not a regular file or cannot be mapped.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::filesystem::path& path() const { return path_; }
  std::size_t size() const { return size_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// The same bytes as characters.
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  /// Tells the system that the file is about to be read once from front to back.
  void expect_sequential_reading() const;

 private:
  void release() noexcept;

  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// The whole of a file of at most `limit` bytes. Throws IoError where it cannot be read and DataError where
/// it is larger; `what` names the kind of file in that sentence ("the vocabulary").
std::string read_small_file(const std::filesystem::path& path, std::size_t limit, std::string_view what);

}  // namespace normformer
