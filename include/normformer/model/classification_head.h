#pragma once

#include "normformer/model/head.h"

namespace normformer {

/// RoBERTa's head for sequence classification (Liu et al. 2019; fairseq's RobertaClassificationHead): of the
/// last layer's output at one token of each sequence dropout, a product with bias, tanh, dropout, and a
/// product with bias onto the classes. Every rank of the tensor group makes all of it. Drops with the
/// probability of the residual stream.
class ClassificationHead {
 public:
  /// Declares its parameters in the store.
  ClassificationHead(const ModelEnvironment& environment, ParameterStore& store);

  /// Negative log-likelihoods [sequences] of the targets and the logits of all classes, from hidden [N, D],
  /// for the sequences whose token is here (the micro-batch's weights); others' mean nothing. For training
  /// also the gradient of hidden, and those of all of its parameters are added.
  HeadResult forward(const MicroBatch& batch, const Placed<Replicated>& hidden) const;

 private:
  struct Made {
    Tensor input;    // [sequences, D], behind its dropout
    Tensor product;  // without bias
    Tensor activated;
    ops::Dropout input_dropout;
    ops::Dropout hidden_dropout;
  };

  ops::Dropout dropout(const MicroBatch& batch, DropoutSite site) const;
  Made forward_to_activation(const MicroBatch& batch, const Tensor& hidden) const;
  Tensor backward_from_activation(const Made& made, const Tensor& dactivated) const;

  ModelEnvironment environment_;
  Group alone_;  // which has all classes
  Parameter* dense_weight_;
  Parameter* dense_bias_;
  Parameter* output_weight_;
  Parameter* output_bias_;
};

}  // namespace normformer
