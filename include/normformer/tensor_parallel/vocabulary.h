#pragma once

#include "normformer/comm/group.h"
#include "normformer/tensor_parallel/placed.h"

namespace normformer {

/// One rank's rows of the token embedding [V, D] and their main gradient; of the logits' bias [V] likewise,
/// where there is one.
struct VocabularyRows {
  Tensor weight;
  Tensor gradient;
  int64_t first_row = 0;
  Tensor bias = {};
  Tensor bias_gradient = {};
};

/// Token embeddings with the vocabulary's rows split over the tensor-parallel group. tokens: i32 [N].
Placed<Partial> embed_tokens(Context& context, const VocabularyRows& rows, const Tensor& tokens);

/// Adds factor * the rows of dout to the gradients of this rank's rows.
void embed_tokens_backward(Context& context, const VocabularyRows& rows, const Tensor& tokens,
                           const Placed<Replicated>& dout, double factor);

/// What the loss of one micro-batch takes and gives.
struct LossOptions {
  Tensor targets;          ///< i32 [N]
  Tensor weights;          ///< u8 [N]: 1 where a token counts; undefined means all do
  bool training = true;    ///< whether gradients are wanted
  double factor = 1.0;     ///< multiplies the gradient of the summed loss
  bool likeliest = false;  ///< whether the likeliest tokens are wanted
};
struct LossResult {
  Tensor nll;               ///< [N] of accumulator_of(T): every token's, counted or not
  Placed<Partial> dhidden;  ///< [N, D]: gradient of factor * their sum over what counts, from this rank's
                            ///< rows of the vocabulary; undefined without training
  Tensor minus_likeliest;   ///< [N] of accumulator_of(T): minus the id of the likeliest token, the first of
                            ///< equals; undefined where not wanted
};

/// Output logits (hidden times the embedding's rows, plus the bias) and softmax cross-entropy over the split
/// vocabulary.
///
/// Tokens are taken in chunks so that logits exist for one chunk only: each chunk's logits become their own
/// gradient and are used up at once, for dhidden and for the gradient of the rows, which is added here and
/// not in a later backward. Collective over `tensor`.
LossResult vocabulary_loss(Context& context, const Group& tensor, const VocabularyRows& rows,
                           const Placed<Replicated>& hidden, const LossOptions& options);

/// The logits [N, V of this rank] of the last tokens, for generation.
Placed<FeatureSharded> vocabulary_logits(Context& context, const VocabularyRows& rows,
                                         const Placed<Replicated>& hidden);

}  // namespace normformer
