#include "ops/cuda/cudnn_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <cudnn_frontend.h>

#include "normformer/core/checked.h"
#include "normformer/core/error.h"
#include "normformer/core/log.h"
#include "normformer/tensor/gpu.h"

namespace normformer::ops::cuda {

namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;
using Graph = std::shared_ptr<fe::graph::Graph>;

/// The tensors of the graphs. Queries, keys and values are parts of qkv, as are their gradients of dqkv.
enum Uid : int64_t { kQueries = 1, kKeys, kValues, kOut, kLse, kDout, kDqueries, kDkeys, kDvalues };

/// Describes attention to cuDNN, for tensors as in normformer/ops/attention.h.
class GraphMaker {
 public:
  GraphMaker(const AttentionShape& shape, DType dtype, int compute_capability) : shape_(shape) {
    graph_->set_sm_version(compute_capability)
        .set_io_data_type(dtype == DType::bf16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }

  Graph make(AttentionDirection direction) {
    if (direction == AttentionDirection::forward)
      add_forward();
    else
      add_backward();
    return graph_;
  }

 private:
  using Node = std::shared_ptr<Tensor_attributes>;
  using Extents = std::vector<int64_t>;  // [batch, heads, length, channels]

  void add_forward() {
    auto options = fe::graph::SDPA_attributes().set_name("attention_forward").set_generate_stats(true);
    mask(options);
    // What cuDNN calls stats is the log-sum-exp of scaled scores.
    const auto [out, lse] = graph_->sdpa(qkv(kQueries), qkv(kKeys), qkv(kValues), options);
    give(out, kOut, extents(), out_strides());
    give(lse, kLse, lse_extents(), lse_strides());
    lse->set_data_type(fe::DataType_t::FLOAT);
  }

  void add_backward() {
    auto options = fe::graph::SDPA_backward_attributes()
                       .set_name("attention_backward")
                       .set_deterministic_algorithm(true);
    mask(options);
    const Node lse = take(kLse, lse_extents(), lse_strides());
    lse->set_data_type(fe::DataType_t::FLOAT);
    const Node out = take(kOut, extents(), out_strides());
    const Node dout = take(kDout, extents(), out_strides());
    const auto [dqueries, dkeys, dvalues] =
        graph_->sdpa_backward(qkv(kQueries), qkv(kKeys), qkv(kValues), out, dout, lse, options);
    give(dqueries, kDqueries, extents(), qkv_strides());
    give(dkeys, kDkeys, extents(), qkv_strides());
    give(dvalues, kDvalues, extents(), qkv_strides());
  }

  int64_t channels() const { return shape_.heads * shape_.head_size; }
  Extents extents() const { return {shape_.batch, shape_.heads, shape_.length, shape_.head_size}; }
  Extents qkv_strides() const {
    return {3 * shape_.length * channels(), shape_.head_size, 3 * channels(), 1};
  }
  Extents out_strides() const { return {shape_.length * channels(), shape_.head_size, channels(), 1}; }
  Extents lse_extents() const { return {shape_.batch, shape_.heads, shape_.length, 1}; }
  Extents lse_strides() const { return {shape_.heads * shape_.length, shape_.length, 1, 1}; }

  Node take(Uid uid, const Extents& dims, const Extents& strides) {
    return graph_->tensor(Tensor_attributes().set_uid(uid).set_dim(dims).set_stride(strides));
  }

  Node qkv(Uid uid) { return take(uid, extents(), qkv_strides()); }

  static void give(const Node& node, Uid uid, const Extents& dims, const Extents& strides) {
    node->set_output(true).set_uid(uid).set_dim(dims).set_stride(strides);
  }

  template <class Options>
  void mask(Options& options) const {
    options.set_attn_scale(static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape_.head_size))));
    if (!shape_.causal) return;
    options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
  }

  const AttentionShape& shape_;
  Graph graph_ = std::make_shared<fe::graph::Graph>();
};

