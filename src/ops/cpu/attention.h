#pragma once

#include "normformer/core/sequence_part.h"
#include "normformer/ops/attention.h"
#include "normformer/tensor/dtype.h"

namespace normformer::ops::cpu {

/// What both directions read, as in normformer/ops/attention.h and attention_block.h: a sequence has queries
/// of some of its tokens here, and keys and values of some.
template <class T>
struct AttentionInput {
  int64_t heads;
  int64_t head_size;
  int64_t first_head;
  int64_t length;  ///< tokens of the whole sequence
  bool causal;
  SequencePart queries;
  SequencePart keys;
  Dropout dropout;
  const int32_t* document_start;  ///< null where a sequence is one document
  const T* q;
  int64_t q_stride;  ///< from row to row
  const T* k;
  const T* v;
  int64_t kv_stride;
};

/// Rows that results go to: of T, which are overwritten, or of the accumulator type, which are added to.
template <class T>
struct ResultRows {
  T* written;
  Accumulator<T>* added;  ///< null where `written` is not
  int64_t stride;
};

/// What the backward reads besides.
template <class T>
struct AttentionSaved {
  const T* dout;
  const T* out;
  const Accumulator<T>* lse;
};

/// Parts of the work on one pair of a sequence and a head, chosen for the processor.
template <class T>
struct AttentionTasks {
  /// Blocks of queries group, group + groups, ... What is added to is out of other keys, and lse theirs.
  void (*forward)(const AttentionInput<T>& input, int64_t pair, int64_t group, int64_t groups,
                  const ResultRows<T>& out, Accumulator<T>* lse);
  /// Blocks of keys group, group + groups, ...: gives their gradients and adds to dq[queries, padded size],
  /// the workspace of attention_backward_workspace().
  void (*backward)(const AttentionInput<T>& input, const AttentionSaved<T>& saved, int64_t pair,
                   int64_t group, int64_t groups, Accumulator<T>* dq, const ResultRows<T>& dk,
                   const ResultRows<T>& dv);
  /// Adds up the groups' dq in order and gives it.
  void (*write_dq)(const AttentionInput<T>& input, int64_t pair, int64_t groups, int64_t group_stride,
                   Accumulator<T>* parts, const ResultRows<T>& dq);
};

}  // namespace normformer::ops::cpu
