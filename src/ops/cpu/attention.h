#pragma once

#include "normformer/ops/attention.h"
#include "normformer/tensor/dtype.h"

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

/// Parts of the work on one pair of a sequence and a head, chosen for the processor.
template <class T>
struct AttentionTasks {
  /// Blocks of queries group, group + groups, ...
  void (*forward)(const AttentionInput<T>& input, int64_t pair, int64_t group, int64_t groups, T* out,
                  Accumulator<T>* lse);
  /// Blocks of keys group, group + groups, ...: writes their gradients and adds to dq[length, padded
  /// size], the workspace of attention_backward_workspace().
  void (*backward)(const AttentionInput<T>& input, const AttentionSaved<T>& saved, int64_t pair,
                   int64_t group, int64_t groups, Accumulator<T>* dq, T* dqkv);
  /// Adds up the groups' dq in order and writes it.
  void (*write_dq)(const AttentionInput<T>& input, int64_t pair, int64_t groups, int64_t group_stride,
                   Accumulator<T>* parts, T* dqkv);
};

}  // namespace normformer::ops::cpu
