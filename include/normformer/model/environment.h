#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/mesh/layout.h"
#include "normformer/mesh/parameter.h"
#include "normformer/model/key_value_cache.h"
#include "normformer/ops/activation.h"
#include "normformer/ops/dropout.h"
#include "normformer/ops/sublayer.h"
#include "normformer/sharding/parameter_store.h"
#include "normformer/tensor/context.h"
#include "normformer/tensor_parallel/placed.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {

/// What every part of a model knows: where it computes, what it is, and with whom it shares heads and
/// features.
struct ModelEnvironment {
  Context* context;
  ModelConfig config;  ///< with ffn and vocab filled in
  DType dtype;         ///< of weights and activations
  Group tensor;        ///< the tensor-parallel group
  Group sequences;     ///< the context-parallel group, which shares every sequence's tokens
  uint64_t seed;
  bool sequence = false;  ///< the residual stream's tokens are dealt out to the tensor-parallel group
  Recompute recompute = Recompute::none;
  int64_t recompute_layers = 0;  ///< of a part, its first ones; 0 means all
  bool overlap_context = false;  ///< receive keys and values beside the computing with others
  bool overlap_tensor = false;   ///< reduce gradients of inputs beside the computing of those of weights

  /// This rank's heads, feed-forward features, channels of its heads, and rows of the vocabulary.
  Range heads() const { return head_shard(config.heads, tensor.size(), tensor.rank()); }
  Range features() const { return feature_shard(config.ffn, tensor.size(), tensor.rank()); }
  Range head_channels() const {
    return head_channel_shard(config.heads, config.head_size(), tensor.size(), tensor.rank());
  }
  Range vocabulary() const { return vocabulary_shard(config.vocab, tensor.size(), tensor.rank()); }
};

/// Whether the model predicts only the tokens that a batch's loss mask names.
inline bool predicts_some_tokens(const ModelConfig& config) { return config.head != OutputHead::language; }

/// What a forward pass is for.
enum class Purpose {
  training,    ///< dropout is on, the loss and its gradients are wanted
  evaluation,  ///< every target's negative log-likelihood is wanted
  scoring,     ///< the same, and every target's rival: the likeliest token
  generation,  ///< the logits behind each sequence's last token are wanted
};

/// The tokens of one micro-batch and what is asked of them, as far as this rank has them: of every sequence
/// the same part. Undefined tensors mean: not needed here, or no mask.
struct MicroBatch {
  int64_t sequences = 0;     ///< may be 0: a replica with fewer micro-batches than others runs empty ones
  int64_t length = 0;        ///< tokens of a whole sequence; at most the model's
  SequencePart part;         ///< those of them that are here, which may be none
  int64_t first_sample = 0;  ///< position of its first sequence in the global batch
  uint64_t batch_index = 0;  ///< which global batch; keys dropout
  Purpose purpose = Purpose::evaluation;
  Tensor tokens;     ///< i32 [num_tokens()]: the sequences' parts one behind the other
  Tensor targets;    ///< i32, as many; or one for each of `predicted`
  Tensor weights;    ///< u8, as many: 1 where a target counts; none beside a masked model's `predicted`
  Tensor predicted;  ///< i32 [counted]: of a model that predicts some tokens only, their rows in `tokens`;
                     ///< of a classifier [sequences], num_tokens() where another rank has the token
  Tensor document_start;    ///< i32, as many, of whole sequences: see ops/attention.h
  Tensor positions = {};    ///< i32, as many: where in its text each token is; none: in its sequence
  int64_t counted = 0;      ///< how many of these targets count
  double loss_scale = 1.0;  ///< what the gradient of its loss is multiplied by
  std::optional<Continuation> continuation = std::nullopt;  ///< of generation with a cache: its rows, of
                                                            ///< sequences of which none is longer than length

  int64_t num_tokens() const { return continuation ? continuation->num_tokens() : sequences * part.size(); }
};

/// Where in the model a dropout acts. The values are part of what a seed means: they never change.
enum class DropoutSite : uint64_t {
  embedding = 0,
  attention = 1,
  attention_output = 2,
  activation = 3,
  ffn_output = 4,
  head_input = 5,  ///< of a classifier
  head_hidden = 6
};

/// The dropout of a site for a micro-batch: inactive unless it trains and the probability is positive.
/// `layer` is global; `row_elements` and `first_column` as in ops::Dropout.
ops::Dropout make_dropout(const ModelEnvironment& environment, const MicroBatch& batch, DropoutSite site,
                          int64_t layer, double probability, int64_t row_elements, int64_t first_column = 0);

/// As make_dropout of a site on the residual stream, of which this rank holds the micro-batch's tokens from
/// `first_row` on.
ops::Dropout make_stream_dropout(const ModelEnvironment& environment, const MicroBatch& batch,
                                 DropoutSite site, int64_t layer, double probability, int64_t first_row);

/// BERT's matrices and embeddings (Devlin et al. 2019; fairseq's init_bert_params), and biases.
inline constexpr InitialValue kBertWeights{InitialValue::Kind::normal, 0.02};
inline constexpr InitialValue kZeros{InitialValue::Kind::constant, 0.0};

