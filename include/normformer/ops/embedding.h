#pragma once

#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

namespace normformer::ops {

// tokens: i32 [N], ids of the whole vocabulary. weight: [V, D] of T, rows [first_row, first_row + V) of the
// vocabulary.

/// out[N, D] = rows of the embedding, zeros for tokens whose row another rank holds. LogicError for an id <
/// 0; on a GPU, which would have to be waited for, such an id counts as another rank's.
void embedding_forward(Context& context, const Tensor& tokens, const Tensor& weight, int64_t first_row,
                       const Tensor& out);

/// dweight[V, D] (accumulator_of(T)) += factor * rows of dout at this rank's tokens, added in the order of
/// tokens.
void embedding_backward(Context& context, const Tensor& tokens, const Tensor& dout, double factor,
                        int64_t first_row, const Tensor& dweight);

/// out[N, D] = drop(factor * embedded + positions[(first_row + row) % length]); positions [length, D] of T:
/// the rows may begin inside a sequence. out may be embedded.
void add_positions_forward(Context& context, const Tensor& embedded, double factor, const Tensor& positions,
                           int64_t first_row, const Dropout& dropout, const Tensor& out);

/// dsum[N, D] = dout with the dropout of the forward (not yet multiplied by `factor`); dpositions[length, D]
/// (accumulator_of(T)), where defined, += its sums over sequences. dsum may be dout.
void add_positions_backward(Context& context, const Tensor& dout, int64_t length, int64_t first_row,
                            const Dropout& dropout, const Tensor& dsum, const Tensor& dpositions);

/// fairseq's sinusoidal table, [length, width] of T: row t is position t + 2; sines in the first half of the
/// channels, cosines in the second, of frequencies exp(-i ln(10000) / (width / 2 - 1)). An odd width's last
/// channel is zero.
Tensor sinusoidal_positions(Context& context, int64_t length, int64_t width, DType dtype);

}  // namespace normformer::ops
