#include "normformer/context_parallel/ring_attention.h"

#include <limits>

#include "normformer/mesh/layout.h"
#include "normformer/ops/columns.h"
#include "normformer/ops/partial_attention.h"
#include "normformer/ops/random_fill.h"

namespace normformer {

namespace {

constexpr int kBlockTag = 20;
constexpr int kGradientTag = 21;

int64_t channels_of(const ops::AttentionShape& shape) { return checked_mul(shape.heads, shape.head_size); }

ops::PartialAttentionShape partial_shape(const ops::AttentionShape& shape, const SequencePart& queries,
                                         const SequencePart& keys) {
  return {.batch = shape.batch,
          .length = shape.length,
          .queries = queries,
          .keys = keys,
          .heads = shape.heads,
          .head_size = shape.head_size,
          .first_head = shape.first_head,
          .causal = shape.causal};
}

// Of keys and values, or their gradients, of a part.
Shape block_shape(const ops::AttentionShape& shape, const SequencePart& keys) {
  return {checked_mul(shape.batch, keys.size()), 2 * channels_of(shape)};
}

}  // namespace

SequencePart RingAttention::part(int64_t length) const {
  return context_part(length, group_.size(), group_.rank());
}

// Gives `block` to the next rank and returns what the one before gave; `compute` runs while they travel.
Tensor RingAttention::pass_on(const Tensor& block, const Shape& next, int tag,
                              const std::function<void()>& compute) const {
  const int ranks = group_.size();
  const int from = (group_.rank() + ranks - 1) % ranks;
  CommRequest sent = group_.send(*context_, block, (group_.rank() + 1) % ranks, tag);
  Tensor received = context_->empty(next, block.dtype(), MemoryUse::communication);
  CommRequest arrival;
  if (overlap_) arrival = group_.start_receive(*context_, received, from, tag);
  compute();
  if (!overlap_) group_.receive(*context_, received, from, tag);
  arrival.wait();
  sent.wait();
  return received;
}

Tensor RingAttention::own_keys_and_values(const ops::AttentionShape& shape, const Tensor& qkv) const {
  const int64_t channels = channels_of(shape);
  Tensor block =
      context_->empty(block_shape(shape, part(shape.length)), qkv.dtype(), MemoryUse::communication);
  ops::copy_columns(*context_, qkv, channels, block, 0, 2 * channels);
  return block;
}

void RingAttention::forward(const ops::AttentionShape& shape, const Tensor& qkv, const Tensor& document_start,
                            const ops::Dropout& dropout, const Tensor& out, const Tensor& lse) const {
  const DType accumulator = accumulator_of(qkv.dtype());
  const Tensor sums = out.dtype() == accumulator ? out : context_->empty(out.shape(), accumulator);
  fill_zero(*context_, sums);
  ops::fill_constant(*context_, lse, -std::numeric_limits<double>::infinity());
  const auto part_of = [&](int step) { return context_part(shape.length, group_.size(), owner(step)); };
  Tensor block = own_keys_and_values(shape, qkv);
  for (int step = 0; step < group_.size(); ++step) {
    const auto attend = [&] {
      ops::partial_attention_forward(*context_, partial_shape(shape, part_of(0), part_of(step)), qkv, block,
                                     document_start, dropout, sums, lse);
    };
    if (step + 1 == group_.size())
      attend();
    else
      block = pass_on(block, block_shape(shape, part_of(step + 1)), kBlockTag, attend);
  }
  if (out.dtype() != accumulator) copy(*context_, sums, out);
}

void RingAttention::backward(const ops::AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                             const Tensor& document_start, const ops::Dropout& dropout, const Tensor& out,
                             const Tensor& lse, const Tensor& dqkv) const {
  const DType accumulator = accumulator_of(qkv.dtype());
  const int64_t channels = channels_of(shape);
  const auto part_of = [&](int step) { return context_part(shape.length, group_.size(), owner(step)); };
  const Tensor dq = context_->zeros({qkv.dim(0), channels}, accumulator);
  Tensor block = own_keys_and_values(shape, qkv);
  const Tensor own = context_->zeros(block.shape(), accumulator);
  Tensor gradient = own;
  for (int step = 0; step < group_.size(); ++step) {
    const auto differentiate = [&] {
      ops::partial_attention_backward(*context_, partial_shape(shape, part_of(0), part_of(step)), dout, qkv,
                                      block, document_start, dropout, out, lse, dq, gradient);
    };
    const bool is_last = step + 1 == group_.size();
    Tensor next;
    if (is_last)
      differentiate();
    else
      next = pass_on(block, block_shape(shape, part_of(step + 1)), kBlockTag, differentiate);
    // This rank's own share waits at home; the others' begins with zeros at the next rank and comes back.
    if (step == 0 && !is_last) {
      gradient = context_->zeros(next.shape(), accumulator, MemoryUse::communication);
    } else if (step > 0) {
      const int behind = is_last ? 0 : step + 1;
      gradient = pass_on(gradient, block_shape(shape, part_of(behind)), kGradientTag, [] {});
    }
    block = next;
  }
  if (group_.size() > 1) add(*context_, gradient, own);
  ops::copy_columns(*context_, dq, 0, dqkv, 0, channels);
  ops::copy_columns(*context_, own, 0, dqkv, channels, 2 * channels);
}

}  // namespace normformer
