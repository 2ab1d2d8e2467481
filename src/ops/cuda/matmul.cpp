#include <array>
#include <map>
#include <memory>
#include <tuple>

#include <cublasLt.h>

#include "normformer/core/error.h"
#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"
#include "tensor/cuda/check.h"

namespace normformer::ops::cuda {

namespace {

void check(cublasStatus_t status, const std::source_location& where = std::source_location::current()) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(ExitCode::internal, fmt::format("{}:{}: cuBLASLt: {}", where.file_name(), where.line(),
                                              cublasLtGetStatusString(status)));
}

template <class T>
constexpr cudaDataType_t data_type() {
  if constexpr (std::is_same_v<T, double>)
    return CUDA_R_64F;
  else if constexpr (std::is_same_v<T, float>)
    return CUDA_R_32F;
  else
    return CUDA_R_16BF;
}

/// d[rows, columns] = op(a) op(b) in cuBLAS's column-major terms; all matrices are packed.
struct Product {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t inner = 0;
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  ///< d += instead of d =
  bool with_bias = false;   ///< one number added to each row of d
  cudaDataType_t in = CUDA_R_32F;
  cudaDataType_t out = CUDA_R_32F;

  auto operator<=>(const Product&) const = default;
};

struct Operands {
  const void* a;
  const void* b;
  const void* bias;
  void* d;
};

struct Deleter {
  void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
  void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
  void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Deleter>;

Owned<cublasLtMatrixLayout_t> make_layout(cudaDataType_t type, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check(cublasLtMatrixLayoutCreate(&made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns),
                                   rows));
  return Owned<cublasLtMatrixLayout_t>(made);
}

template <class Value>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
  check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof(value)));
}

template <class Value>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const Value& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
}

/// The largest power of two up to 256 that divides an address.
uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256u;
  return static_cast<uint32_t>(address & (~address + 1));
}

using Alignments = std::array<uint32_t, 4>;

/// A product with the algorithm that runs it.
class Plan {
 public:
  Plan(cublasLtHandle_t handle, const Product& product, const Operands& operands, size_t workspace_bytes,
       bool tf32)
      : a_(make_layout(product.in, product.transpose_a ? product.inner : product.rows,
                       product.transpose_a ? product.rows : product.inner)),
        b_(make_layout(product.in, product.transpose_b ? product.columns : product.inner,
                       product.transpose_b ? product.inner : product.columns)),
        d_(make_layout(product.out, product.rows, product.columns)) {
    describe(product, operands, tf32);
    choose(handle, product, operands, workspace_bytes);
  }

  void run(cublasLtHandle_t handle, const Product& product, const Operands& operands, void* workspace,
           size_t workspace_bytes, cudaStream_t stream) {
    if (product.with_bias) set(description_.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias);
    const bool wide = product.in == CUDA_R_64F;
    const double one64 = 1.0;
    const double beta64 = product.accumulate ? 1.0 : 0.0;
    const float one32 = 1.0F;
    const float beta32 = product.accumulate ? 1.0F : 0.0F;
    const void* alpha = wide ? static_cast<const void*>(&one64) : &one32;
    const void* beta = wide ? static_cast<const void*>(&beta64) : &beta32;
    check(cublasLtMatmul(handle, description_.get(), alpha, operands.a, a_.get(), operands.b, b_.get(), beta,
                         operands.d, d_.get(), operands.d, d_.get(), &algorithm_, workspace, workspace_bytes,
                         stream));
  }

