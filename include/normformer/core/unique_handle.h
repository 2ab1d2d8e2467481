#pragma once

#include <concepts>
#include <utility>

namespace normformer {

/// What UniqueHandle must know of a kind of C handle: its type, the value that means none, how to close one.
/// close() never throws.
template <class Traits>
concept HandleTraits = requires(typename Traits::Handle handle) {
  { Traits::none() } -> std::same_as<typename Traits::Handle>;
  { Traits::close(handle) }
  noexcept;
};

/// The sole owner of one C handle: the only way in which this program holds one. Moving leaves the source
/// empty; assigning closes what was held before.
template <HandleTraits Traits>
class UniqueHandle {
 public:
  using Handle = typename Traits::Handle;

  UniqueHandle() noexcept = default;
  explicit UniqueHandle(Handle handle) noexcept : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_(other.release()) {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    UniqueHandle taken(std::move(other));
    std::swap(handle_, taken.handle_);
    return *this;
  }
  UniqueHandle(const UniqueHandle&) = delete;
  UniqueHandle& operator=(const UniqueHandle&) = delete;
  ~UniqueHandle() {
    if (handle_ != Traits::none()) Traits::close(handle_);
  }

  Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != Traits::none(); }

  /// Gives the handle up without closing it.
  Handle release() noexcept { return std::exchange(handle_, Traits::none()); }

 private:
  Handle handle_ = Traits::none();
};

}  // namespace normformer
