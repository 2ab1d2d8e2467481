#include "normformer/tensor/context.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "normformer/tensor/dispatch.h"

#include "tensor/cuda/elementwise.h"

namespace normformer {

namespace {

// Elements of one run of an elementwise loop: small enough to share, large enough to be worth a thread.
constexpr int64_t kGrain = 1 << 15;

void check_same_size(const Tensor& a, const Tensor& b) {
  NF_CHECK(a.numel() == b.numel(), "{} against {}", to_string(a), to_string(b));
}

template <class From, class To>
void convert(Context& context, const Tensor& from, const Tensor& to) {
  const From* in = from.data<From>();
  To* out = to.data<To>();
  context.threads().parallel_for(from.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<To>(static_cast<Accumulator<To>>(static_cast<Accumulator<From>>(in[i])));
    }
  });
}

void copy_between_devices(const Tensor& from, const Tensor& to) {
  NF_CHECK(from.dtype() == to.dtype(), "{} copied from {} to {} on {}", to_string(from),
           name_of(from.device()), to_string(to), name_of(to.device()));
  if (from.device() == DeviceKind::cuda) {
    from.copy_out(to.host_raw());
  } else {
    to.copy_in(from.host_raw());
  }
}

void copy_on_gpu(Context& context, const Tensor& from, const Tensor& to) {
  if (from.dtype() != to.dtype()) return cuda::convert(context, from, to);
  if (from.raw() != to.raw()) context.gpu().copy(to.raw(), from.raw(), from.nbytes());
}

}  // namespace

void CostLedger::record(std::string_view operation, int64_t flops, int64_t bytes) {
  auto found = operations_.find(operation);
  if (found == operations_.end()) found = operations_.emplace(std::string(operation), OperationCost{}).first;
  found->second.calls += 1;
  found->second.flops += flops;
  found->second.bytes += bytes;
  latest_ = {1, flops, bytes};
}

void CostLedger::add(const CostLedger& other) {
  for (const auto& [name, cost] : other.operations_) {
    OperationCost& mine = operations_[name];
    mine.calls += cost.calls;
    mine.flops += cost.flops;
    mine.bytes += cost.bytes;
  }
}

int64_t CostLedger::total_flops() const {
  int64_t total = 0;
  for (const auto& [name, cost] : operations_) total += cost.flops;
  return total;
}

Context::Context(DeviceKind device, int threads, int gpu)
    : device_(device),
      gpu_(device == DeviceKind::cuda ? std::make_shared<Gpu>(gpu) : nullptr),
      memory_(std::make_shared<Allocator>(device, gpu_)),
      threads_(threads) {}

Gpu& Context::gpu() const {
  NF_CHECK(gpu_ != nullptr, "a context on {} has no GPU", name_of(device_));
  return *gpu_;
}

Context& Context::host() {
  if (!is_cuda()) return *this;
  if (host_ == nullptr) host_ = std::make_unique<Context>(DeviceKind::cpu, threads_.size());
  return *host_;
}

Tensor Context::empty(const Shape& shape, DType dtype, MemoryUse use) {
  const int64_t bytes = checked_mul(shape.numel(), size_of(dtype));
  return Tensor(std::make_shared<Storage>(memory_, bytes, use), 0, shape, dtype, device_);
}

Tensor Context::zeros(const Shape& shape, DType dtype, MemoryUse use) {
  Tensor made = empty(shape, dtype, use);
  fill_zero(*this, made);
  return made;
}

void fill_zero(Context& context, const Tensor& tensor) {
  context.costs().record("fill_zero", 0, tensor.nbytes());
  if (context.is_meta() || tensor.numel() == 0) return;
  const TraceScope scope = trace_operation(context, "fill_zero");
  if (context.is_cuda()) return context.gpu().fill_zero(tensor.raw(), tensor.nbytes());
  auto* bytes = static_cast<std::byte*>(tensor.raw());
  context.threads().parallel_for(tensor.nbytes(), 4 * kGrain, [&](int64_t begin, int64_t end) {
    std::memset(bytes + begin, 0, static_cast<size_t>(end - begin));
  });
}

void copy(Context& context, const Tensor& from, const Tensor& to) {
  check_same_size(from, to);
  context.costs().record("copy", 0, from.nbytes() + to.nbytes());
  if (context.is_meta() || from.numel() == 0) return;
  const TraceScope scope = trace_operation(context, "copy");
  if (from.device() != to.device()) return copy_between_devices(from, to);
  if (context.is_cuda()) return copy_on_gpu(context, from, to);
  if (from.dtype() == to.dtype()) {
    const auto* in = static_cast<const std::byte*>(from.raw());
    auto* out = static_cast<std::byte*>(to.raw());
    if (in == out) return;
    context.threads().parallel_for(from.nbytes(), 4 * kGrain, [&](int64_t begin, int64_t end) {
      std::memcpy(out + begin, in + begin, static_cast<size_t>(end - begin));
    });
    return;
  }
  dispatch_floating(from.dtype(), [&]<class From>() {
    dispatch_floating(to.dtype(), [&]<class To>() { convert<From, To>(context, from, to); });
  });
}

