#pragma once

// The language of kernels: its keywords, where a thread is, and how threads of a block meet.
//
// The threads of a block are fibers of one host thread, and blocks run one after another on it. Between two
// meetings threads run in an order that changes from one meeting to the next, so that kernels which forget to
// meet fail. Where some threads wait for others that never come, the launch ends in std::logic_error.

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "simt/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
// Blocks run one after another on a host thread, and several host threads may run blocks at once.
#define __shared__ static thread_local

inline thread_local constinit uint3 threadIdx{};
inline thread_local constinit uint3 blockIdx{};
inline thread_local constinit dim3 blockDim{};
inline thread_local constinit dim3 gridDim{};
inline constexpr int warpSize = 32;

namespace simt {

namespace detail {

/// The calling thread's number in its block, x running fastest.
inline thread_local constinit unsigned thread_number = 0;

/// What lanes of a warp meet for; all of them for the same.
enum class Meeting : uint8_t { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, vote, exchange };

/// The most bytes that a lane can hand to the others at one meeting.
inline constexpr size_t kMostBytes = 512;

/// Waits for the other threads of the block.
void wait_for_block(std::source_location where);

/// Waits for the other lanes of `mask`; every lane's `bytes` bytes, lane by lane, valid until the calling
/// lane meets others again. Those of lanes outside `mask` are arbitrary.
const void* meet(Meeting what, unsigned mask, const void* mine, size_t bytes, std::source_location where);

[[noreturn]] void bad_source_lane(int source, unsigned mask, std::source_location where);

template <class T>
T read_lane(Meeting what, unsigned mask, T value, int source, std::source_location where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "CUDA shuffles no such type");
  const auto* all = static_cast<const T*>(meet(what, mask, &value, sizeof(T), where));
  if ((mask >> source & 1u) == 0) bad_source_lane(source, mask, where);
  return all[source];
}

inline int lane() { return static_cast<int>(thread_number % 32u); }

}  // namespace detail

/// The dynamic shared memory of the running block, aligned to 128 bytes. All bits are set before each block.
void* dynamic_shared_memory();

/// For emulated warp instructions: every lane of the warp hands in `bytes` bytes (at most 512) and gets those
/// of all 32, lane by lane.
void warp_exchange(const void* mine, size_t bytes, void* all,
                   std::source_location where = std::source_location::current());

/// The same without the copy: valid until the calling lane meets others again.
inline const void* warp_view(const void* mine, size_t bytes,
                             std::source_location where = std::source_location::current()) {
  return detail::meet(detail::Meeting::exchange, ~0u, mine, bytes, where);
}

/// For emulated asynchronous copies: the bytes at `from`, zeros where it is null, arrive at `to` when the
/// calling thread waits. Until then all bits there are set.
void begin_copy(void* to, const void* from, size_t bytes);

/// Waits for all copies that the calling thread began.
void wait_for_copies();

}  // namespace simt

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  simt::detail::wait_for_block(where);
}

inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  simt::detail::meet(simt::detail::Meeting::sync, mask, nullptr, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const int first = simt::detail::lane() & ~(width - 1);
  return simt::detail::read_lane(simt::detail::Meeting::shuffle, mask, value, first + (source & (width - 1)),
                                 where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const int lane = simt::detail::lane();
  const int source = lane ^ lanes;
  return simt::detail::read_lane(simt::detail::Meeting::shuffle_xor, mask, value,
                                 source > (lane | (width - 1)) ? lane : source, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const int lane = simt::detail::lane();
  const int source = lane + static_cast<int>(lanes);
  return simt::detail::read_lane(simt::detail::Meeting::shuffle_down, mask, value,
                                 source > (lane | (width - 1)) ? lane : source, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 std::source_location where = std::source_location::current()) {
  const int lane = simt::detail::lane();
  const int source = lane - static_cast<int>(lanes);
  return simt::detail::read_lane(simt::detail::Meeting::shuffle_up, mask, value,
                                 source < (lane & ~(width - 1)) ? lane : source, where);
}

unsigned __ballot_sync(unsigned mask, int predicate,
                       std::source_location where = std::source_location::current());

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Of integers only: with floating-point numbers the result would depend on the order of threads.
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;