/// Throws LogicError unless cuDNN did what it was asked to.
void check(const fe::error_t& result) { NF_CHECK(result.is_good(), "cuDNN: {}", result.err_msg); }

/// cuDNN on one GPU, with what it has compiled there.
class Cudnn {
 public:
  explicit Cudnn(const Gpu& gpu)
      : compute_capability_(10 * gpu.description().compute_major + gpu.description().compute_minor) {
    NF_CHECK(cudnnCreate(&handle_) == CUDNN_STATUS_SUCCESS, "cuDNN does not start on {}",
             gpu.description().name);
    NF_CHECK(cudnnSetStream(handle_, static_cast<cudaStream_t>(gpu.stream())) == CUDNN_STATUS_SUCCESS,
             "cuDNN does not take the stream");
  }

  ~Cudnn() { cudnnDestroy(handle_); }

  Cudnn(const Cudnn&) = delete;
  Cudnn& operator=(const Cudnn&) = delete;

  /// Null where there are no kernels for it; found once.
  fe::graph::Graph* graph(const AttentionShape& shape, DType dtype, AttentionDirection direction) {
    const Key key{shape.batch, shape.length, shape.heads, shape.head_size, shape.causal, dtype, direction};
    const auto known = graphs_.find(key);
    if (known != graphs_.end()) return known->second.get();
    // A graph takes up to seconds to compile: callers whose lengths keep changing are better off without.
    if (graphs_.size() >= kMostGraphs) return nullptr;
    return graphs_.emplace(key, build(shape, dtype, direction)).first->second.get();
  }

  void run(Context& context, fe::graph::Graph& graph, std::unordered_map<int64_t, void*>& tensors) {
    int64_t bytes = 0;
    check(graph.get_workspace_size(bytes));
    const Tensor workspace = context.empty({std::max<int64_t>(bytes, 1)}, DType::u8, MemoryUse::workspace);
    check(graph.execute(handle_, tensors, workspace.raw()));
  }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, DType, AttentionDirection>;
  static constexpr size_t kMostGraphs = 32;

  Graph build(const AttentionShape& shape, DType dtype, AttentionDirection direction) {
    Graph graph = GraphMaker(shape, dtype, compute_capability_).make(direction);
    const fe::error_t result = graph->build(handle_, {fe::HeurMode_t::A});
    if (result.is_good()) return graph;
    log_root(LogLevel::warning,
             "attention of {} heads of {} channels over {} tokens runs without cuDNN, which says: {}",
             shape.heads, shape.head_size, shape.length, result.err_msg);
    return nullptr;
  }

  int compute_capability_;
  cudnnHandle_t handle_ = nullptr;
  std::map<Key, Graph> graphs_;
};

std::atomic<bool> cudnn_is_used{true};

bool takes(const AttentionShape& shape, const Tensor& document_start, const Dropout& dropout,
           std::initializer_list<Tensor> tensors) {
  constexpr int64_t kTokens = 128;  // of the kernels' blocks; other lengths go ways that are less trodden
  if (!cudnn_is_used || document_start || dropout.active()) return false;
  if (shape.length % kTokens != 0 || shape.head_size % 8 != 0 || shape.head_size > 128) return false;
  for (const Tensor& t : tensors) {
    if (!is_16_bit(t.dtype()) || reinterpret_cast<uintptr_t>(t.raw()) % 16 != 0) return false;
  }
  return true;
}

/// Calls of the deterministic backward keep the gradients of all scores, [batch, heads, length, length] of
/// 16 bits: the most sequences that divide the batch and keep that within a bound.
int64_t sequences_at_once(const AttentionShape& shape) {
  constexpr int64_t kMostBytes = 1 << 30;
  const int64_t bytes =
      checked_mul(checked_mul(shape.heads, shape.length), shape.length * size_of(DType::bf16));
  int64_t sequences = std::clamp<int64_t>(kMostBytes / bytes, 1, shape.batch);
  while (shape.batch % sequences != 0) --sequences;
  return sequences;
}

