#include "ops/cuda/cudnn_attention.h"

namespace normformer::ops::cuda {

bool cudnn_attention_forward(Context&, const AttentionShape&, const Tensor&, const Tensor&, const Dropout&,
                             const Tensor&, const Tensor&) {
  return false;
}

bool cudnn_attention_backward(Context&, const AttentionShape&, const Tensor&, const Tensor&, const Tensor&,
                              const Dropout&, const Tensor&, const Tensor&, const Tensor&) {
  return false;
}

void use_cudnn(bool) {}

std::string describe_cudnn() { return "no cuDNN"; }

std::string cudnn_refusal(const AttentionShape&, DType, AttentionDirection, const std::string&, int) {
  return "this build has no cuDNN";
}

}  // namespace normformer::ops::cuda
