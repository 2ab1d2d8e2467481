#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/tensor/memory.h"
#include "normformer/tensor/tensor.h"
#include "normformer/tensor/thread_pool.h"
#include "normformer/tensor/trace.h"

namespace normformer {

/// What operations of one kind have cost so far.
struct OperationCost {
  int64_t calls = 0;
  int64_t flops = 0;  ///< floating-point operations, a multiply-add counted as two
  int64_t bytes = 0;  ///< the least that must move through memory: inputs read once, outputs written once
};

/// The account of a rank's operations. Every operation enters what it costs where it checks its arguments.
class CostLedger {
 public:
  void record(std::string_view operation, int64_t flops, int64_t bytes);

  /// Enters what another account has.
  void add(const CostLedger& other);
  const std::map<std::string, OperationCost, std::less<>>& operations() const { return operations_; }
  int64_t total_flops() const;

  /// What the call recorded last costs: that which is about to be computed.
  const OperationCost& latest() const { return latest_; }

  void clear() { operations_.clear(); }

 private:
  OperationCost latest_;
  std::map<std::string, OperationCost, std::less<>> operations_;
};

/// What a rank computes with: its device, memory, threads and accounts. One per rank, passed to every
/// operation; used by the rank's own thread only. Tensors may outlive it.
class Context {
 public:
  /// `threads` shares the rank's loops on the host; it must be at least 1. `gpu` is which GPU of this
  /// process, on cuda; ConfigError where there is no such GPU.
  explicit Context(DeviceKind device, int threads = 1, int gpu = 0);

  DeviceKind device() const { return device_; }
  bool is_meta() const { return device_ == DeviceKind::meta; }
  bool is_cuda() const { return device_ == DeviceKind::cuda; }

  /// The GPU; LogicError on other devices.
  Gpu& gpu() const;

  /// Where this rank computes on the host: this context itself but on cuda.
  Context& host();
  ThreadPool& threads() { return threads_; }
  Allocator& memory() { return *memory_; }
  CostLedger& costs() { return costs_; }
  Trace& trace() { return trace_; }

  /// A tensor with arbitrary contents.
  Tensor empty(const Shape& shape, DType dtype, MemoryUse use = MemoryUse::activations);

  /// A tensor of zeros.
  Tensor zeros(const Shape& shape, DType dtype, MemoryUse use = MemoryUse::activations);

 private:
  DeviceKind device_;
  std::shared_ptr<Gpu> gpu_;
  std::shared_ptr<Allocator> memory_;
  ThreadPool threads_;
  std::unique_ptr<Context> host_;
  CostLedger costs_;
  Trace trace_;
};

/// Sets every element to zero.
void fill_zero(Context& context, const Tensor& tensor);

/// Copies `from` into `to`, of the same number of elements, converting between floating-point types (to
/// nearest even). One of them may be on the host though the context is not; then both are of one type.
void copy(Context& context, const Tensor& from, const Tensor& to);

/// to += from, elementwise; added in the accumulator type and rounded once. Same number of elements.
void add(Context& context, const Tensor& from, const Tensor& to);

/// x *= factor, elementwise, in the accumulator type.
void scale(Context& context, const Tensor& x, double factor);

/// out = pieces[0] + pieces[1] + ..., added in that order in fp32 for 16-bit and 32-bit values, in fp64 for
/// fp64, and rounded once. All of one type (out too) and size. What every summing collective on CPU does.
void sum_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out);

/// out = the largest of pieces[0], pieces[1], ..., elementwise; a NaN in any of them wins. All of one type,
/// f32 or f64, and size.
void max_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out);

/// A host vector as a new tensor on the context's device. T is an element type.
template <class T>
Tensor from_host(Context& context, std::span<const T> values, const Shape& shape,
                 MemoryUse use = MemoryUse::activations);

/// The same elements on the host: the tensor itself where it is there, else a copy.
Tensor on_host(Context& context, const Tensor& tensor);

/// The elements of a tensor converted to double. Not for meta.
std::vector<double> to_host(const Tensor& tensor);

}  // namespace normformer
