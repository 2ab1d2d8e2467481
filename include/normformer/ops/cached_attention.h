#pragma once

#include "normformer/tensor/context.h"

// Self-attention of tokens to sequences that grow: what was computed of earlier tokens is kept in a cache
// and read again.
namespace normformer::ops {

// qkv is [tokens, 3 * heads * head_size] of T as in attention.h: tokens of several sequences, in any order.
// keys and values, the cache of this rank's heads, are [slots, capacity, heads, head_size] of T: room for so
// many sequences of so many tokens. `slots` and `positions`, i32 [tokens], say which sequence each token is
// of and where in it. LogicError for a slot or a position that there is no room for; a GPU is not waited for
// to look.

/// Puts the tokens' keys and values into the cache, each where it belongs. No two may belong to one place.
void store_keys_and_values(Context& context, const Tensor& qkv, const Tensor& slots, const Tensor& positions,
                           const Tensor& keys, const Tensor& values);

/// out [tokens, heads * head_size] = softmax(q k^T / sqrt(head_size)) v by heads, over positions 0 to the
/// token's own of its sequence, which are in the cache; softmax in the accumulator type. A token's result has
/// the same bits whatever other tokens and sequences there are. Costs are recorded as of full sequences.
void cached_attention_forward(Context& context, const Tensor& qkv, const Tensor& slots,
                              const Tensor& positions, const Tensor& keys, const Tensor& values,
                              const Tensor& out);

}  // namespace normformer::ops
