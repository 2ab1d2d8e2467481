#include "normformer/model/language_model.h"

#include <cmath>
#include <utility>

#include "normformer/ops/cross_entropy.h"
#include "normformer/ops/embedding.h"

namespace normformer {

struct LanguageModelStage::LayerSaved {
  Placed<Replicated> input;  // where the layer is to be computed anew: all that is kept
  AttentionBlock<Replicated>::Saved attention;
  FeedForwardBlock<Replicated>::Saved feed_forward;
};

struct LanguageModelStage::Layer {
  Layer(const ModelEnvironment& environment, int64_t number_of_layer, ParameterStore& store)
      : number(number_of_layer),
        is_computed_anew(environment.recompute == Recompute::full),
        attention(environment, number_of_layer, store),
        feed_forward(environment, number_of_layer, store) {}

  NormedStream<Replicated> forward(const MicroBatch& batch, const NormedStream<Replicated>& stream,
                                   LayerSaved& saved) const {
    return feed_forward.forward(batch, attention.forward(batch, stream, saved.attention), saved.feed_forward);
  }

  void backward_weight(LayerSaved& saved) const {
    feed_forward.backward_weight(saved.feed_forward);
    attention.backward_weight(saved.attention);
  }

  int64_t number;  // global
  bool is_computed_anew;
  AttentionBlock<Replicated> attention;
  FeedForwardBlock<Replicated> feed_forward;
};

struct LanguageModelStage::SavedState final : Stage::Saved {
  std::vector<LayerSaved> layers;
  ops::Dropout embedding_dropout;
  NormSaved final_norm;
  Placed<Replicated> dhidden;  // of the final norm's output, left by the loss
};

LanguageModelStage::LanguageModelStage(ModelEnvironment environment, StagePart part, ParameterStore& store)
    : environment_(std::move(environment)), part_(part), store_(&store) {
  const ModelConfig& config = environment_.config;
  const bool gpt2 = config.init == Initialisation::gpt2;
  const auto embedding_init =
      InitialValue::normal(gpt2 ? 0.02 : 1.0 / std::sqrt(static_cast<double>(config.width)));
  const ParameterDeclarer declare(environment_, store, "decoder.");
  if (part_.first || part_.last) {
    embedding_ = store.find("decoder.embed_tokens.weight");
  }
  if (embedding_ == nullptr && (part_.first || part_.last)) {
    embedding_ = &declare.row_sharded("embed_tokens.weight", config.vocab, config.width,
                                      environment_.vocabulary(), embedding_init);
    embedding_->spec.sum_over.embedding = !part_.holds_both_ends;
    embedding_->spec.owned = part_.first;
  }
  if (part_.first && config.positions == Positions::learned) {
    positions_ =
        &declare.replicated_matrix("embed_positions.weight", config.length, config.width, embedding_init);
  }
  for (int64_t layer = part_.layers.begin; layer < part_.layers.end; ++layer) {
    layers_.push_back(std::make_unique<Layer>(environment_of_layer(layer), layer, store));
  }
  if (part_.last && config.norm_position == NormPosition::pre) {
    final_norm_ = declare_stream_norm(declare, "layer_norm", config.width);
  }
  if (config.norm_position == NormPosition::pre) hand_out_norms();
}

LanguageModelStage::~LanguageModelStage() = default;

ModelEnvironment LanguageModelStage::environment_of_layer(int64_t layer) const {
  ModelEnvironment made = environment_;
  const int64_t computed_anew = environment_.recompute_layers;
  if (computed_anew > 0 && layer - part_.layers.begin >= computed_anew) made.recompute = Recompute::none;
  return made;
}

// A LayerNorm is made in the pass that makes what it reads: each block gets the one behind it. The stage's
// last block gets none where another stage goes on, and nothing here comes before its first LayerNorm.
void LanguageModelStage::hand_out_norms() {
  NormParameters next = final_norm_;
  for (size_t i = layers_.size(); i-- > 0;) {
    layers_[i]->feed_forward.set_next_norm(next);
    layers_[i]->attention.set_next_norm(layers_[i]->feed_forward.norm());
    next = layers_[i]->attention.norm();
  }
  first_norm_ = next;
}

void LanguageModelStage::prepare() {
  if (layers_.empty() || !layers_.front()->feed_forward.is_folded()) return;
  Context& context = *environment_.context;
  const auto count = static_cast<int64_t>(layers_.size());
  const int64_t width = environment_.config.width;
  const TraceScope scope = trace_module(environment_, "decoder.layers", "fold FFN LayerNorms");
  if (!folded_.defined()) folded_ = context.empty({count, 2, width}, accumulator_of(environment_.dtype));
  for (int64_t i = 0; i < count; ++i) {
    const OpenValues open(*store_, part_.layers.begin + i);
    layers_[static_cast<size_t>(i)]->feed_forward.fold_weights(folded_.flat(2 * i * width, width),
                                                               folded_.flat((2 * i + 1) * width, width));
  }
  environment_.tensor.all_reduce(context, folded_, ReduceOp::sum);
}

void LanguageModelStage::set_micro_batches(std::vector<MicroBatch> batches) {
  for (const MicroBatch& batch : batches) {
    NF_CHECK(batch.length <= environment_.config.length, "{} tokens for a model of {}", batch.length,
             environment_.config.length);
  }
  batches_ = std::move(batches);
  results_.assign(batches_.size(), Tensor());
}

double LanguageModelStage::loss_sum() const {
  double sum = 0.0;
  for (size_t i = 0; i < results_.size(); ++i) {
    if (results_[i].defined()) {
      sum += ops::weighted_sum(*environment_.context, results_[i], batches_[i].weights);
    }
  }
  return sum;
}

Shape LanguageModelStage::boundary_shape(int64_t micro_batch) const {
  return {batches_[static_cast<size_t>(micro_batch)].num_tokens(), environment_.config.width};
}

// What an empty micro-batch gives to a neighbour, or nothing where there is none.
Tensor LanguageModelStage::empty_boundary(int64_t micro_batch, bool exists) const {
  return exists ? environment_.context->empty(boundary_shape(micro_batch), boundary_dtype()) : Tensor();
}

VocabularyRows LanguageModelStage::vocabulary_rows() const {
  return {embedding_->value, embedding_->gradient, environment_.vocabulary().begin};
}

double LanguageModelStage::embedding_factor() const {
  return environment_.config.embedding_scale ? std::sqrt(static_cast<double>(environment_.config.width))
                                             : 1.0;
}

Tensor LanguageModelStage::embed(const MicroBatch& batch, SavedState& saved) const {
  Context& context = *environment_.context;
  const ModelConfig& config = environment_.config;
  const TraceScope scope = trace_module(environment_, "decoder.embed_tokens", "forward");
  const Placed<Replicated> embedded =
      reduce_partial(context, environment_.tensor, embed_tokens(context, vocabulary_rows(), batch.tokens));
  const Tensor positions = positions_ != nullptr ? positions_->value : sinusoidal_;
  saved.embedding_dropout =
      make_dropout(environment_, batch, DropoutSite::embedding, 0, config.embedding_dropout, config.width);
  ops::add_positions_forward(context, embedded.tensor(), embedding_factor(), positions.rows(0, batch.length), 0,
                             saved.embedding_dropout, embedded.tensor());
  return embedded.tensor();
}

void LanguageModelStage::embed_backward(const MicroBatch& batch, const SavedState& saved,
                                        const Tensor& dx) const {
  Context& context = *environment_.context;
  const TraceScope scope = trace_module(environment_, "decoder.embed_tokens", "backward");
  const Tensor dpositions = positions_ != nullptr ? positions_->gradient.rows(0, batch.length) : Tensor();
  ops::add_positions_backward(context, dx, batch.length, 0, saved.embedding_dropout, dx, dpositions);
  embed_tokens_backward(context, vocabulary_rows(), batch.tokens, Placed<Replicated>(dx), embedding_factor());
}

Tensor LanguageModelStage::last_tokens(const MicroBatch& batch, const Tensor& x) const {
  Context& context = *environment_.context;
  Tensor picked = context.empty({batch.sequences, x.dim(1)}, x.dtype());
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t row = (s + 1) * batch.length - 1;
    copy(context, x.rows(row, row + 1), picked.rows(s, s + 1));
  }
  return picked;
}

