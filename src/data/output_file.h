#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

namespace normformer {

/// A file being written under a temporary name: buffered, hashed as it goes, and given its name only when
/// complete. Destroyed before that, it leaves nothing behind.
class OutputFile {
 public:
  /// Creates "`path`.tmp". Throws IoError.
  explicit OutputFile(const std::filesystem::path& path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  /// Appends bytes. Throws IoError.
  void write(std::span<const std::byte> bytes);
  /// Writes what is buffered, syncs and closes. Throws IoError.
  void complete();
  /// Gives the completed file its name and syncs the folder. Throws IoError.
  void publish();

  /// The name that publish() gives.
  const std::filesystem::path& path() const { return path_; }
  /// XXH3-64 of everything written so far.
  uint64_t hash() const;

 private:
  struct Hasher;
  void flush();

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int descriptor_ = -1;
  bool published_ = false;
  std::vector<std::byte> buffer_;
  std::unique_ptr<Hasher> hasher_;
};

/// Writes a whole small file by way of OutputFile, so that readers see the old or the new one.
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);

}  // namespace normformer
