#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include <cublasLt.h>

namespace normformer::ops::cuda {

/// Throws Error with cuBLASLt's words where a call failed.
void check(cublasStatus_t status, const std::source_location& where = std::source_location::current());

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
  bool tf32 = false;  ///< factors in fp32 are rounded to 11 bits

  auto operator<=>(const Product&) const = default;
};

/// Where the matrices of a product are, in a GPU's memory.
struct Operands {
  const void* a;
  const void* b;
  const void* bias;
  void* d;

  /// The largest power of two up to 256 that divides each address: what an algorithm's choice depends on.
  std::array<uint32_t, 4> alignments() const;
};

/// Memory that algorithms may use while they run.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

/// A product as cuBLASLt takes it, with the algorithm that runs it. Used by one thread at a time.
class ProductPlan {
 public:
  /// Without an algorithm yet.
  ProductPlan(cublasLtHandle_t handle, const Product& product);

  /// The algorithms that the library's heuristic proposes, the most promising first, at most `most`. Always
  /// the same for one kind of GPU and version of the library. LogicError where there is none.
  std::vector<cublasLtMatmulAlgo_t> candidates(const Operands& operands, size_t workspace_bytes, int most);

  /// Whether an algorithm can run the product with a workspace of so many bytes.
  bool accepts(const cublasLtMatmulAlgo_t& algorithm, const Operands& operands, size_t workspace_bytes);

  void use(const cublasLtMatmulAlgo_t& algorithm) { algorithm_ = algorithm; }

  /// Enqueues the product on a stream.
  void run(const Operands& operands, const Workspace& workspace, cudaStream_t stream);

  /// The same, but says what the library says: an algorithm that the heuristic proposes may yet be refused.
  cublasStatus_t try_to_run(const Operands& operands, const Workspace& workspace, cudaStream_t stream);

 private:
  struct Deleter {
    void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
    void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
    void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
  };
  template <class Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Deleter>;

  static Owned<cublasLtMatrixLayout_t> make_layout(cudaDataType_t type, int64_t rows, int64_t columns);
  void describe();
  void set_bias(const void* bias);

  cublasLtHandle_t handle_;
  Product product_;
  Owned<cublasLtMatmulDesc_t> description_;
  Owned<cublasLtMatrixLayout_t> a_;
  Owned<cublasLtMatrixLayout_t> b_;
  Owned<cublasLtMatrixLayout_t> d_;
  cublasLtMatmulAlgo_t algorithm_{};
};

/// An algorithm as words of hexadecimal digits; good for the same GPU and version of the library.
std::string text_of(const cublasLtMatmulAlgo_t& algorithm);

/// The algorithm of such a text; nothing where it is none.
std::optional<cublasLtMatmulAlgo_t> algorithm_of(const std::string& text);

}  // namespace normformer::ops::cuda
