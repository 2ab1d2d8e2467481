#pragma once

#include <string>

#include "normformer/ops/attention.h"

// cuDNN's attention where the build has the library (cudnn_attention.cpp); else nothing is taken
// (no_cudnn.cpp).

namespace normformer::ops::cuda {

/// As attention_forward and attention_backward for what cuDNN has kernels for: false, and nothing is done,
/// for every other call. Taken are bf16 and fp16 without dropout and documents, in sequences of whole blocks
/// of 128 tokens. The first call for a shape finds and compiles its kernels. The same bits every time.
bool cudnn_attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                             const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                             const Tensor& lse);
bool cudnn_attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout,
                              const Tensor& qkv, const Tensor& document_start, const Dropout& dropout,
                              const Tensor& out, const Tensor& lse, const Tensor& dqkv);

/// Whether this process uses cuDNN where it can, as it does unless told otherwise: for tests and benchmarks.
void use_cudnn(bool use);

/// "cuDNN 9.19.0 (frontend 1.23.0)", or "no cuDNN".
std::string describe_cudnn();

enum class AttentionDirection { forward, backward };

/// Why cuDNN has no kernels for a shape on a device that is described as cuDNN itself writes devices down, in
/// JSON; empty where it has. `compute_capability` is that device's, 90 for Hopper. Needs no GPU: for tests.
std::string cudnn_refusal(const AttentionShape& shape, DType dtype, AttentionDirection direction,
                          const std::string& device, int compute_capability);

}  // namespace normformer::ops::cuda
