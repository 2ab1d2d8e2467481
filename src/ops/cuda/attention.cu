#include <functional>
#include <string>

#include "normformer/tensor/dispatch.h"

#include "ops/cuda/attention_input.h"
#include "ops/cuda/cudnn_attention.h"
#include "ops/cuda/tuning.h"
#include "ops/kernels.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // that share a row of a head

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const T* dout, const T* out, int64_t rows, int length, int64_t heads, int64_t size,
                 Accumulator<T>* delta) {
  using A = Accumulator<T>;
  const int64_t row = global_thread() / kLanes;
  A sum{0};
  if (row < rows) {
    for (int64_t c = threadIdx.x % kLanes * N; c < size; c += kLanes * N) {
      A d[N];
      A o[N];
      load_pack<N>(dout + row * size + c, d);
      load_pack<N>(out + row * size + c, o);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += d[i] * o[i];
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (row < rows && threadIdx.x % kLanes == 0) {
    const int64_t token = row / heads;
    delta[(token / length * heads + row % heads) * length + token % length] = sum;
  }
}

/// delta[batch, heads, queries] = the dot products of rows of dout and out.
template <class T, class Input>
void find_delta(Context& context, const Input& input, const T* dout, const T* out, Accumulator<T>* delta) {
  const int64_t rows = input.pairs * input.num_queries();
  const LaunchShape shape{.blocks = ceil_div(rows * kLanes, int64_t{kThreads}), .threads = kThreads};
  const bool packs = can_pack<kPack<T>>(input.head_size, dout, out);
  launch(context, shape, packs ? delta_kernel<kPack<T>, T> : delta_kernel<1, T>, dout, out, rows,
         static_cast<int>(input.num_queries()), input.heads, input.head_size, delta);
}

void own_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                 const Tensor& document_start, const Dropout& dropout, const Tensor& out, const Tensor& lse) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    const AttentionInput<T> input(shape, qkv, document_start, dropout);
    T* to = out.data<T>();
    auto* lse_to = lse.data<Accumulator<T>>();
    if constexpr (kIs16Bit<T>) {
      if (tensor_cores_take(shape.head_size, {input.qkv, to})) {
        return tensor_core_attention_forward(context, input, to, lse_to);
      }
    }
    plain_attention_forward(context, input, to, lse_to);
  });
}

void own_backward(Context& context, const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                  const Tensor& document_start, const Dropout& dropout, const Tensor& out, const Tensor& lse,
                  const Tensor& dqkv, const Tensor& workspace) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const AttentionInput<T> input(shape, qkv, document_start, dropout);
    const AttentionSaved<T> saved{
        .dout = dout.data<T>(), .out = out.data<T>(), .lse = lse.data<A>(), .delta = workspace.data<A>()};
    T* to = dqkv.data<T>();
    find_delta(context, input, saved.dout, saved.out, workspace.data<A>());
    if constexpr (kIs16Bit<T>) {
      if (tensor_cores_take(shape.head_size, {input.qkv, saved.dout, to})) {
        return tensor_core_attention_backward(context, input, saved, to);
      }
    }
    plain_attention_backward(context, input, saved, to);
  });
}

/// cuDNN's kernels and our own: who attends.
struct AttentionWays {
  explicit AttentionWays(Gpu& gpu) : faster(gpu, describe_cudnn()) {}
  FasterWay faster;
};

void run_faster(Context& context, const char* direction, const AttentionShape& shape, DType dtype,
                const std::function<bool()>& by_cudnn, const std::function<void()>& by_own) {
  const std::string key = direction + to_string(shape) + " in " + std::string(name_of(dtype));
  context.gpu().attached<AttentionWays>().faster.run(key, by_cudnn, by_own);
}

}  // namespace

void attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                       const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                       const Tensor& lse) {
  const auto by_cudnn = [&] {
    return cudnn_attention_forward(context, shape, qkv, document_start, dropout, out, lse);
  };
  const auto by_own = [&] { own_forward(context, shape, qkv, document_start, dropout, out, lse); };
  run_faster(context, "attention forward ", shape, qkv.dtype(), by_cudnn, by_own);
}

// What find_delta finds: [batch, heads, length].
Shape attention_backward_workspace(Context&, const AttentionShape& shape) {
  return {shape.batch, shape.heads, shape.length};
}

void attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                        const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                        const Tensor& lse, const Tensor& dqkv, const Tensor& workspace) {
  const auto by_cudnn = [&] {
    return cudnn_attention_backward(context, shape, dout, qkv, document_start, dropout, out, lse, dqkv);
  };
  const auto by_own = [&] {
    own_backward(context, shape, dout, qkv, document_start, dropout, out, lse, dqkv, workspace);
  };
  run_faster(context, "attention backward ", shape, qkv.dtype(), by_cudnn, by_own);
}

void partial_attention_forward(Context& context, const PartialAttentionShape& shape, const Tensor& qkv,
                               const Tensor& kv, const Tensor& document_start, const Dropout& dropout,
                               const Tensor& out, const Tensor& lse) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const PartialInput<T> input(shape, qkv, kv, document_start, dropout);
    if constexpr (kIs16Bit<T>) {
      if (tensor_cores_take(shape.head_size, {input.qkv, input.kv})) {
        return tensor_core_partial_attention_forward(context, input, out.data<A>(), lse.data<A>());
      }
    }
    // Blocks that share a head's channels all read lse, so that none may write it.
    const Tensor merged_lse = context.empty(lse.shape(), lse.dtype(), MemoryUse::workspace);
    plain_partial_attention_forward(context, input, out.data<A>(), lse.data<A>(), merged_lse.data<A>());
    copy(context, merged_lse, lse);
  });
}

// What find_delta finds: [batch, heads, queries].
Shape partial_attention_backward_workspace(Context&, const PartialAttentionShape& shape) {
  return {shape.batch, shape.heads, shape.queries.size()};
}

void partial_attention_backward(Context& context, const PartialAttentionShape& shape, const Tensor& dout,
                                const Tensor& qkv, const Tensor& kv, const Tensor& document_start,
                                const Dropout& dropout, const Tensor& out, const Tensor& lse,
                                const Tensor& dq, const Tensor& dkv, const Tensor& workspace) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const PartialInput<T> input(shape, qkv, kv, document_start, dropout);
    const AttentionSaved<T> saved{
        .dout = dout.data<T>(), .out = out.data<T>(), .lse = lse.data<A>(), .delta = workspace.data<A>()};
    find_delta(context, input, saved.dout, saved.out, workspace.data<A>());
    if constexpr (kIs16Bit<T>) {
      if (tensor_cores_take(shape.head_size, {input.qkv, input.kv, saved.dout})) {
        return tensor_core_partial_attention_backward(context, input, saved, dq.data<A>(), dkv.data<A>());
      }
    }
    plain_partial_attention_backward(context, input, saved, dq.data<A>(), dkv.data<A>());
  });
}

}  // namespace normformer::ops::cuda
