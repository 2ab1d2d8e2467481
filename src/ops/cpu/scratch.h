#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace normformer::ops::cpu {

/// Memory that a thread works in and keeps for its next piece of work; its contents are arbitrary. As large
/// as the caches at most, so outside the allocator's account.
class Scratch {
 public:
  /// Room for `count` elements, aligned for any vector; what was handed out before is gone.
  template <class T>
  T* take(int64_t count) {
    const auto bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      memory_.reset();
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(std::byte* block) const { ::operator delete(block, kAlignment); }
  };
  std::unique_ptr<std::byte, Release> memory_;
  size_t bytes_ = 0;
};

}  // namespace normformer::ops::cpu
