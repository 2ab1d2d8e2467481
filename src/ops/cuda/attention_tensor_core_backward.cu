#include "ops/cuda/attention_tensor_core.h"

// After Dao, "FlashAttention-2", 2023, algorithm 2, with two changes: gradients of queries come from a kernel
// of their own, so that nothing is added up across blocks in an order that timing decides; and gradients of
// keys and values are computed from transposed scores, so that probabilities stay in registers here as well.

namespace normformer::ops::cuda {

namespace {

/// Of gradients of queries: a block has kOwn queries and passes over keys.
template <int D>
struct QueryTile {
  static constexpr int kTiles = 2;
  static constexpr int kRows = kTiles * 16;  // of a warp
  static constexpr int kOwn = kRows * kAttentionWarps;
  static constexpr int kPassing = D <= 96 ? 64 : 32;
  static constexpr int kStep = 32;  // keys whose scores a warp has at a time, in registers
  static constexpr int64_t kSharedBytes = (2 * kOwn + 2 * 2 * kPassing) * kSharedStride<D> * kElementBytes;
};

/// Of gradients of keys and values: a block has kOwn keys and passes over queries.
template <int D>
struct KeyTile {
  static constexpr int kTiles = D <= 64 ? 2 : 1;
  static constexpr int kRows = kTiles * 16;
  static constexpr int kOwn = kRows * kAttentionWarps;
  static constexpr int kPassing = 64;
  static constexpr int kStep = 32;
  static constexpr int kNumbers = 2;  // of 4 bytes, of a query: lse and delta
  static constexpr int64_t kSharedBytes = (2 * kOwn + 2 * 2 * kPassing) * kSharedStride<D> * kElementBytes +
                                          2 * kNumbers * kPassing * static_cast<int64_t>(sizeof(float));
};

template <class H, class E>
__device__ HeadRows<E> douts_of(const H& head, const AttentionSaved<E>& saved) {
  return {saved.dout + head.query_at(head.out_stride()), head.out_stride(), head.queries(), head.size()};
}

template <int kTiles, int D>
__device__ __forceinline__ void scale_sums(float factor, Sums<kTiles, D>& sums) {
#pragma unroll
  for (auto& tile : sums) {
#pragma unroll
    for (auto& part : tile) {
#pragma unroll
      for (float& s : part) s *= factor;
    }
  }
}

template <class Input, int D, bool kDrops, class E = typename Input::Element>
__global__ void __launch_bounds__(kAttentionThreads)
    tensor_core_dq_kernel(Input input, AttentionSaved<E> saved, ResultRows<E> to) {
  using T = QueryTile<D>;
  constexpr int kStride = kSharedStride<D>;
  const auto blocks = static_cast<int>(ceil_div(input.num_queries(), int64_t{T::kOwn}));
  const typename Input::HeadType head(input, blockIdx.x / blocks);
  // The blocks with the most keys come first.
  const int first_of_block = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * T::kOwn;
  const int first = first_of_block + warp_of_block() * T::kRows;
  auto* block_queries = dynamic_shared<E>();
  E* block_douts = block_queries + T::kOwn * kStride;
  E* queries = block_queries + warp_of_block() * T::kRows * kStride;
  const E* douts = block_douts + warp_of_block() * T::kRows * kStride;
  E* stages = block_douts + T::kOwn * kStride;
  const auto keys_at = [&](int key) { return stages + key / T::kPassing % 2 * (2 * T::kPassing * kStride); };
  const auto values_at = [&](int key) { return keys_at(key) + T::kPassing * kStride; };
  const auto copy_stage = [&](int key) {
    copy_rows<D, T::kPassing>(head.key_rows(), key, keys_at(key));
    copy_rows<D, T::kPassing>(head.value_rows(), key, values_at(key));
  };

  const Positions seen_by_block = head.keys_of(Positions{first_of_block, first_of_block + T::kOwn});
  const Positions seen = head.keys_of(Positions{first, first + T::kRows});
  if (Input::kMerges && seen_by_block.begin >= seen_by_block.end) return;
  int key = seen_by_block.begin / T::kPassing * T::kPassing;
  copy_rows<D, T::kOwn>(head.query_rows(), first_of_block, block_queries);
  copy_rows<D, T::kOwn>(douts_of(head, saved), first_of_block, block_douts);
  copy_stage(key);
  float lse_log2[T::kTiles][2];
  float delta[T::kTiles][2];
#pragma unroll
  for (int m = 0; m < T::kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first + row_in_tiles(m, 2 * r);
      const bool there = query < head.queries();
      lse_log2[m][r] = there ? saved.lse[head.lse_at() + query] * kLog2E : 0.0f;
      delta[m][r] = there ? saved.delta[head.lse_at() + query] : 0.0f;
    }
  }
  const float scale_log2 = head.scale() * kLog2E;
  Sums<T::kTiles, D> dq = {};
  for (; key < seen_by_block.end; key += T::kPassing) {
    wait_for_copies();
    __syncthreads();  // this stage is there, and the other has been read
    if (key + T::kPassing < seen_by_block.end) copy_stage(key + T::kPassing);
#pragma unroll 1
    for (int step = 0; step < T::kPassing; step += T::kStep) {
      const int k = key + step;
      if (k >= seen.end || k + T::kStep <= seen.begin) continue;
      uint32_t kept[T::kTiles];
      if constexpr (kDrops) find_kept_in_queries<T::kTiles, T::kStep>(head, first, k, kept);
      const E* keys = keys_at(key) + step * kStride;
      Sums<T::kTiles, T::kStep> scores;
      Sums<T::kTiles, T::kStep> dscores;
      multiply_rows<D, T::kTiles, T::kStep>(queries, keys, scores);
      multiply_rows<D, T::kTiles, T::kStep>(douts, values_at(key) + step * kStride, dscores);
      if (!all_seen(head, first, k, T::kStep)) mask_queries<T::kTiles, T::kStep>(head, first, k, scores);
#pragma unroll
      for (int m = 0; m < T::kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < T::kStep / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float p = exp2_quickly(fmaf(scores[m][n][i], scale_log2, -lse_log2[m][i / 2]));
            float dp = dscores[m][n][i];
            if constexpr (kDrops) dp *= is_kept(kept[m], n, i) ? head.dropout().kept : 0.0f;
            dscores[m][n][i] = p * (dp - delta[m][i / 2]);
          }
        }
      }
      Weights<T::kTiles, T::kStep> weights;
      to_weights<E, T::kTiles, T::kStep>(dscores, weights);
      add_products<D, T::kTiles, T::kStep>(weights, keys, dq);
    }
  }
  scale_sums<T::kTiles, D>(head.scale(), dq);
  give_rows<D, T::kTiles>(dq, queries, first, head.queries(), head.size(), to, head.query_at(to.stride));
}

