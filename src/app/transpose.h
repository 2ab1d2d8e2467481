#pragma once

#include <cstdint>

#include "normformer/tensor/tensor.h"

namespace normformer {

/// Puts the matrix `from` [rows, columns] transposed into columns `at`, `at` + 1, ... of `into`, whose rows
/// have `width` elements. Both on the CPU and of one type, or LogicError.
void transpose(const Tensor& from, int64_t rows, int64_t columns, const Tensor& into, int64_t width,
               int64_t at);

}  // namespace normformer
