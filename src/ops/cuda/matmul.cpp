#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "normformer/core/error.h"
#include "normformer/core/log.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cuda/product_plan.h"
#include "ops/cuda/tuning.h"
#include "ops/kernels.h"
#include "tensor/cuda/check.h"

namespace normformer::ops::cuda {

namespace {

template <class T>
constexpr cudaDataType_t data_type() {
  if constexpr (std::is_same_v<T, double>)
    return CUDA_R_64F;
  else if constexpr (std::is_same_v<T, float>)
    return CUDA_R_32F;
  else if constexpr (std::is_same_v<T, bf16>)
    return CUDA_R_16BF;
  else
    return CUDA_R_16F;
}

int64_t bytes_of_element(cudaDataType_t type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

/// The products that a GPU has run so far, and what they share.
class Products {
 public:
  explicit Products(Gpu& gpu)
      : gpu_(gpu), choices_(kept_choices_of(gpu, fmt::format("cublaslt {}", cublasLtGetVersion()))) {
    check(cublasLtCreate(&handle_));
    workspace_ = {gpu.allocate(kWorkspaceBytes), kWorkspaceBytes};
    NF_CHECK(workspace_.data != nullptr, "no memory for the workspace of matrix products");
  }
  ~Products() {
    plans_.clear();
    gpu_.free(workspace_.data);
    cublasLtDestroy(handle_);
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void run(const Product& product, const Operands& operands) {
    std::unique_ptr<ProductPlan>& plan = plans_[{product, operands.alignments()}];
    if (plan == nullptr) plan = make_plan(product, operands);
    plan->run(operands, workspace_, stream());
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(gpu_.stream()); }

  std::unique_ptr<ProductPlan> make_plan(const Product& product, const Operands& operands) {
    auto plan = std::make_unique<ProductPlan>(handle_, product);
    const auto tuned = tuned_algorithm(*plan, product, operands);
    plan->use(tuned ? *tuned : plan->candidates(operands, workspace_.bytes, 1).front());
    return plan;
  }

  // Without a place to keep choices the library's own first one, always the same, is taken.
  std::optional<cublasLtMatmulAlgo_t> tuned_algorithm(ProductPlan& plan, const Product& product,
                                                      const Operands& operands) {
    if (!choices_) return std::nullopt;
    // Work enqueued so far may wait for another rank, which may wait for its turn to choose.
    gpu_.synchronize();
    const auto kept = choices_->find_or_choose(key_of(product, operands),
                                               [&] { return text_of(fastest(plan, product, operands)); });
    const auto algorithm = kept ? algorithm_of(*kept) : std::nullopt;
    return algorithm && plan.accepts(*algorithm, operands, workspace_.bytes) ? algorithm : std::nullopt;
  }

  // The file's name holds the rest of what a choice depends on.
  static std::string key_of(const Product& p, const Operands& operands) {
    const auto [a, b, d, bias] = operands.alignments();
    return fmt::format("{}x{}x{} {}{} types {} {}{}{}{} aligned {} {} {} {}", p.rows, p.columns, p.inner,
                       p.transpose_a ? 't' : 'n', p.transpose_b ? 't' : 'n', static_cast<int>(p.in),
                       static_cast<int>(p.out), p.accumulate ? " accumulate" : "", p.with_bias ? " bias" : "",
                       p.tf32 ? " tf32" : "", a, b, d, bias);
  }

  // Results go to memory of their own; where that is lacking, the heuristic decides.
  cublasLtMatmulAlgo_t fastest(ProductPlan& plan, const Product& product, Operands operands) {
    constexpr int kCandidates = 16;
    const auto candidates = plan.candidates(operands, workspace_.bytes, kCandidates);
    const int64_t bytes = product.rows * product.columns * bytes_of_element(product.out);
    operands.d = candidates.size() > 1 ? gpu_.allocate(bytes) : nullptr;
    if (operands.d == nullptr) return candidates.front();
    gpu_.fill_zero(operands.d, bytes);
    std::vector<float> times;
    for (const auto& algorithm : candidates) times.push_back(time_of(plan, algorithm, operands));
    gpu_.free(operands.d);
    return candidates[static_cast<size_t>(std::min_element(times.begin(), times.end()) - times.begin())];
  }

  float time_of(ProductPlan& plan, const cublasLtMatmulAlgo_t& algorithm, const Operands& operands) {
    plan.use(algorithm);
    if (plan.try_to_run(operands, workspace_, stream()) != CUBLAS_STATUS_SUCCESS)
      return std::numeric_limits<float>::infinity();
    return median_milliseconds(gpu_, [&] { plan.run(operands, workspace_, stream()); });
  }

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS asks for on Hopper

  Gpu& gpu_;
  std::optional<KeptChoices> choices_;
  cublasLtHandle_t handle_ = nullptr;
  Workspace workspace_;
  std::map<std::pair<Product, std::array<uint32_t, 4>>, std::unique_ptr<ProductPlan>> plans_;
};

void multiply(Context& context, Product product, Operands operands) {
  if (product.rows == 0 || product.columns == 0) return;
  Tensor zeros;
  if (product.inner == 0) {
    // A sum of nothing, which cuBLASLt does not take, is that of one zero.
    const int64_t bytes = std::max(product.rows, product.columns) * bytes_of_element(product.in);
    zeros = context.empty({bytes}, DType::u8, MemoryUse::workspace);
    context.gpu().fill_zero(zeros.raw(), bytes);
    product.inner = 1;
    operands.a = operands.b = zeros.raw();
  }
  product.tf32 = context.gpu().uses_tf32();
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
