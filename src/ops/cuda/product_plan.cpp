#include "ops/cuda/product_plan.h"

#include <charconv>

#include "normformer/core/error.h"

namespace normformer::ops::cuda {

namespace {

template <class Value>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
  check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof(value)));
}

template <class Value>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const Value& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
}

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256u;
  return static_cast<uint32_t>(address & (~address + 1));
}

// How sums may be cut into parts: not in place, where parts are added as they come, nor with parts in 16
// bits, which would each be rounded. Some of cuBLASLt 12's and 13's algorithms lose what is left of a cut sum
// after the last whole block of terms (https://github.com/facebookexperimental/triton/pull/2767).
uint32_t reduction_schemes(const Product& product) {
  constexpr int64_t kMostOfABlock = 128;
  return product.inner % kMostOfABlock == 0 ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
                                            : CUBLASLT_REDUCTION_SCHEME_NONE;
}

}  // namespace

void check(cublasStatus_t status, const std::source_location& where) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(ExitCode::internal, fmt::format("{}:{}: cuBLASLt: {}", where.file_name(), where.line(),
                                              cublasLtGetStatusString(status)));
}

std::array<uint32_t, 4> Operands::alignments() const {
  return {alignment_of(a), alignment_of(b), alignment_of(d), alignment_of(bias)};
}

ProductPlan::Owned<cublasLtMatrixLayout_t> ProductPlan::make_layout(cudaDataType_t type, int64_t rows,
                                                                    int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check(cublasLtMatrixLayoutCreate(&made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns),
                                   rows));
  return Owned<cublasLtMatrixLayout_t>(made);
}

ProductPlan::ProductPlan(cublasLtHandle_t handle, const Product& product)
    : handle_(handle),
      product_(product),
      a_(make_layout(product.in, product.transpose_a ? product.inner : product.rows,
                     product.transpose_a ? product.rows : product.inner)),
      b_(make_layout(product.in, product.transpose_b ? product.columns : product.inner,
                     product.transpose_b ? product.inner : product.columns)),
      d_(make_layout(product.out, product.rows, product.columns)) {
  describe();
}

void ProductPlan::describe() {
  const bool wide = product_.in == CUDA_R_64F;
  const cublasComputeType_t compute = wide ? CUBLAS_COMPUTE_64F
                                      : product_.tf32 && product_.in == CUDA_R_32F
                                          ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F;
  cublasLtMatmulDesc_t made = nullptr;
  check(cublasLtMatmulDescCreate(&made, compute, wide ? CUDA_R_64F : CUDA_R_32F));
  description_.reset(made);
  set(made, CUBLASLT_MATMUL_DESC_TRANSA, product_.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(made, CUBLASLT_MATMUL_DESC_TRANSB, product_.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (!product_.with_bias) return;
  set(made, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  set(made, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, product_.out);
}

// The heuristic and the check of an algorithm look at the bias' alignment.
void ProductPlan::set_bias(const void* bias) {
  if (product_.with_bias) set(description_.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
}

std::vector<cublasLtMatmulAlgo_t> ProductPlan::candidates(const Operands& operands, size_t workspace_bytes,
                                                          int most) {
  set_bias(operands.bias);
  cublasLtMatmulPreference_t made = nullptr;
  check(cublasLtMatmulPreferenceCreate(&made));
  const Owned<cublasLtMatmulPreference_t> preference(made);
  const auto [a, b, d, bias] = operands.alignments();
  set(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
  set(made, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction_schemes(product_));
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, d);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d);
  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(most));
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, description_.get(), a_.get(), b_.get(), d_.get(), d_.get(),
                                     made, most, results.data(), &found);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status);
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (int i = 0; i < found; ++i) {
    const auto& result = results[static_cast<size_t>(i)];
    if (result.state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(result.algo);
  }
  NF_CHECK(!algorithms.empty(), "cuBLASLt has no algorithm for a product [{}, {}] over {} (types {} and {})",
           product_.rows, product_.columns, product_.inner, static_cast<int>(product_.in),
           static_cast<int>(product_.out));
  return algorithms;
}

bool ProductPlan::accepts(const cublasLtMatmulAlgo_t& algorithm, const Operands& operands,
                          size_t workspace_bytes) {
  set_bias(operands.bias);
  cublasLtMatmulHeuristicResult_t result{};
  return cublasLtMatmulAlgoCheck(handle_, description_.get(), a_.get(), b_.get(), d_.get(), d_.get(),
                                 &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
         result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= workspace_bytes;
}

void ProductPlan::run(const Operands& operands, const Workspace& workspace, cudaStream_t stream) {
  check(try_to_run(operands, workspace, stream));
}

cublasStatus_t ProductPlan::try_to_run(const Operands& operands, const Workspace& workspace,
                                       cudaStream_t stream) {
  set_bias(operands.bias);
  const bool wide = product_.in == CUDA_R_64F;
  const double one64 = 1.0;
  const double beta64 = product_.accumulate ? 1.0 : 0.0;
  const float one32 = 1.0F;
  const float beta32 = product_.accumulate ? 1.0F : 0.0F;
  const void* alpha = wide ? static_cast<const void*>(&one64) : &one32;
  const void* beta = wide ? static_cast<const void*>(&beta64) : &beta32;
  return cublasLtMatmul(handle_, description_.get(), alpha, operands.a, a_.get(), operands.b, b_.get(), beta,
                        operands.d, d_.get(), operands.d, d_.get(), &algorithm_, workspace.data,
                        workspace.bytes, stream);
}

std::string text_of(const cublasLtMatmulAlgo_t& algorithm) {
  std::string text;
  for (const uint64_t word : algorithm.data) text += fmt::format("{}{:016x}", text.empty() ? "" : " ", word);
  return text;
}

std::optional<cublasLtMatmulAlgo_t> algorithm_of(const std::string& text) {
  cublasLtMatmulAlgo_t algorithm{};
  const char* at = text.data();
  const char* const end = at + text.size();
  for (uint64_t& word : algorithm.data) {
    if (at != text.data() && at != end) ++at;
    at = std::from_chars(at, end, word, 16).ptr;
  }
  return text_of(algorithm) == text ? std::optional(algorithm) : std::nullopt;
}

}  // namespace normformer::ops::cuda
