#pragma once

#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu::onednn {

/// gemm() of fp32, without bias.
void sgemm(const GemmShape& shape, const float* a, const float* b, float* c);

/// gemm() of bf16 by a primitive that is made once a thread and shape; only where has_native_bf16().
void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const bf16* bias, bf16* c);
void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const float* bias, float* c);

/// "oneDNN 2.6.3, avx512_core_bf16".
std::string describe();

bool has_native_bf16();

}  // namespace normformer::ops::cpu::onednn
