#include <algorithm>
#include <cmath>
#include <limits>

#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kThreads;            // keys whose scores a block holds
constexpr int64_t kMostBlocks = 132 * 16;  // as in tensor/cuda/elementwise.cu

/// The tokens of a pass and the cache, as in normformer/ops/cached_attention.h.
template <class T>
struct CachedTokens {
  CachedTokens(const Tensor& qkv_tensor, const Tensor& slots_tensor, const Tensor& positions_tensor,
               const Tensor& keys_tensor, const Tensor& values_tensor)
      : qkv(qkv_tensor.data<T>()),
        slots(slots_tensor.data<int32_t>()),
        positions(positions_tensor.data<int32_t>()),
        keys(keys_tensor.data<T>()),
        values(values_tensor.data<T>()),
        tokens(qkv_tensor.dim(0)),
        capacity(keys_tensor.dim(1)),
        heads(keys_tensor.dim(2)),
        head_size(static_cast<int>(keys_tensor.dim(3))),
        channels(heads * head_size) {}

  /// The first channel of a position of a token's sequence.
  __device__ int64_t at(int64_t token, int64_t position) const {
    return (slots[token] * capacity + position) * channels;
  }

  const T* qkv;
  const int32_t* slots;
  const int32_t* positions;
  T* keys;
  T* values;
  int64_t tokens;
  int64_t capacity;
  int64_t heads;
  int head_size;
  int64_t channels;
};

template <class T>
__global__ void store_kernel(CachedTokens<T> in) {
  for (int64_t i = global_thread(); i < in.tokens * in.channels; i += global_threads()) {
    const int64_t token = i / in.channels;
    const int64_t channel = i % in.channels;
    const T* row = in.qkv + token * 3 * in.channels + channel;
    const int64_t to = in.at(token, in.positions[token]) + channel;
    in.keys[to] = row[in.channels];
    in.values[to] = row[2 * in.channels];
  }
}

/// The scores of a tile of keys, a warp for each.
template <class T, class A>
__device__ void score_tile(const T* query, const T* keys, int64_t stride, int size, int count, A scale,
                           A (&scores)[kTile]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int k = static_cast<int>(threadIdx.x) / kWarp; k < count; k += kWarps) {
    A sum{0};
    for (int c = lane; c < size; c += kWarp) sum += widen(query[c]) * widen(keys[k * stride + c]);
    sum = warp_sum(sum);
    if (lane == 0) scores[k] = sum * scale;
  }
}

/// One token and head a block, a channel a thread: softmax tile by tile (Milakov, Gimelshein, 2018). Heads of
/// more channels than a block has threads are shared by blocks, each of which makes the scores.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cached_attention_kernel(CachedTokens<T> in, Accumulator<T> scale, T* out) {
  using A = Accumulator<T>;
  __shared__ A scores[kTile];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x / in.heads;
  const int64_t first = blockIdx.x % in.heads * in.head_size;  // of the head's channels
  const int channel = static_cast<int>(blockIdx.y) * kThreads + thread;
  const int tokens = in.positions[token] + 1;
  A largest = -std::numeric_limits<A>::infinity();
  A total{0};
  A sum{0};
  for (int tile = 0; tile < tokens; tile += kTile) {
    const int count = tokens - tile < kTile ? tokens - tile : kTile;
    const int64_t from = in.at(token, tile) + first;
    __syncthreads();  // scores of the tile before have been read
    score_tile(in.qkv + token * 3 * in.channels + first, in.keys + from, in.channels, in.head_size, count,
               scale, scores);
    __syncthreads();
    const A before = largest;
    for (int k = 0; k < count; ++k) largest = largest < scores[k] ? scores[k] : largest;
    __syncthreads();
    if (thread < count) scores[thread] = exp(scores[thread] - largest);
    __syncthreads();
    const A factor = exp(before - largest);
    sum *= factor;
    total *= factor;
    for (int k = 0; k < count; ++k) {
      total += scores[k];
      if (channel < in.head_size) sum += scores[k] * widen(in.values[from + k * in.channels + channel]);
    }
  }
  if (channel < in.head_size) out[token * in.channels + first + channel] = narrow<T>(sum / total);
}

}  // namespace

void store_keys_and_values(Context& context, const Tensor& qkv, const Tensor& slots, const Tensor& positions,
                           const Tensor& keys, const Tensor& values) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    const CachedTokens<T> in(qkv, slots, positions, keys, values);
    const int64_t blocks = std::min(ceil_div(in.tokens * in.channels, int64_t{kThreads}), kMostBlocks);
    launch(context, {.blocks = blocks, .threads = kThreads}, store_kernel<T>, in);
  });
}

void cached_attention_forward(Context& context, const Tensor& qkv, const Tensor& slots,
                              const Tensor& positions, const Tensor& keys, const Tensor& values,
                              const Tensor& out) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    const CachedTokens<T> in(qkv, slots, positions, keys, values);
    const LaunchShape shape{.blocks = in.tokens * in.heads,
                            .threads = kThreads,
                            .blocks_y = ceil_div(in.head_size, int64_t{kThreads})};
    const auto scale = static_cast<Accumulator<T>>(1.0 / std::sqrt(static_cast<double>(in.head_size)));
    launch(context, shape, cached_attention_kernel<T>, in, scale, out.data<T>());
  });
}

}  // namespace normformer::ops::cuda