void add(Context& context, const Tensor& from, const Tensor& to) {
  NF_CHECK(from.dtype() == to.dtype(), "{} added to {}", to_string(from), to_string(to));
  const Tensor pieces[] = {to, from};
  sum_in_order(context, pieces, to);
}

void scale(Context& context, const Tensor& x, double factor) {
  context.costs().record("scale", x.numel(), 2 * x.nbytes());
  if (context.is_meta() || x.numel() == 0) return;
  const TraceScope scope = trace_operation(context, "scale");
  if (context.is_cuda()) return cuda::scale(context, x, factor);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    T* values = x.data<T>();
    const auto f = static_cast<A>(factor);
    context.threads().parallel_for(x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] = static_cast<T>(static_cast<A>(values[i]) * f);
    });
  });
}

void sum_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out) {
  NF_CHECK(!pieces.empty(), "a sum of nothing");
  for (const Tensor& piece : pieces) {
    check_same_size(piece, out);
    NF_CHECK(piece.dtype() == out.dtype(), "{} in a sum of {}", to_string(piece), to_string(out));
  }
  const auto terms = static_cast<int64_t>(pieces.size());
  context.costs().record("sum_in_order", (terms - 1) * out.numel(), (terms + 1) * out.nbytes());
  if (context.is_meta() || out.numel() == 0) return;
  const TraceScope scope = trace_operation(context, "sum_in_order");
  if (context.is_cuda()) return cuda::sum_in_order(context, pieces, out);
  dispatch_floating(out.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    std::vector<const T*> in;
    for (const Tensor& piece : pieces) in.push_back(piece.data<T>());
    T* result = out.data<T>();
    context.threads().parallel_for(out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      constexpr int64_t kBlock = 512;  // the running sums stay in the first cache
      A sums[kBlock];
      for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = std::min(kBlock, end - start);
        for (int64_t i = 0; i < n; ++i) sums[i] = static_cast<A>(in[0][start + i]);
        for (size_t p = 1; p < in.size(); ++p) {
          for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<A>(in[p][start + i]);
        }
        for (int64_t i = 0; i < n; ++i) result[start + i] = static_cast<T>(sums[i]);
      }
    });
  });
}

void max_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out) {
  NF_CHECK(!pieces.empty() && (out.dtype() == DType::f32 || out.dtype() == DType::f64),
           "a maximum of {} pieces of {}", pieces.size(), to_string(out));
  const auto terms = static_cast<int64_t>(pieces.size());
  context.costs().record("max_in_order", (terms - 1) * out.numel(), (terms + 1) * out.nbytes());
  if (context.is_meta() || out.numel() == 0) return;
  const TraceScope scope = trace_operation(context, "max_in_order");
  if (context.is_cuda()) return cuda::max_in_order(context, pieces, out);
  dispatch_floating(out.dtype(), [&]<class T>() {
    std::vector<const T*> in;
    for (const Tensor& piece : pieces) in.push_back(piece.data<T>());
    T* result = out.data<T>();
    using A = Accumulator<T>;
    for (int64_t i = 0; i < out.numel(); ++i) {
      auto most = static_cast<A>(in[0][i]);
      for (size_t p = 1; p < in.size(); ++p) {
        const auto next = static_cast<A>(in[p][i]);
        if (next > most || std::isnan(next)) most = next;
      }
      result[i] = static_cast<T>(most);
    }
  });
}

template <class T>
Tensor from_host(Context& context, std::span<const T> values, const Shape& shape, MemoryUse use) {
  Tensor made = context.empty(shape, dtype_of<T>(), use);
  NF_CHECK(made.numel() == static_cast<int64_t>(values.size()), "{} values for {}", values.size(),
           to_string(shape));
  if (!context.is_meta()) made.copy_in(values.data());
  return made;
}

template Tensor from_host<double>(Context&, std::span<const double>, const Shape&, MemoryUse);
template Tensor from_host<float>(Context&, std::span<const float>, const Shape&, MemoryUse);
template Tensor from_host<bf16>(Context&, std::span<const bf16>, const Shape&, MemoryUse);
template Tensor from_host<f16>(Context&, std::span<const f16>, const Shape&, MemoryUse);
template Tensor from_host<int64_t>(Context&, std::span<const int64_t>, const Shape&, MemoryUse);
template Tensor from_host<int32_t>(Context&, std::span<const int32_t>, const Shape&, MemoryUse);
template Tensor from_host<uint8_t>(Context&, std::span<const uint8_t>, const Shape&, MemoryUse);

Tensor on_host(Context& context, const Tensor& tensor) {
  if (tensor.device() != DeviceKind::cuda) return tensor;
  Tensor made = context.host().empty(tensor.shape(), tensor.dtype());
  tensor.copy_out(made.raw());
  return made;
}

std::vector<double> to_host(const Tensor& tensor) {
  std::vector<double> values(static_cast<size_t>(tensor.numel()));
  dispatch_any(tensor.dtype(), [&]<class T>() {
    std::vector<T> in(values.size());
    tensor.copy_out(in.data());
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (kIs16Bit<T>)
        values[i] = static_cast<float>(in[i]);
      else
        values[i] = static_cast<double>(in[i]);
    }
  });
  return values;
}

}  // namespace normformer