/// The first block of queries from `query` on of which any attends to keys before `end`; else queries() or
/// more.
template <int kPassing, class H>
__device__ int next_queries(const H& head, int query, int end) {
  if (head.starts() == nullptr) return query;
  while (query < head.queries() && head.keys_of(Positions{query, query + kPassing}).begin >= end) {
    query += kPassing;
  }
  return query;
}

/// Scores of rows of keys with columns of queries: minus infinity where the query does not attend to the key.
/// Queries beyond the last one are left: they have gradients of zero.
template <int kTiles, int kColumns, class H>
__device__ __forceinline__ void mask_keys(const H& head, int first_key, int query,
                                          Sums<kTiles, kColumns>& scores) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int q = query + column_in_sums(n, c);
      const Positions seen = q < head.queries() ? head.keys_of(q) : Positions{0, head.keys()};
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = c; i < 4; i += 2) {
          const int key = first_key + row_in_tiles(m, i);
          if (key < seen.begin || key >= seen.end) scores[m][n][i] = kMinusInfinity;
        }
      }
    }
  }
}

template <class Input, int D, bool kDrops, class E = typename Input::Element>
__global__ void __launch_bounds__(kAttentionThreads)
    tensor_core_dkv_kernel(Input input, AttentionSaved<E> saved, ResultRows<E> to_dk, ResultRows<E> to_dv) {
  using T = KeyTile<D>;
  constexpr int kStride = kSharedStride<D>;
  const auto blocks = static_cast<int>(ceil_div(input.num_keys(), int64_t{T::kOwn}));
  const typename Input::HeadType head(input, blockIdx.x / blocks);
  const int first_of_block = static_cast<int>(blockIdx.x % blocks) * T::kOwn;
  const int first = first_of_block + warp_of_block() * T::kRows;
  auto* block_keys = dynamic_shared<E>();
  E* block_values = block_keys + T::kOwn * kStride;
  E* keys = block_keys + warp_of_block() * T::kRows * kStride;
  E* values = block_values + warp_of_block() * T::kRows * kStride;
  E* stages = block_values + T::kOwn * kStride;
  auto* numbers = reinterpret_cast<float*>(stages + 2 * 2 * T::kPassing * kStride);
  const auto queries_at = [&](int stage) { return stages + stage * (2 * T::kPassing * kStride); };
  const auto douts_at = [&](int stage) { return queries_at(stage) + T::kPassing * kStride; };
  const auto lse_at = [&](int stage) { return numbers + stage * (T::kNumbers * T::kPassing); };
  const auto delta_at = [&](int stage) { return lse_at(stage) + T::kPassing; };
  const auto copy_stage = [&](int query, int stage) {
    copy_rows<D, T::kPassing>(head.query_rows(), query, queries_at(stage));
    copy_rows<D, T::kPassing>(douts_of(head, saved), query, douts_at(stage));
    copy_numbers<T::kPassing>(saved.lse + head.lse_at(), query, head.queries(), lse_at(stage));
    copy_numbers<T::kPassing>(saved.delta + head.lse_at(), query, head.queries(), delta_at(stage));
  };
  const auto next = [&](int query) {
    return next_queries<T::kPassing>(head, query, first_of_block + T::kOwn);
  };

  copy_rows<D, T::kOwn>(head.key_rows(), first_of_block, block_keys);
  copy_rows<D, T::kOwn>(head.value_rows(), first_of_block, block_values);
  const int first_query = head.first_query_of(first);  // of any of the warp's keys
  int query = next(head.first_query_of(first_of_block) / T::kPassing * T::kPassing);
  if (query < head.queries()) copy_stage(query, 0);
  const float scale_log2 = head.scale() * kLog2E;
  Sums<T::kTiles, D> dk = {};
  Sums<T::kTiles, D> dv = {};
  for (int stage = 0; query < head.queries(); stage ^= 1) {
    const int following = next(query + T::kPassing);
    wait_for_copies();
    __syncthreads();  // this stage is there, and the other has been read
    if (following < head.queries()) copy_stage(following, stage ^ 1);
#pragma unroll 1
    for (int step = 0; step < T::kPassing; step += T::kStep) {
      const int q = query + step;
      if (q + T::kStep <= first_query) continue;
      uint32_t kept[T::kTiles];
      if constexpr (kDrops) find_kept_in_keys<T::kTiles, T::kStep>(head, first, q, kept);
      const E* queries = queries_at(stage) + step * kStride;
      const E* douts = douts_at(stage) + step * kStride;
      Sums<T::kTiles, T::kStep> scores;
      Sums<T::kTiles, T::kStep> dscores;
      multiply_rows<D, T::kTiles, T::kStep>(keys, queries, scores);
      multiply_rows<D, T::kTiles, T::kStep>(values, douts, dscores);
      if (!all_seen(head, q, first, T::kRows)) mask_keys<T::kTiles, T::kStep>(head, first, q, scores);
#pragma unroll
      for (int n = 0; n < T::kStep / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = step + column_in_sums(n, c);
          const float lse_log2 = lse_at(stage)[column] * kLog2E;
          const float delta = delta_at(stage)[column];
#pragma unroll
          for (int m = 0; m < T::kTiles; ++m) {
#pragma unroll
            for (int i = c; i < 4; i += 2) {
              const float p = exp2_quickly(fmaf(scores[m][n][i], scale_log2, -lse_log2));
              float multiplier = 1.0f;
              if constexpr (kDrops) multiplier = is_kept(kept[m], n, i) ? head.dropout().kept : 0.0f;
              scores[m][n][i] = p * multiplier;
              dscores[m][n][i] = p * (dscores[m][n][i] * multiplier - delta);
            }
          }
        }
      }
      Weights<T::kTiles, T::kStep> weights;
      to_weights<E, T::kTiles, T::kStep>(scores, weights);
      add_products<D, T::kTiles, T::kStep>(weights, douts, dv);
      to_weights<E, T::kTiles, T::kStep>(dscores, weights);
      add_products<D, T::kTiles, T::kStep>(weights, queries, dk);
    }
    query = following;
  }
  // Where no query came by, what was copied at the beginning may still be on its way.
  wait_for_copies();
  __syncthreads();
  scale_sums<T::kTiles, D>(head.scale(), dk);
  give_rows<D, T::kTiles>(dk, keys, first, head.keys(), head.size(), to_dk, head.key_at(to_dk.stride));
  give_rows<D, T::kTiles>(dv, values, first, head.keys(), head.size(), to_dv, head.key_at(to_dv.stride));
}

