#include "shared_arena.h"

#include <algorithm>
#include <cstring>
#include <new>

#include <sys/mman.h>

namespace simt {

namespace {

constexpr size_t kAlignment = 128;
constexpr size_t kRoom = size_t{256} << 10;
constexpr size_t kPage = 4096;

}  // namespace

SharedArena::SharedArena() {
  void* mapped =
      mmap(nullptr, kPage + kRoom + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  begin_ = static_cast<std::byte*>(mapped) + kPage;
  mprotect(begin_, kRoom, PROT_READ | PROT_WRITE);
}

SharedArena::~SharedArena() { munmap(begin_ - kPage, kPage + kRoom + kPage); }

void SharedArena::prepare(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  bytes_ = bytes;
  data_ = begin_ + kRoom - rounded;
  std::memset(data_ - kAlignment, 0xFF, kAlignment + rounded);
}

bool SharedArena::guards(const void* address) const {
  const std::byte* end = begin_ + kRoom;
  return (address >= begin_ - kPage && address < begin_) || (address >= end && address < end + kPage);
}

bool SharedArena::intact() const {
  const auto untouched = [](std::byte b) { return b == std::byte{0xFF}; };
  return std::all_of(data_ - kAlignment, data_, untouched) &&
         std::all_of(data_ + bytes_, begin_ + kRoom, untouched);
}

}  // namespace simt
