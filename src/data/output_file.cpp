#include "output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <xxhash.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

[[noreturn]] void fail(std::string_view action, const std::filesystem::path& path) {
  throw IoError(fmt::format("cannot {} {}: {}", action, path.string(), system_reason()));
}

void sync_folder(const std::filesystem::path& folder) {
  const int descriptor = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail("open the folder", folder);
  const int result = fsync(descriptor);
  close(descriptor);
  if (result != 0) fail("sync the folder", folder);
}

}  // namespace

struct OutputFile::Hasher {
  Hasher() : state(XXH3_createState()) { XXH3_64bits_reset(state); }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  ~Hasher() { XXH3_freeState(state); }
  XXH3_state_t* state;
};

OutputFile::OutputFile(const std::filesystem::path& path)
    : path_(path), temporary_(path.string() + ".tmp"), hasher_(std::make_unique<Hasher>()) {
  descriptor_ = open(temporary_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("create", temporary_);
  buffer_.reserve(kBufferBytes);
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!published_) unlink(temporary_.c_str());
}

void OutputFile::write(std::span<const std::byte> bytes) {
  XXH3_64bits_update(hasher_->state, bytes.data(), bytes.size());
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  if (buffer_.size() >= kBufferBytes) flush();
}

void OutputFile::flush() {
  NF_CHECK(descriptor_ >= 0, "{} is already complete", path_.string());
  std::size_t done = 0;
  while (done < buffer_.size()) {
    const ssize_t written = ::write(descriptor_, buffer_.data() + done, buffer_.size() - done);
    if (written < 0) fail("write", temporary_);
    done += static_cast<std::size_t>(written);
  }
  buffer_.clear();
}

void OutputFile::complete() {
  flush();
  if (fsync(descriptor_) != 0) fail("sync", temporary_);
  const int descriptor = descriptor_;
  descriptor_ = -1;
  if (close(descriptor) != 0) fail("close", temporary_);
}

void OutputFile::publish() {
  NF_CHECK(descriptor_ < 0, "{} is not complete", path_.string());
  if (rename(temporary_.c_str(), path_.c_str()) != 0) fail("give its name to", path_);
  published_ = true;
  sync_folder(path_.has_parent_path() ? path_.parent_path() : std::filesystem::path("."));
}

uint64_t OutputFile::hash() const { return XXH3_64bits_digest(hasher_->state); }

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  OutputFile file(path);
  file.write(bytes);
  file.complete();
  file.publish();
}

}  // namespace normformer