/// Declares parameters of one module under a common prefix.
class ParameterDeclarer {
 public:
  /// `unit` and `finished_with` are those of ParameterSpec.
  ParameterDeclarer(const ModelEnvironment& environment, ParameterStore& store, std::string prefix,
                    int64_t unit, int64_t finished_with)
      : environment_(&environment),
        store_(&store),
        prefix_(std::move(prefix)),
        unit_(unit),
        finished_with_(finished_with) {}

  /// A vector that every rank of the tensor group holds whole and whose gradient every rank makes whole; its
  /// first rank owns it.
  Parameter& replicated_vector(const std::string& name, int64_t size, InitialValue initial) const;

  /// A matrix of that kind.
  Parameter& replicated_matrix(const std::string& name, int64_t rows, int64_t columns,
                               InitialValue initial) const;

  /// The same of a vector that acts on the residual stream: each rank makes the gradient of the tokens it
  /// has.
  Parameter& stream_vector(const std::string& name, int64_t size, InitialValue initial) const;

  /// A vector of `size` of which this rank holds `part`.
  Parameter& sharded_vector(const std::string& name, int64_t size, Range part, InitialValue initial,
                            bool joins_previous = false) const;

  /// A matrix of which this rank holds rows `part`, or columns `part`.
  Parameter& row_sharded(const std::string& name, int64_t rows, int64_t columns, Range part,
                         InitialValue initial, bool joins_previous = false) const;
  /// A matrix that acts on the residual stream, as stream_vector.
  Parameter& stream_matrix(const std::string& name, int64_t rows, int64_t columns,
                           InitialValue initial) const;

  Parameter& column_sharded(const std::string& name, int64_t rows, int64_t columns, Range part,
                            InitialValue initial) const;

 private:
  // What the ranks of the tensor group hold of a parameter: their own parts, or copies.
  enum class Held { sharded, replicated, on_stream };
  Parameter& declare(const std::string& name, Shape shape, Rectangle part, Held held, InitialValue initial,
                     bool joins_previous) const;

  const ModelEnvironment* environment_;
  ParameterStore* store_;
  std::string prefix_;
  int64_t unit_;
  int64_t finished_with_;
};

/// A module's span in traces: "decoder.layers.3.self_attn forward".
TraceScope trace_module(const ModelEnvironment& environment, std::string_view module,
                        std::string_view direction);

/// The operation of the model's activation.
ops::ActivationKind activation_kind(const ModelConfig& config);

/// "decoder.layers.N."
std::string layer_prefix(int64_t layer);

/// Rows of a matrix by their numbers, i32; zeros for numbers behind its last row.
Tensor pick_rows(const ModelEnvironment& environment, const Tensor& from, const Tensor& rows);

/// Gain and bias of one LayerNorm.
struct NormParameters {
  Parameter* gamma = nullptr;
  Parameter* beta = nullptr;
};

/// Declares a LayerNorm over the residual stream's channels, gain 1 and bias 0.
NormParameters declare_stream_norm(const ParameterDeclarer& declare, const std::string& name, int64_t width);

/// What a LayerNorm on the residual stream keeps for its backward.
struct NormSaved {
  Tensor input;
  Tensor mean;
  Tensor rstd;
};

/// The residual stream and the LayerNorm of it that is read next.
template <class Stream>
struct NormedStream {
  Placed<Stream> x;       ///< [N, D]
  Placed<Stream> normed;  ///< [N, D]; x itself where x is what a LayerNorm gave (Post-LN), undefined where
                          ///< another stage makes it
  NormSaved norm;         ///< of `normed`, where it is not x
};

/// x with its LayerNorm; with x itself where `norm` has no parameters.
template <class Stream>
NormedStream<Stream> stream_norm_forward(const ModelEnvironment& environment, const NormParameters& norm,
                                         const Placed<Stream>& x);

/// The stream behind a sub-layer's residual (ops::sublayer_output_forward, whose `mean` and `rstd` these are)
/// and, where `next` has parameters, its LayerNorm: one pass.
template <class Stream>
NormedStream<Stream> sublayer_forward(const ModelEnvironment& environment, const ops::SublayerOutput& parts,
                                      const Placed<Stream>& branch, const Placed<Stream>& residual,
                                      const Tensor& mean, const Tensor& rstd, const NormParameters& next);

/// The gradient of a sub-layer's input x while what came through its products is still being reduced.
template <class Stream>
struct StartedGradient {
  Arriving<Stream> dnormed;  ///< of what the products read
  Tensor dresidual;          ///< [n, D]: of x itself
  NormSaved norm;            ///< Pre-LN: of the LayerNorm between the two
};

/// The gradient of x: once dnormed has come, goes back through the LayerNorm (Pre-LN) and adds. Adds to the
/// norm's gradients.
template <class Stream>
Placed<Stream> finish_gradient(const ModelEnvironment& environment, const NormParameters& norm,
                               StartedGradient<Stream> started);

/// What the norm gave, computed anew with the same bits.
Tensor stream_norm_again(const ModelEnvironment& environment, const NormParameters& norm,
                         const NormSaved& saved);

/// The gradient of the norm's input, plus `residual` where defined. Adds to the norm's gradients.
Tensor stream_norm_backward(const ModelEnvironment& environment, const NormParameters& norm,
                            const NormSaved& saved, const Tensor& dy, const Tensor& residual);

}  // namespace normformer
