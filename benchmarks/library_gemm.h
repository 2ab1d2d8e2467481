#pragma once

#include <omp.h>

#include "normformer/tensor/context.h"

#include "ops/cpu/onednn.h"

namespace normformer::benchmarks {

/// One product by one call of the library, shared among `threads` threads of its own as nowhere else in this
/// program: the ceiling that our products are held against. b is row-major as in GemmShape; c of fp32, or of
/// b's type.
inline void library_gemm(int threads, const ops::cpu::GemmShape& shape, const Tensor& a, const Tensor& b,
                         const Tensor& c) {
  omp_set_num_threads(threads);
  if (a.dtype() == DType::f32) {
    ops::cpu::onednn::sgemm(shape, a.data<float>(), b.data<float>(), c.data<float>());
  } else if (c.dtype() == DType::f32) {
    const float* none = nullptr;
    ops::cpu::onednn::bf16_gemm(shape, a.data<bf16>(), b.data<bf16>(), none, c.data<float>());
  } else {
    const bf16* none = nullptr;
    ops::cpu::onednn::bf16_gemm(shape, a.data<bf16>(), b.data<bf16>(), none, c.data<bf16>());
  }
  omp_set_num_threads(1);
}

/// The shapes of a linear's three products, as ops::linear_* has them: x [n, k], w [m, k], y [n, m].
inline ops::cpu::GemmShape forward_shape(int64_t n, int64_t k, int64_t m) {
  return {.m = n, .n = m, .k = k, .lda = k, .ldb = k, .ldc = m, .transpose_b = true};
}
inline ops::cpu::GemmShape backward_input_shape(int64_t n, int64_t k, int64_t m) {
  return {.m = n, .n = k, .k = m, .lda = m, .ldb = k, .ldc = k};
}
inline ops::cpu::GemmShape backward_weight_shape(int64_t n, int64_t k, int64_t m) {
  return {.m = m, .n = k, .k = n, .lda = m, .ldb = k, .ldc = k, .transpose_a = true, .accumulate = true};
}

}  // namespace normformer::benchmarks
