#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include <cblas.h>

#include "normformer/core/error.h"

#include "ops/cpu/gemm.h"
#include "ops/cpu/onednn.h"

namespace normformer::ops::cpu {

namespace {

// The library would share every call among threads of its own.
void keep_blas_to_this_thread() {
  static std::once_flag once;
  std::call_once(once, [] { openblas_set_num_threads(1); });
}

template <class T>
void add_bias(const GemmShape& s, const T* bias, T* c) {
  for (int64_t i = 0; i < s.m; ++i) {
    T* row = c + i * s.ldc;
    for (int64_t j = 0; j < s.n; ++j) row[j] += bias[j];
  }
}

template <class T>
void set_rows(const GemmShape& s, const T* bias, T* c) {
  for (int64_t i = 0; i < s.m; ++i) {
    T* row = c + i * s.ldc;
    if (bias != nullptr)
      std::copy(bias, bias + s.n, row);
    else
      std::fill(row, row + s.n, T{});
  }
}

// True where there is nothing to multiply; then c holds its result already.
template <class T>
bool is_trivial(const GemmShape& s, const T* bias, T* c) {
  if (s.m == 0 || s.n == 0) return true;
  if (s.k != 0) return false;
  if (!s.accumulate)
    set_rows(s, bias, c);
  else if constexpr (!std::is_same_v<T, bf16>) {
    if (bias != nullptr) add_bias(s, bias, c);
  }
  return true;
}

int blas_int(int64_t n) {
  NF_CHECK(n <= std::numeric_limits<int>::max(), "{} is too large for the BLAS library", n);
  return static_cast<int>(n);
}

std::vector<float> widened(const bf16* from, int64_t rows, int64_t columns, int64_t ld) {
  std::vector<float> wide(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    std::transform(from + i * ld, from + i * ld + columns, wide.begin() + i * columns,
                   [](bf16 x) { return static_cast<float>(x); });
  }
  return wide;
}

// For processors without instructions for bf16: the same products, in fp32.
template <class Out>
void gemm_through_floats(const GemmShape& s, const bf16* a, const bf16* b, const Out* bias, Out* c) {
  GemmShape wide = s;
  wide.lda = s.transpose_a ? s.m : s.k;
  wide.ldb = s.transpose_b ? s.k : s.n;
  const std::vector<float> wide_a = widened(a, s.transpose_a ? s.k : s.m, wide.lda, s.lda);
  const std::vector<float> wide_b = widened(b, s.transpose_b ? s.n : s.k, wide.ldb, s.ldb);
  if constexpr (std::is_same_v<Out, float>) {
    gemm(wide, wide_a.data(), wide_b.data(), bias, c);
  } else {
    wide.ldc = s.n;
    std::vector<float> wide_c(static_cast<size_t>(s.m * s.n));
    const std::vector<float> wide_bias = bias == nullptr ? std::vector<float>{} : widened(bias, 1, s.n, s.n);
    gemm(wide, wide_a.data(), wide_b.data(), bias == nullptr ? nullptr : wide_bias.data(), wide_c.data());
    for (int64_t i = 0; i < s.m; ++i) {
      std::transform(wide_c.begin() + i * s.n, wide_c.begin() + (i + 1) * s.n, c + i * s.ldc,
                     [](float x) { return bf16(x); });
    }
  }
}

template <class Out>
void bf16_gemm(const GemmShape& s, const bf16* a, const bf16* b, const Out* bias, Out* c) {
  if (is_trivial(s, bias, c)) return;
  if (onednn::has_native_bf16())
    onednn::bf16_gemm(s, a, b, bias, c);
  else
    gemm_through_floats(s, a, b, bias, c);
}

}  // namespace

void gemm(const GemmShape& s, const double* a, const double* b, const double* bias, double* c) {
  if (is_trivial(s, bias, c)) return;
  keep_blas_to_this_thread();
  cblas_dgemm(CblasRowMajor, s.transpose_a ? CblasTrans : CblasNoTrans,
              s.transpose_b ? CblasTrans : CblasNoTrans, blas_int(s.m), blas_int(s.n), blas_int(s.k), 1.0, a,
              blas_int(s.lda), b, blas_int(s.ldb), s.accumulate ? 1.0 : 0.0, c, blas_int(s.ldc));
  if (bias != nullptr) add_bias(s, bias, c);
}

void gemm(const GemmShape& s, const float* a, const float* b, const float* bias, float* c) {
  if (is_trivial(s, bias, c)) return;
  onednn::sgemm(s, a, b, c);
  if (bias != nullptr) add_bias(s, bias, c);
}

void gemm(const GemmShape& s, const bf16* a, const bf16* b, const bf16* bias, bf16* c) {
  NF_CHECK(!s.accumulate, "sums are not kept in bf16");
  bf16_gemm(s, a, b, bias, c);
}

void gemm(const GemmShape& s, const bf16* a, const bf16* b, const float* bias, float* c) {
  bf16_gemm(s, a, b, bias, c);
}

std::string describe_gemm() { return onednn::describe(); }

bool gemm_has_native_bf16() { return onednn::has_native_bf16(); }

}  // namespace normformer::ops::cpu
