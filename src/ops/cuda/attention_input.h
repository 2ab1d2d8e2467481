#pragma once

// For .cu files: what attention's kernels read, and which heads, rows and masks a block finds in it.

#include <cmath>

#include "normformer/core/checked.h"
#include "normformer/ops/attention.h"
#include "normformer/ops/partial_attention.h"

#include "ops/cuda/dropout_mask.h"

namespace normformer::ops::cuda {

template <class T>
class Head;
template <class T>
class PartialHead;

/// What both directions read, as in normformer/ops/attention.h.
template <class T>
struct AttentionInput {
  using Element = T;
  using A = Accumulator<T>;
  using HeadType = Head<T>;
  static constexpr bool kMerges = false;  ///< whether results are added to those of other keys

  AttentionInput(const AttentionShape& shape, const Tensor& qkv_tensor, const Tensor& document_start_tensor,
                 const Dropout& dropout_of_scores)
      : qkv(qkv_tensor.data<T>()),
        document_start(document_start_tensor ? document_start_tensor.data<int32_t>() : nullptr),
        dropout(dropout_of_scores),
        pairs(shape.batch * shape.heads),
        heads(shape.heads),
        head_size(shape.head_size),
        first_head(shape.first_head),
        length(static_cast<int>(shape.length)),
        causal(shape.causal),
        scale(static_cast<A>(1.0 / std::sqrt(static_cast<double>(shape.head_size)))) {}

  constexpr int64_t num_queries() const { return length; }
  constexpr int64_t num_keys() const { return length; }

  const T* qkv;
  const int32_t* document_start;  ///< null where a sequence is one document
  DropoutMask<A> dropout;
  int64_t pairs;  ///< of a sequence and a head
  int64_t heads;
  int64_t head_size;
  int64_t first_head;
  int length;
  bool causal;
  A scale;
};

/// What the backward reads besides.
template <class T>
struct AttentionSaved {
  const T* dout;
  const T* out;
  const Accumulator<T>* lse;
  const Accumulator<T>* delta;  ///< [batch, heads, length]: the dot products of rows of dout and out
};

/// Consecutive positions in a sequence.
struct Positions {
  int begin;
  int end;
};

/// Rows of a matrix, of one head's channels.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  int count;
  int size;
};

/// Rows that results go to: of T, which are overwritten, or of the accumulator type, which are added to.
template <class T>
struct ResultRows {
  T* written;
  Accumulator<T>* added;  ///< null where `written` is not
  int64_t stride;
};

/// The least of starts[queries] below `count`, and `count` where that is less. The same on all lanes; every
/// lane must call.
__device__ inline int least_start(const int32_t* starts, Positions queries, int count) {
  int least = count;
  const int last = queries.end < count ? queries.end : count;
  for (int q = queries.begin + static_cast<int>(threadIdx.x) % kWarp; q < last; q += kWarp) {
    least = starts[q] < least ? starts[q] : least;
  }
  return -warp_max(-least);
}

/// One head of one sequence: where its rows are, and what masks and drops its scores.
template <class T>
class Head {
 public:
  using A = Accumulator<T>;

  __device__ Head(const AttentionInput<T>& input, int64_t pair)
      : input_(input),
        sample_(pair / input.heads),
        head_(pair % input.heads),
        lse_at_(pair * input.length),
        starts_(input.document_start == nullptr ? nullptr : input.document_start + sample_ * input.length) {}

  __device__ int length() const { return input_.length; }
  __device__ int size() const { return static_cast<int>(input_.head_size); }
  __device__ bool causal() const { return input_.causal; }
  __device__ A scale() const { return input_.scale; }
  __device__ int64_t out_stride() const { return input_.heads * input_.head_size; }
  __device__ int64_t qkv_stride() const { return 3 * out_stride(); }

  /// The first channel of token 0's query (part 0), key (1) or value (2) in qkv.
  __device__ int64_t qkv_at(int part) const {
    return sample_ * length() * qkv_stride() + part * out_stride() + head_ * input_.head_size;
  }
  __device__ const T* rows(int part) const { return input_.qkv + qkv_at(part); }
  __device__ int64_t out_at() const { return sample_ * length() * out_stride() + head_ * input_.head_size; }
  /// Of token 0 in a tensor [batch, heads, length].
  __device__ int64_t lse_at() const { return lse_at_; }

