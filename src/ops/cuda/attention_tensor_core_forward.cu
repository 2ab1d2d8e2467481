#include "ops/cuda/attention_tensor_core.h"

// After Dao, "FlashAttention-2", 2023, algorithm 1: a block computes kQueries queries of one head and passes
// over their keys with probabilities in registers, relative to the largest score so far.

namespace normformer::ops::cuda {

namespace {

template <int D>
struct Tile {
  static constexpr int kTiles = 2;
  static constexpr int kRows = kTiles * 16;  // of a warp
  static constexpr int kQueries = kRows * kAttentionWarps;
  static constexpr int kKeys = 64;
  static constexpr int kStep = D <= 80 ? 64 : 32;  // keys whose scores a warp has at a time, in registers
  static constexpr int64_t kSharedBytes = (kQueries + 2 * 2 * kKeys) * kSharedStride<D> * kElementBytes;
};

__device__ inline float largest_of_four_lanes(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ inline float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// Softmax of rows whose scores come block by block (Milakov, Gimelshein, 2018), two rows of each tile a
/// thread.
template <int kTiles>
class OnlineSoftmax {
 public:
  /// `scale_log2` is what scores are multiplied by, and the logarithm to base 2 of e.
  __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest_[m][r] = kMinusInfinity;
        total_[m][r] = 0.0f;
      }
    }
  }

  /// Scores become probabilities relative to the largest so far; `sums` of earlier ones follow.
  template <int kColumns, int D>
  __device__ __forceinline__ void add(Sums<kTiles, kColumns>& scores, Sums<kTiles, D>& sums) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = kMinusInfinity;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
        }
        largest = fmaxf(largest_[m][r], largest_of_four_lanes(largest));
        // A row may have seen nothing yet.
        const float shift = largest == kMinusInfinity ? 0.0f : largest * scale_log2_;
        const float factor = exp2_quickly(largest_[m][r] * scale_log2_ - shift);
        largest_[m][r] = largest;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            scores[m][n][i] = exp2_quickly(fmaf(scores[m][n][i], scale_log2_, -shift));
            total += scores[m][n][i];
          }
        }
        total_[m][r] = total_[m][r] * factor + total;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          sums[m][c][2 * r] *= factor;
          sums[m][c][2 * r + 1] *= factor;
        }
      }
    }
  }

  /// Divides the sums by the rows' totals and writes the rows' log-sum-exp to lse[first_row ...] where below
  /// `count`. `scale` is what scores are multiplied by.
  template <int D>
  __device__ void finish(float scale, int first_row, int count, Sums<kTiles, D>& sums, float* lse) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = sum_of_four_lanes(total_[m][r]);
        const int row = first_row + row_in_tiles(m, 2 * r);
        if (lane_of_warp() % 4 == 0 && row < count) lse[row] = largest_[m][r] * scale + logf(total);
        const float factor = 1.0f / total;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          sums[m][c][2 * r] *= factor;
          sums[m][c][2 * r + 1] *= factor;
        }
      }
    }
  }

  /// As finish(), for results that join those of other keys, whose log-sum-exps `lse` has so far: `kept` is
  /// what those results are to be multiplied by. A row that has seen nothing changes nothing.
  template <int D>
  __device__ void merge(float scale, int first_row, int count, Sums<kTiles, D>& sums, float* lse,
                        float (&kept)[kTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = sum_of_four_lanes(total_[m][r]);
        const int row = first_row + row_in_tiles(m, 2 * r);
        const bool joins = row < count && total > 0.0f;
        const float before = joins ? lse[row] : 0.0f;
        const float here = joins ? largest_[m][r] * scale + logf(total) : 0.0f;
        const float larger = fmaxf(before, here);
        const float merged = larger + logf(expf(before - larger) + expf(here - larger));
        __syncwarp();  // all four lanes of a row have read what was there
        if (joins && lane_of_warp() % 4 == 0) lse[row] = merged;
        kept[m][r] = joins ? expf(before - merged) : 1.0f;
        const float factor = joins ? expf(here - merged) / total : 0.0f;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          sums[m][c][2 * r] *= factor;
          sums[m][c][2 * r + 1] *= factor;
        }
      }
    }
  }

 private:
  float scale_log2_;
  float largest_[kTiles][2];
  float total_[kTiles][2];  // of this thread's columns
};

/// Probabilities of rows of queries, by what find_kept_in_queries found.
template <int kTiles, int kColumns>
__device__ __forceinline__ void drop(const uint32_t (&kept)[kTiles], float factor,
                                     Sums<kTiles, kColumns>& probabilities) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[m][n][i] *= is_kept(kept[m], n, i) ? factor : 0.0f;
    }
  }
}

