#include "transpose.h"

#include <cstring>

#include "normformer/core/error.h"

namespace normformer {

void transpose(const Tensor& from, int64_t rows, int64_t columns, const Tensor& into, int64_t width,
               int64_t at) {
  NF_CHECK(from.dtype() == into.dtype() && from.numel() == rows * columns &&
               into.numel() == columns * width && at + rows <= width,
           "{} of {} x {} transposed into {} at {}", to_string(from), rows, columns, to_string(into), at);
  const auto bytes = static_cast<size_t>(size_of(from.dtype()));
  const auto* source = static_cast<const std::byte*>(from.raw());
  auto* target = static_cast<std::byte*>(into.raw());
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(target + static_cast<size_t>(c * width + at + r) * bytes,
                  source + static_cast<size_t>(r * columns + c) * bytes, bytes);
    }
  }
}

}  // namespace normformer
