#include <algorithm>

#include "normformer/ops/random_fill.h"
#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"
#include "ops/random_draws.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 16;  // enough for every multiprocessor

LaunchShape flat(int64_t items) {
  return {.blocks = std::min(ceil_div(items, int64_t{kThreads}), kMostBlocks), .threads = kThreads};
}

/// Where the elements of a Rectangle lie in the logical matrix.
struct Places {
  int64_t first;  ///< the first element's index
  int64_t columns;
  int64_t global_columns;

  explicit Places(const Rectangle& part)
      : first(part.rows.begin * part.global_columns + part.columns.begin),
        columns(part.columns.size()),
        global_columns(part.global_columns) {}

  __device__ uint64_t of(int64_t i) const {
    return static_cast<uint64_t>(first + i / columns * global_columns + i % columns);
  }
};

struct NormalDraw {
  RandomStream stream;
  double std;
  __device__ double operator()(uint64_t index) const { return normal_draw(stream, index, std); }
};

struct UniformDraw {
  RandomStream stream;
  double bound;
  __device__ double operator()(uint64_t index) const { return uniform_draw(stream, index, bound); }
};

template <class T, class Draw>
__global__ void draw_kernel(T* values, int64_t n, Places places, Draw draw) {
  for (int64_t i = global_thread(); i < n; i += global_threads()) {
    values[i] = narrow<T>(static_cast<Accumulator<T>>(draw(places.of(i))));
  }
}

template <class T>
__global__ void constant_kernel(T* values, int64_t n, Accumulator<T> value) {
  for (int64_t i = global_thread(); i < n; i += global_threads()) values[i] = narrow<T>(value);
}

template <class Draw>
void fill_by_index(Context& context, const Tensor& tensor, const Rectangle& part, Draw draw) {
  dispatch_floating(tensor.dtype(), [&]<class T>() {
    const int64_t n = tensor.numel();
    launch(context, flat(n), draw_kernel<T, Draw>, tensor.data<T>(), n, Places(part), draw);
  });
}

}  // namespace

void fill_normal(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                 double std) {
  fill_by_index(context, tensor, part, NormalDraw{stream, std});
}

void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound) {
  fill_by_index(context, tensor, part, UniformDraw{stream, bound});
}

void fill_constant(Context& context, const Tensor& tensor, double value) {
  dispatch_floating(tensor.dtype(), [&]<class T>() {
    const int64_t n = tensor.numel();
    launch(context, flat(n), constant_kernel<T>, tensor.data<T>(), n, static_cast<Accumulator<T>>(value));
  });
}

}  // namespace normformer::ops::cuda
