#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/core/file_system.h"

namespace normformer {

/// What stands for a rank's sudden death: no handler of errors knows it.
struct Killed {};

/// Another file system with a fault at one of its operations. Operations that change or sync something are
/// counted from 0, and reads with them.
class FailingFiles : public FileSystem {
 public:
  enum class Fault {
    none,         ///< only count
    error,        ///< the operation fails
    disk_full,    ///< it and everything later that needs space fails
    torn_error,   ///< half of what it appends is written, then it fails
    kill,         ///< this rank is gone before the operation
    torn_kill,    ///< this rank is gone after half of what the operation appends
    kill_behind,  ///< this rank is gone after the operation
  };

  FailingFiles(FileSystem& files, Fault fault, int64_t at) : files_(files), fault_(fault), at_(at) {}

  int64_t operations() const { return count_; }

  std::unique_ptr<WritableFile> create(const std::filesystem::path& path) override;
  std::unique_ptr<ReadableFile> open(const std::filesystem::path& path) override;
  bool exists(const std::filesystem::path& path) override;
  std::vector<std::string> list(const std::filesystem::path& folder) override;
  void make_folder(const std::filesystem::path& path) override;
  void rename(const std::filesystem::path& from, const std::filesystem::path& to) override;
  void sync_folder(const std::filesystem::path& folder) override;
  void remove_file(const std::filesystem::path& path) override;
  void remove_folder(const std::filesystem::path& path) override;

 private:
  class Writer;

  /// Runs one operation, or half of it, or lets it fail.
  template <class Body>
  auto perform(const std::filesystem::path& path, bool needs_space, Body&& body);
  void before(const std::filesystem::path& path, bool needs_space);
  void behind();

  FileSystem& files_;
  Fault fault_;
  int64_t at_;
  std::atomic<int64_t> count_ = 0;  // ranks may share these files
};

}  // namespace normformer
