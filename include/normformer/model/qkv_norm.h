#pragma once

#include <array>

#include "normformer/model/environment.h"

namespace normformer {

/// LayerNorms on queries, keys and values, each over the channels of all heads (NormFormer's ablation "+3
/// more LN"). Channels are split over the tensor-parallel group with their heads; statistics are of all of
/// them, exactly.
class QkvNorm {
 public:
  /// What a micro-batch's backward needs. Of N tokens, with C channels on this rank.
  struct Saved {
    std::array<Tensor, 3> inputs;  ///< [N, C]: queries, keys, values before their LayerNorms
    Tensor mean;                   ///< [3, N]
    Tensor rstd;
  };

  explicit QkvNorm(const ModelEnvironment& environment) : environment_(environment) {}

  /// Declares `q_ln`, `k_ln` and `v_ln`, gains 1 and biases 0.
  void declare(const ParameterDeclarer& declare);

  /// The normed queries, keys and values of `qkv`, both [N, 3 C]. Collective over the tensor group.
  Tensor forward(const Tensor& qkv, Saved& saved) const;

  /// The gradient of `qkv` from that of what forward gave, in its place. Adds to the gradients of gains and
  /// biases and frees what was saved. Collective over the tensor group.
  void backward(const Tensor& dnormed, Saved& saved) const;

 private:
  Tensor sums_of_tokens(int64_t tokens) const;

  ModelEnvironment environment_;
  std::array<NormParameters, 3> norms_;
};

}  // namespace normformer