template <class Tile, class Input>
LaunchShape shape_of(const Input& input, int64_t rows) {
  return {.blocks = input.pairs * ceil_div(rows, int64_t{Tile::kOwn}),
          .threads = kAttentionThreads,
          .shared_bytes = Tile::kSharedBytes};
}

/// Where the gradients go.
template <class E>
struct Gradients {
  ResultRows<E> dq, dk, dv;
};

template <class Input, int D, bool kDrops>
void launch_both(Context& context, const Input& input, const AttentionSaved<typename Input::Element>& saved,
                 const Gradients<typename Input::Element>& to) {
  launch(context, shape_of<KeyTile<D>>(input, input.num_keys()), tensor_core_dkv_kernel<Input, D, kDrops>,
         input, saved, to.dk, to.dv);
  launch(context, shape_of<QueryTile<D>>(input, input.num_queries()), tensor_core_dq_kernel<Input, D, kDrops>,
         input, saved, to.dq);
}

template <class Input>
void launch_backward(Context& context, const Input& input,
                     const AttentionSaved<typename Input::Element>& saved,
                     const Gradients<typename Input::Element>& to) {
  with_head_size(input.head_size, [&]<int D>() {
    if (input.dropout.active)
      launch_both<Input, D, true>(context, input, saved, to);
    else
      launch_both<Input, D, false>(context, input, saved, to);
  });
}

}  // namespace

