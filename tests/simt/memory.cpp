#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include <fmt/format.h>
#include <sys/mman.h>

#include "simt/control.h"

namespace simt {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 16;
constexpr size_t kMostFilled = size_t{64} << 20;
constexpr size_t kMostKept = 256;  // mappings of freed blocks

size_t round_up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

struct Block {
  std::byte* mapping = nullptr;
  size_t mapped = 0;
  size_t bytes = 0;
  size_t counted = 0;  ///< how much of the device's memory it takes
  Place place = Place::device;
};

class Memory {
 public:
  void* allocate(size_t bytes, Place place);
  bool deallocate(void* block, Place place);
  Location locate(const void* begin, size_t bytes) const;
  size_t free() const;
  size_t total() const;
  void set_total(size_t bytes);
  std::string describe(const std::byte* address) const;

 private:
  void retire(const Block& block);

  mutable std::mutex mutex_;
  std::map<uintptr_t, Block> blocks_;
  // Freed blocks keep their addresses for a while, so that accesses to them fault.
  std::deque<std::pair<std::byte*, size_t>> retired_;
  size_t total_ = size_t{64} << 30;
  size_t used_ = 0;
};

Memory& memory() {
  static Memory all;
  return all;
}

void* Memory::allocate(size_t bytes, Place place) {
  const size_t counted = place == Place::device && !dry_run() ? bytes : 0;
  {
    const std::lock_guard lock(mutex_);
    if (counted > total_ - std::min(used_, total_)) return nullptr;
    used_ += counted;
  }
  const size_t room = round_up(bytes, kAlignment);
  const size_t pages = round_up(room, kPage);
  void* mapped =
      mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* mapping = static_cast<std::byte*>(mapped);
  mprotect(mapping + kPage, pages, PROT_READ | PROT_WRITE);
  std::byte* begin = mapping + kPage + pages - room;
  if (place == Place::device && bytes <= kMostFilled && !dry_run()) {
    std::memset(mapping + kPage, 0xFF, pages);
  } else {
    std::memset(begin + bytes, 0xFF, room - bytes);
  }
  const std::lock_guard lock(mutex_);
  blocks_[reinterpret_cast<uintptr_t>(begin)] = {mapping, pages + 2 * kPage, bytes, counted, place};
  return begin;
}

bool Memory::deallocate(void* block, Place place) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(reinterpret_cast<uintptr_t>(block));
  if (found == blocks_.end() || found->second.place != place) return false;
  const Block b = found->second;
  const auto* end = static_cast<std::byte*>(block) + b.bytes;
  const auto* guard = b.mapping + b.mapped - kPage;
  if (!std::all_of(end, guard, [](std::byte x) { return x == std::byte{0xFF}; })) {
    std::fprintf(stderr, "simt: something wrote past the end of the %zu bytes at %p\n", b.bytes, block);
    std::abort();
  }
  used_ -= b.counted;
  blocks_.erase(found);
  retire(b);
  return true;
}

void Memory::retire(const Block& block) {
  // A new mapping over the old one gives the memory back.
  mmap(block.mapping, block.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
  retired_.emplace_back(block.mapping, block.mapped);
  if (retired_.size() > kMostKept) {
    munmap(retired_.front().first, retired_.front().second);
    retired_.pop_front();
  }
}

Location Memory::locate(const void* begin, size_t bytes) const {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const std::lock_guard lock(mutex_);
  auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return {};
  const auto& [start, block] = *std::prev(after);
  if (address > start + block.bytes) return {};
  return {block.place, address + bytes <= start + block.bytes};
}

size_t Memory::free() const {
  const std::lock_guard lock(mutex_);
  return total_ - std::min(used_, total_);
}

size_t Memory::total() const {
  const std::lock_guard lock(mutex_);
  return total_;
}

void Memory::set_total(size_t bytes) {
  const std::lock_guard lock(mutex_);
  total_ = bytes;
}

std::string Memory::describe(const std::byte* address) const {
  // The lock is busy where the fault is in this file.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return "";
  for (const auto& [begin, block] : blocks_) {
    if (address < block.mapping || address >= block.mapping + block.mapped) continue;
    return fmt::format(": {} the {} bytes at {:#x}",
                       address < block.mapping + kPage ? "in front of" : "behind", block.bytes, begin);
  }
  const bool freed = std::any_of(retired_.begin(), retired_.end(), [=](const auto& mapping) {
    return address >= mapping.first && address < mapping.first + mapping.second;
  });
  return freed ? ": in memory that was freed" : "";
}

}  // namespace

void* allocate(size_t bytes, Place place) { return memory().allocate(bytes, place); }
bool deallocate(void* block, Place place) { return memory().deallocate(block, place); }
Location locate(const void* begin, size_t bytes) { return memory().locate(begin, bytes); }
std::string describe_address_of_memory(const void* address) {
  return memory().describe(static_cast<const std::byte*>(address));
}
size_t free_memory() { return memory().free(); }
size_t total_memory() { return memory().total(); }
void set_device_memory(size_t bytes) { memory().set_total(bytes); }

}  // namespace simt
