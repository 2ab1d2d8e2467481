#pragma once

#include "normformer/core/sequence_part.h"
#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

// Self-attention of some of a sequence's tokens to some of them, the others being elsewhere: summed up over
// blocks of keys it is that of attention.h. Where it is causal, a token attends to the keys of a block that
// are of no later position than its own.
namespace normformer::ops {

/// Which tokens meet, over this rank's heads.
struct PartialAttentionShape {
  int64_t batch = 1;       ///< sequences
  int64_t length = 1;      ///< tokens of a whole sequence
  SequencePart queries;    ///< of every sequence, the tokens that attend
  SequencePart keys;       ///< and those that may be attended to here
  int64_t heads = 1;       ///< heads of this rank
  int64_t head_size = 1;   ///< channels of a head
  int64_t first_head = 0;  ///< global number of this rank's first head
  bool causal = true;      ///< as in AttentionShape
};

/// "4 x 512 of 1024 tokens to 512, 12 heads of 64, causal"
std::string to_string(const PartialAttentionShape& shape);

// With q = queries.size(), k = keys.size() and c = heads * head_size: qkv is [batch * q, 3 c] of T, of which
// the queries are read; kv is [batch * k, 2 c] of T, all heads' keys, then values. `document_start`, where
// defined, is i32 [batch * q], positions in the whole sequence as in attention.h. Dropout is that of
// attention.h, of the whole sequence: its element of query position p and key position r has index (h *
// length + p) * length + r.

/// Takes the block's keys into what earlier blocks gave: out [batch * q, c] and lse [batch, heads, q], both
/// of accumulator_of(T), which begin as zeros and -inf and are attention's over all keys so far. A token that
/// attends to nothing here is left as it is. Results are merged by their log-sum-exps (Dao et al. 2022,
/// section 3.1; Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023).
void partial_attention_forward(Context& context, const PartialAttentionShape& shape, const Tensor& qkv,
                               const Tensor& kv, const Tensor& document_start, const Dropout& dropout,
                               const Tensor& out, const Tensor& lse);

/// Adds the block's share to dq [batch * q, c] and the gradients of its keys and values to dkv [batch * k,
/// 2 c], all of accumulator_of(T), from dout and out, both [batch * q, c] of T, and lse, those of all keys.
/// The same bits for any number of threads.
void partial_attention_backward(Context& context, const PartialAttentionShape& shape, const Tensor& dout,
                                const Tensor& qkv, const Tensor& kv, const Tensor& document_start,
                                const Dropout& dropout, const Tensor& out, const Tensor& lse,
                                const Tensor& dq, const Tensor& dkv);

/// FLOPs of the products in partial_attention_forward, counting only pairs that see each other, documents
/// aside: with P of them 4 P head_size a head. The backward has 2.5 times as many.
int64_t partial_attention_forward_flops(const PartialAttentionShape& shape);

}  // namespace normformer::ops
