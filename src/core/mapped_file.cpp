#include "normformer/core/mapped_file.h"

#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int value) : value_(value) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (value_ >= 0) close(value_);
  }
  int get() const { return value_; }

 private:
  int value_;
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) throw IoError(fmt::format("cannot open {}: {}", path.string(), system_reason()));
  struct stat status {};
  if (fstat(file.get(), &status) != 0) {
    throw IoError(fmt::format("cannot read the size of {}: {}", path.string(), system_reason()));
  }
  if (!S_ISREG(status.st_mode)) throw IoError(fmt::format("{} is not a regular file", path.string()));
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;  // mmap refuses a length of 0
  void* const address = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.get(), 0);
  if (address == MAP_FAILED) {
    throw IoError(fmt::format("cannot map {} into memory: {}", path.string(), system_reason()));
  }
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    release();
    path_ = std::move(other.path_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

MappedFile::~MappedFile() { release(); }

void MappedFile::release() noexcept {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
  data_ = nullptr;
}

void MappedFile::expect_sequential_reading() const {
  if (data_ != nullptr) madvise(const_cast<std::byte*>(data_), size_, MADV_SEQUENTIAL);
}

std::string read_small_file(const std::filesystem::path& path, std::size_t limit, std::string_view what) {
  const MappedFile file(path);
  if (file.size() > limit) {
    throw DataError(fmt::format("{} {} has {} bytes; {} is the most that is accepted", what, path.string(),
                                file.size(), limit));
  }
  return std::string(file.text());
}

}  // namespace normformer
