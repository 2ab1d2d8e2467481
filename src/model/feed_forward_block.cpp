#include "normformer/model/feed_forward_block.h"

#include <array>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "normformer/ops/ffn_norm.h"

namespace normformer {

namespace {

struct FeedForwardInit {
  InitialValue fc1_weight;
  InitialValue fc1_bias;
  InitialValue fc2_weight;
  InitialValue fc2_bias;
};

FeedForwardInit feed_forward_init(const ModelConfig& config) {
  if (config.init == Initialisation::bert) return {kBertWeights, kZeros, kBertWeights, kZeros};
  if (config.init == Initialisation::gpt2) {
    // Radford et al. 2019, section 2.3: residual projections scaled by 1 / sqrt(number of residual layers).
    const double residual = 0.02 / std::sqrt(2.0 * static_cast<double>(config.layers));
    return {InitialValue::normal(0.02), InitialValue::constant(0.0), InitialValue::normal(residual),
            InitialValue::constant(0.0)};
  }
  // fairseq: nn.Linear's own, weights and biases uniform in 1 / sqrt(inputs).
  const InitialValue fc1 = InitialValue::uniform(1.0 / std::sqrt(static_cast<double>(config.width)));
  const InitialValue fc2 = InitialValue::uniform(1.0 / std::sqrt(static_cast<double>(config.ffn)));
  return {fc1, fc1, fc2, fc2};
}

// dy and what goes with it by token, from this rank's tokens to all, in one exchange.
Placed<Replicated> gather_with(const StreamBoundary<SequenceSharded>& boundary,
                               const Placed<SequenceSharded>& dy, int64_t tokens,
                               ops::NormOfActivation& norm) {
  const std::array<Tensor*, 4> vectors = {&norm.mean, &norm.rstd, &norm.mean_g, &norm.mean_gx};
  std::vector<Placed<SequenceSharded>> own = {dy};
  for (const Tensor* vector : vectors) own.emplace_back(*vector);
  const std::vector<Placed<Replicated>> all = boundary.leave_backward_with(own, tokens);
  for (size_t i = 0; i < vectors.size(); ++i) *vectors[i] = all[i + 1].tensor();
  return all.front();
}

}  // namespace

template <class Stream>
FeedForwardBlock<Stream>::FeedForwardBlock(const ModelEnvironment& environment, int64_t layer,
                                           ParameterStore& store)
    : environment_(environment),
      layer_(layer),
      name_(layer_prefix(layer) + "feed_forward"),
      boundary_(*environment.context, environment.tensor) {
  const ModelConfig& config = environment.config;
  const Range features = environment.features();
  const FeedForwardInit init = feed_forward_init(config);
  const ParameterDeclarer declare(environment_, store, layer_prefix(layer), layer, layer);
  norm_ = declare_stream_norm(declare, "final_layer_norm", config.width);
  if (!is_pre()) next_norm_ = norm_;
  fc1_weight_ = &declare.row_sharded("fc1.weight", config.ffn, config.width, features, init.fc1_weight);
  fc1_bias_ = &declare.sharded_vector("fc1.bias", config.ffn, features, init.fc1_bias);
  if (config.ffn_norm) {
    ffn_norm_.gamma =
        &declare.sharded_vector("ffn_layernorm.weight", config.ffn, features, InitialValue::constant(1.0));
    ffn_norm_.beta =
        &declare.sharded_vector("ffn_layernorm.bias", config.ffn, features, InitialValue::constant(0.0));
  }
  fc2_weight_ = &declare.column_sharded("fc2.weight", config.width, config.ffn, features, init.fc2_weight);
  // The folded form's gradient of the bias is a sum over all tokens that every rank needs anyway.
  fc2_bias_ = is_folded() ? &declare.replicated_vector("fc2.bias", config.width, init.fc2_bias)
                          : &declare.stream_vector("fc2.bias", config.width, init.fc2_bias);
  if (config.residual_scale) {
    residual_scale_ = &declare.stream_vector("w_resid", config.width, InitialValue::constant(1.0));
  }
}

template <class Stream>
bool FeedForwardBlock<Stream>::is_folded() const {
  return environment_.config.ffn_norm && environment_.config.ffn_norm_form == FfnNormForm::folded;
}

template <class Stream>
bool FeedForwardBlock<Stream>::is_plain() const {
  return environment_.config.ffn_norm && environment_.config.ffn_norm_form == FfnNormForm::plain;
}

template <class Stream>
ColumnParallelLinear FeedForwardBlock<Stream>::fc1() const {
  // The bias is added by the activation, which reads the product anyway.
  return {*environment_.context, {fc1_weight_->value, {}, fc1_weight_->gradient, {}}};
}

template <class Stream>
RowParallelLinear FeedForwardBlock<Stream>::fc2() const {
  return {*environment_.context, {fc2_weight_->value, {}, fc2_weight_->gradient, {}}};
}

template <class Stream>
ops::SublayerOutput FeedForwardBlock<Stream>::output_parts(const ops::Dropout& dropout) const {
  ops::SublayerOutput parts;
  if (!is_folded()) parts.bias = fc2_bias_->value;  // unfold_norm adds it in the folded form
  if (residual_scale_ != nullptr) parts.residual_scale = residual_scale_->value;
  parts.dropout = dropout;
  return parts;
}

template <class Stream>
ops::SublayerOutputGradients FeedForwardBlock<Stream>::output_gradients() const {
  ops::SublayerOutputGradients gradients;
  if (!is_folded()) gradients.bias = fc2_bias_->gradient;
  if (residual_scale_ != nullptr) gradients.residual_scale = residual_scale_->gradient;
  return gradients;
}

template <class Stream>
void FeedForwardBlock<Stream>::fold_weights(const Tensor& c, const Tensor& w_beta) {
  NF_CHECK(is_folded(), "layer {} has no folded LayerNorm", layer_);
  ops::fold_norm_weights(*environment_.context, fc2_weight_->value, ffn_norm_.gamma->value,
                         ffn_norm_.beta->value, c, w_beta);
  c_ = c;
  w_beta_ = w_beta;
}

// Of the tokens whose sums these are.
template <class Stream>
void FeedForwardBlock<Stream>::compute_statistics(Saved& saved, const Tensor& sums) const {
  Context& context = *environment_.context;
  saved.mean = context.empty({sums.dim(0)}, sums.dtype());
  saved.rstd = context.empty({sums.dim(0)}, sums.dtype());
  ops::norm_statistics(context, sums, environment_.config.ffn, environment_.config.norm_eps, saved.mean,
                       saved.rstd);
}

template <class Stream>
Placed<Stream> FeedForwardBlock<Stream>::folded_output(Saved& saved, const Tensor& sums) const {
  Context& context = *environment_.context;
  const Placed<Partial> product = fc2().forward(Placed<FeatureSharded>(saved.activated));
  const WithStatistics<Stream> z = boundary_.leave_with(product, Placed<Partial>(sums));
  compute_statistics(saved, z.statistics.tensor());
  saved.output = z.value.tensor();
  ops::unfold_norm(context, saved.output, saved.mean, saved.rstd, c_, w_beta_, fc2_bias_->value,
                   saved.output);
  return z.value;
}

template <class Stream>
Tensor FeedForwardBlock<Stream>::normalised(const Saved& saved) const {
  Tensor normed = environment_.context->empty(saved.activated.shape(), environment_.dtype);
  ops::normalise(*environment_.context, saved.activated, saved.mean, saved.rstd, ffn_norm_.gamma->value,
                 ffn_norm_.beta->value, normed);
  return normed;
}

template <class Stream>
Placed<Stream> FeedForwardBlock<Stream>::plain_output(Saved& saved, const Tensor& sums) const {
  reduce_partial(*environment_.context, boundary_.tensor_group(), Placed<Partial>(sums));
  compute_statistics(saved, sums);
  return boundary_.leave(fc2().forward(Placed<FeatureSharded>(normalised(saved))));
}

template <class Stream>
void FeedForwardBlock<Stream>::activate(Saved& saved, const Tensor& sums) const {
  Context& context = *environment_.context;
  saved.activated = context.empty(saved.hidden.shape(), environment_.dtype);
  ops::activation_forward(context, activation_kind(environment_.config), saved.hidden, fc1_bias_->value,
                          saved.activation_dropout, is_folded() ? ffn_norm_.gamma->value : Tensor(),
                          saved.activated, sums);
}

template <class Stream>
Placed<Stream> FeedForwardBlock<Stream>::fc2_output(Saved& saved) const {
  Tensor sums;
  if (environment_.config.ffn_norm)
    sums = environment_.context->empty({saved.hidden.dim(0), 2}, accumulator_of(environment_.dtype));
  activate(saved, sums);
  if (is_folded()) return folded_output(saved, sums);
  if (is_plain()) return plain_output(saved, sums);
  return boundary_.leave(fc2().forward(Placed<FeatureSharded>(saved.activated)));
}

template <class Stream>
NormedStream<Stream> FeedForwardBlock<Stream>::forward(const MicroBatch& batch,
                                                       const NormedStream<Stream>& stream,
                                                       Saved& saved) const {
  const TraceScope scope = trace_module(environment_, name_, "forward");
  const ModelConfig& config = environment_.config;
  saved.activation_dropout =
      make_dropout(environment_, batch, DropoutSite::activation, layer_, config.activation_dropout,
                   config.ffn, environment_.features().begin);
  saved.output_dropout =
      make_stream_dropout(environment_, batch, DropoutSite::ffn_output, layer_, config.residual_dropout,
                          boundary_.rows(batch.num_tokens()).begin);

  const Placed<Replicated> input = boundary_.enter(stream.normed, batch.num_tokens());
  if (!normalises_again()) saved.input = stream.normed.tensor();
  saved.hidden = fc1().forward(input).tensor();
  const Placed<Stream> branch = fc2_output(saved);
  if (activates_again()) saved.activated = {};

  const NormedStream<Stream> made = sublayer_forward(environment_, output_parts(saved.output_dropout), branch,
                                                     stream.x, Tensor(), Tensor(), next_norm_);
  if (config.residual_scale) saved.residual = stream.x.tensor();
  if (is_pre()) {
    saved.norm = stream.norm;
    return made;
  }
  saved.norm = made.norm;
  return {made.normed, made.normed, {}};
}

// Statistics and means of the tokens that saved.mean has.
template <class Stream>
ops::NormOfActivation FeedForwardBlock<Stream>::norm_of_activation(const Saved& saved) const {
  Context& context = *environment_.context;
  const DType accumulator = accumulator_of(environment_.dtype);
  const Shape tokens = saved.mean.shape();
  return {ffn_norm_.gamma->value,
          saved.mean,
          saved.rstd,
          context.empty(tokens, accumulator),
          context.empty(tokens, accumulator),
          ffn_norm_.gamma->gradient,
          ffn_norm_.beta->gradient};
}

// Means are of the tokens whose y is here, on the stream; dy_scaled and sums over tokens of all.
template <class Stream>
auto FeedForwardBlock<Stream>::folded_backward(Saved& saved, const Placed<Stream>& dy) const
    -> FoldedGradient {
  Context& context = *environment_.context;
  const DType accumulator = accumulator_of(environment_.dtype);
  const int64_t tokens = saved.hidden.dim(0);
  const int64_t width = environment_.config.width;
  const auto backward = [&](const Tensor& d, const Tensor& y, const ops::NormOfActivation& n,
                            const Tensor& scaled) {
    ops::fold_norm_backward(context, d, y, n.mean, n.rstd, c_, w_beta_, fc2_bias_->value,
                            environment_.config.ffn, n.mean_g, n.mean_gx, scaled, saved.correction_u,
                            saved.correction_s);
  };
  FoldedGradient gradient{{}, norm_of_activation(saved)};
  saved.correction_u = context.empty({width}, accumulator);
  saved.correction_s = context.empty({width}, accumulator);
  if constexpr (std::is_same_v<Stream, Replicated>) {
    gradient.dy = dy;
  } else {
    backward(dy.tensor(), saved.output, gradient.norm, Tensor());
    saved.output = {};
    gradient.dy = gather_with(boundary_, dy, tokens, gradient.norm);
  }
  saved.doutput = context.empty({tokens, width}, environment_.dtype);
  backward(gradient.dy.tensor(), saved.output, gradient.norm, saved.doutput);
  add(context, saved.correction_s, fc2_bias_->gradient);
  saved.output = {};
  return gradient;
}

template <class Stream>
ops::NormOfActivation FeedForwardBlock<Stream>::plain_backward(Saved& saved, const Tensor& dnormed) const {
  Context& context = *environment_.context;
  const ops::NormOfActivation norm = norm_of_activation(saved);
  const Tensor sums = context.empty({saved.hidden.dim(0), 2}, accumulator_of(environment_.dtype));
  ops::normalise_backward_sums(context, dnormed, saved.activated, saved.mean, saved.rstd,
                               ffn_norm_.gamma->value, sums);
  reduce_partial(context, boundary_.tensor_group(), Placed<Partial>(sums));
  ops::split_means(context, sums, environment_.config.ffn, norm.mean_g, norm.mean_gx);
  return norm;
}

template <class Stream>
void FeedForwardBlock<Stream>::activation_backward(Saved& saved, const Tensor& d,
                                                   const ops::NormOfActivation* norm) const {
  ops::activation_backward(*environment_.context, activation_kind(environment_.config), d, saved.hidden,
                           fc1_bias_->value, saved.activation_dropout, norm, d, fc1_bias_->gradient);
  saved.hidden = {};
  saved.dhidden = d;
}

template <class Stream>
StartedGradient<Stream> FeedForwardBlock<Stream>::start_backward_input(Saved& saved,
                                                                       const Placed<Stream>& dout,
                                                                       bool overlap) const {
  const TraceScope scope = trace_module(environment_, name_, "backward input");
  Context& context = *environment_.context;
  if (activates_again()) activate(saved, Tensor());
  const Placed<Stream> dsum(
      is_pre() ? dout.tensor()
               : stream_norm_backward(environment_, norm_, saved.norm, dout.tensor(), Tensor()));

  const Placed<Stream> dbranch(context.empty(dsum.tensor().shape(), environment_.dtype));
  const Tensor dscaled =
      residual_scale_ != nullptr ? context.empty(dsum.tensor().shape(), environment_.dtype) : Tensor();
  ops::sublayer_output_backward(context, output_parts(saved.output_dropout), dsum.tensor(), Tensor(),
                                saved.residual, Tensor(), Tensor(), dbranch.tensor(), dscaled,
                                output_gradients());
  const Tensor dresidual = dscaled.defined() ? dscaled : dsum.tensor();
  saved.residual = {};

  Placed<Replicated> dy;
  std::optional<ops::NormOfActivation> norm;
  if (is_folded()) {
    FoldedGradient gradient = folded_backward(saved, dbranch);
    dy = gradient.dy;
    norm = gradient.norm;
  } else {
    dy = boundary_.leave_backward(dbranch, saved.hidden.dim(0));
    saved.doutput = dy.tensor();
  }
  const Tensor d = fc2().backward_input(dy).tensor();
  if (is_plain()) norm = plain_backward(saved, d);
  activation_backward(saved, d, norm ? &*norm : nullptr);

  return {
      start_enter_backward(boundary_, fc1().backward_input(Placed<FeatureSharded>(saved.dhidden)), overlap),
      dresidual, saved.norm};
}

template <class Stream>
Placed<Stream> FeedForwardBlock<Stream>::backward_input(Saved& saved, const Placed<Stream>& dout) const {
  return finish_gradient(environment_, norm_, start_backward_input(saved, dout, false));
}

template <class Stream>
Placed<Stream> FeedForwardBlock<Stream>::backward(Saved& saved, const Placed<Stream>& dout) const {
  StartedGradient<Stream> started = start_backward_input(saved, dout, environment_.overlap_tensor);
  backward_weight(saved);
  return finish_gradient(environment_, norm_, std::move(started));
}

template <class Stream>
void FeedForwardBlock<Stream>::backward_weight(Saved& saved) const {
  const TraceScope scope = trace_module(environment_, name_, "backward weight");
  const Tensor fc2_input = is_plain() ? normalised(saved) : saved.activated;
  fc2().backward_weight(Placed<Replicated>(saved.doutput), Placed<FeatureSharded>(fc2_input));
  if (is_folded()) {
    ops::add_fold_correction(*environment_.context, saved.correction_u, ffn_norm_.gamma->value,
                             saved.correction_s, ffn_norm_.beta->value, fc2_weight_->gradient);
  }
  if (normalises_again()) saved.input = stream_norm_again(environment_, norm_, saved.norm);
  fc1().backward_weight(Placed<FeatureSharded>(saved.dhidden),
                        boundary_.enter(Placed<Stream>(saved.input), saved.dhidden.dim(0)));
  saved = {};
}

template class FeedForwardBlock<Replicated>;
template class FeedForwardBlock<SequenceSharded>;

}  // namespace normformer
