#pragma once

#include "normformer/ops/attention.h"
#include "normformer/tensor/thread_pool.h"

namespace normformer::ops::cpu {

/// What both directions read, as in normformer/ops/attention.h.
template <class T>
struct AttentionInput {
  AttentionShape shape;
  Dropout dropout;
  const int32_t* document_start;  ///< null where a sequence is one document
  const T* qkv;
};

/// What the backward reads besides.
template <class T>
struct AttentionSaved {
  const T* dout;
  const T* out;
  const Accumulator<T>* lse;
};

template <class T>
void attention_forward(ThreadPool& threads, const AttentionInput<T>& input, T* out, Accumulator<T>* lse);

/// The shape of the workspace in which gradients of queries are summed: [groups of key blocks, batch * heads,
/// length, head_size].
Shape attention_dq_parts(const AttentionShape& shape);

/// `dq_parts` is a workspace of attention_dq_parts().
template <class T>
void attention_backward(ThreadPool& threads, const AttentionInput<T>& input, const AttentionSaved<T>& saved,
                        Accumulator<T>* dq_parts, T* dqkv);

}  // namespace normformer::ops::cpu
