#include "normformer/tensor/tensor.h"

#include <algorithm>
#include <cstring>

#include <fmt/ranges.h>

namespace normformer {

Shape::Shape(std::initializer_list<int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  NF_CHECK(rank_ <= kMaxRank, "a tensor of {} dimensions", rank_);
  for (const int64_t d : dims) NF_CHECK(d >= 0, "an extent of {}", d);
  std::copy(dims.begin(), dims.end(), dims_.begin());
}

int64_t Shape::operator[](int i) const {
  const int index = i < 0 ? i + rank_ : i;
  NF_CHECK(index >= 0 && index < rank_, "dimension {} of {}", i, to_string(*this));
  return dims_[static_cast<size_t>(index)];
}

int64_t Shape::numel() const {
  int64_t product = 1;
  for (const int64_t d : dims()) product = checked_mul(product, d);
  return product;
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape.dims(), ", ")); }

Storage::Storage(std::shared_ptr<Allocator> allocator, int64_t bytes, MemoryUse use)
    : allocator_(std::move(allocator)), bytes_(bytes), use_(use), data_(allocator_->allocate(bytes, use)) {}

Storage::~Storage() { allocator_->release(data_, bytes_, use_); }

Tensor::Tensor(std::shared_ptr<Storage> storage, int64_t byte_offset, Shape shape, DType dtype,
               DeviceKind device)
    : storage_(std::move(storage)), byte_offset_(byte_offset), shape_(shape), dtype_(dtype), device_(device) {
  NF_CHECK(byte_offset >= 0 && byte_offset + nbytes() <= storage_->bytes(),
           "{} at byte {} leaves its storage of {}", to_string(shape), byte_offset, storage_->bytes());
}

void Tensor::check_access(DType wanted) const {
  NF_CHECK(defined(), "an undefined tensor was read");
  NF_CHECK(dtype_ == wanted, "{} was read as {}", to_string(*this), name_of(wanted));
}

void* Tensor::raw() const {
  NF_CHECK(defined(), "an undefined tensor was read");
  NF_CHECK(device_ != DeviceKind::meta, "{} has no memory: it is on the meta device", to_string(*this));
  return static_cast<std::byte*>(storage_->data()) + byte_offset_;
}

void* Tensor::host_raw() const {
  NF_CHECK(device_ != DeviceKind::cuda, "{} is on a GPU, and was read as if it were on the host",
           to_string(*this));
  return raw();
}

void Tensor::copy_out(void* host) const {
  if (numel() == 0) return;
  if (device_ == DeviceKind::cuda) {
    gpu()->copy_out(host, raw(), nbytes());
  } else {
    std::memcpy(host, raw(), static_cast<size_t>(nbytes()));
  }
}

void Tensor::copy_in(const void* host) const {
  if (numel() == 0) return;
  if (device_ == DeviceKind::cuda) {
    gpu()->copy_in(raw(), host, nbytes());
  } else {
    std::memcpy(raw(), host, static_cast<size_t>(nbytes()));
  }
}

Tensor Tensor::view(Shape shape) const {
  NF_CHECK(shape.numel() == numel(), "{} viewed as {}", to_string(*this), to_string(shape));
  return at(0, shape);
}

Tensor Tensor::rows(int64_t begin, int64_t end) const {
  NF_CHECK(shape_.rank() >= 1 && begin >= 0 && begin <= end && end <= dim(0), "rows {}..{} of {}", begin, end,
           to_string(*this));
  std::array<int64_t, Shape::kMaxRank> dims{};
  std::copy(shape_.dims().begin(), shape_.dims().end(), dims.begin());
  dims[0] = end - begin;
  const int64_t row = dim(0) == 0 ? 0 : numel() / dim(0);
  return at(begin * row, Shape(std::span<const int64_t>(dims.data(), shape_.dims().size())));
}

Tensor Tensor::flat(int64_t offset, int64_t count) const { return at(offset, {count}); }

Tensor Tensor::at(int64_t offset, Shape shape) const {
  NF_CHECK(defined() && offset >= 0 && offset + shape.numel() <= numel(), "{} at {} of {}", to_string(shape),
           offset, to_string(*this));
  return Tensor(storage_, byte_offset_ + offset * size_of(dtype_), shape, dtype_, device_);
}

std::string to_string(const Tensor& tensor) {
  if (!tensor.defined()) return "undefined tensor";
  return fmt::format("{}{}", name_of(tensor.dtype()), to_string(tensor.shape()));
}

}  // namespace normformer
