#include "normformer/core/file_system.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "normformer/core/activity.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr size_t kBlock = size_t{64} << 20;  // between two signs of activity

[[noreturn]] void fail(std::string_view action, const fs::path& path) {
  throw IoError(fmt::format("cannot {} {}: {}", action, path.string(), system_reason()));
}

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  int get() const { return value_; }
  int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};

/// Large files go past the system's cache (O_DIRECT), through one aligned buffer: that takes no time of the
/// processors for copying, and leaves the cache to what is read. Where the file system cannot, or a write has
/// ended at an odd place, the cache it is.
class SystemWritableFile : public WritableFile {
 public:
  SystemWritableFile(int descriptor, fs::path path) : descriptor_(descriptor), path_(std::move(path)) {}

  void reserve(int64_t bytes) override {
    if (bytes == 0) return;
    if (fallocate(descriptor_.get(), FALLOC_FL_KEEP_SIZE, 0, bytes) != 0) {
      const bool cannot = errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL;
      if (!cannot) fail("set space aside for", path_);
    }
    if (bytes >= kDirectFrom && set_direct(true)) {
      buffer_.reset(static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, kDirectBlock)));
    }
  }

  void append(std::span<const std::byte> bytes) override {
    if (buffer_ == nullptr) return write_all(bytes);
    while (!bytes.empty()) {
      const size_t part = std::min(bytes.size(), kDirectBlock - filled_);
      std::memcpy(buffer_.get() + filled_, bytes.data(), part);
      filled_ += part;
      bytes = bytes.subspan(part);
      if (filled_ == kDirectBlock) empty_buffer();
    }
  }

  void sync() override {
    end_direct();
    if (fsync(descriptor_.get()) != 0) fail("sync", path_);
  }

  void close() override {
    end_direct();
    if (::close(descriptor_.release()) != 0) fail("close", path_);
  }

 private:
  static constexpr int64_t kDirectFrom = int64_t{16} << 20;
  static constexpr size_t kDirectBlock = size_t{4} << 20;
  static constexpr size_t kDirectAlignment = 4096;

  bool set_direct(bool direct) {
    const int flags = fcntl(descriptor_.get(), F_GETFL);
    if (flags < 0 || fcntl(descriptor_.get(), F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) != 0)
      return false;
    is_direct_ = direct;
    return true;
  }

  void write_all(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(descriptor_.get(), bytes.data(), std::min(bytes.size(), kBlock));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0 && errno == EINVAL && is_direct_ && set_direct(false)) continue;
      if (written < 0) fail("write", path_);
      note_activity();
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
  }

  void empty_buffer() {
    write_all({buffer_.get(), filled_});
    filled_ = 0;
  }

  // The file's end need not be aligned.
  void end_direct() {
    if (buffer_ == nullptr) return;
    if (is_direct_) set_direct(false);
    empty_buffer();
    buffer_.reset();
  }

  Descriptor descriptor_;
  fs::path path_;
  std::unique_ptr<std::byte, FreeMemory> buffer_;  // null: without
  size_t filled_ = 0;
  bool is_direct_ = false;
};

class SystemReadableFile : public ReadableFile {
 public:
  SystemReadableFile(int descriptor, fs::path path) : descriptor_(descriptor), path_(std::move(path)) {
    struct stat status {};
    if (fstat(descriptor_.get(), &status) != 0) fail("read the size of", path_);
    if (!S_ISREG(status.st_mode)) throw IoError(fmt::format("{} is not a regular file", path_.string()));
    size_ = status.st_size;
  }

  int64_t size() const override { return size_; }

  void read(int64_t offset, std::span<std::byte> into) const override {
    while (!into.empty()) {
      const ssize_t got = pread(descriptor_.get(), into.data(), std::min(into.size(), kBlock), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail("read", path_);
      note_activity();
      if (got == 0) throw IoError(fmt::format("{} ends at byte {}", path_.string(), offset));
      into = into.subspan(static_cast<size_t>(got));
      offset += got;
    }
  }

 private:
  Descriptor descriptor_;
  fs::path path_;
  int64_t size_ = 0;
};

struct CloseFolder {
  void operator()(DIR* folder) const { closedir(folder); }
};

class SystemFiles : public FileSystem {
 public:
  std::unique_ptr<WritableFile> create(const fs::path& path) override {
    const int descriptor = ::open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (descriptor < 0) fail("create", path);
    return std::make_unique<SystemWritableFile>(descriptor, path);
  }

