#pragma once

// For .cu files: the instructions of tensor cores and of asynchronous copies (sm_80 and up), which C++ has no
// words for. Where nvcc does not compile, the same is computed from what all lanes of the warp hand in. Every
// lane must call load_matrices, load_matrices_transposed and multiply_add.
// E is bf16 or f16. Source: NVIDIA, "PTX ISA", sections on mma.m16n8k16, ldmatrix, cp.async and cvt.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "tensor/cuda/kernel.h"

namespace normformer::cuda {

namespace detail {

#ifndef __CUDACC__
inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

inline uint32_t join(uint16_t first, uint16_t second) { return first | uint32_t{second} << 16; }

template <class E>
float half_of(uint32_t pair, int second) {
  E x;
  x.bits = static_cast<uint16_t>(second != 0 ? pair >> 16 : pair);
  return static_cast<float>(x);
}

/// The addresses that the lanes gave, of rows of four matrices.
template <class E>
struct MatrixRows {
  const E* rows[kWarp];
};

template <class E>
MatrixRows<E> gather_rows(const E* row) {
  MatrixRows<E> all;
  simt::warp_exchange(&row, sizeof(row), all.rows);
  return all;
}
#else
__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

}  // namespace detail

/// Four matrices of 8 x 8 from shared memory. Lane l says where row l % 8 of matrix l / 8 begins, aligned to
/// 16 bytes, and gets of each matrix elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
template <class E>
__device__ void load_matrices(const E* row, uint32_t (&to)[4]) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(detail::shared_address(row))
               : "memory");
#else
  const auto all = detail::gather_rows(row);
  for (int i = 0; i < 4; ++i) {
    const E* mine = all.rows[8 * i + detail::lane() / 4] + detail::lane() % 4 * 2;
    to[i] = detail::join(mine[0].bits, mine[1].bits);
  }
#endif
}

/// The same of the transposed matrices: elements of column l / 4, in rows 2 (l % 4) and 2 (l % 4) + 1.
template <class E>
__device__ void load_matrices_transposed(const E* row, uint32_t (&to)[4]) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(detail::shared_address(row))
               : "memory");
#else
  const auto all = detail::gather_rows(row);
  for (int i = 0; i < 4; ++i) {
    const int first = 8 * i + detail::lane() % 4 * 2;
    to[i] =
        detail::join(all.rows[first][detail::lane() / 4].bits, all.rows[first + 1][detail::lane() / 4].bits);
  }
#endif
}

/// sums += a b, of a [16, 16] and b [16, 8] in E and sums in fp32. With g = lane / 4 and t = 2 (lane % 4)
/// a lane has: of a, pairs of columns t, t + 1 in rows g and g + 8, then of columns t + 8, t + 9 in the same;
/// of b, column g in rows t, t + 1, then t + 8, t + 9; of sums, columns t, t + 1 in row g, then in row g + 8.
template <class E>
__device__ void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sums)[4]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<E, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  struct Operands {
    uint32_t a[4];
    uint32_t b[2];
  };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* all = static_cast<const Operands*>(simt::warp_view(&mine, sizeof(mine)));
  for (int i = 0; i < 4; ++i) {
    const int row = detail::lane() / 4 * 4;  // the first of the lanes that have it
    const int column = (detail::lane() % 4 * 2 + i % 2) * 4;
    float product = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float x = detail::half_of<E>(all[row + k % 8 / 2].a[i / 2 + k / 8 * 2], k % 2);
      product += x * detail::half_of<E>(all[column + k % 8 / 2].b[k / 8], k % 2);
    }
    sums[i] += product;
  }
#endif
}

/// Two numbers rounded to nearest even, the first in the lower half.
template <class E>
__device__ uint32_t pack_pair(float first, float second) {
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (std::is_same_v<E, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return detail::join(E(first).bits, E(second).bits);
#endif
}

/// The same to an address aligned to 4 bytes.
template <class E>
__device__ void store_pair(float first, float second, E* to) {
#ifdef __CUDACC__
  *reinterpret_cast<uint32_t*>(to) = pack_pair<E>(first, second);
#else
  to[0] = E(first);
  to[1] = E(second);
#endif
}

/// 2^x to about 2 units in the last place; what is below the normal numbers is 0.
__device__ inline float exp2_quickly(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

/// Begins to copy 4 or 16 bytes from global to shared memory, both addresses aligned to as many; zeros where
/// `there` is false, and nothing is read.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, bool there) {
  static_assert(kBytes == 4 || kBytes == 16);
#ifdef __CUDACC__
  const uint32_t bytes = there ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(detail::shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
#else
  if (there)
    std::memcpy(to, from, kBytes);
  else
    std::memset(to, 0, kBytes);
#endif
}

/// Waits for all copies that this thread began.
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace normformer::cuda
