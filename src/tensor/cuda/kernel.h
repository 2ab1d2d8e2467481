#pragma once

// What kernels are written with. Only for .cu files.

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "normformer/tensor/dtype.h"

namespace normformer::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

/// The memory that a launch gave each block (LaunchShape::shared_bytes), aligned to 128 bytes.
template <class T>
__device__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char nf_dynamic_shared[];
  return reinterpret_cast<T*>(nf_dynamic_shared);
#else
  return static_cast<T*>(simt::dynamic_shared_memory());
#endif
}

/// An element in the type that it is computed with.
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return static_cast<float>(x); }
__device__ inline float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  return static_cast<float>(x);
#endif
}

/// Rounded once to nearest even; to the type itself nothing happens.
template <class T>
__device__ T narrow(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
#ifdef __CUDA_ARCH__
    T rounded;
    rounded.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return rounded;
#else
    return T(x);
#endif
  } else if constexpr (std::is_same_v<T, f16>) {
#ifdef __CUDA_ARCH__
    T rounded;
    rounded.bits = __half_as_ushort(__float2half_rn(x));
    return rounded;
#else
    return T(x);
#endif
  } else {
    return x;
  }
}

/// N consecutive elements that move in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

/// Elements of T in an access of 16 bytes.
template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

/// values = N elements from an address aligned to N of them (at most 16 bytes), or of T = float to as many
/// multiples of 16 bytes as N elements need.
template <int N, class T>
__device__ void load_pack(const T* from, Accumulator<T> (&values)[N]) {
  constexpr int kOne = N < kPack<T> ? N : kPack<T>;
#pragma unroll
  for (int first = 0; first < N; first += kOne) {
    const auto pack = *reinterpret_cast<const Pack<T, kOne>*>(from + first);
#pragma unroll
    for (int i = 0; i < kOne; ++i) values[first + i] = widen(pack.values[i]);
  }
}

/// The N values, each rounded once, to an address aligned as for load_pack.
template <int N, class T>
__device__ void store_pack(const Accumulator<T> (&values)[N], T* to) {
  constexpr int kOne = N < kPack<T> ? N : kPack<T>;
#pragma unroll
  for (int first = 0; first < N; first += kOne) {
    Pack<T, kOne> pack;
#pragma unroll
    for (int i = 0; i < kOne; ++i) pack.values[i] = narrow<T>(values[first + i]);
    *reinterpret_cast<Pack<T, kOne>*>(to + first) = pack;
  }
}

/// The sum over the warp's lanes, the same bits on every lane. Every lane must call.
template <class A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <class A>
__device__ A warp_max(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, distance);
    value = value < other ? other : value;
  }
  return value;
}

/// The sum over the block's threads, the same bits on every thread: lanes first, then warps in order. Every
/// thread of the block must call; blockDim.x is a multiple of kWarp, at most 1024.
template <class A>
__device__ A block_sum(A value) {
  __shared__ A sums[kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_sum(value);
  __syncthreads();  // sums of an earlier call have been read
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  A total = sums[0];
  for (int w = 1; w < warps; ++w) total += sums[w];
  return total;
}

/// The index of this thread among all threads of the launch's first dimension, and how many there are.
__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

/// Whether rows of `columns` elements that begin at these addresses can be read N elements at a time.
template <int N, class... Pointers>
bool can_pack(int64_t columns, Pointers... pointers) {
  const auto aligned = [](const auto* p) {
    constexpr auto kBytes = static_cast<uintptr_t>(N * sizeof(*p) < 16 ? N * sizeof(*p) : 16);
    return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
  };
  return columns % N == 0 && (aligned(pointers) && ...);
}

}  // namespace normformer::cuda
