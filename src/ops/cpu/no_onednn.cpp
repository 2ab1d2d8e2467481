#include "normformer/core/error.h"

#include "ops/cpu/onednn.h"

namespace normformer::ops::cpu::onednn {

namespace {

[[noreturn]] void refuse() {
  throw Error(ExitCode::internal, "this program was built without oneDNN (NORMFORMER_PLAIN_KERNELS)");
}

}  // namespace

bool is_better_for_bf16() { return false; }

void sgemm(const GemmShape&, const float*, const float*, float*) { refuse(); }

void bf16_gemm(const GemmShape&, const bf16*, const bf16*, const bf16*, bf16*) { refuse(); }

void bf16_gemm(const GemmShape&, const bf16*, const bf16*, const float*, float*) { refuse(); }

bool has_native_bf16() { return false; }

std::string describe() { return "no oneDNN"; }

}  // namespace normformer::ops::cpu::onednn
