#pragma once

#include "normformer/model/environment.h"
#include "normformer/ops/activation.h"
#include "normformer/ops/sublayer.h"
#include "normformer/tensor_parallel/linear.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {

/// The feed-forward sub-layer with its LayerNorms and residual (NormFormer, section 2):
///   pre:  lambda * x + drop(W2 LN_ffn(drop(act(W1 LN(x) + b1))) + b2)
///   post: LN(lambda * x + drop(...)), the sub-layer reading x itself.
/// LN_ffn where ffn_norm is set, lambda where residual_scale is. Features are split over the tensor-parallel
/// group; LN_ffn is over all of them, exactly, in the form that ffn_norm_form names (docs/ffn-layernorm.md).
template <class Stream>
class FeedForwardBlock {
 public:
  /// What a micro-batch's backward needs; pieces go as they are used up. Of N tokens n are on this rank's
  /// stream.
  struct Saved {
    ops::Dropout activation_dropout;
    ops::Dropout output_dropout;
    NormSaved norm;    // the sub-layer's own LayerNorm
    Tensor input;      // [n, D]: what fc1 read; not kept where it is made again
    Tensor residual;   // [n, D]: x, kept for lambda's gradient
    Tensor hidden;     // [N, F of this rank]: fc1's product, without bias
    Tensor activated;  // [N, F]: h; in the folded form gamma * h
    Tensor mean;       // of LN_ffn: [N], in the folded form [n] until backward_input
    Tensor rstd;
    Tensor output;        // [n, D]: fc2's output before dropout; folded form only
    Tensor dhidden;       // left by backward_input for backward_weight
    Tensor doutput;       // the gradient of fc2's output; in the folded form times rstd
    Tensor correction_u;  // folded form: see ops::fold_norm_backward
    Tensor correction_s;
  };

  /// Declares its parameters in the store; `layer` is global.
  FeedForwardBlock(const ModelEnvironment& environment, int64_t layer, ParameterStore& store);

  /// Where the folded form is used, writes this rank's terms of c and w_beta (ops::fold_norm_weights), each
  /// [D], and remembers the tensors: once their sums over the tensor group stand in them, forward may be
  /// called.
  void fold_weights(const Tensor& c, const Tensor& w_beta);
  bool is_folded() const;

  /// Its own LayerNorm, which in the Pre-LN model whoever makes its input makes too.
  const NormParameters& norm() const { return norm_; }

  /// Pre-LN: the LayerNorm that reads this block's output and is made with it; none until this is called.
  void set_next_norm(const NormParameters& norm) { next_norm_ = norm; }

  /// The stream before the block to the stream behind its residual. Collective over the tensor group.
  NormedStream<Stream> forward(const MicroBatch& batch, const NormedStream<Stream>& stream,
                               Saved& saved) const;

  /// The gradient of x; gradients of vectors are added here, those of products in backward_weight.
  /// Collective over the tensor group.
  Placed<Stream> backward_input(Saved& saved, const Placed<Stream>& dout) const;

  /// Adds the gradients of the products' weights and frees what backward_input left. Collective over the
  /// tensor group where the stream is split.
  void backward_weight(Saved& saved) const;

  /// Both of the above with the same bits; where overlap_tensor is set, the gradient of x is reduced beside
  /// the computing of those of weights. Collective over the tensor group.
  Placed<Stream> backward(Saved& saved, const Placed<Stream>& dout) const;

 private:
  // The gradient of fc2's output, and LN_ffn as the activation's backward takes it, for all tokens.
  struct FoldedGradient {
    Placed<Replicated> dy;
    ops::NormOfActivation norm;
  };

  StartedGradient<Stream> start_backward_input(Saved& saved, const Placed<Stream>& dout, bool overlap) const;
  bool is_pre() const { return environment_.config.norm_position == NormPosition::pre; }
  bool is_plain() const;
  // What backward makes again instead of keeping it; in the Post-LN model fc1's input is the stream.
  bool activates_again() const { return environment_.recompute == Recompute::selective; }
  bool normalises_again() const { return is_pre() && activates_again(); }
  void activate(Saved& saved, const Tensor& sums) const;
  void compute_statistics(Saved& saved, const Tensor& sums) const;
  ColumnParallelLinear fc1() const;
  RowParallelLinear fc2() const;
  ops::SublayerOutput output_parts(const ops::Dropout& dropout) const;
  ops::SublayerOutputGradients output_gradients() const;
  Placed<Stream> fc2_output(Saved& saved) const;
  Placed<Stream> folded_output(Saved& saved, const Tensor& sums) const;
  Placed<Stream> plain_output(Saved& saved, const Tensor& sums) const;
  FoldedGradient folded_backward(Saved& saved, const Placed<Stream>& dy) const;
  ops::NormOfActivation plain_backward(Saved& saved, const Tensor& dnormed) const;
  ops::NormOfActivation norm_of_activation(const Saved& saved) const;
  void activation_backward(Saved& saved, const Tensor& d, const ops::NormOfActivation* norm) const;
  Tensor normalised(const Saved& saved) const;

  ModelEnvironment environment_;
  int64_t layer_;
  std::string name_;  // in traces
  StreamBoundary<Stream> boundary_;
  NormParameters norm_;
  NormParameters next_norm_;  // made of the output: in the Post-LN model norm_
  Parameter* fc1_weight_ = nullptr;
  Parameter* fc1_bias_ = nullptr;
  NormParameters ffn_norm_;  // split with the features
  Parameter* fc2_weight_ = nullptr;
  Parameter* fc2_bias_ = nullptr;
  Parameter* residual_scale_ = nullptr;
  Tensor c_;       // [D]: W2 gamma, summed over ranks
  Tensor w_beta_;  // [D]: W2 beta, summed over ranks
};

extern template class FeedForwardBlock<Replicated>;
extern template class FeedForwardBlock<SequenceSharded>;

}  // namespace normformer