template <class Input, int D, bool kDrops, class E = typename Input::Element>
__global__ void __launch_bounds__(kAttentionThreads)
    tensor_core_forward_kernel(Input input, ResultRows<E> out, float* lse) {
  using T = Tile<D>;
  const auto blocks = static_cast<int>(ceil_div(input.num_queries(), int64_t{T::kQueries}));
  const typename Input::HeadType head(input, blockIdx.x / blocks);
  // The blocks with the most keys come first.
  const int first_of_block = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * T::kQueries;
  const int first = first_of_block + warp_of_block() * T::kRows;
  auto* block_queries = dynamic_shared<E>();
  E* queries = block_queries + warp_of_block() * T::kRows * kSharedStride<D>;
  E* stages = block_queries + T::kQueries * kSharedStride<D>;
  const auto keys_at = [&](int key) {
    return stages + key / T::kKeys % 2 * (2 * T::kKeys * kSharedStride<D>);
  };
  const auto values_at = [&](int key) { return keys_at(key) + T::kKeys * kSharedStride<D>; };
  const auto copy_stage = [&](int key) {
    copy_rows<D, T::kKeys>(head.key_rows(), key, keys_at(key));
    copy_rows<D, T::kKeys>(head.value_rows(), key, values_at(key));
  };

  const Positions seen_by_block = head.keys_of(Positions{first_of_block, first_of_block + T::kQueries});
  const Positions seen = head.keys_of(Positions{first, first + T::kRows});
  if (Input::kMerges && seen_by_block.begin >= seen_by_block.end) return;
  int key = seen_by_block.begin / T::kKeys * T::kKeys;
  copy_rows<D, T::kQueries>(head.query_rows(), first_of_block, block_queries);
  copy_stage(key);
  Sums<T::kTiles, D> sums = {};
  OnlineSoftmax<T::kTiles> softmax(head.scale() * kLog2E);
  for (; key < seen_by_block.end; key += T::kKeys) {
    wait_for_copies();
    __syncthreads();  // this stage is there, and the other has been read
    if (key + T::kKeys < seen_by_block.end) copy_stage(key + T::kKeys);
#pragma unroll 1
    for (int step = 0; step < T::kKeys; step += T::kStep) {
      const int k = key + step;
      if (k >= seen.end || k + T::kStep <= seen.begin) continue;
      // Found first: it takes registers that scores need later.
      uint32_t kept[T::kTiles];
      if constexpr (kDrops) find_kept_in_queries<T::kTiles, T::kStep>(head, first, k, kept);
      Sums<T::kTiles, T::kStep> scores;
      multiply_rows<D, T::kTiles, T::kStep>(queries, keys_at(key) + step * kSharedStride<D>, scores);
      if (!all_seen(head, first, k, T::kStep)) mask_queries<T::kTiles, T::kStep>(head, first, k, scores);
      softmax.template add<T::kStep, D>(scores, sums);
      if constexpr (kDrops) drop<T::kTiles, T::kStep>(kept, head.dropout().kept, scores);
      Weights<T::kTiles, T::kStep> probabilities;
      to_weights<E, T::kTiles, T::kStep>(scores, probabilities);
      add_products<D, T::kTiles, T::kStep>(probabilities, values_at(key) + step * kSharedStride<D>, sums);
    }
  }
  const int64_t at = head.query_at(out.stride);
  if constexpr (Input::kMerges) {
    float kept[T::kTiles][2];
    softmax.template merge<D>(head.scale(), first, head.queries(), sums, lse + head.lse_at(), kept);
    add_rows<D, T::kTiles>(sums, kept, first, head.queries(), head.size(), out.added + at, out.stride);
  } else {
    softmax.template finish<D>(head.scale(), first, head.queries(), sums, lse + head.lse_at());
    write_rows<D, T::kTiles>(sums, queries, first, head.queries(), head.size(), out.written + at, out.stride);
  }
}

template <class Input>
void launch_forward(Context& context, const Input& input, const ResultRows<typename Input::Element>& out,
                    float* lse) {
  with_head_size(input.head_size, [&]<int D>() {
    const LaunchShape shape{.blocks = input.pairs * ceil_div(input.num_queries(), int64_t{Tile<D>::kQueries}),
                            .threads = kAttentionThreads,
                            .shared_bytes = Tile<D>::kSharedBytes};
    launch(context, shape,
           input.dropout.active ? tensor_core_forward_kernel<Input, D, true>
                                : tensor_core_forward_kernel<Input, D, false>,
           input, out, lse);
  });
}

}  // namespace

bool tensor_cores_take(int64_t head_size, std::initializer_list<const void*> rows) {
  if (head_size % 8 != 0 || head_size > 128) return false;
  for (const void* row : rows) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) return false;
  }
  return true;
}

template <class E>
void tensor_core_attention_forward(Context& context, const AttentionInput<E>& input, E* out, float* lse) {
  launch_forward(context, input, {out, nullptr, input.heads * input.head_size}, lse);
}

template <class E>
void tensor_core_partial_attention_forward(Context& context, const PartialInput<E>& input, float* out,
                                           float* lse) {
  launch_forward(context, input, {nullptr, out, input.heads * input.head_size}, lse);
}

template void tensor_core_attention_forward(Context&, const AttentionInput<bf16>&, bf16*, float*);
template void tensor_core_attention_forward(Context&, const AttentionInput<f16>&, f16*, float*);
template void tensor_core_partial_attention_forward(Context&, const PartialInput<bf16>&, float*, float*);
template void tensor_core_partial_attention_forward(Context&, const PartialInput<f16>&, float*, float*);

}  // namespace normformer::ops::cuda
