#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace normformer {

/// A file being written from front to back, closed on destruction. What was appended is durable only once
/// sync() has returned. After an error the file must be considered lost: nothing may be retried on it,
/// because systems mark unwritten pages clean when an fsync fails.
class WritableFile {
 public:
  virtual ~WritableFile() = default;

  /// Sets disk space aside for a file of `bytes` bytes, so that a full disk is known before anything is
  /// written; does nothing where the file system cannot. Throws IoError.
  virtual void reserve(int64_t bytes) = 0;

  /// Writes all of `bytes` after what is there. Throws IoError.
  virtual void append(std::span<const std::byte> bytes) = 0;

  /// Returns once everything appended is on the disk. Throws IoError.
  virtual void sync() = 0;

  /// Closes the file and tells of errors that only closing shows. Throws IoError.
  virtual void close() = 0;
};

/// A file open for reading, closed on destruction.
class ReadableFile {
 public:
  virtual ~ReadableFile() = default;

  /// Its length in bytes when it was opened.
  virtual int64_t size() const = 0;

  /// Fills `into` with the bytes from `offset`. Throws IoError, also where the file ends before.
  virtual void read(int64_t offset, std::span<std::byte> into) const = 0;
};

/// The operations on files by which anything durable is written, so that tests can put a failing or a
/// crashing disk in their place. Every refusal is an IoError that names the file and the system's reason.
/// Safe from several threads.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  /// A new empty file; an existing one (a link too) is an error.
  virtual std::unique_ptr<WritableFile> create(const std::filesystem::path& path) = 0;

  /// An existing regular file; a link in the last place of the path is an error.
  virtual std::unique_ptr<ReadableFile> open(const std::filesystem::path& path) = 0;

  /// Whether something has this name.
  virtual bool exists(const std::filesystem::path& path) = 0;

  /// The names in a folder, sorted.
  virtual std::vector<std::string> list(const std::filesystem::path& folder) = 0;

  /// A new folder; its parent must exist.
  virtual void make_folder(const std::filesystem::path& path) = 0;

  /// Gives a file or folder another name at once; readers see the old or the new state.
  virtual void rename(const std::filesystem::path& from, const std::filesystem::path& to) = 0;

  /// Returns once the names in a folder are on the disk.
  virtual void sync_folder(const std::filesystem::path& folder) = 0;

  virtual void remove_file(const std::filesystem::path& path) = 0;

  /// Removes an empty folder.
  virtual void remove_folder(const std::filesystem::path& path) = 0;
};

/// The operating system's files.
std::unique_ptr<FileSystem> make_system_files();

/// The whole of a file of at most `limit` bytes. Throws IoError where it cannot be read and DataError where
/// it is longer.
std::string read_whole_file(FileSystem& files, const std::filesystem::path& path, int64_t limit);

/// Writes a file so that after a crash at any moment readers find all of it, or what was there before: a
/// temporary file beside it, its sync, its rename and the folder's sync. Throws IoError.
void write_durably(FileSystem& files, const std::filesystem::path& path, std::string_view content);

/// Makes a folder and those above it where they do not exist, each durable before the next. Throws IoError.
void make_folders(FileSystem& files, const std::filesystem::path& folder);

/// Removes a folder of plain files: it is renamed to ".del-<name>" beside it first, durably, so that no
/// crash leaves half of it under its name. Throws IoError.
void remove_folder_durably(FileSystem& files, const std::filesystem::path& folder);

/// Removes a folder and the plain files in it without that care. Throws IoError.
void remove_folder_and_files(FileSystem& files, const std::filesystem::path& folder);

/// The bytes of a text.
inline std::span<const std::byte> as_bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

}  // namespace normformer
