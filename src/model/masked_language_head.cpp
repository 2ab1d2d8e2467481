#include "normformer/model/masked_language_head.h"

#include <cmath>

#include "normformer/ops/activation.h"
#include "normformer/ops/layer_norm.h"
#include "normformer/ops/matmul.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {

MaskedLanguageHead::MaskedLanguageHead(const ModelEnvironment& environment, ParameterStore& store)
    : environment_(environment) {
  const ModelConfig& config = environment.config;
  const ParameterDeclarer declare(environment_, store, "decoder.lm_head.", -1, -1);
  // fairseq: nn.Linear's own, where init_bert_params does not draw it anew.
  const InitialValue of_linear = InitialValue::uniform(1.0 / std::sqrt(static_cast<double>(config.width)));
  const bool fairseq = config.init == Initialisation::fairseq;
  dense_weight_ = &declare.replicated_matrix("dense.weight", config.width, config.width,
                                             fairseq ? of_linear : kBertWeights);
  dense_bias_ = &declare.replicated_vector("dense.bias", config.width, fairseq ? of_linear : kZeros);
  norm_ = {&declare.replicated_vector("layer_norm.weight", config.width, InitialValue::constant(1.0)),
           &declare.replicated_vector("layer_norm.bias", config.width, kZeros)};
  bias_ = &declare.sharded_vector("bias", config.vocab, environment.vocabulary(), kZeros);
}

MaskedLanguageHead::Made MaskedLanguageHead::forward_to_norm(const Tensor& input) const {
  Context& context = *environment_.context;
  const auto empty = [&] { return context.empty(input.shape(), input.dtype()); };
  const DType accumulator = accumulator_of(input.dtype());
  Made made{input,
            empty(),
            empty(),
            empty(),
            context.empty({input.dim(0)}, accumulator),
            context.empty({input.dim(0)}, accumulator)};
  ops::linear_forward(context, input, dense_weight_->value, Tensor(), made.product);
  ops::activation_forward(context, activation_kind(environment_.config), made.product, dense_bias_->value,
                          ops::Dropout(), Tensor(), made.activated, Tensor());
  ops::layer_norm_forward(context, made.activated, norm_.gamma->value, norm_.beta->value,
                          environment_.config.norm_eps, made.normed, made.mean, made.rstd);
  return made;
}

// The gradient of the input; those of parameters are added.
Tensor MaskedLanguageHead::backward_from_norm(const Made& made, const Tensor& dnormed) const {
  Context& context = *environment_.context;
  ops::layer_norm_backward(context, dnormed, made.activated, norm_.gamma->value, made.mean, made.rstd,
                           Tensor(), dnormed, norm_.gamma->gradient, norm_.beta->gradient);
  ops::activation_backward(context, activation_kind(environment_.config), dnormed, made.product,
                           dense_bias_->value, ops::Dropout(), nullptr, dnormed, dense_bias_->gradient);
  ops::linear_backward_weight(context, dnormed, made.input, dense_weight_->gradient);
  const Tensor dinput = context.empty(made.input.shape(), made.input.dtype());
  ops::linear_backward_input(context, dnormed, dense_weight_->value, dinput);
  return dinput;
}

HeadResult MaskedLanguageHead::forward(const MicroBatch& batch, const Placed<Replicated>& hidden,
                                       VocabularyRows rows) const {
  Context& context = *environment_.context;
  rows.bias = bias_->value;
  rows.bias_gradient = bias_->gradient;
  const Made made = forward_to_norm(pick_rows(environment_, hidden.tensor(), batch.predicted));
  const LossOptions options{batch.targets, {}, batch.purpose == Purpose::training, batch.loss_scale};
  const LossResult loss =
      vocabulary_loss(context, environment_.tensor, rows, Placed<Replicated>(made.normed), options);
  if (!options.training) return {loss.nll, {}};
  const Placed<Replicated> dnormed = reduce_partial(context, environment_.tensor, loss.dhidden);
  const Tensor dinput = backward_from_norm(made, dnormed.tensor());
  return {loss.nll, Placed<Replicated>(put_rows(context, dinput, batch.predicted, hidden.tensor().dim(0)))};
}

}  // namespace normformer
