#include "normformer/model/language_model.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "normformer/model/attention_block.h"
#include "normformer/model/classification_head.h"
#include "normformer/model/feed_forward_block.h"
#include "normformer/model/masked_language_head.h"
#include "normformer/ops/cross_entropy.h"
#include "normformer/ops/embedding.h"
#include "normformer/tensor_parallel/stream.h"
#include "normformer/tensor_parallel/vocabulary.h"

namespace normformer {

void LanguageModelStage::set_micro_batches(std::vector<MicroBatch> batches) {
  for (const MicroBatch& batch : batches) {
    NF_CHECK(batch.length <= environment_.config.length, "{} tokens for a model of {}", batch.length,
             environment_.config.length);
  }
  batches_ = std::move(batches);
  results_.assign(batches_.size(), Tensor());
  logits_.assign(batches_.size(), Tensor());
  minus_likeliest_.assign(batches_.size(), Tensor());
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

std::vector<double> LanguageModelStage::logits(int64_t index) const {
  const Tensor& made = logits_[static_cast<size_t>(index)];
  if (!made.defined() || environment_.context->is_meta()) return {};
  const auto classes = static_cast<size_t>(made.dim(1));
  const std::vector<double> weights = to_host(batch(index).weights);
  std::vector<double> values = to_host(made);
  for (size_t i = 0; i < values.size(); ++i) {
    if (weights[i / classes] == 0.0) values[i] = 0.0;
  }
  return values;
}

int64_t LanguageModelStage::correct() const {
  int64_t count = 0;
  for (size_t i = 0; i < batches_.size(); ++i) {
    const std::vector<double> values = logits(static_cast<int64_t>(i));
    if (values.empty()) continue;
    const std::vector<double> weights = to_host(batches_[i].weights);
    const std::vector<double> targets = to_host(batches_[i].targets);
    const auto classes = static_cast<int64_t>(values.size() / weights.size());
    for (size_t s = 0; s < weights.size(); ++s) {
      const auto row = values.begin() + static_cast<int64_t>(s) * classes;
      const auto likeliest = std::max_element(row, row + classes) - row;
      if (weights[s] != 0.0 && likeliest == static_cast<int64_t>(targets[s])) ++count;
    }
  }
  return count;
}

namespace {

template <class Stream>
struct LayerSaved {
  Placed<Stream> input;  // where the layer is to be computed anew: all that is kept
  typename AttentionBlock<Stream>::Saved attention;
  typename FeedForwardBlock<Stream>::Saved feed_forward;
};

template <class Stream>
struct Layer {
  Layer(const ModelEnvironment& environment, int64_t number_of_layer, ParameterStore& store)
      : number(number_of_layer),
        is_computed_anew(environment.recompute == Recompute::full),
        attention(environment, number_of_layer, store),
        feed_forward(environment, number_of_layer, store) {}

  NormedStream<Stream> forward(const MicroBatch& batch, const NormedStream<Stream>& stream,
                               LayerSaved<Stream>& saved) const {
    return feed_forward.forward(batch, attention.forward(batch, stream, saved.attention), saved.feed_forward);
  }

  Placed<Stream> backward_input(LayerSaved<Stream>& saved, const Placed<Stream>& dout) const {
    return attention.backward_input(saved.attention, feed_forward.backward_input(saved.feed_forward, dout));
  }

  void backward_weight(LayerSaved<Stream>& saved) const {
    feed_forward.backward_weight(saved.feed_forward);
    attention.backward_weight(saved.attention);
  }

  Placed<Stream> backward(LayerSaved<Stream>& saved, const Placed<Stream>& dout) const {
    return attention.backward(saved.attention, feed_forward.backward(saved.feed_forward, dout));
  }

  int64_t number;  // global
  bool is_computed_anew;
  AttentionBlock<Stream> attention;
  FeedForwardBlock<Stream> feed_forward;
};

// A layer's values, whole for as long as this lives; the next one's in this direction are on their way.
// Without a micro-batch too: other replicas gather weights, of which this one holds pieces.
class OpenLayer {
 public:
  template <class Layers>
  OpenLayer(ParameterStore& store, const Layers& layers, size_t place, int direction)
      : open_(store, layers[place]->number) {
    const size_t next = place + static_cast<size_t>(direction);
    if (next < layers.size()) store.prefetch_values(layers[next]->number);
  }

 private:
  OpenValues open_;
};

// A stage over one placement of the residual stream.
template <class Stream>
class StageOf final : public LanguageModelStage {
 public:
  StageOf(const ModelEnvironment& environment, const StagePart& part, ParameterStore& store);

  void prepare() override;
  void set_micro_batches(std::vector<MicroBatch> batches) override;
  Tensor forward(int64_t micro_batch, const Tensor& input, std::unique_ptr<Stage::Saved>& saved) override;
  Tensor backward(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) override;
  Tensor backward_input(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) override;
  void backward_weight(int64_t micro_batch, Stage::Saved& saved) override;
  Shape boundary_shape(int64_t micro_batch) const override;

 private:
  struct SavedState final : Stage::Saved {
    std::vector<LayerSaved<Stream>> layers;
    ops::Dropout embedding_dropout;
    NormSaved final_norm;
    Placed<Stream> dhidden;  // of the final norm's output, left by the loss
  };

  Context& context() const { return *environment().context; }
  void hand_out_norms();
  bool folds() const { return !layers_.empty() && layers_.front()->feed_forward.is_folded(); }
  void fold(Range layers);
  void finish_weights(size_t layer);
  ModelEnvironment environment_of_layer(int64_t layer) const;
  void compute_anew(const MicroBatch& batch, const Layer<Stream>& layer, LayerSaved<Stream>& saved) const;
  VocabularyRows vocabulary_rows() const;
  double embedding_factor() const;
  static bool is_whole(const MicroBatch& batch) { return batch.part == SequencePart::whole(batch.length); }
  // Whether the rows of positions are the table's first ones.
  static bool stand_in_table(const MicroBatch& batch) { return is_whole(batch) && !batch.positions; }
  static int64_t num_positions(const MicroBatch& batch);
  Tensor positions_of(const MicroBatch& batch) const;
  Tensor position_gradients(const MicroBatch& batch) const;
  void add_position_gradients(const MicroBatch& batch, const Tensor& of_part) const;
  Placed<Stream> embed(const MicroBatch& batch, SavedState& saved) const;
  void embed_backward(const MicroBatch& batch, const SavedState& saved, const Placed<Stream>& dx) const;
  void finish(int64_t micro_batch, const NormedStream<Stream>& stream, SavedState& saved);
  Tensor last_tokens(const MicroBatch& batch, const Tensor& x) const;
  Placed<Stream> finish_backward(SavedState& saved) const;
  Tensor empty_boundary(int64_t micro_batch, bool exists) const;
  template <class OfLayer>
  Tensor run_backward(int64_t micro_batch, SavedState& saved, const Tensor& doutput, OfLayer of_layer) const;

  ParameterStore* store_;
  StreamBoundary<Stream> boundary_;
  Parameter* embedding_ = nullptr;
  Parameter* positions_ = nullptr;  // learned positions
  Tensor sinusoidal_;               // [length, D], made when first needed
  std::vector<std::unique_ptr<Layer<Stream>>> layers_;
  NormParameters first_norm_;  // Pre-LN: what reads the stage's input
  NormParameters final_norm_;
  std::optional<MaskedLanguageHead> head_;  // where logits are not the embedding's alone
  std::optional<ClassificationHead> classifier_;
  Tensor folded_;                  // [layers, 2, D]: c and w_beta of every layer
  std::vector<bool> is_folded_;    // of each layer: whether these are of its present weights
  std::vector<size_t> backwards_;  // of each layer: micro-batches whose gradients of weights are added
};

template <class Stream>
StageOf<Stream>::StageOf(const ModelEnvironment& environment, const StagePart& part, ParameterStore& store)
    : LanguageModelStage(environment, part),
      store_(&store),
      boundary_(*environment.context, environment.tensor) {
  const ModelConfig& config = environment.config;
  const bool fairseq = config.init == Initialisation::fairseq;
  const auto embedding_init =
      InitialValue::normal(fairseq ? 1.0 / std::sqrt(static_cast<double>(config.width)) : 0.02);
  const ParameterDeclarer declare(this->environment(), store, "decoder.", -1, -1);
  const bool classifies = config.head == OutputHead::classification;
  const bool embeds = part.first || (part.last && !classifies);
  if (embeds) embedding_ = store.find("decoder.embed_tokens.weight");
  if (embedding_ == nullptr && embeds) {
    embedding_ = &declare.row_sharded("embed_tokens.weight", config.vocab, config.width,
                                      environment.vocabulary(), embedding_init);
    embedding_->spec.sum_over.embedding = !part.holds_both_ends && !classifies;
    embedding_->spec.owned = part.first;
  }
  if (part.first && config.positions == Positions::learned) {
    positions_ =
        &declare.stream_matrix("embed_positions.weight", config.length, config.width, embedding_init);
  }
  for (int64_t layer = part.layers.begin; layer < part.layers.end; ++layer) {
    layers_.push_back(std::make_unique<Layer<Stream>>(environment_of_layer(layer), layer, store));
  }
  if (part.last && config.norm_position == NormPosition::pre) {
    final_norm_ = declare_stream_norm(declare, "layer_norm", config.width);
  }
  if (part.last && config.head == OutputHead::masked_language) head_.emplace(this->environment(), store);
  if (part.last && classifies) classifier_.emplace(this->environment(), store);
  if (config.norm_position == NormPosition::pre) hand_out_norms();
}

template <class Stream>
ModelEnvironment StageOf<Stream>::environment_of_layer(int64_t layer) const {
  ModelEnvironment made = environment();
  const int64_t computed_anew = environment().recompute_layers;
  if (computed_anew > 0 && layer - part().layers.begin >= computed_anew) made.recompute = Recompute::none;
  return made;
}

// A LayerNorm is made in the pass that makes what it reads: each block gets the one behind it. The stage's
// last block gets none where another stage goes on, and nothing here comes before its first LayerNorm.
template <class Stream>
void StageOf<Stream>::hand_out_norms() {
  NormParameters next = final_norm_;
  for (size_t i = layers_.size(); i-- > 0;) {
    layers_[i]->feed_forward.set_next_norm(next);
    layers_[i]->attention.set_next_norm(layers_[i]->feed_forward.norm());
    next = layers_[i]->attention.norm();
  }
  first_norm_ = next;
}

// Weights that come when they are used are folded then, layer by layer; others together.
template <class Stream>
void StageOf<Stream>::prepare() {
  if (!folds()) return;
  is_folded_.assign(layers_.size(), false);
  if (!store_->gathers_for_use()) fold({0, static_cast<int64_t>(layers_.size())});
}

// Of layers of this part, by their places; their values are open.
template <class Stream>
void StageOf<Stream>::fold(Range layers) {
  const int64_t width = environment().config.width;
  const TraceScope scope = trace_module(environment(), "decoder.layers", "fold FFN LayerNorms");
  if (!folded_.defined()) {
    const auto count = static_cast<int64_t>(layers_.size());
    folded_ = context().empty({count, 2, width}, accumulator_of(environment().dtype));
  }
  for (int64_t i = layers.begin; i < layers.end; ++i) {
    layers_[static_cast<size_t>(i)]->feed_forward.fold_weights(folded_.flat(2 * i * width, width),
                                                               folded_.flat((2 * i + 1) * width, width));
    is_folded_[static_cast<size_t>(i)] = true;
  }
  environment().tensor.all_reduce(
      context(), folded_.flat(2 * layers.begin * width, 2 * layers.size() * width), ReduceOp::sum);
}

template <class Stream>
void StageOf<Stream>::set_micro_batches(std::vector<MicroBatch> batches) {
  LanguageModelStage::set_micro_batches(std::move(batches));
  backwards_.assign(layers_.size(), 0);
}

template <class Stream>
Shape StageOf<Stream>::boundary_shape(int64_t micro_batch) const {
  return {boundary_.rows(batch(micro_batch).num_tokens()).size(), environment().config.width};
}

// What an empty micro-batch gives to a neighbour, or nothing where there is none.
template <class Stream>
Tensor StageOf<Stream>::empty_boundary(int64_t micro_batch, bool exists) const {
  return exists ? context().empty(boundary_shape(micro_batch), boundary_dtype()) : Tensor();
}

template <class Stream>
VocabularyRows StageOf<Stream>::vocabulary_rows() const {
  return {embedding_->value, embedding_->gradient, environment().vocabulary().begin};
}

template <class Stream>
double StageOf<Stream>::embedding_factor() const {
  return environment().config.embedding_scale ? std::sqrt(static_cast<double>(environment().config.width))
                                              : 1.0;
}

// The rows of the table for the tokens that are here.
template <class Stream>
Tensor StageOf<Stream>::positions_of(const MicroBatch& batch) const {
  const Tensor table = positions_ != nullptr ? positions_->value : sinusoidal_;
  if (batch.continuation) return pick_rows(environment(), table, batch.continuation->positions);
  if (batch.positions) return pick_rows(environment(), table, batch.positions);
  if (is_whole(batch)) return table.rows(0, batch.length);
  const auto& [first, second] = batch.part;
  const Tensor rows = context().empty({batch.part.size(), table.dim(1)}, table.dtype());
  copy(context(), table.rows(first.begin, first.end), rows.rows(0, first.size()));
  copy(context(), table.rows(second.begin, second.end), rows.rows(first.size(), batch.part.size()));
  return rows;
}

// How many rows positions_of has: those of a sequence, or of all sequences one behind the other.
template <class Stream>
int64_t StageOf<Stream>::num_positions(const MicroBatch& batch) {
  return batch.positions ? batch.num_tokens() : batch.part.size();
}

// Where the gradients of these rows add up: in the table's own, or beside them until they go there.
template <class Stream>
Tensor StageOf<Stream>::position_gradients(const MicroBatch& batch) const {
  const Tensor& table = positions_->gradient;
  if (stand_in_table(batch)) return table.rows(0, batch.length);
  return context().zeros({num_positions(batch), table.dim(1)}, table.dtype());
}

template <class Stream>
void StageOf<Stream>::add_position_gradients(const MicroBatch& batch, const Tensor& of_part) const {
  const Tensor& table = positions_->gradient;
  if (batch.positions) return ops::embedding_backward(context(), batch.positions, of_part, 1.0, 0, table);
  const auto& [first, second] = batch.part;
  add(context(), of_part.rows(0, first.size()), table.rows(first.begin, first.end));
  add(context(), of_part.rows(first.size(), batch.part.size()), table.rows(second.begin, second.end));
}

template <class Stream>
Placed<Stream> StageOf<Stream>::embed(const MicroBatch& batch, SavedState& saved) const {
  const ModelConfig& config = environment().config;
  const TraceScope scope = trace_module(environment(), "decoder.embed_tokens", "forward");
  const Placed<Stream> embedded = boundary_.leave(embed_tokens(context(), vocabulary_rows(), batch.tokens));
  const int64_t first_row = boundary_.rows(batch.num_tokens()).begin;
  saved.embedding_dropout = make_stream_dropout(environment(), batch, DropoutSite::embedding, 0,
                                                config.embedding_dropout, first_row);
  ops::add_positions_forward(context(), embedded.tensor(), embedding_factor(), positions_of(batch), first_row,
                             saved.embedding_dropout, embedded.tensor());
  return embedded;
}

template <class Stream>
void StageOf<Stream>::embed_backward(const MicroBatch& batch, const SavedState& saved,
                                     const Placed<Stream>& dx) const {
  const TraceScope scope = trace_module(environment(), "decoder.embed_tokens", "backward");
  const Tensor dpositions = positions_ != nullptr ? position_gradients(batch) : Tensor();
  ops::add_positions_backward(context(), dx.tensor(), num_positions(batch),
                              boundary_.rows(batch.num_tokens()).begin, saved.embedding_dropout, dx.tensor(),
                              dpositions);
  if (dpositions && !stand_in_table(batch)) add_position_gradients(batch, dpositions);
  embed_tokens_backward(context(), vocabulary_rows(), batch.tokens,
                        boundary_.leave_backward(dx, batch.num_tokens()), embedding_factor());
}

template <class Stream>
Tensor StageOf<Stream>::last_tokens(const MicroBatch& batch, const Tensor& x) const {
  if (batch.continuation) return pick_rows(environment(), x, batch.continuation->last_rows);
  Tensor picked = context().empty({batch.sequences, x.dim(1)}, x.dtype());
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t row = (s + 1) * batch.part.size() - 1;
    copy(context(), x.rows(row, row + 1), picked.rows(s, s + 1));
  }
  return picked;
}

// From the last layer's output to the loss. The loss' own gradient is made here too, chunk by chunk, because
// logits are never kept.
template <class Stream>
void StageOf<Stream>::finish(int64_t micro_batch, const NormedStream<Stream>& stream, SavedState& saved) {
  const MicroBatch& batch = this->batch(micro_batch);
  const TraceScope scope = trace_module(environment(), "decoder.output", "forward");
  const Placed<Replicated> hidden = boundary_.enter(stream.normed, batch.num_tokens());
  if (head_ || classifier_) {
    HeadResult made =
        head_ ? head_->forward(batch, hidden, vocabulary_rows()) : classifier_->forward(batch, hidden);
    set_result(micro_batch, std::move(made.nll));
    set_logits(micro_batch, std::move(made.logits));
    if (batch.purpose != Purpose::training) return;
    saved.final_norm = stream.norm;
    saved.dhidden = boundary_.keep_own(made.dhidden);
    return;
  }
  if (batch.purpose == Purpose::generation) {
    const Placed<Replicated> last(last_tokens(batch, hidden.tensor()));
    return set_result(micro_batch, vocabulary_logits(context(), vocabulary_rows(), last).tensor());
  }
  const LossOptions options{batch.targets, batch.weights, batch.purpose == Purpose::training,
                            batch.loss_scale, batch.purpose == Purpose::scoring};
  const LossResult loss =
      vocabulary_loss(context(), environment().tensor, vocabulary_rows(), hidden, options);
  set_result(micro_batch, loss.nll);
  if (options.likeliest) set_minus_likeliest(micro_batch, loss.minus_likeliest);
  if (!options.training) return;
  saved.final_norm = stream.norm;
  saved.dhidden = boundary_.enter_backward(loss.dhidden);
}

template <class Stream>
Placed<Stream> StageOf<Stream>::finish_backward(SavedState& saved) const {
  const Placed<Stream> dhidden = std::exchange(saved.dhidden, {});
  if (final_norm_.gamma == nullptr) return dhidden;
  const TraceScope scope = trace_module(environment(), "decoder.layer_norm", "backward");
  return Placed<Stream>(
      stream_norm_backward(environment(), final_norm_, saved.final_norm, dhidden.tensor(), Tensor()));
}

template <class Stream>
Tensor StageOf<Stream>::forward(int64_t micro_batch, const Tensor& input,
                                std::unique_ptr<Stage::Saved>& saved) {
  const MicroBatch& batch = this->batch(micro_batch);
  auto state = std::make_unique<SavedState>();
  if (batch.sequences == 0) {
    saved = std::move(state);
    for (size_t i = 0; i < layers_.size(); ++i) const OpenLayer open(*store_, layers_, i, 1);
    return empty_boundary(micro_batch, !part().last);
  }
  if (part().first && positions_ == nullptr && !sinusoidal_.defined()) {
    sinusoidal_ = ops::sinusoidal_positions(context(), environment().config.length,
                                            environment().config.width, environment().dtype);
  }
  store_->await_values(part().layers.begin);
  const bool keeps = batch.purpose == Purpose::training;
  NormedStream<Stream> stream = stream_norm_forward(
      environment(), first_norm_, part().first ? embed(batch, *state) : Placed<Stream>(input));
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer<Stream>& layer = *layers_[i];
    LayerSaved<Stream> layer_saved;
    const OpenLayer open(*store_, layers_, i, 1);
    if (folds() && !is_folded_[i]) fold({static_cast<int64_t>(i), static_cast<int64_t>(i) + 1});
    const Placed<Stream> before = stream.x;
    stream = layer.forward(batch, stream, layer_saved);
    if (!keeps) continue;
    if (layer.is_computed_anew)
      state->layers.push_back({.input = before, .attention = {}, .feed_forward = {}});
    else
      state->layers.push_back(std::move(layer_saved));
  }
  if (part().last) finish(micro_batch, stream, *state);
  if (keeps) saved = std::move(state);
  return part().last ? Tensor() : stream.x.tensor();
}

// Dropout is a function of where it acts, so it drops the same again.
template <class Stream>
void StageOf<Stream>::compute_anew(const MicroBatch& batch, const Layer<Stream>& layer,
                                   LayerSaved<Stream>& saved) const {
  const TraceScope scope = trace_module(environment(), "decoder.layers", "recompute");
  const NormParameters norm =
      environment().config.norm_position == NormPosition::pre ? layer.attention.norm() : NormParameters{};
  const Placed<Stream> input = std::exchange(saved.input, {});
  layer.forward(batch, stream_norm_forward(environment(), norm, input), saved);
}

// Calls of_layer(place, dx), which returns the gradient of the layer's input; of an empty micro-batch too,
// since other replicas have gradients to sum.
template <class Stream>
template <class OfLayer>
Tensor StageOf<Stream>::run_backward(int64_t micro_batch, SavedState& saved, const Tensor& doutput,
                                     OfLayer of_layer) const {
  const MicroBatch& batch = this->batch(micro_batch);
  const bool is_empty = batch.sequences == 0;
  Placed<Stream> dx;
  if (!is_empty) dx = part().last ? finish_backward(saved) : Placed<Stream>(doutput);
  for (size_t i = layers_.size(); i-- > 0;) {
    const OpenLayer open(*store_, layers_, i, -1);
    store_->open_gradients(layers_[i]->number);
    if (!is_empty && layers_[i]->is_computed_anew) compute_anew(batch, *layers_[i], saved.layers[i]);
    dx = of_layer(i, dx);
  }
  if (is_empty) return empty_boundary(micro_batch, !part().first);
  if (!part().first) return dx.tensor();
  embed_backward(batch, saved, dx);
  return {};
}

// A micro-batch's gradients of a layer's weights are added.
template <class Stream>
void StageOf<Stream>::finish_weights(size_t layer) {
  store_->reduce_gradients(layers_[layer]->number);
  if (++backwards_[layer] == num_micro_batches()) store_->finish_gradients(layers_[layer]->number);
}

template <class Stream>
Tensor StageOf<Stream>::backward(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) {
  auto& state = static_cast<SavedState&>(saved);
  return run_backward(micro_batch, state, doutput, [&](size_t i, const Placed<Stream>& dout) {
    const Placed<Stream> dx = dout.defined() ? layers_[i]->backward(state.layers[i], dout) : dout;
    finish_weights(i);
    return dx;
  });
}

template <class Stream>
Tensor StageOf<Stream>::backward_input(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) {
  auto& state = static_cast<SavedState&>(saved);
  return run_backward(micro_batch, state, doutput, [&](size_t i, const Placed<Stream>& dout) {
    return dout.defined() ? layers_[i]->backward_input(state.layers[i], dout) : dout;
  });
}

template <class Stream>
void StageOf<Stream>::backward_weight(int64_t, Stage::Saved& saved) {
  auto& state = static_cast<SavedState&>(saved);
  for (size_t i = layers_.size(); i-- > 0;) {
    const OpenLayer open(*store_, layers_, i, -1);
    if (!state.layers.empty()) layers_[i]->backward_weight(state.layers[i]);
    finish_weights(i);
  }
}

}  // namespace

std::unique_ptr<LanguageModelStage> make_language_model_stage(const ModelEnvironment& environment,
                                                              const StagePart& part, ParameterStore& store) {
  if (environment.sequence) return std::make_unique<StageOf<SequenceSharded>>(environment, part, store);
  return std::make_unique<StageOf<Replicated>>(environment, part, store);
}

Tensor ForwardOnlyStage::forward(int64_t micro_batch, const Tensor& input) {
  std::unique_ptr<Stage::Saved> dropped;
  return stage_->forward(micro_batch, input, dropped);
}

}  // namespace normformer
