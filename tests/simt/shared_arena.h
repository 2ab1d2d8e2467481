#pragma once

#include <cstddef>

namespace simt {

/// Where a block's dynamic shared memory lies, aligned to 128 bytes; its end, rounded up to as many, touches
/// a page that cannot be accessed.
class SharedArena {
 public:
  SharedArena();
  ~SharedArena();
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  /// Room for `bytes` bytes (at most 227 KiB) with all bits set.
  void prepare(size_t bytes);
  void* data() const { return data_; }

  /// Whether an address lies in the pages around it.
  bool guards(const void* address) const;

  /// Whether the 128 bytes in front and those between the end and the guard are as prepare() left them.
  bool intact() const;

 private:
  std::byte* begin_ = nullptr;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace simt
