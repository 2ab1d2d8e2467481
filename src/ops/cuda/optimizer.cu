#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "normformer/ops/optimizer.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dispatch_accumulator.h"
#include "ops/kernels.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 8;  // as many as a GPU holds at once
constexpr int kBins = OrderFreeSumOfSquares::kBins;

LaunchShape flat(int64_t items) {
  return {.blocks = std::clamp(ceil_div(items, int64_t{kThreads}), int64_t{1}, kMostBlocks),
          .threads = kThreads};
}

/// An update's scalars as every element needs them:
///   m = beta1 m + rest1 g, v = beta2 v + rest2 g^2, p = keep p - rate m / (sqrt(v) spread + eps).
template <class A>
struct Scalars {
  A grad_factor, beta1, rest1, beta2, rest2, keep, rate, spread, eps;

  explicit Scalars(const AdamW& step)
      : grad_factor(A(step.grad_factor)),
        beta1(A(step.beta1)),
        rest1(A(1.0 - step.beta1)),
        beta2(A(step.beta2)),
        rest2(A(1.0 - step.beta2)),
        keep(A(1.0 - step.lr * step.weight_decay)),
        eps(A(step.eps)) {
    const auto t = static_cast<double>(step.update);
    const double correction1 = 1.0 - std::pow(step.beta1, t);
    const double correction2 = std::sqrt(1.0 - std::pow(step.beta2, t));
    rate = A(step.lr / correction1 * (step.fairseq_eps ? correction2 : 1.0));
    spread = A(step.fairseq_eps ? 1.0 : 1.0 / correction2);
  }
};

/// What an update reads and writes. `params` may be null.
template <class Master, class T>
struct Shard {
  const Accumulator<T>* gradient;
  Master* master;
  Accumulator<T>* moment1;
  Accumulator<T>* moment2;
  T* params;
};

/// Updates elements i ... i + N - 1.
template <int N, class Master, class T>
__device__ void update(const Scalars<Accumulator<T>>& s, const Shard<Master, T>& shard, int64_t i) {
  using A = Accumulator<T>;
  A g[N], m[N], v[N], p[N];
  load_pack<N>(shard.gradient + i, g);
  load_pack<N>(shard.moment1 + i, m);
  load_pack<N>(shard.moment2 + i, v);
  load_pack<N>(shard.master + i, p);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g[j] *= s.grad_factor;
    m[j] = s.beta1 * m[j] + s.rest1 * g[j];
    v[j] = s.beta2 * v[j] + s.rest2 * (g[j] * g[j]);
    p[j] = s.keep * p[j] - s.rate * (m[j] / (std::sqrt(v[j]) * s.spread + s.eps));
  }
  store_pack<N>(m, shard.moment1 + i);
  store_pack<N>(v, shard.moment2 + i);
  store_pack<N>(p, shard.master + i);
  if (shard.params != nullptr) store_pack<N>(p, shard.params + i);
}

template <int N, class Master, class T>
__global__ void adamw_kernel(Scalars<Accumulator<T>> scalars, Shard<Master, T> shard, int64_t n) {
  const int64_t packs = n / N;
  for (int64_t p = global_thread(); p < packs; p += global_threads()) update<N>(scalars, shard, p * N);
  const int64_t rest = packs * N + global_thread();
  if (rest < n) update<1>(scalars, shard, rest);
}

/// Calls body(x) for the elements that are this thread's: N at a time, then what is left.
template <int N, class T, class Body>
__device__ void for_elements(const T* x, int64_t n, Body&& body) {
  const int64_t packs = n / N;
#pragma unroll 4
  for (int64_t p = global_thread(); p < packs; p += global_threads()) {
    Accumulator<T> values[N];
    load_pack<N>(x + p * N, values);
#pragma unroll
    for (int j = 0; j < N; ++j) body(values[j]);
  }
  const int64_t rest = packs * N + global_thread();
  if (rest < n) body(widen(x[rest]));
}

/// largest[block] = the largest |x| of what is the block's, or infinity where something is not finite.
template <int N, class T>
__global__ void absolute_max_kernel(const T* x, int64_t n, Accumulator<T>* largest) {
  using A = Accumulator<T>;
  A mine = 0;
  for_elements<N>(x, n, [&](A value) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    const A magnitude = std::fabs(value);
    mine = std::fmax(mine, magnitude < kInfinity ? magnitude : kInfinity);
  });
  __shared__ A of_warps[kThreads / kWarp];
  mine = warp_max(mine);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const A of_warp : of_warps) mine = std::fmax(mine, of_warp);
  largest[blockIdx.x] = mine;
}

/// sums[block] = the sums of |x| and of x^2 of what is the block's.
template <int N, class T>
__global__ void norm_sums_kernel(const T* x, int64_t n, double* sums) {
  double absolute = 0.0;
  double squares = 0.0;
  for_elements<N>(x, n, [&](T value) {
    const auto wide = static_cast<double>(value);
    absolute += std::fabs(wide);
    squares += wide * wide;
  });
  absolute = block_sum(absolute);
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  sums[int64_t{blockIdx.x} * 2] = absolute;
  sums[int64_t{blockIdx.x} * 2 + 1] = squares;
}

