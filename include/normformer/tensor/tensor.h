#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "normformer/core/checked.h"
#include "normformer/tensor/dtype.h"
#include "normformer/tensor/memory.h"

namespace normformer {

/// The extents of a tensor: up to four dimensions, row-major, the last one contiguous.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  explicit Shape(std::span<const int64_t> dims);

  int rank() const { return rank_; }
  /// Extent of dimension i; negative i counts from the end.
  int64_t operator[](int i) const;
  /// Product of the extents; 1 for rank 0.
  int64_t numel() const;
  std::span<const int64_t> dims() const { return {dims_.data(), static_cast<size_t>(rank_)}; }
  bool operator==(const Shape&) const = default;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

/// "[2, 3]"
std::string to_string(const Shape& shape);

/// A block of memory, returned to its allocator when the last tensor over it goes.
class Storage {
 public:
  Storage(std::shared_ptr<Allocator> allocator, int64_t bytes, MemoryUse use);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  const Allocator& allocator() const { return *allocator_; }

 private:
  std::shared_ptr<Allocator> allocator_;
  int64_t bytes_;
  MemoryUse use_;
  void* data_;
};

/// A shape and an element type over shared storage: a cheap value. Copying it shares the elements, as a
/// pointer does; constness is of the handle, not of the elements. Always contiguous. A default-made tensor is
/// undefined.
class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<Storage> storage, int64_t byte_offset, Shape shape, DType dtype, DeviceKind device);

  bool defined() const { return storage_ != nullptr; }
  explicit operator bool() const { return defined(); }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t numel() const { return shape_.numel(); }
  int64_t nbytes() const { return numel() * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  DeviceKind device() const { return device_; }

  /// The first element; LogicError where T is not the element type or the tensor has no memory (meta,
  /// undefined).
  template <class T>
  T* data() const {
    check_access(dtype_of<T>());
    return static_cast<T*>(raw());
  }

  /// The first byte, whatever the element type; LogicError on meta. On cuda no address of the host's.
  void* raw() const;

  /// As raw(), for the host to read or write: LogicError on cuda too.
  void* host_raw() const;

  /// Copies the elements' bytes out to the host, or in from it, whatever the device; `host` is nbytes() long.
  /// Waits for a GPU to finish what it was given before. LogicError on meta.
  void copy_out(void* host) const;
  void copy_in(const void* host) const;

  /// The same elements under another shape of as many.
  Tensor view(Shape shape) const;

  /// Entries [begin, end) of the first dimension, sharing memory.
  Tensor rows(int64_t begin, int64_t end) const;

  /// `count` elements from `offset` as a vector, sharing memory.
  Tensor flat(int64_t offset, int64_t count) const;

  /// `shape.numel()` elements from element `offset` as a tensor of `shape`, sharing memory.
  Tensor at(int64_t offset, Shape shape) const;

 private:
  void check_access(DType wanted) const;
  Gpu* gpu() const { return storage_->allocator().gpu(); }

  std::shared_ptr<Storage> storage_;
  int64_t byte_offset_ = 0;
  Shape shape_;
  DType dtype_ = DType::f32;
  DeviceKind device_ = DeviceKind::cpu;
};

/// "f32[2, 3]"
std::string to_string(const Tensor& tensor);

}  // namespace normformer