  std::unique_ptr<ReadableFile> open(const fs::path& path) override {
    // O_NONBLOCK: opening a pipe under a file's name must not wait for a writer.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0) fail("open", path);
    return std::make_unique<SystemReadableFile>(descriptor, path);
  }

  bool exists(const fs::path& path) override {
    struct stat status {};
    if (lstat(path.c_str(), &status) == 0) return true;
    if (errno != ENOENT && errno != ENOTDIR) fail("look for", path);
    return false;
  }

  std::vector<std::string> list(const fs::path& folder) override {
    const std::unique_ptr<DIR, CloseFolder> stream(opendir(folder.c_str()));
    if (stream == nullptr) fail("list", folder);
    std::vector<std::string> names;
    while (true) {
      errno = 0;
      const dirent* entry = readdir(stream.get());
      if (entry == nullptr) break;
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
    if (errno != 0) fail("list", folder);
    std::sort(names.begin(), names.end());
    return names;
  }

  void make_folder(const fs::path& path) override {
    if (mkdir(path.c_str(), 0777) != 0) fail("make the folder", path);
  }

  void rename(const fs::path& from, const fs::path& to) override {
    if (::rename(from.c_str(), to.c_str()) == 0) return;
    throw IoError(fmt::format("cannot rename {} to {}: {}", from.string(), to.string(), system_reason()));
  }

  void sync_folder(const fs::path& folder) override {
    const Descriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (descriptor.get() < 0) fail("open the folder", folder);
    if (fsync(descriptor.get()) != 0) fail("sync the folder", folder);
  }

  void remove_file(const fs::path& path) override {
    if (unlink(path.c_str()) != 0) fail("remove", path);
  }

  void remove_folder(const fs::path& path) override {
    if (rmdir(path.c_str()) != 0) fail("remove the folder", path);
  }
};

fs::path parent_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

}  // namespace

std::unique_ptr<FileSystem> make_system_files() { return std::make_unique<SystemFiles>(); }

std::string read_whole_file(FileSystem& files, const fs::path& path, int64_t limit) {
  const auto file = files.open(path);
  if (file->size() > limit) {
    throw DataError(
        fmt::format("{} has {} bytes; {} is the most that is accepted", path.string(), file->size(), limit));
  }
  std::string content(static_cast<size_t>(file->size()), '\0');
  file->read(0, std::as_writable_bytes(std::span(content)));
  return content;
}

void write_durably(FileSystem& files, const fs::path& path, std::string_view content) {
  const fs::path temporary = path.string() + ".tmp";
  if (files.exists(temporary)) files.remove_file(temporary);
  const auto file = files.create(temporary);
  file->append(as_bytes(content));
  file->sync();
  file->close();
  files.rename(temporary, path);
  files.sync_folder(parent_of(path));
}

void make_folders(FileSystem& files, const fs::path& folder) {
  if (!folder.has_filename() && folder.has_relative_path()) return make_folders(files, folder.parent_path());
  if (folder.empty() || files.exists(folder)) return;
  make_folders(files, folder.parent_path());
  files.make_folder(folder);
  files.sync_folder(parent_of(folder));
}

void remove_folder_durably(FileSystem& files, const fs::path& folder) {
  const fs::path parent = parent_of(folder);
  const fs::path doomed = parent / (".del-" + folder.filename().string());
  if (files.exists(doomed)) remove_folder_and_files(files, doomed);
  files.rename(folder, doomed);
  files.sync_folder(parent);
  remove_folder_and_files(files, doomed);
}

void remove_folder_and_files(FileSystem& files, const fs::path& folder) {
  for (const std::string& name : files.list(folder)) files.remove_file(folder / name);
  files.remove_folder(folder);
}

}  // namespace normformer
