#include "normformer/model/attention_block.h"

#include <cmath>

#include "normformer/ops/cached_attention.h"
#include "normformer/ops/head_scale.h"

namespace normformer {

namespace {

struct AttentionInit {
  InitialValue qkv_weight;
  InitialValue qkv_bias;
  InitialValue output_weight;
};

AttentionInit attention_init(const ModelConfig& config) {
  const auto width = static_cast<double>(config.width);
  if (config.init == Initialisation::bert) return {kBertWeights, kZeros, kBertWeights};
  if (config.init == Initialisation::gpt2) {
    // Radford et al. 2019, section 2.3: residual projections scaled by 1 / sqrt(number of residual layers).
    return {InitialValue::normal(0.02), InitialValue::constant(0.0),
            InitialValue::normal(0.02 / std::sqrt(2.0 * static_cast<double>(config.layers)))};
  }
  // fairseq's MultiheadAttention: xavier_uniform, gain 1 / sqrt(2) for q, k, v; their biases are nn.Linear's.
  const double xavier = std::sqrt(6.0 / (2.0 * width));
  return {InitialValue::uniform(xavier / std::sqrt(2.0)), InitialValue::uniform(1.0 / std::sqrt(width)),
          InitialValue::uniform(xavier)};
}

}  // namespace

template <class Stream>
AttentionBlock<Stream>::AttentionBlock(const ModelEnvironment& environment, int64_t layer,
                                       ParameterStore& store)
    : environment_(environment),
      layer_(layer),
      name_(layer_prefix(layer) + "self_attn"),
      store_(&store),
      boundary_(*environment.context, environment.tensor),
      ring_(*environment.context, environment.sequences, environment.overlap_context),
      qkv_norm_(environment_) {
  const ModelConfig& config = environment.config;
  const int64_t width = config.width;
  const Range channels = environment.head_channels();
  const AttentionInit init = attention_init(config);
  const ParameterDeclarer declare(environment_, store, layer_prefix(layer), layer, layer);
  // The layer before makes this norm, so it belongs to no one layer.
  norm_ = declare_stream_norm(ParameterDeclarer(environment_, store, layer_prefix(layer), -1, layer),
                              "self_attn_layer_norm", width);
  if (!is_pre()) next_norm_ = norm_;
  q_weight_ = &declare.row_sharded("self_attn.q_proj.weight", width, width, channels, init.qkv_weight);
  declare.row_sharded("self_attn.k_proj.weight", width, width, channels, init.qkv_weight, true);
  declare.row_sharded("self_attn.v_proj.weight", width, width, channels, init.qkv_weight, true);
  q_bias_ = &declare.sharded_vector("self_attn.q_proj.bias", width, channels, init.qkv_bias);
  declare.sharded_vector("self_attn.k_proj.bias", width, channels, init.qkv_bias, true);
  declare.sharded_vector("self_attn.v_proj.bias", width, channels, init.qkv_bias, true);
  if (config.qkv_norm) qkv_norm_.declare(declare);
  if (config.head_scale == HeadScale::paper) {
    head_scale_ =
        &declare.sharded_vector("c_attn", config.heads, environment.heads(), InitialValue::constant(1.0));
  } else if (config.head_scale == HeadScale::fairseq) {
    head_scale_ = &declare.stream_vector("c_attn", config.heads, InitialValue::constant(1.0));
  }
  output_weight_ =
      &declare.column_sharded("self_attn.out_proj.weight", width, width, channels, init.output_weight);
  output_bias_ = &declare.stream_vector("self_attn.out_proj.bias", width, InitialValue::constant(0.0));
  if (config.post_attention_norm) output_norm_ = declare_stream_norm(declare, "attn_ln", width);
}

template <class Stream>
ColumnParallelLinear AttentionBlock<Stream>::qkv_linear() const {
  const int64_t rows = 3 * environment_.head_channels().size();
  const Shape matrix{rows, environment_.config.width};
  return {*environment_.context,
          {store_->joined_value(*q_weight_, matrix), store_->joined_value(*q_bias_, {rows}),
           store_->joined_gradient(*q_weight_, matrix), store_->joined_gradient(*q_bias_, {rows})}};
}

template <class Stream>
RowParallelLinear AttentionBlock<Stream>::output_linear() const {
  return {*environment_.context, {output_weight_->value, {}, output_weight_->gradient, {}}};
}

template <class Stream>
ops::SublayerOutput AttentionBlock<Stream>::output_parts(const ops::Dropout& dropout) const {
  ops::SublayerOutput parts;
  parts.bias = output_bias_->value;
  if (environment_.config.head_scale == HeadScale::fairseq) parts.head_scale = head_scale_->value;
  if (output_norm_.gamma != nullptr) {
    parts.norm_gamma = output_norm_.gamma->value;
    parts.norm_beta = output_norm_.beta->value;
    parts.norm_eps = environment_.config.norm_eps;
  }
  parts.dropout = dropout;
  return parts;
}

template <class Stream>
ops::SublayerOutputGradients AttentionBlock<Stream>::output_gradients() const {
  ops::SublayerOutputGradients gradients;
  gradients.bias = output_bias_->gradient;
  if (environment_.config.head_scale == HeadScale::fairseq) gradients.head_scale = head_scale_->gradient;
  if (output_norm_.gamma != nullptr) {
    gradients.norm_gamma = output_norm_.gamma->gradient;
    gradients.norm_beta = output_norm_.beta->gradient;
  }
  return gradients;
}

template <class Stream>
Placed<FeatureSharded> AttentionBlock<Stream>::scaled_heads(const Tensor& heads) const {
  if (environment_.config.head_scale != HeadScale::paper) return Placed<FeatureSharded>(heads);
  Tensor scaled = environment_.context->empty(heads.shape(), heads.dtype());
  ops::head_scale_forward(*environment_.context, heads, head_scale_->value, scaled);
  return Placed<FeatureSharded>(std::move(scaled));
}

template <class Stream>
void AttentionBlock<Stream>::attend(const Saved& saved, const Tensor& qkv) const {
  if (splits_sequences()) {
    return ring_.forward(saved.shape, qkv, saved.document_start, saved.probabilities_dropout, saved.heads,
                         saved.lse);
  }
  ops::attention_forward(*environment_.context, saved.shape, qkv, saved.document_start,
                         saved.probabilities_dropout, saved.heads, saved.lse);
}

template <class Stream>
void AttentionBlock<Stream>::attend_backward(const Saved& saved, const Tensor& dheads) const {
  if (splits_sequences()) {
    return ring_.backward(saved.shape, dheads, saved.qkv, saved.document_start, saved.probabilities_dropout,
                          saved.heads, saved.lse, saved.dqkv);
  }
  ops::attention_backward(*environment_.context, saved.shape, dheads, saved.qkv, saved.document_start,
                          saved.probabilities_dropout, saved.heads, saved.lse, saved.dqkv);
}

// Sequences that begin attend to nothing but rows that are here.
template <class Stream>
void AttentionBlock<Stream>::attend_continued(const Continuation& continuation, const Tensor& qkv,
                                              const Tensor& out) const {
  Context& context = *environment_.context;
  const KeysAndValues& cache = continuation.cache->of_layer(layer_);
  ops::store_keys_and_values(context, qkv, continuation.slots, continuation.positions, cache.keys,
                             cache.values);
  if (!continuation.begins()) {
    return ops::cached_attention_forward(context, qkv, continuation.slots, continuation.positions, cache.keys,
                                         cache.values, out);
  }
  const Range heads = environment_.heads();
  int64_t row = 0;
  for (const ContinuedSequence& sequence : continuation.sequences) {
    const ops::AttentionShape shape{.length = sequence.tokens,
                                    .heads = heads.size(),
                                    .head_size = environment_.config.head_size(),
                                    .first_head = heads.begin};
    const int64_t end = row + sequence.tokens;
    const Tensor lse = context.empty({1, heads.size(), sequence.tokens}, accumulator_of(qkv.dtype()));
    ops::attention_forward(context, shape, qkv.rows(row, end), Tensor(), ops::Dropout(), out.rows(row, end),
                           lse);
    row = end;
  }
}

template <class Stream>
NormedStream<Stream> AttentionBlock<Stream>::forward(const MicroBatch& batch,
                                                     const NormedStream<Stream>& stream, Saved& saved) const {
  const TraceScope scope = trace_module(environment_, name_, "forward");
  Context& context = *environment_.context;
  const ModelConfig& config = environment_.config;
  const DType accumulator = accumulator_of(environment_.dtype);
  const Range heads = environment_.heads();
  const int64_t tokens = batch.num_tokens();

  const Placed<Replicated> input = boundary_.enter(stream.normed, tokens);
  const Tensor product = qkv_linear().forward(input).tensor();
  const Tensor qkv = config.qkv_norm ? qkv_norm_.forward(product, saved.qkv_norm) : product;

  saved.shape = {batch.sequences,    batch.length, heads.size(),
                 config.head_size(), heads.begin,  config.attention == AttentionMask::causal};
  saved.part = batch.part;
  saved.probabilities_dropout = make_dropout(environment_, batch, DropoutSite::attention, layer_,
                                             config.attention_dropout, batch.length);
  saved.document_start = batch.document_start;
  saved.heads = context.empty({tokens, environment_.head_channels().size()}, environment_.dtype);
  if (batch.continuation) {
    attend_continued(*batch.continuation, qkv, saved.heads);
  } else {
    saved.lse = context.empty({batch.sequences, heads.size(), batch.part.size()}, accumulator);
    attend(saved, qkv);
  }

  const Placed<Stream> projected = boundary_.leave(output_linear().forward(scaled_heads(saved.heads)));
  saved.output_dropout = make_stream_dropout(environment_, batch, DropoutSite::attention_output, layer_,
                                             config.residual_dropout, boundary_.rows(tokens).begin);
  const ops::SublayerOutput parts = output_parts(saved.output_dropout);
  if (config.post_attention_norm) {
    saved.output_mean = context.empty({projected.tensor().dim(0)}, accumulator);
    saved.output_rstd = context.empty({projected.tensor().dim(0)}, accumulator);
  }
  const NormedStream<Stream> made = sublayer_forward(environment_, parts, projected, stream.x,
                                                     saved.output_mean, saved.output_rstd, next_norm_);
  if (!normalises_again()) saved.input = stream.normed.tensor();
  saved.qkv = qkv;
  // Without a norm or head scale behind it the product is not needed again: bias and dropout are linear.
  if (config.post_attention_norm || config.head_scale == HeadScale::fairseq)
    saved.projected = projected.tensor();
  if (is_pre()) {
    saved.norm = stream.norm;
    return made;
  }
  saved.norm = made.norm;
  return {made.normed, made.normed, {}};
}

template <class Stream>
StartedGradient<Stream> AttentionBlock<Stream>::start_backward_input(Saved& saved, const Placed<Stream>& dout,
                                                                     bool overlap) const {
  const TraceScope scope = trace_module(environment_, name_, "backward input");
  Context& context = *environment_.context;
  const Placed<Stream> dsum(
      is_pre() ? dout.tensor()
               : stream_norm_backward(environment_, norm_, saved.norm, dout.tensor(), Tensor()));

  const Placed<Stream> dbranch(context.empty(dsum.tensor().shape(), environment_.dtype));
  ops::sublayer_output_backward(context, output_parts(saved.output_dropout), dsum.tensor(), saved.projected,
                                Tensor(), saved.output_mean, saved.output_rstd, dbranch.tensor(), Tensor(),
                                output_gradients());
  saved.projected = {};
  const Placed<Replicated> dprojected = boundary_.leave_backward(dbranch, saved.num_tokens());
  saved.dprojected = dprojected.tensor();
  const Tensor dheads = output_linear().backward_input(dprojected).tensor();
  if (environment_.config.head_scale == HeadScale::paper) {
    ops::head_scale_backward(context, dheads, saved.heads, head_scale_->value, dheads, head_scale_->gradient);
  }
  saved.dqkv = context.empty(saved.qkv.shape(), environment_.dtype);
  attend_backward(saved, dheads);
  if (environment_.config.qkv_norm) qkv_norm_.backward(saved.dqkv, saved.qkv_norm);
  saved.qkv = {};
  saved.lse = {};
  return {start_enter_backward(boundary_, qkv_linear().backward_input(Placed<FeatureSharded>(saved.dqkv)),
                               overlap),
          dsum.tensor(), saved.norm};
}

template <class Stream>
Placed<Stream> AttentionBlock<Stream>::backward_input(Saved& saved, const Placed<Stream>& dout) const {
  return finish_gradient(environment_, norm_, start_backward_input(saved, dout, false));
}

template <class Stream>
Placed<Stream> AttentionBlock<Stream>::backward(Saved& saved, const Placed<Stream>& dout) const {
  StartedGradient<Stream> started = start_backward_input(saved, dout, environment_.overlap_tensor);
  backward_weight(saved);
  return finish_gradient(environment_, norm_, std::move(started));
}

template <class Stream>
void AttentionBlock<Stream>::backward_weight(Saved& saved) const {
  const TraceScope scope = trace_module(environment_, name_, "backward weight");
  output_linear().backward_weight(Placed<Replicated>(saved.dprojected), scaled_heads(saved.heads));
  if (normalises_again()) saved.input = stream_norm_again(environment_, norm_, saved.norm);
  qkv_linear().backward_weight(Placed<FeatureSharded>(saved.dqkv),
                               boundary_.enter(Placed<Stream>(saved.input), saved.num_tokens()));
  saved = {};
}

template class AttentionBlock<Replicated>;
template class AttentionBlock<SequenceSharded>;

}  // namespace normformer