/// sums[0], sums[1] += those of all blocks. One block.
__global__ void add_block_sums_kernel(const double* of_blocks, int64_t blocks, double* sums) {
  for (int column = 0; column < 2; ++column) {
    double mine = 0.0;
    for (int64_t b = threadIdx.x; b < blocks; b += kThreads) mine += of_blocks[b * 2 + column];
    mine = block_sum(mine);
    if (threadIdx.x == 0) sums[column] += mine;
  }
}

/// The multiple of 2^(k - 52) nearest to x, where anchor is 1.5 * 2^k. Rounded addition by addition: a fused
/// or reordered one would not cut.
__device__ inline double cut(double x, double anchor) { return __dsub_rn(__dadd_rn(x, anchor), anchor); }

/// bins[block] = the cuts of the squares of what is the block's. Every addition to a bin is exact, so neither
/// the order nor the number of blocks shows.
template <int N, class T>
__global__ void cut_squares_kernel(const T* x, int64_t n, std::array<double, kBins> anchors, double* bins) {
  double mine[kBins] = {};
  for_elements<N>(x, n, [&](T value) {
    const auto wide = static_cast<double>(value);
    double left = __dmul_rn(wide, wide);
#pragma unroll
    for (int b = 0; b < kBins; ++b) {
      const double part = cut(left, anchors[static_cast<size_t>(b)]);
      left = __dsub_rn(left, part);
      mine[b] = __dadd_rn(mine[b], part);
    }
  });
  for (int b = 0; b < kBins; ++b) {
    const double sum = block_sum(mine[b]);
    if (threadIdx.x == 0) bins[int64_t{blockIdx.x} * kBins + b] = sum;
  }
}

/// What a kernel left for each block, on the host.
template <class A>
std::vector<A> read(const Tensor& of_blocks) {
  std::vector<A> values(static_cast<size_t>(of_blocks.numel()));
  of_blocks.copy_out(values.data());
  return values;
}

}  // namespace

void adamw(Context& context, const AdamW& step, const Tensor& gradient, const Tensor& master,
           const Tensor& moment1, const Tensor& moment2, const Tensor& params) {
  dispatch_floating(params ? params.dtype() : master.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const int64_t n = master.numel();
    const Scalars<A> scalars(step);
    T* own = params && params.raw() != master.raw() ? params.data<T>() : nullptr;
    const auto run = [&]<class Master>(Master* masters) {
      const Shard<Master, T> shard{gradient.data<A>(), masters, moment1.data<A>(), moment2.data<A>(), own};
      // The kernel itself takes what is left of the last pack.
      const bool packs =
          can_pack<kN>(0, shard.gradient, shard.master, shard.moment1, shard.moment2, shard.params);
      const auto kernel = packs ? adamw_kernel<kN, Master, T> : adamw_kernel<1, Master, T>;
      launch(context, flat(packs ? n / kN : n), kernel, scalars, shard, n);
    };
    if (master.dtype() == dtype_of<T>())
      run(master.data<T>());
    else
      run(master.data<A>());
  });
}

double absolute_max(Context& context, const Tensor& x) {
  double largest = 0.0;
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const int64_t n = x.numel();
    const T* in = x.data<T>();
    const bool packs = can_pack<kN>(0, in);
    const LaunchShape shape = flat(packs ? n / kN : n);
    const Tensor of_blocks = context.empty({shape.blocks}, dtype_of<A>(), MemoryUse::workspace);
    const auto kernel = packs ? absolute_max_kernel<kN, T> : absolute_max_kernel<1, T>;
    launch(context, shape, kernel, in, n, of_blocks.data<A>());
    for (const A of_block : read<A>(of_blocks)) largest = std::max(largest, static_cast<double>(of_block));
  });
  return largest;
}

void add_norm_sums(Context& context, const Tensor& x, const Tensor& sums) {
  cpu::dispatch_accumulator(x.dtype(), [&]<class T>() {
    constexpr int kN = kPack<T>;
    const int64_t n = x.numel();
    const T* in = x.data<T>();
    const bool packs = can_pack<kN>(0, in);
    const LaunchShape shape = flat(packs ? n / kN : n);
    const Tensor of_blocks = context.empty({shape.blocks, 2}, DType::f64, MemoryUse::workspace);
    const auto kernel = packs ? norm_sums_kernel<kN, T> : norm_sums_kernel<1, T>;
    launch(context, shape, kernel, in, n, of_blocks.data<double>());
    launch(context, {.blocks = 1, .threads = kThreads}, add_block_sums_kernel, of_blocks.data<double>(),
           shape.blocks, sums.data<double>());
  });
}

void add_cut_squares(Context& context, const Tensor& x, const std::array<double, kBins>& anchors,
                     std::array<double, kBins>& bins) {
  cpu::dispatch_accumulator(x.dtype(), [&]<class T>() {
    constexpr int kN = kPack<T>;
    const int64_t n = x.numel();
    const T* in = x.data<T>();
    const bool packs = can_pack<kN>(0, in);
    const LaunchShape shape = flat(packs ? n / kN : n);
    const Tensor of_blocks = context.empty({shape.blocks, kBins}, DType::f64, MemoryUse::workspace);
    const auto kernel = packs ? cut_squares_kernel<kN, T> : cut_squares_kernel<1, T>;
    launch(context, shape, kernel, in, n, anchors, of_blocks.data<double>());
    const std::vector<double> sums = read<double>(of_blocks);
    for (size_t i = 0; i < sums.size(); ++i) bins[i % kBins] += sums[i];
  });
}

}  // namespace normformer::ops::cuda
