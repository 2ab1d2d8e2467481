// In place of src/ops/cuda/matmul.cpp: emulated memory is the host's, so the host multiplies, when the
// queue's turn comes.

#include <cstring>

#include "ops/kernels.h"
#include "simt/control.h"
#include "simt/runtime_api.h"

namespace normformer::ops::cuda {

namespace {

/// A tensor's place in the emulated memory, which is all that a GPU would know of it.
class Operand {
 public:
  explicit Operand(const Tensor& tensor)
      : defined_(tensor.defined()),
        shape_(defined_ ? tensor.shape() : Shape()),
        dtype_(defined_ ? tensor.dtype() : DType::f32),
        data_(defined_ ? tensor.raw() : nullptr) {}

  Tensor taken(Context& host) const {
    if (!defined_) return {};
    const Tensor copied = host.empty(shape_, dtype_);
    if (copied.nbytes() > 0) std::memcpy(copied.raw(), data_, static_cast<size_t>(copied.nbytes()));
    return copied;
  }

  void give(const Tensor& result) const {
    if (result.nbytes() > 0) std::memcpy(data_, result.raw(), static_cast<size_t>(result.nbytes()));
  }

 private:
  bool defined_;
  Shape shape_;
  DType dtype_;
  void* data_;
};

/// Enqueues `multiply(host, a, b, c)`, which writes c.
template <class Multiply>
void enqueue(Context& context, const Tensor& a, const Tensor& b, const Tensor& c, Multiply multiply) {
  if (simt::dry_run()) return;
  const auto work = [=, a = Operand(a), b = Operand(b), c = Operand(c)] {
    thread_local Context host(DeviceKind::cpu);
    const Tensor result = c.taken(host);
    multiply(host, a.taken(host), b.taken(host), result);
    c.give(result);
  };
  simt::enqueue_host_work(static_cast<cudaStream_t>(context.gpu().stream()), work);
}

}  // namespace

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  enqueue(context, x, w, y,
          [bias = Operand(bias)](Context& host, const Tensor& a, const Tensor& b, const Tensor& c) {
            cpu::linear_forward(host, a, b, bias.taken(host), c);
          });
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  enqueue(context, dy, w, dx, cpu::linear_backward_input);
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  enqueue(context, dy, x, dw, cpu::linear_backward_weight);
}

}  // namespace normformer::ops::cuda