void* address_of(const Tensor& tensor, int64_t element) {
  return static_cast<std::byte*>(tensor.raw()) + element * size_of(tensor.dtype());
}

/// Addresses of the queries, keys and values of a qkv from row `row` on.
void add_parts(const AttentionShape& shape, const Tensor& qkv, int64_t row, Uid queries,
               std::unordered_map<int64_t, void*>& tensors) {
  const int64_t channels = shape.heads * shape.head_size;
  for (int64_t part = 0; part < 3; ++part) {
    tensors[queries + part] = address_of(qkv, row * 3 * channels + part * channels);
  }
}

}  // namespace

bool cudnn_attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                             const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                             const Tensor& lse) {
  if (!takes(shape, document_start, dropout, {qkv, out})) return false;
  auto& cudnn = context.gpu().attached<Cudnn>();
  fe::graph::Graph* graph = cudnn.graph(shape, qkv.dtype(), AttentionDirection::forward);
  if (graph == nullptr) return false;
  std::unordered_map<int64_t, void*> tensors{{kOut, out.raw()}, {kLse, lse.raw()}};
  add_parts(shape, qkv, 0, kQueries, tensors);
  cudnn.run(context, *graph, tensors);
  return true;
}

bool cudnn_attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout,
                              const Tensor& qkv, const Tensor& document_start, const Dropout& dropout,
                              const Tensor& out, const Tensor& lse, const Tensor& dqkv) {
  if (!takes(shape, document_start, dropout, {dout, qkv, out, dqkv})) return false;
  auto& cudnn = context.gpu().attached<Cudnn>();
  AttentionShape some = shape;
  some.batch = sequences_at_once(shape);
  fe::graph::Graph* graph = cudnn.graph(some, qkv.dtype(), AttentionDirection::backward);
  if (graph == nullptr) return false;
  for (int64_t sequence = 0; sequence < shape.batch; sequence += some.batch) {
    const int64_t row = sequence * shape.length;
    const int64_t at = row * shape.heads * shape.head_size;
    std::unordered_map<int64_t, void*> tensors{{kOut, address_of(out, at)},
                                               {kDout, address_of(dout, at)},
                                               {kLse, lse.data<float>() + row * shape.heads}};
    add_parts(shape, qkv, row, kQueries, tensors);
    add_parts(shape, dqkv, row, kDqueries, tensors);
    cudnn.run(context, *graph, tensors);
  }
  return true;
}

void use_cudnn(bool use) { cudnn_is_used = use; }

std::string describe_cudnn() {
  const size_t version = cudnnGetVersion();
  return fmt::format("cuDNN {}.{}.{} (frontend {}.{}.{})", version / 10000, version / 100 % 100,
                     version % 100, CUDNN_FRONTEND_MAJOR_VERSION, CUDNN_FRONTEND_MINOR_VERSION,
                     CUDNN_FRONTEND_PATCH_VERSION);
}

std::string cudnn_refusal(const AttentionShape& shape, DType dtype, AttentionDirection direction,
                          const std::string& device, int compute_capability) {
  const auto properties = std::make_shared<fe::DeviceProperties>();
  fe::error_t result = properties->deserialize({device.begin(), device.end()});
  const Graph graph = GraphMaker(shape, dtype, compute_capability).make(direction);
  graph->set_device_properties(properties);
  if (result.is_good()) result = graph->validate();
  if (result.is_good()) result = graph->build_operation_graph();
  if (result.is_good()) result = graph->create_execution_plans({fe::HeurMode_t::A});
  if (result.is_good()) result = graph->check_support();
  return result.is_good() ? std::string() : "cuDNN: " + result.err_msg;
}

}  // namespace normformer::ops::cuda
