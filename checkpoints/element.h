#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "normformer/tensor/tensor.h"

namespace normformer {

/// An element type as safetensors names it.
struct StoredType {
  std::string_view name;
  int64_t bytes = 0;           ///< of one element
  std::optional<DType> dtype;  ///< what reading gives; none where this program has no such type
};

/// The type of that name; none where safetensors has none such.
std::optional<StoredType> find_stored_type(std::string_view name);

/// The type that a tensor of `dtype` is stored as.
StoredType stored_type_of(DType dtype);

/// Whether elements of `from` can be read into a tensor of `to`.
bool is_convertible(const StoredType& from, DType to);

/// Elements of type `from`, in little-endian bytes, into into[at], into[at + 1], ..., rounded to nearest even
/// where the type is narrower. LogicError where the type is not convertible.
void convert_elements(const StoredType& from, std::span<const std::byte> source, const Tensor& into,
                      int64_t at);

}  // namespace normformer