  /// What kernels ask of a head, whether it is all of a sequence or not.
  __device__ int queries() const { return length(); }
  __device__ int keys() const { return length(); }
  __device__ int64_t query_at(int64_t stride) const {
    return sample_ * length() * stride + head_ * input_.head_size;
  }
  __device__ int64_t key_at(int64_t stride) const { return query_at(stride); }
  __device__ HeadRows<T> query_rows() const { return {rows(0), qkv_stride(), length(), size()}; }
  __device__ HeadRows<T> key_rows() const { return {rows(1), qkv_stride(), length(), size()}; }
  __device__ HeadRows<T> value_rows() const { return {rows(2), qkv_stride(), length(), size()}; }
  __device__ int first_query_of(int key) const { return input_.causal ? key : 0; }

  /// Whether four keys from a multiple of four on are four elements of dropout from a multiple of four on.
  __device__ bool drops_by_fours() const { return length() % 4 == 0; }

  /// Null where the sequence is one document.
  __device__ const int32_t* starts() const { return starts_; }

  /// The keys that a query attends to.
  __device__ Positions keys_of(int query) const {
    return {starts_ == nullptr ? 0 : starts_[query], input_.causal ? query + 1 : length()};
  }

  /// The least range of keys in which lies what any of the queries attends to, among positions below
  /// length(). The same on all lanes; every lane must call.
  __device__ Positions keys_of(Positions queries) const {
    const int last = queries.end < length() ? queries.end : length();
    if (queries.begin >= last) return {0, 0};
    const int least = starts_ != nullptr ? least_start(starts_, queries, length()) : 0;
    return {least, input_.causal ? last : length()};
  }

  __device__ bool drops() const { return input_.dropout.active; }
  __device__ const DropoutMask<A>& dropout() const { return input_.dropout; }

  /// The number of the element of a query and a key in the sample's dropout.
  __device__ uint64_t element(int query, int key) const {
    const int64_t row = (input_.first_head + head_) * length() + query;
    return static_cast<uint64_t>(row * length() + key);
  }
  __device__ uint64_t dropout_sample() const {
    return static_cast<uint64_t>(input_.dropout.first_sample + sample_);
  }

 private:
  const AttentionInput<T>& input_;
  int64_t sample_;
  int64_t head_;
  int64_t lse_at_;
  const int32_t* starts_;
};

/// AttentionInput of partial_attention.h.
template <class T>
struct PartialInput {
  using Element = T;
  using A = Accumulator<T>;
  using HeadType = PartialHead<T>;
  static constexpr bool kMerges = true;

  PartialInput(const PartialAttentionShape& shape, const Tensor& qkv_tensor, const Tensor& kv_tensor,
               const Tensor& document_start_tensor, const Dropout& dropout_of_scores)
      : qkv(qkv_tensor.data<T>()),
        kv(kv_tensor.data<T>()),
        document_start(document_start_tensor ? document_start_tensor.data<int32_t>() : nullptr),
        dropout(dropout_of_scores),
        pairs(shape.batch * shape.heads),
        heads(shape.heads),
        head_size(shape.head_size),
        first_head(shape.first_head),
        length(shape.length),
        queries(shape.queries),
        keys(shape.keys),
        causal(shape.causal),
        scale(static_cast<A>(1.0 / std::sqrt(static_cast<double>(shape.head_size)))) {}

  constexpr int64_t num_queries() const { return queries.size(); }
  constexpr int64_t num_keys() const { return keys.size(); }

  const T* qkv;
  const T* kv;
  const int32_t* document_start;  ///< null where a sequence is one document
  DropoutMask<A> dropout;
  int64_t pairs;  ///< of a sequence and a head
  int64_t heads;
  int64_t head_size;
  int64_t first_head;
  int64_t length;
  SequencePart queries;
  SequencePart keys;
  bool causal;
  A scale;
};

/// Head of a PartialInput. Queries and keys count from the first here.
template <class T>
class PartialHead {
 public:
  using A = Accumulator<T>;

  __device__ PartialHead(const PartialInput<T>& input, int64_t pair)
      : input_(input),
        sample_(pair / input.heads),
        head_(pair % input.heads),
        starts_(input.document_start == nullptr ? nullptr : input.document_start + sample_ * queries()) {}

  __device__ int queries() const { return static_cast<int>(input_.queries.size()); }
  __device__ int keys() const { return static_cast<int>(input_.keys.size()); }
  __device__ int size() const { return static_cast<int>(input_.head_size); }
  __device__ A scale() const { return input_.scale; }

