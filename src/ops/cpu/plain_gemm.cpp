#include <algorithm>
#include <vector>

#include "normformer/core/error.h"

#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu {

namespace {

template <class In, class Out>
void plain_gemm(const GemmShape& s, const In* a, const In* b, const Out* bias, Out* c) {
  using A = Accumulator<In>;
  std::vector<A> sums(static_cast<size_t>(s.n));
  for (int64_t i = 0; i < s.m; ++i) {
    Out* row = c + i * s.ldc;
    std::fill(sums.begin(), sums.end(), A{0});
    for (int64_t p = 0; p < s.k; ++p) {
      const auto factor = static_cast<A>(s.transpose_a ? a[p * s.lda + i] : a[i * s.lda + p]);
      const In* other = s.transpose_b ? b + p : b + p * s.ldb;
      const int64_t step = s.transpose_b ? s.ldb : 1;
      for (int64_t j = 0; j < s.n; ++j)
        sums[static_cast<size_t>(j)] += factor * static_cast<A>(other[j * step]);
    }
    for (int64_t j = 0; j < s.n; ++j) {
      A sum = sums[static_cast<size_t>(j)];
      if (bias != nullptr) sum += static_cast<A>(bias[j]);
      if (s.accumulate) sum += static_cast<A>(row[j]);
      row[j] = static_cast<Out>(sum);
    }
  }
}

}  // namespace

void gemm(const GemmShape& shape, const double* a, const double* b, const double* bias, double* c) {
  plain_gemm(shape, a, b, bias, c);
}

void gemm(const GemmShape& shape, const float* a, const float* b, const float* bias, float* c) {
  plain_gemm(shape, a, b, bias, c);
}

void gemm(const GemmShape& shape, const bf16* a, const bf16* b, const bf16* bias, bf16* c) {
  NF_CHECK(!shape.accumulate, "sums are not kept in bf16");
  plain_gemm(shape, a, b, bias, c);
}

void gemm(const GemmShape& shape, const bf16* a, const bf16* b, const float* bias, float* c) {
  plain_gemm(shape, a, b, bias, c);
}

std::string describe_gemm() { return "plain loops"; }

bool gemm_has_native_bf16() { return false; }

}  // namespace normformer::ops::cpu
