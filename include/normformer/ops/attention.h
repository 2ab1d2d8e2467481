#pragma once

#include <string>

#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

namespace normformer::ops {

/// The shape of self-attention over this rank's heads.
struct AttentionShape {
  int64_t batch = 1;       ///< sequences
  int64_t length = 1;      ///< tokens of a sequence
  int64_t heads = 1;       ///< heads of this rank
  int64_t head_size = 1;   ///< channels of a head
  int64_t first_head = 0;  ///< global number of this rank's first head
  bool causal = true;      ///< a token attends to itself and what is before it; false: to all of its sequence
};

/// "4 x 1024 tokens, 12 heads of 64, causal"
std::string to_string(const AttentionShape& shape);

// qkv is [batch * length, 3 * heads * head_size] of T: all heads' queries, then keys, then values, biases
// added. out is [batch * length, heads * head_size] of T. lse [batch, heads, length] is of accumulator_of(T).
// `document_start`, where defined, is i32 [batch * length]: the position in its sequence of the first token
// of the token's document; a token attends to nothing before it. LogicError where a token would attend to
// nothing; a GPU is not waited for to look.

/// out = softmax(q k^T / sqrt(head_size)) v by heads, computed in blocks so that no [length, length] matrix
/// is kept (Dao et al. 2022), with softmax in the accumulator type. lse receives the log-sum-exp of each row
/// of scores.
///
/// Dropout acts on probabilities after the softmax. Its element of query q, key k, head h (global) of a
/// sample has index (h * length + q) * length + k there; of the Dropout's fields only probability, stream and
/// first_sample are read.
void attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                       const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                       const Tensor& lse);

/// dqkv from dout, the kept qkv, out and lse. Probabilities are computed anew. The same bits for any number
/// of threads.
void attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                        const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                        const Tensor& lse, const Tensor& dqkv);

/// FLOPs of the products in attention_forward, counting only what the causal mask lets through: with P pairs
/// of query and key, 4 P head_size a head. The backward has 2.5 times as many (one product is computed anew).
int64_t attention_forward_flops(const AttentionShape& shape);

}  // namespace normformer::ops
