#pragma once

#include <cstdint>
#include <string>

#include "normformer/core/checked.h"
#include "normformer/tensor/dtype.h"

namespace normformer::ops::cpu {

/// A product of row-major matrices, c[m, n] = op(a)[m, k] op(b)[k, n], where op may transpose.
struct GemmShape {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t lda = 0;  ///< elements from one stored row of a to the next
  int64_t ldb = 0;
  int64_t ldc = 0;
  bool transpose_a = false;  ///< a is stored as [k, m]
  bool transpose_b = false;  ///< b is stored as [n, k]
  bool accumulate = false;   ///< c += instead of c =; never with c of 16 bits
  bool operator==(const GemmShape&) const = default;
};

/// The part rows x columns of a product, on the calling thread; k > 0. `bias` is a whole row, added before
/// the one rounding, or null. Whatever the part, an element has the same bits: they depend on its row of
/// op(a), its column of op(b) and the instruction set alone. So neither the number of threads nor the number
/// of tokens that are multiplied together shows in a result. For (In, Out): (double, double), (float, float),
/// (bf16, bf16), (bf16, float), (f16, f16) and (f16, float). Products of f16 have the bits of fp32 products
/// of the widened factors, rounded once.
template <class In, class Out>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const In* a, const In* b, const Out* bias,
               Out* c);

/// Columns of a part are best a multiple of this.
inline constexpr int64_t kGemmPanel = 32;

/// The instruction set that gemm_part() runs on: "AVX3", ...
std::string gemm_instructions();

/// Whether gemm_part() has instructions for bf16.
bool gemm_has_native_bf16();

}  // namespace normformer::ops::cpu
