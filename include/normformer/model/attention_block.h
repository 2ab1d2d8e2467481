#pragma once

#include "normformer/context_parallel/ring_attention.h"
#include "normformer/model/environment.h"
#include "normformer/model/qkv_norm.h"
#include "normformer/ops/attention.h"
#include "normformer/ops/sublayer.h"
#include "normformer/tensor_parallel/linear.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {

/// The attention sub-layer with its LayerNorms and residual (NormFormer, section 2):
///   pre:  x + drop(LN_post(scale(W_o attention(LN(x)) + b_o)))
///   post: LN(x + drop(...)), the sub-layer reading x itself.
/// With qkv_norm, attention reads LayerNorms of queries, keys and values. Head scale acts before W_o
/// (`paper`) or after it (`fairseq`); LN_post where post_attention_norm is set. Heads are split over the
/// tensor-parallel group, in whole heads.
template <class Stream>
class AttentionBlock {
 public:
  /// What a micro-batch's backward needs; pieces go as they are used up. Of N tokens n are on this rank's
  /// stream.
  struct Saved {
    ops::AttentionShape shape;  // of whole sequences
    SequencePart part;
    ops::Dropout probabilities_dropout;
    ops::Dropout output_dropout;
    Tensor document_start;
    NormSaved norm;  // the sub-layer's own LayerNorm
    Tensor input;    // [n, D]: what the projections read; not kept where it is made again
    Tensor qkv;      // [N, 3 * channels of this rank]: what attention read
    QkvNorm::Saved qkv_norm;
    Tensor heads;        // [N, channels of this rank]: attention's output, before head scale
    Tensor lse;          // [B, heads of this rank, tokens of a sequence here]
    Tensor projected;    // [n, D]: the reduced output of W_o, without bias
    Tensor output_mean;  // of LN_post
    Tensor output_rstd;
    Tensor dqkv;  // left by backward_input for backward_weight
    Tensor dprojected;

    int64_t num_tokens() const { return shape.batch * part.size(); }
  };

  /// Declares its parameters in the store; `layer` is global.
  AttentionBlock(const ModelEnvironment& environment, int64_t layer, ParameterStore& store);

  /// Its own LayerNorm, which in the Pre-LN model whoever makes its input makes too.
  const NormParameters& norm() const { return norm_; }

  /// Pre-LN: the LayerNorm that reads this block's output and is made with it; none until this is called.
  void set_next_norm(const NormParameters& norm) { next_norm_ = norm; }

  /// The stream before the block to the stream behind its residual. Collective over the tensor and the
  /// context group.
  NormedStream<Stream> forward(const MicroBatch& batch, const NormedStream<Stream>& stream,
                               Saved& saved) const;

  /// The gradient of x; gradients of vectors are added here, those of products in backward_weight.
  /// Collective over the tensor and the context group.
  Placed<Stream> backward_input(Saved& saved, const Placed<Stream>& dout) const;

  /// Adds the gradients of the products' weights and frees what backward_input left. Collective over the
  /// tensor group where the stream is split.
  void backward_weight(Saved& saved) const;

  /// Both of the above with the same bits; where overlap_tensor is set, the gradient of x is reduced beside
  /// the computing of those of weights. Collective over the tensor group.
  Placed<Stream> backward(Saved& saved, const Placed<Stream>& dout) const;

 private:
  StartedGradient<Stream> start_backward_input(Saved& saved, const Placed<Stream>& dout, bool overlap) const;
  bool is_pre() const { return environment_.config.norm_position == NormPosition::pre; }
  // Whether the products' input is made again from the stream; in the Post-LN model it is the stream.
  bool normalises_again() const { return is_pre() && environment_.recompute == Recompute::selective; }
  ColumnParallelLinear qkv_linear() const;
  RowParallelLinear output_linear() const;
  ops::SublayerOutput output_parts(const ops::Dropout& dropout) const;
  ops::SublayerOutputGradients output_gradients() const;
  Placed<FeatureSharded> scaled_heads(const Tensor& heads) const;
  bool splits_sequences() const { return environment_.sequences.size() > 1; }
  void attend(const Saved& saved, const Tensor& qkv) const;
  void attend_backward(const Saved& saved, const Tensor& dheads) const;
  void attend_continued(const Continuation& continuation, const Tensor& qkv, const Tensor& out) const;

  ModelEnvironment environment_;
  int64_t layer_;
  std::string name_;  // in traces
  const ParameterStore* store_;
  StreamBoundary<Stream> boundary_;
  RingAttention ring_;  // where sequences are split
  NormParameters norm_;
  NormParameters next_norm_;       // made of the output: in the Post-LN model norm_
  Parameter* q_weight_ = nullptr;  // followed by k's and v's: one matrix [3 * channels, D]
  Parameter* q_bias_ = nullptr;
  QkvNorm qkv_norm_;
  Parameter* head_scale_ = nullptr;
  Parameter* output_weight_ = nullptr;
  Parameter* output_bias_ = nullptr;
  NormParameters output_norm_;
};

extern template class AttentionBlock<Replicated>;
extern template class AttentionBlock<SequenceSharded>;

}  // namespace normformer