  __device__ int64_t out_stride() const { return input_.heads * input_.head_size; }
  __device__ int64_t query_at(int64_t stride) const {
    return sample_ * queries() * stride + head_ * input_.head_size;
  }
  __device__ int64_t key_at(int64_t stride) const {
    return sample_ * keys() * stride + head_ * input_.head_size;
  }
  __device__ int64_t lse_at() const { return (sample_ * input_.heads + head_) * queries(); }
  __device__ HeadRows<T> query_rows() const {
    return {input_.qkv + query_at(3 * out_stride()), 3 * out_stride(), queries(), size()};
  }
  __device__ HeadRows<T> key_rows() const {
    return {input_.kv + key_at(2 * out_stride()), 2 * out_stride(), keys(), size()};
  }
  __device__ HeadRows<T> value_rows() const {
    return {input_.kv + key_at(2 * out_stride()) + out_stride(), 2 * out_stride(), keys(), size()};
  }

  /// As Head's.
  __device__ Positions keys_of(int query) const {
    return {starts_ == nullptr ? 0 : keys_before(starts_[query]), end_of_keys(query)};
  }
  __device__ Positions keys_of(Positions asked) const {
    const int last = asked.end < queries() ? asked.end : queries();
    if (asked.begin >= last) return {0, 0};
    const int most = static_cast<int>(input_.length);
    const int start = starts_ == nullptr ? 0 : least_start(starts_, {asked.begin, last}, most);
    return {keys_before(start), end_of_keys(last - 1)};
  }
  __device__ int first_query_of(int key) const {
    return input_.causal ? static_cast<int>(input_.queries.rows_before(input_.keys.position_of(key))) : 0;
  }
  __device__ bool drops_by_fours() const {
    const SequencePart& k = input_.keys;
    return input_.length % 4 == 0 && k.first.begin % 4 == 0 && k.first.end % 4 == 0 &&
           k.second.begin % 4 == 0;
  }
  __device__ const int32_t* starts() const { return starts_; }

  __device__ bool drops() const { return input_.dropout.active; }
  __device__ const DropoutMask<A>& dropout() const { return input_.dropout; }
  __device__ uint64_t element(int query, int key) const {
    const int64_t row = (input_.first_head + head_) * input_.length + input_.queries.position_of(query);
    return static_cast<uint64_t>(row * input_.length + input_.keys.position_of(key));
  }
  __device__ uint64_t dropout_sample() const {
    return static_cast<uint64_t>(input_.dropout.first_sample + sample_);
  }

 private:
  __device__ int keys_before(int64_t position) const {
    return static_cast<int>(input_.keys.rows_before(position));
  }
  __device__ int end_of_keys(int query) const {
    return input_.causal ? keys_before(input_.queries.position_of(query) + 1) : keys();
  }

  const PartialInput<T>& input_;
  int64_t sample_;
  int64_t head_;
  const int32_t* starts_;
};

/// Every type, head size and alignment, in the accumulator type throughout.
template <class T>
void plain_attention_forward(Context& context, const AttentionInput<T>& input, T* out, Accumulator<T>* lse);
template <class T>
void plain_attention_backward(Context& context, const AttentionInput<T>& input,
                              const AttentionSaved<T>& saved, T* dqkv);

/// Those of partial_attention.h. `merged_lse` receives what is to become lse.
template <class T>
void plain_partial_attention_forward(Context& context, const PartialInput<T>& input, Accumulator<T>* out,
                                     const Accumulator<T>* lse, Accumulator<T>* merged_lse);
template <class T>
void plain_partial_attention_backward(Context& context, const PartialInput<T>& input,
                                      const AttentionSaved<T>& saved, Accumulator<T>* dq,
                                      Accumulator<T>* dkv);

/// Whether the two below, of bf16 and f16, take heads of this size whose rows begin at these addresses.
bool tensor_cores_take(int64_t head_size, std::initializer_list<const void*> rows);

template <class E>
void tensor_core_attention_forward(Context& context, const AttentionInput<E>& input, E* out, float* lse);
template <class E>
void tensor_core_attention_backward(Context& context, const AttentionInput<E>& input,
                                    const AttentionSaved<E>& saved, E* dqkv);

/// Those of partial_attention.h.
template <class E>
void tensor_core_partial_attention_forward(Context& context, const PartialInput<E>& input, float* out,
                                           float* lse);
template <class E>
void tensor_core_partial_attention_backward(Context& context, const PartialInput<E>& input,
                                            const AttentionSaved<E>& saved, float* dq, float* dkv);

}  // namespace normformer::ops::cuda
