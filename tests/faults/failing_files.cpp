#include "failing_files.h"

#include <cerrno>
#include <cstring>

#include "normformer/core/error.h"

namespace normformer {

namespace fs = std::filesystem;

void FailingFiles::before(const fs::path& path, bool needs_space) {
  const int64_t now = count_++;
  const bool dead = fault_ == Fault::kill || fault_ == Fault::torn_kill || fault_ == Fault::kill_behind;
  if (dead && (now > at_ || (now == at_ && fault_ == Fault::kill))) throw Killed();
  if (fault_ == Fault::error && now == at_) {
    throw IoError(fmt::format("cannot use {}: {}", path.string(), std::strerror(EIO)));
  }
  if (fault_ == Fault::disk_full && now >= at_ && needs_space) {
    throw IoError(fmt::format("cannot write {}: {}", path.string(), std::strerror(ENOSPC)));
  }
}

void FailingFiles::behind() {
  if (fault_ == Fault::kill_behind && count_ == at_ + 1) throw Killed();
}

template <class Body>
auto FailingFiles::perform(const fs::path& path, bool needs_space, Body&& body) {
  before(path, needs_space);
  if constexpr (std::is_void_v<decltype(body())>) {
    body();
    behind();
  } else {
    auto result = body();
    behind();
    return result;
  }
}

class FailingFiles::Writer : public WritableFile {
 public:
  Writer(FailingFiles& files, std::unique_ptr<WritableFile> file, fs::path path)
      : files_(files), file_(std::move(file)), path_(std::move(path)) {}

  void reserve(int64_t bytes) override {
    files_.perform(path_, true, [&] { file_->reserve(bytes); });
  }

  void append(std::span<const std::byte> bytes) override {
    files_.before(path_, true);
    const bool torn = (files_.fault_ == Fault::torn_error || files_.fault_ == Fault::torn_kill) &&
                      files_.count_ == files_.at_ + 1;
    file_->append(bytes.first(torn ? bytes.size() / 2 : bytes.size()));
    if (torn && files_.fault_ == Fault::torn_kill) throw Killed();
    if (torn) throw IoError(fmt::format("cannot write {}: {}", path_.string(), std::strerror(ENOSPC)));
    files_.behind();
  }

  void sync() override {
    files_.perform(path_, false, [&] { file_->sync(); });
  }

  void close() override {
    files_.perform(path_, false, [&] { file_->close(); });
  }

 private:
  FailingFiles& files_;
  std::unique_ptr<WritableFile> file_;
  fs::path path_;
};

std::unique_ptr<WritableFile> FailingFiles::create(const fs::path& path) {
  return perform(path, true, [&]() -> std::unique_ptr<WritableFile> {
    return std::make_unique<Writer>(*this, files_.create(path), path);
  });
}

std::unique_ptr<ReadableFile> FailingFiles::open(const fs::path& path) {
  return perform(path, false, [&] { return files_.open(path); });
}

bool FailingFiles::exists(const fs::path& path) {
  return perform(path, false, [&] { return files_.exists(path); });
}

std::vector<std::string> FailingFiles::list(const fs::path& folder) {
  return perform(folder, false, [&] { return files_.list(folder); });
}

void FailingFiles::make_folder(const fs::path& path) {
  perform(path, true, [&] { files_.make_folder(path); });
}

void FailingFiles::rename(const fs::path& from, const fs::path& to) {
  perform(from, false, [&] { files_.rename(from, to); });
}

void FailingFiles::sync_folder(const fs::path& folder) {
  perform(folder, false, [&] { files_.sync_folder(folder); });
}

void FailingFiles::remove_file(const fs::path& path) {
  perform(path, false, [&] { files_.remove_file(path); });
}

void FailingFiles::remove_folder(const fs::path& path) {
  perform(path, false, [&] { files_.remove_folder(path); });
}

}  // namespace normformer
