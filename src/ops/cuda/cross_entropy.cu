#include <algorithm>
#include <cmath>
#include <limits>

#include "normformer/ops/cross_entropy.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dispatch_accumulator.h"
#include "ops/kernels.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

namespace {

constexpr int kThreads = 256;  // of a block, which takes one row

/// Calls body(c, values) for columns c ... c + N - 1 of a row, all of them shared by the block's threads.
/// Several packs are read before the first is used; body may overwrite the columns that it gets.
template <int N, class T, class Body>
__device__ void for_packs(const T* row, int64_t columns, Body&& body) {
  constexpr int kAhead = 4;
  constexpr int64_t kStep = int64_t{kThreads} * N;
  for (int64_t c = int64_t{threadIdx.x} * N; c < columns; c += kAhead * kStep) {
    Accumulator<T> values[kAhead][N] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (c + a * kStep < columns) load_pack<N>(row + c + a * kStep, values[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (c + a * kStep < columns) body(c + a * kStep, values[a]);
    }
  }
}

/// Writes the largest of the values that a block's threads have.
template <class A>
__device__ void write_block_max(A largest, A* out) {
  __shared__ A of_warps[kThreads / kWarp];
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const A of_warp : of_warps) largest = std::fmax(largest, of_warp);
  *out = largest;
}

template <int N, class T>
__global__ void max_kernel(const T* logits, int64_t columns, Accumulator<T>* maxima) {
  using A = Accumulator<T>;
  A largest = -std::numeric_limits<A>::infinity();
  for_packs<N>(logits + int64_t{blockIdx.x} * columns, columns, [&](int64_t, const A(&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) largest = std::fmax(largest, x[i]);
  });
  write_block_max(largest, maxima + blockIdx.x);
}

template <int N, class T>
__global__ void first_max_kernel(const T* logits, int64_t columns, const Accumulator<T>* maxima,
                                 int64_t first_row, Accumulator<T>* ids) {
  using A = Accumulator<T>;
  const A maximum = maxima[blockIdx.x];
  A largest = -std::numeric_limits<A>::infinity();
  for_packs<N>(logits + int64_t{blockIdx.x} * columns, columns, [&](int64_t c, const A(&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (x[i] == maximum) largest = std::fmax(largest, -static_cast<A>(first_row + c + i));
    }
  });
  write_block_max(largest, ids + blockIdx.x);
}

template <int N, class T>
__global__ void sums_kernel(const T* logits, int64_t columns, const Accumulator<T>* maxima,
                            const int32_t* targets, int64_t first_row, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const int64_t r = blockIdx.x;
  const T* row = logits + r * columns;
  const A maximum = maxima[r];
  A sum = 0;
  for_packs<N>(row, columns, [&](int64_t, const A(&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += std::exp(x[i] - maximum);
  });
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const int64_t target = targets[r] - first_row;
  sums[2 * r] = sum;
  sums[2 * r + 1] = target >= 0 && target < columns ? widen(row[target]) - maximum : A{0};
}

template <class A>
__global__ void loss_kernel(const A* sums, A* nll, int64_t rows) {
  const int64_t r = global_thread();
  if (r < rows) nll[r] = std::log(sums[2 * r]) - sums[2 * r + 1];
}

template <int N, class T>
__device__ void clear_row(T* row, int64_t columns) {
  constexpr Accumulator<T> kZeros[N] = {};
  for (int64_t c = int64_t{threadIdx.x} * N; c < columns; c += int64_t{kThreads} * N) {
    store_pack<N>(kZeros, row + c);
  }
}

template <int N, class T>
__global__ void backward_kernel(T* logits, int64_t columns, const Accumulator<T>* maxima,
                                const Accumulator<T>* sums, const int32_t* targets, int64_t first_row,
                                const uint8_t* weights, Accumulator<T> factor) {
  using A = Accumulator<T>;
  const int64_t r = blockIdx.x;
  T* row = logits + r * columns;
  if (weights != nullptr && weights[r] == 0) return clear_row<N>(row, columns);
  const A maximum = maxima[r];
  const A scale = factor / sums[2 * r];
  const int64_t target = targets[r] - first_row;
  for_packs<N>(row, columns, [&](int64_t c, A(&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = std::exp(x[i] - maximum) * scale;
    if (target >= c && target < c + N) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] -= c + i == target ? factor : A{0};
    }
    store_pack<N>(x, row + c);
  });
}

LaunchShape block_per_row(const Tensor& logits) { return {.blocks = logits.dim(0), .threads = kThreads}; }

}  // namespace

void logits_max(Context& context, const Tensor& logits, const Tensor& maxima) {
  dispatch_floating(logits.dtype(), [&]<class T>() {
    constexpr int kN = kPack<T>;
    const T* in = logits.data<T>();
    const int64_t columns = logits.dim(1);
    const auto kernel = can_pack<kN>(columns, in) ? max_kernel<kN, T> : max_kernel<1, T>;
    launch(context, block_per_row(logits), kernel, in, columns, maxima.data<Accumulator<T>>());
  });
}

void logits_first_max(Context& context, const Tensor& logits, const Tensor& maxima, int64_t first_row,
                      const Tensor& ids) {
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const T* in = logits.data<T>();
    const int64_t columns = logits.dim(1);
    const auto kernel = can_pack<kN>(columns, in) ? first_max_kernel<kN, T> : first_max_kernel<1, T>;
    launch(context, block_per_row(logits), kernel, in, columns, maxima.data<A>(), first_row, ids.data<A>());
  });
}

void logits_sums(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& targets,
                 int64_t first_row, const Tensor& sums) {
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const T* in = logits.data<T>();
    const int64_t columns = logits.dim(1);
    const auto kernel = can_pack<kN>(columns, in) ? sums_kernel<kN, T> : sums_kernel<1, T>;
    launch(context, block_per_row(logits), kernel, in, columns, maxima.data<A>(), targets.data<int32_t>(),
           first_row, sums.data<A>());
  });
}

void cross_entropy(Context& context, const Tensor& sums, const Tensor& nll) {
  cpu::dispatch_accumulator(sums.dtype(), [&]<class A>() {
    const int64_t rows = sums.dim(0);
    const LaunchShape shape{.blocks = ceil_div(rows, int64_t{kThreads}), .threads = kThreads};
    launch(context, shape, loss_kernel<A>, sums.data<A>(), nll.data<A>(), rows);
  });
}

double weighted_sum(Context& context, const Tensor& values, const Tensor& weights) {
  // The host needs the sum, so it waits in any case; adding there keeps the order of tokens.
  return cpu::weighted_sum(context.host(), on_host(context, values),
                           weights ? on_host(context, weights) : weights);
}

void cross_entropy_backward(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                            const Tensor& targets, int64_t first_row, const Tensor& weights, double factor) {
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    T* in = logits.data<T>();
    const int64_t columns = logits.dim(1);
    const auto kernel = can_pack<kN>(columns, in) ? backward_kernel<kN, T> : backward_kernel<1, T>;
    launch(context, block_per_row(logits), kernel, in, columns, maxima.data<A>(), sums.data<A>(),
           targets.data<int32_t>(), first_row, weights ? weights.data<uint8_t>() : nullptr,
           static_cast<A>(factor));
  });
}

}  // namespace normformer::ops::cuda
