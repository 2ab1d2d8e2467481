#include "ops/cpu/onednn.h"

#include <memory>
#include <unordered_map>

#include <dnnl.hpp>
#include <fmt/format.h>
#include <omp.h>

#include "normformer/core/error.h"

namespace normformer::ops::cpu::onednn {

namespace {

using dnnl::memory;

// The library would share every call among OpenMP's threads; ours come from the rank's pool alone.
void keep_to_this_thread() {
  thread_local const bool done = (omp_set_num_threads(1), true);
  static_cast<void>(done);
}

const dnnl::engine& engine() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

dnnl::matmul::primitive_desc describe_matmul(const memory::desc& a, const memory::desc& b,
                                             const memory::desc& bias, const memory::desc& c,
                                             const dnnl::primitive_attr& attributes) {
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), a, b, bias, c, attributes};
#else
  return {dnnl::matmul::desc(a, b, bias, c), attributes, engine()};
#endif
}

struct ProductKey {
  GemmShape shape;
  bool has_bias = false;
  memory::data_type out = memory::data_type::f32;
  bool operator==(const ProductKey&) const = default;
};

struct ProductHash {
  size_t operator()(const ProductKey& key) const {
    const GemmShape& s = key.shape;
    size_t hash = 0;
    const auto mix = [&](int64_t fact) {
      hash = (hash ^ static_cast<size_t>(fact)) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
    };
    for (const int64_t fact : {s.m, s.n, s.k, s.lda, s.ldb, s.ldc}) mix(fact);
    mix(s.transpose_a + 2 * s.transpose_b + 4 * s.accumulate + 8 * key.has_bias +
        16 * static_cast<int64_t>(key.out));
    return hash;
  }
};

// One prepared product: the generated code and the handles of its operands.
class Product {
 public:
  explicit Product(const ProductKey& key) : stream_(engine()) {
    const GemmShape& s = key.shape;
    constexpr auto in = memory::data_type::bf16;
    const auto strides = [](bool transpose, int64_t ld) {
      return transpose ? memory::dims{1, ld} : memory::dims{ld, 1};
    };
    const memory::desc a({s.m, s.k}, in, strides(s.transpose_a, s.lda));
    const memory::desc b({s.k, s.n}, in, strides(s.transpose_b, s.ldb));
    const memory::desc c({s.m, s.n}, key.out, strides(false, s.ldc));
    const memory::desc bias =
        key.has_bias ? memory::desc({1, s.n}, key.out, memory::dims{s.n, 1}) : memory::desc();
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (s.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0F);
      attributes.set_post_ops(sum);
    }
    const auto description = describe_matmul(a, b, bias, c, attributes);
    primitive_ = dnnl::matmul(description);
    const auto add = [&](int argument, const memory::desc& desc, void* data) {
      arguments_.emplace(argument, memory(desc, engine(), data));
    };
    add(DNNL_ARG_SRC, a, nullptr);
    add(DNNL_ARG_WEIGHTS, b, nullptr);
    add(DNNL_ARG_DST, c, nullptr);
    if (key.has_bias) add(DNNL_ARG_BIAS, bias, nullptr);
    scratch_desc_ = description.scratchpad_desc();
    arguments_.emplace(DNNL_ARG_SCRATCHPAD, memory(scratch_desc_, engine(), nullptr));
  }

  size_t scratch_bytes() const { return scratch_desc_.get_size(); }

  void run(const bf16* a, const bf16* b, const void* bias, void* c, void* scratch) {
    set(DNNL_ARG_SRC, a);
    set(DNNL_ARG_WEIGHTS, b);
    set(DNNL_ARG_DST, c);
    if (bias != nullptr) set(DNNL_ARG_BIAS, bias);
    set(DNNL_ARG_SCRATCHPAD, scratch);
    primitive_.execute(stream_, arguments_);
    stream_.wait();
  }

 private:
  void set(int argument, const void* data) {
    arguments_.at(argument).set_data_handle(const_cast<void*>(data));
  }

  dnnl::stream stream_;
  dnnl::matmul primitive_;
  memory::desc scratch_desc_;
  std::unordered_map<int, memory> arguments_;
};

// What a thread keeps between products. Nothing in it changes a result.
class ProductCache {
 public:
  void run(const ProductKey& key, const bf16* a, const bf16* b, const void* bias, void* c) {
    Product& product = find(key);
    if (product.scratch_bytes() > scratch_.size()) scratch_.resize(product.scratch_bytes());
    product.run(a, b, bias, c, scratch_.data());
  }

 private:
  Product& find(const ProductKey& key) {
    const auto found = products_.find(key);
    if (found != products_.end()) return *found->second;
    // A model has some tens of shapes; text of varying length could bring any number.
    if (products_.size() >= 1024) products_.clear();
    return *products_.emplace(key, std::make_unique<Product>(key)).first->second;
  }

  std::unordered_map<ProductKey, std::unique_ptr<Product>, ProductHash> products_;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  class Scratch {
   public:
    size_t size() const { return lines_.size() * sizeof(Line); }
    void resize(size_t bytes) { lines_ = std::vector<Line>((bytes + sizeof(Line) - 1) / sizeof(Line)); }
    void* data() { return lines_.data(); }

   private:
    std::vector<Line> lines_;
  } scratch_;
};

template <class Out>
void run_bf16(const GemmShape& shape, const bf16* a, const bf16* b, const Out* bias, Out* c) {
  keep_to_this_thread();
  thread_local ProductCache cache;
  constexpr auto out = std::is_same_v<Out, float> ? memory::data_type::f32 : memory::data_type::bf16;
  cache.run({shape, bias != nullptr, out}, a, b, bias, c);
}

bool has_all(dnnl::cpu_isa have, dnnl::cpu_isa wanted) {
  const auto bits = static_cast<unsigned>(wanted);
  return (static_cast<unsigned>(have) & bits) == bits;
}

}  // namespace

void sgemm(const GemmShape& s, const float* a, const float* b, float* c) {
  keep_to_this_thread();
  const dnnl::status status = dnnl::sgemm(s.transpose_a ? 'T' : 'N', s.transpose_b ? 'T' : 'N', s.m, s.n, s.k,
                                          1.0F, a, s.lda, b, s.ldb, s.accumulate ? 1.0F : 0.0F, c, s.ldc);
  NF_CHECK(status == dnnl::status::success, "oneDNN's sgemm of {} x {} x {} returned {}", s.m, s.n, s.k,
           static_cast<int>(status));
}

void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const bf16* bias, bf16* c) {
  run_bf16(shape, a, b, bias, c);
}

void bf16_gemm(const GemmShape& shape, const bf16* a, const bf16* b, const float* bias, float* c) {
  run_bf16(shape, a, b, bias, c);
}

std::string describe() {
  const dnnl_version_t* version = dnnl_version();
  return fmt::format("oneDNN {}.{}.{}", version->major, version->minor, version->patch);
}

bool has_native_bf16() { return has_all(dnnl::get_effective_cpu_isa(), dnnl::cpu_isa::avx512_core_bf16); }

bool is_better_for_bf16() { return has_all(dnnl::get_effective_cpu_isa(), dnnl::cpu_isa::avx512_core_amx); }

}  // namespace normformer::ops::cpu::onednn