template <class E>
void tensor_core_attention_backward(Context& context, const AttentionInput<E>& input,
                                    const AttentionSaved<E>& saved, E* dqkv) {
  const int64_t channels = input.heads * input.head_size;
  const auto part = [&](int64_t i) { return ResultRows<E>{dqkv + i * channels, nullptr, 3 * channels}; };
  launch_backward(context, input, saved, {part(0), part(1), part(2)});
}

template <class E>
void tensor_core_partial_attention_backward(Context& context, const PartialInput<E>& input,
                                            const AttentionSaved<E>& saved, float* dq, float* dkv) {
  const int64_t channels = input.heads * input.head_size;
  launch_backward(context, input, saved,
                  {.dq = {nullptr, dq, channels},
                   .dk = {nullptr, dkv, 2 * channels},
                   .dv = {nullptr, dkv + channels, 2 * channels}});
}

template void tensor_core_attention_backward(Context&, const AttentionInput<bf16>&,
                                             const AttentionSaved<bf16>&, bf16*);
template void tensor_core_attention_backward(Context&, const AttentionInput<f16>&, const AttentionSaved<f16>&,
                                             f16*);
template void tensor_core_partial_attention_backward(Context&, const PartialInput<bf16>&,
                                                     const AttentionSaved<bf16>&, float*, float*);
template void tensor_core_partial_attention_backward(Context&, const PartialInput<f16>&,
                                                     const AttentionSaved<f16>&, float*, float*);

}  // namespace normformer::ops::cuda