// From the last layer's output to the loss. The loss' own gradient is made here too, chunk by chunk, because
// logits are never kept.
Tensor LanguageModelStage::finish(int64_t micro_batch, const NormedStream<Replicated>& stream,
                                  SavedState& saved) {
  Context& context = *environment_.context;
  const MicroBatch& batch = batches_[static_cast<size_t>(micro_batch)];
  const bool generating = batch.purpose == Purpose::generation;
  const TraceScope scope = trace_module(environment_, "decoder.output", "forward");
  const Placed<Replicated> hidden(generating ? last_tokens(batch, stream.normed.tensor())
                                             : stream.normed.tensor());
  Tensor& result = results_[static_cast<size_t>(micro_batch)];
  if (generating) {
    result = vocabulary_logits(context, vocabulary_rows(), hidden).tensor();
    return {};
  }
  const LossOptions options{batch.targets, batch.weights, batch.purpose == Purpose::training, 1.0};
  LossResult loss = vocabulary_loss(context, environment_.tensor, vocabulary_rows(), hidden, options);
  result = loss.nll;
  saved.final_norm = stream.norm;
  saved.dhidden = std::move(loss.dhidden);
  return {};
}

Tensor LanguageModelStage::finish_backward(SavedState& saved) const {
  const Tensor dhidden = saved.dhidden.tensor();
  saved.dhidden = {};
  if (final_norm_.gamma == nullptr) return dhidden;
  const TraceScope scope = trace_module(environment_, "decoder.layer_norm", "backward");
  return stream_norm_backward(environment_, final_norm_, saved.final_norm, dhidden, Tensor());
}

