#pragma once

#include <cstdint>
#include <string>

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
  bool accumulate = false;   ///< c += instead of c =
  bool operator==(const GemmShape&) const = default;
};

// Each runs on the calling thread alone, so that the threads of a rank's pool are the only ones; its bits
// depend on the shape only. `bias`, where not null, is added to every row before the one rounding.

void gemm(const GemmShape& shape, const double* a, const double* b, const double* bias, double* c);
void gemm(const GemmShape& shape, const float* a, const float* b, const float* bias, float* c);

/// Products of bf16 are exact in fp32, where they are summed. Never accumulates.
void gemm(const GemmShape& shape, const bf16* a, const bf16* b, const bf16* bias, bf16* c);
void gemm(const GemmShape& shape, const bf16* a, const bf16* b, const float* bias, float* c);

/// What these run on.
std::string describe_gemm();

/// Whether bf16 runs on instructions for it.
bool gemm_has_native_bf16();

}  // namespace normformer::ops::cpu