 private:
  void describe(const Product& product, const Operands& operands, bool tf32) {
    const bool wide = product.in == CUDA_R_64F;
    const cublasComputeType_t compute = wide                               ? CUBLAS_COMPUTE_64F
                                        : tf32 && product.in == CUDA_R_32F ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                           : CUBLAS_COMPUTE_32F;
    cublasLtMatmulDesc_t made = nullptr;
    check(cublasLtMatmulDescCreate(&made, compute, wide ? CUDA_R_64F : CUDA_R_32F));
    description_.reset(made);
    set(made, CUBLASLT_MATMUL_DESC_TRANSA, product.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(made, CUBLASLT_MATMUL_DESC_TRANSB, product.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (!product.with_bias) return;
    set(made, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(made, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, product.out);
    // The choice of an algorithm looks at its alignment.
    set(made, CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias);
  }

  // The library's own first choice, which for one GPU and version is always the same: timing would not be.
  void choose(cublasLtHandle_t handle, const Product& product, const Operands& operands,
              size_t workspace_bytes) {
    cublasLtMatmulPreference_t made = nullptr;
    check(cublasLtMatmulPreferenceCreate(&made));
    const Owned<cublasLtMatmulPreference_t> preference(made);
    set(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(operands.a));
    set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(operands.b));
    set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(operands.d));
    set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(operands.d));
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    check(cublasLtMatmulAlgoGetHeuristic(handle, description_.get(), a_.get(), b_.get(), d_.get(), d_.get(),
                                         made, 1, &result, &found));
    NF_CHECK(found == 1, "cuBLASLt has no algorithm for a product [{}, {}] over {} (types {} and {})",
             product.rows, product.columns, product.inner, static_cast<int>(product.in),
             static_cast<int>(product.out));
    algorithm_ = result.algo;
  }

  Owned<cublasLtMatmulDesc_t> description_;
  Owned<cublasLtMatrixLayout_t> a_;
  Owned<cublasLtMatrixLayout_t> b_;
  Owned<cublasLtMatrixLayout_t> d_;
  cublasLtMatmulAlgo_t algorithm_{};
};

/// The products that a GPU has run so far, and what they share.
class Products {
 public:
  explicit Products(Gpu& gpu) : gpu_(gpu) {
    check(cublasLtCreate(&handle_));
    workspace_ = gpu.allocate(kWorkspaceBytes);
    NF_CHECK(workspace_ != nullptr, "no memory for the workspace of matrix products");
  }
  ~Products() {
    gpu_.free(workspace_);
    cublasLtDestroy(handle_);
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void run(const Product& product, const Operands& operands) {
    const Alignments alignments{alignment_of(operands.a), alignment_of(operands.b), alignment_of(operands.d),
                                alignment_of(operands.bias)};
    auto found = plans_.find({product, alignments});
    if (found == plans_.end()) {
      found =
          plans_
              .emplace(std::pair{product, alignments},
                       std::make_unique<Plan>(handle_, product, operands, kWorkspaceBytes, gpu_.uses_tf32()))
              .first;
    }
    found->second->run(handle_, product, operands, workspace_, kWorkspaceBytes,
                       static_cast<cudaStream_t>(gpu_.stream()));
  }

 private:
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS asks for on Hopper

  Gpu& gpu_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<std::pair<Product, Alignments>, std::unique_ptr<Plan>> plans_;
};

void multiply(Context& context, const Product& product, const Operands& operands) {
  if (product.rows == 0 || product.columns == 0) return;
  NF_CHECK(product.inner > 0, "a product over nothing");
  context.gpu().attached<Products>().run(product, operands);
}

}  // namespace

// A row-major matrix is its transpose to cuBLAS: y^T = w x^T and so on.

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  dispatch_floating(x.dtype(), [&]<class T>() {
    multiply(context,
             {.rows = w.dim(0),
              .columns = x.dim(0),
              .inner = x.dim(1),
              .transpose_a = true,
              .with_bias = bias.defined(),
              .in = data_type<T>(),
              .out = data_type<T>()},
             {w.raw(), x.raw(), bias ? bias.raw() : nullptr, y.raw()});
  });
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  dispatch_floating(dy.dtype(), [&]<class T>() {
    multiply(context,
             {.rows = w.dim(1),
              .columns = dy.dim(0),
              .inner = dy.dim(1),
              .in = data_type<T>(),
              .out = data_type<T>()},
             {w.raw(), dy.raw(), nullptr, dx.raw()});
  });
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  dispatch_floating(dy.dtype(), [&]<class T>() {
    multiply(context,
             {.rows = x.dim(1),
              .columns = dy.dim(1),
              .inner = dy.dim(0),
              .transpose_b = true,
              .accumulate = true,
              .in = data_type<T>(),
              .out = data_type<Accumulator<T>>()},
             {x.raw(), dy.raw(), nullptr, dw.raw()});
  });
}

}  // namespace normformer::ops::cuda
