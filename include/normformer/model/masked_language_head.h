#pragma once

#include "normformer/model/head.h"
#include "normformer/tensor_parallel/vocabulary.h"

namespace normformer {

/// RoBERTa's head (Liu et al. 2019; fairseq's RobertaLMHead), at masked tokens only: of the last layer's
/// output h a product with bias, the model's activation and a LayerNorm, and of these the logits by the tied
/// token embedding plus a bias. Every rank of the tensor group makes all of it but the logits, whose
/// vocabulary is split.
class MaskedLanguageHead {
 public:
  /// Declares its parameters in the store.
  MaskedLanguageHead(const ModelEnvironment& environment, ParameterStore& store);

  /// Negative log-likelihoods of the micro-batch's predicted tokens, from hidden [N, D]; for training also
  /// the gradient of hidden, and those of all of its parameters and of the embedding's `rows` are added.
  /// Collective over the tensor group.
  HeadResult forward(const MicroBatch& batch, const Placed<Replicated>& hidden, VocabularyRows rows) const;

 private:
  struct Made {
    Tensor input;    // [predicted, D]
    Tensor product;  // without bias
    Tensor activated;
    Tensor normed;
    Tensor mean;
    Tensor rstd;
  };

  Made forward_to_norm(const Tensor& input) const;
  Tensor backward_from_norm(const Made& made, const Tensor& dnormed) const;

  ModelEnvironment environment_;
  Parameter* dense_weight_;
  Parameter* dense_bias_;
  NormParameters norm_;
  Parameter* bias_;
};

}  // namespace normformer
