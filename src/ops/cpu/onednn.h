#pragma once

#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu::onednn {

/// Whether products of bf16 are better left to oneDNN: on processors with matrix tiles (AMX), which it drives
/// and gemm_part() does not.
bool is_better_for_bf16();

// Whole products on the calling thread; their bits depend on the shape. The benchmarks hold ours against
// them.

void sgemm(const GemmShape& shape, const float* a, const float* b, float* c);

/// By a primitive that is made once a thread and shape; only where has_native_bf16().
void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const bf16* bias, bf16* c);
void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const float* bias, float* c);

bool has_native_bf16();

/// "oneDNN 2.6.3"
std::string describe();

}  // namespace normformer::ops::cpu::onednn