Tensor LanguageModelStage::forward(int64_t micro_batch, const Tensor& input,
                                   std::unique_ptr<Stage::Saved>& saved) {
  const MicroBatch& batch = batches_[static_cast<size_t>(micro_batch)];
  auto state = std::make_unique<SavedState>();
  if (batch.sequences == 0) {
    saved = std::move(state);
    for (int64_t layer = part_.layers.begin; layer < part_.layers.end; ++layer) OpenValues(*store_, layer);
    return empty_boundary(micro_batch, !part_.last);
  }
  if (part_.first && positions_ == nullptr && !sinusoidal_.defined()) {
    sinusoidal_ = ops::sinusoidal_positions(*environment_.context, environment_.config.length,
                                            environment_.config.width, environment_.dtype);
  }
  const bool keeps = batch.purpose == Purpose::training;
  NormedStream<Replicated> stream = stream_norm_forward(
      environment_, first_norm_, Placed<Replicated>(part_.first ? embed(batch, *state) : input));
  for (const auto& layer : layers_) {
    LayerSaved layer_saved;
    const OpenValues open(*store_, layer->number);
    const Placed<Replicated> before = stream.x;
    stream = layer->forward(batch, stream, layer_saved);
    if (!keeps) continue;
    if (layer->is_computed_anew)
      state->layers.push_back({.input = before, .attention = {}, .feed_forward = {}});
    else
      state->layers.push_back(std::move(layer_saved));
  }
  Tensor output = part_.last ? finish(micro_batch, stream, *state) : stream.x.tensor();
  if (keeps) saved = std::move(state);
  return output;
}

// Dropout is a function of where it acts, so it drops the same again.
void LanguageModelStage::compute_anew(const MicroBatch& batch, const Layer& layer, LayerSaved& saved) const {
  const TraceScope scope = trace_module(environment_, "decoder.layers", "recompute");
  const NormParameters norm =
      environment_.config.norm_position == NormPosition::pre ? layer.attention.norm() : NormParameters{};
  const Placed<Replicated> input = std::exchange(saved.input, {});
  layer.forward(batch, stream_norm_forward(environment_, norm, input), saved);
}

template <class AfterLayer>
Tensor LanguageModelStage::run_backward(int64_t micro_batch, SavedState& saved, const Tensor& doutput,
                                        AfterLayer after_layer) const {
  const MicroBatch& batch = batches_[static_cast<size_t>(micro_batch)];
  if (batch.sequences == 0) {
    // Other replicas have gradients to sum.
    for (int64_t layer = part_.layers.end; layer-- > part_.layers.begin;) {
      OpenValues(*store_, layer);
      store_->open_gradients(layer);
      after_layer(static_cast<size_t>(layer - part_.layers.begin));
    }
    return empty_boundary(micro_batch, !part_.first);
  }
  Placed<Replicated> dx(part_.last ? finish_backward(saved) : doutput);
  for (size_t i = layers_.size(); i-- > 0;) {
    const OpenValues open(*store_, layers_[i]->number);
    store_->open_gradients(layers_[i]->number);
    if (layers_[i]->is_computed_anew) compute_anew(batch, *layers_[i], saved.layers[i]);
    dx = layers_[i]->feed_forward.backward_input(saved.layers[i].feed_forward, dx);
    dx = layers_[i]->attention.backward_input(saved.layers[i].attention, dx);
    after_layer(i);
  }
  if (!part_.first) return dx.tensor();
  embed_backward(batch, saved, dx.tensor());
  return {};
}

Tensor LanguageModelStage::backward(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) {
  auto& state = static_cast<SavedState&>(saved);
  return run_backward(micro_batch, state, doutput, [&](size_t layer) {
    if (!state.layers.empty()) layers_[layer]->backward_weight(state.layers[layer]);
    store_->reduce_gradients(layers_[layer]->number);
  });
}

Tensor LanguageModelStage::backward_input(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) {
  return run_backward(micro_batch, static_cast<SavedState&>(saved), doutput, [](size_t) {});
}

void LanguageModelStage::backward_weight(int64_t, Stage::Saved& saved) {
  auto& state = static_cast<SavedState&>(saved);
  for (size_t i = layers_.size(); i-- > 0;) {
    const OpenValues open(*store_, layers_[i]->number);
    if (!state.layers.empty()) layers_[i]->backward_weight(state.layers[i]);
    store_->reduce_gradients(layers_[i]->number);
  }
}

Tensor ForwardOnlyStage::forward(int64_t micro_batch, const Tensor& input) {
  std::unique_ptr<Stage::Saved> dropped;
  return stage_->forward(micro_batch, input, dropped);
}

}  // namespace normformer
