#pragma once

#include <functional>

#include "normformer/comm/group.h"
#include "normformer/core/sequence_part.h"
#include "normformer/ops/attention.h"

namespace normformer {

/// Attention over sequences whose tokens are dealt out to a group: each rank has the queries, keys and values
/// of context_part() of every sequence. Keys and values go round the ring of ranks, a rank computing with one
/// block while it passes it on (Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023);
/// each step is the same work for every rank. What a rank computes depends neither on timing nor on
/// transport.
class RingAttention {
 public:
  /// With `overlap` a block is received while the rank computes with the one before it.
  RingAttention(Context& context, Group group, bool overlap = false)
      : context_(&context), group_(std::move(group)), overlap_(overlap) {}

  /// The tokens of every sequence of `length` that this rank has.
  SequencePart part(int64_t length) const;

  // `shape` is that of the whole attention, length and all. With n = batch *
  // part(length).size() and c = heads * head_size: qkv [n, 3 c], out [n, c] and lse [batch, heads, part] are
  // those of ops::attention_forward for this rank's tokens; so is document_start [n], in positions of the
  // whole sequence.

  /// Attention's out and lse of this rank's queries to all keys. Collective over the group.
  void forward(const ops::AttentionShape& shape, const Tensor& qkv, const Tensor& document_start,
               const ops::Dropout& dropout, const Tensor& out, const Tensor& lse) const;

  /// dqkv [n, 3 c] of this rank's tokens, from dout [n, c] and what forward kept. Keys' gradients go round in
  /// the accumulator type, each rank adding its queries' share, and are rounded once. Collective over the
  /// group.
  void backward(const ops::AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                const Tensor& document_start, const ops::Dropout& dropout, const Tensor& out,
                const Tensor& lse, const Tensor& dqkv) const;

 private:
  // Whose block is here in a step: this rank's own first, then that of the rank before it, and so on.
  int owner(int step) const { return (group_.rank() + group_.size() - step) % group_.size(); }
  Tensor pass_on(const Tensor& block, const Shape& next, int tag, const std::function<void()>& compute) const;
  Tensor own_keys_and_values(const ops::AttentionShape& shape, const Tensor& qkv) const;

  Context* context_;
  Group group_;
  bool overlap_;
};

}  // namespace normformer
