#include "normformer/model/environment.h"

#include "normformer/ops/embedding.h"
#include "normformer/ops/layer_norm.h"

namespace normformer {

namespace {

// None where there are no parameters.
ops::NextNorm make_next_norm(const ModelEnvironment& environment, const NormParameters& norm,
                             const Shape& shape) {
  if (norm.gamma == nullptr) return {};
  Context& context = *environment.context;
  const DType accumulator = accumulator_of(environment.dtype);
  return {norm.gamma->value,
          norm.beta->value,
          environment.config.norm_eps,
          context.empty(shape, environment.dtype),
          context.empty({shape[0]}, accumulator),
          context.empty({shape[0]}, accumulator)};
}

}  // namespace

ops::Dropout make_dropout(const ModelEnvironment& environment, const MicroBatch& batch, DropoutSite site,
                          int64_t layer, double probability, int64_t row_elements, int64_t first_column) {
  ops::Dropout dropout;
  if (batch.purpose != Purpose::training || probability == 0.0) return dropout;
  dropout.probability = probability;
  dropout.stream = RandomStream{environment.seed}
                       .with("dropout")
                       .with(batch.batch_index)
                       .with(static_cast<uint64_t>(layer))
                       .with(static_cast<uint64_t>(site));
  dropout.first_sample = batch.first_sample;
  dropout.rows_per_sample = batch.part.size();
  dropout.first_token = batch.part.first.begin;
  dropout.split = batch.part.first.size();
  dropout.second_token = batch.part.second.begin;
  dropout.row_elements = row_elements;
  dropout.first_column = first_column;
  return dropout;
}

ops::Dropout make_stream_dropout(const ModelEnvironment& environment, const MicroBatch& batch,
                                 DropoutSite site, int64_t layer, double probability, int64_t first_row) {
  ops::Dropout dropout = make_dropout(environment, batch, site, layer, probability, environment.config.width);
  dropout.first_row = first_row;
  return dropout;
}

Parameter& ParameterDeclarer::declare(const std::string& name, Shape shape, Rectangle part, Held held,
                                      InitialValue initial, bool joins_previous) const {
  const bool sums_tokens = held == Held::on_stream && environment_->sequence;
  return store_->declare({.name = prefix_ + name,
                          .logical_shape = shape,
                          .part = part,
                          .sum_over = {.tensor = sums_tokens, .replicas = true, .embedding = false},
                          .owned = held == Held::sharded || environment_->tensor.rank() == 0,
                          .initial = initial,
                          .joins_previous = joins_previous,
                          .unit = unit_,
                          .finished_with = finished_with_});
}

Parameter& ParameterDeclarer::replicated_vector(const std::string& name, int64_t size,
                                                InitialValue initial) const {
  return declare(name, {size}, {{0, size}, {0, 1}, size, 1}, Held::replicated, initial, false);
}

Parameter& ParameterDeclarer::stream_vector(const std::string& name, int64_t size,
                                            InitialValue initial) const {
  return declare(name, {size}, {{0, size}, {0, 1}, size, 1}, Held::on_stream, initial, false);
}

Parameter& ParameterDeclarer::replicated_matrix(const std::string& name, int64_t rows, int64_t columns,
                                                InitialValue initial) const {
  return declare(name, {rows, columns}, {{0, rows}, {0, columns}, rows, columns}, Held::replicated, initial,
                 false);
}

Parameter& ParameterDeclarer::sharded_vector(const std::string& name, int64_t size, Range part,
                                             InitialValue initial, bool joins_previous) const {
  return declare(name, {size}, {part, {0, 1}, size, 1}, Held::sharded, initial, joins_previous);
}

Parameter& ParameterDeclarer::row_sharded(const std::string& name, int64_t rows, int64_t columns, Range part,
                                          InitialValue initial, bool joins_previous) const {
  return declare(name, {rows, columns}, {part, {0, columns}, rows, columns}, Held::sharded, initial,
                 joins_previous);
}

Parameter& ParameterDeclarer::stream_matrix(const std::string& name, int64_t rows, int64_t columns,
                                            InitialValue initial) const {
  return declare(name, {rows, columns}, {{0, rows}, {0, columns}, rows, columns}, Held::on_stream, initial,
                 false);
}

Parameter& ParameterDeclarer::column_sharded(const std::string& name, int64_t rows, int64_t columns,
                                             Range part, InitialValue initial) const {
  return declare(name, {rows, columns}, {{0, rows}, part, rows, columns}, Held::sharded, initial, false);
}

TraceScope trace_module(const ModelEnvironment& environment, std::string_view module,
                        std::string_view direction) {
  return {*environment.context, TraceKind::module, module, direction};
}

ops::ActivationKind activation_kind(const ModelConfig& config) {
  switch (config.activation) {
    case Activation::gelu:
      return ops::ActivationKind::gelu;
    case Activation::gelu_tanh:
      return ops::ActivationKind::gelu_tanh;
    case Activation::relu_squared:
      return ops::ActivationKind::relu_squared;
  }
  return ops::ActivationKind::gelu;
}

Tensor pick_rows(const ModelEnvironment& environment, const Tensor& from, const Tensor& rows) {
  Tensor picked = environment.context->empty({rows.dim(0), from.dim(1)}, from.dtype());
  ops::embedding_forward(*environment.context, rows, from, 0, picked);
  return picked;
}

std::string layer_prefix(int64_t layer) { return fmt::format("decoder.layers.{}.", layer); }

NormParameters declare_stream_norm(const ParameterDeclarer& declare, const std::string& name, int64_t width) {
  return {&declare.stream_vector(name + ".weight", width, InitialValue::constant(1.0)),
          &declare.stream_vector(name + ".bias", width, InitialValue::constant(0.0))};
}

template <class Stream>
NormedStream<Stream> stream_norm_forward(const ModelEnvironment& environment, const NormParameters& norm,
                                         const Placed<Stream>& x) {
  if (norm.gamma == nullptr) return {x, x, {}};
  const ops::NextNorm made = make_next_norm(environment, norm, x.tensor().shape());
  ops::layer_norm_forward(*environment.context, x.tensor(), made.gamma, made.beta, made.eps, made.y,
                          made.mean, made.rstd);
  return {x, Placed<Stream>(made.y), {x.tensor(), made.mean, made.rstd}};
}

template <class Stream>
NormedStream<Stream> sublayer_forward(const ModelEnvironment& environment, const ops::SublayerOutput& parts,
                                      const Placed<Stream>& branch, const Placed<Stream>& residual,
                                      const Tensor& mean, const Tensor& rstd, const NormParameters& next) {
  const Shape shape = residual.tensor().shape();
  const Tensor out = environment.context->empty(shape, environment.dtype);
  const ops::NextNorm made = make_next_norm(environment, next, shape);
  ops::sublayer_output_forward(*environment.context, parts, branch.tensor(), residual.tensor(), out, mean,
                               rstd, made);
  return {Placed<Stream>(out), Placed<Stream>(made.y), {out, made.mean, made.rstd}};
}

template NormedStream<SequenceSharded> stream_norm_forward(const ModelEnvironment&, const NormParameters&,
                                                           const Placed<SequenceSharded>&);
template NormedStream<SequenceSharded> sublayer_forward(const ModelEnvironment&, const ops::SublayerOutput&,
                                                        const Placed<SequenceSharded>&,
                                                        const Placed<SequenceSharded>&, const Tensor&,
                                                        const Tensor&, const NormParameters&);
template NormedStream<Replicated> stream_norm_forward(const ModelEnvironment&, const NormParameters&,
                                                      const Placed<Replicated>&);
template NormedStream<Replicated> sublayer_forward(const ModelEnvironment&, const ops::SublayerOutput&,
                                                   const Placed<Replicated>&, const Placed<Replicated>&,
                                                   const Tensor&, const Tensor&, const NormParameters&);

template <class Stream>
Placed<Stream> finish_gradient(const ModelEnvironment& environment, const NormParameters& norm,
                               StartedGradient<Stream> started) {
  const Placed<Stream> dnormed = started.dnormed.wait();
  if (environment.config.norm_position == NormPosition::pre) {
    return Placed<Stream>(
        stream_norm_backward(environment, norm, started.norm, dnormed.tensor(), started.dresidual));
  }
  add(*environment.context, started.dresidual, dnormed.tensor());
  return dnormed;
}

template Placed<SequenceSharded> finish_gradient(const ModelEnvironment&, const NormParameters&,
                                                 StartedGradient<SequenceSharded>);
template Placed<Replicated> finish_gradient(const ModelEnvironment&, const NormParameters&,
                                            StartedGradient<Replicated>);

Tensor stream_norm_again(const ModelEnvironment& environment, const NormParameters& norm,
                         const NormSaved& saved) {
  Tensor normed = environment.context->empty(saved.input.shape(), saved.input.dtype());
  ops::layer_norm_forward(*environment.context, saved.input, norm.gamma->value, norm.beta->value,
                          environment.config.norm_eps, normed, saved.mean, saved.rstd);
  return normed;
}

Tensor stream_norm_backward(const ModelEnvironment& environment, const NormParameters& norm,
                            const NormSaved& saved, const Tensor& dy, const Tensor& residual) {
  Context& context = *environment.context;
  Tensor dx = context.empty(dy.shape(), dy.dtype());
  ops::layer_norm_backward(context, dy, saved.input, norm.gamma->value, saved.mean, saved.rstd, residual, dx,
                           norm.gamma->gradient, norm.beta->gradient);
  return dx;
}

}  // namespace normformer
