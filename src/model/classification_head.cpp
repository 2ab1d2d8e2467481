#include "normformer/model/classification_head.h"

#include <cmath>

#include "normformer/ops/activation.h"
#include "normformer/ops/embedding.h"
#include "normformer/ops/matmul.h"
#include "normformer/tensor_parallel/vocabulary.h"

namespace normformer {

ClassificationHead::ClassificationHead(const ModelEnvironment& environment, ParameterStore& store)
    : environment_(environment), alone_(make_self_world()) {
  const ModelConfig& config = environment.config;
  const ParameterDeclarer declare(environment_, store, "decoder.classification_head.", -1, -1);
  // fairseq: nn.Linear's own, as the head comes after init_bert_params; with "bert" and "gpt2" as
  // transformers draw it.
  const InitialValue of_linear = InitialValue::uniform(1.0 / std::sqrt(static_cast<double>(config.width)));
  const bool fairseq = config.init == Initialisation::fairseq;
  const InitialValue weights = fairseq ? of_linear : kBertWeights;
  const InitialValue biases = fairseq ? of_linear : kZeros;
  dense_weight_ = &declare.replicated_matrix("dense.weight", config.width, config.width, weights);
  dense_bias_ = &declare.replicated_vector("dense.bias", config.width, biases);
  output_weight_ = &declare.replicated_matrix("out_proj.weight", config.classes, config.width, weights);
  output_bias_ = &declare.replicated_vector("out_proj.bias", config.classes, biases);
}

// Of a matrix with one row for each sequence.
ops::Dropout ClassificationHead::dropout(const MicroBatch& batch, DropoutSite site) const {
  ops::Dropout made = make_dropout(environment_, batch, site, 0, environment_.config.residual_dropout,
                                   environment_.config.width);
  made.rows_per_sample = made.split = 1;
  made.first_token = 0;
  return made;
}

ClassificationHead::Made ClassificationHead::forward_to_activation(const MicroBatch& batch,
                                                                   const Tensor& hidden) const {
  Context& context = *environment_.context;
  const Shape shape{batch.sequences, environment_.config.width};
  Made made{pick_rows(environment_, hidden, batch.predicted), context.empty(shape, hidden.dtype()),
            context.empty(shape, hidden.dtype()), dropout(batch, DropoutSite::head_input),
            dropout(batch, DropoutSite::head_hidden)};
  if (made.input_dropout.active()) {
    const Tensor nothing = context.zeros({1, shape[1]}, hidden.dtype());
    ops::add_positions_forward(context, made.input, 1.0, nothing, 0, made.input_dropout, made.input);
  }
  ops::linear_forward(context, made.input, dense_weight_->value, Tensor(), made.product);
  ops::activation_forward(context, ops::ActivationKind::tanh, made.product, dense_bias_->value,
                          made.hidden_dropout, Tensor(), made.activated, Tensor());
  return made;
}

// The gradient of the rows that were picked; those of parameters are added.
Tensor ClassificationHead::backward_from_activation(const Made& made, const Tensor& dactivated) const {
  Context& context = *environment_.context;
  ops::activation_backward(context, ops::ActivationKind::tanh, dactivated, made.product, dense_bias_->value,
                           made.hidden_dropout, nullptr, dactivated, dense_bias_->gradient);
  ops::linear_backward_weight(context, dactivated, made.input, dense_weight_->gradient);
  const Tensor dinput = context.empty(made.input.shape(), made.input.dtype());
  ops::linear_backward_input(context, dactivated, dense_weight_->value, dinput);
  if (made.input_dropout.active())
    ops::add_positions_backward(context, dinput, 1, 0, made.input_dropout, dinput, Tensor());
  return dinput;
}

HeadResult ClassificationHead::forward(const MicroBatch& batch, const Placed<Replicated>& hidden) const {
  Context& context = *environment_.context;
  const VocabularyRows classes{output_weight_->value, output_weight_->gradient, 0, output_bias_->value,
                               output_bias_->gradient};
  const Made made = forward_to_activation(batch, hidden.tensor());
  const Placed<Replicated> activated(made.activated);
  const Tensor logits = vocabulary_logits(context, classes, activated).tensor();
  const LossOptions options{batch.targets, batch.weights, batch.purpose == Purpose::training,
                            batch.loss_scale};
  const LossResult loss = vocabulary_loss(context, alone_, classes, activated, options);
  if (!options.training) return {loss.nll, {}, logits};
  const Tensor dinput = backward_from_activation(made, loss.dhidden.tensor());
  const Tensor dhidden = put_rows(context, dinput, batch.predicted, hidden.tensor().dim(0));
  return {loss.nll, Placed<Replicated>(dhidden), logits};
}

}  // namespace normformer
