#include <array>

#include "normformer/tensor/dispatch.h"

#include "tensor/cuda/elementwise.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 16;  // enough for every multiprocessor, few enough to cost nothing

LaunchShape flat(int64_t items) {
  return {.blocks = std::min(ceil_div(items, int64_t{kThreads}), kMostBlocks), .threads = kThreads};
}

template <int N, class From, class To>
__global__ void convert_kernel(const From* from, To* to, int64_t packs) {
  for (int64_t p = global_thread(); p < packs; p += global_threads()) {
    Accumulator<From> in[N];
    load_pack<N>(from + p * N, in);
    Accumulator<To> out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = static_cast<Accumulator<To>>(in[i]);
    store_pack<N>(out, to + p * N);
  }
}

template <int N, class T>
__global__ void scale_kernel(T* values, Accumulator<T> factor, int64_t packs) {
  for (int64_t p = global_thread(); p < packs; p += global_threads()) {
    Accumulator<T> x[N];
    load_pack<N>(values + p * N, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= factor;
    store_pack<N>(x, values + p * N);
  }
}

// Ranks whose pieces are added in one pass; more are added in several.
constexpr int kMostPieces = 16;

template <class T>
struct Pieces {
  const T* data[kMostPieces];
  int count;
};

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

// A NaN on either side stays.
struct Largest {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return b > a || b != b ? b : a;
  }
};

template <int N, class T, class Combine>
__global__ void combine_kernel(Pieces<T> pieces, T* out, int64_t packs, Combine combine) {
  for (int64_t p = global_thread(); p < packs; p += global_threads()) {
    Accumulator<T> result[N];
    load_pack<N>(pieces.data[0] + p * N, result);
    for (int piece = 1; piece < pieces.count; ++piece) {
      Accumulator<T> x[N];
      load_pack<N>(pieces.data[piece] + p * N, x);
#pragma unroll
      for (int i = 0; i < N; ++i) result[i] = combine(result[i], x[i]);
    }
    store_pack<N>(result, out + p * N);
  }
}

template <class Combine>
void combine_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out, Combine combine) {
  dispatch_floating(out.dtype(), [&]<class T>() {
    const int64_t n = out.numel();
    T* to = out.data<T>();
    for (size_t next = 0; next < pieces.size();) {
      Pieces<T> some{};
      bool packs = can_pack<kPack<T>>(n, to);
      // Later passes go on from the result so far.
      if (next > 0) some.data[some.count++] = to;
      for (; next < pieces.size() && some.count < kMostPieces; ++next) {
        some.data[some.count++] = pieces[next].data<T>();
        packs = packs && can_pack<kPack<T>>(n, pieces[next].data<T>());
      }
      if (packs) {
        launch(context, flat(n / kPack<T>), combine_kernel<kPack<T>, T, Combine>, some, to, n / kPack<T>,
               combine);
      } else {
        launch(context, flat(n), combine_kernel<1, T, Combine>, some, to, n, combine);
      }
    }
  });
}

}  // namespace

void convert(Context& context, const Tensor& from, const Tensor& to) {
  dispatch_floating(from.dtype(), [&]<class From>() {
    dispatch_floating(to.dtype(), [&]<class To>() {
      constexpr int kN = kPack<To> < kPack<From> ? kPack<To> : kPack<From>;
      const From* in = from.data<From>();
      To* out = to.data<To>();
      const int64_t n = from.numel();
      if (can_pack<kN>(n, in, out)) {
        launch(context, flat(n / kN), convert_kernel<kN, From, To>, in, out, n / kN);
      } else {
        launch(context, flat(n), convert_kernel<1, From, To>, in, out, n);
      }
    });
  });
}

void scale(Context& context, const Tensor& x, double factor) {
  dispatch_floating(x.dtype(), [&]<class T>() {
    T* values = x.data<T>();
    const auto f = static_cast<Accumulator<T>>(factor);
    const int64_t n = x.numel();
    if (can_pack<kPack<T>>(n, values)) {
      launch(context, flat(n / kPack<T>), scale_kernel<kPack<T>, T>, values, f, n / kPack<T>);
    } else {
      launch(context, flat(n), scale_kernel<1, T>, values, f, n);
    }
  });
}

void sum_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out) {
  NF_CHECK(pieces.size() <= kMostPieces || !is_16_bit(out.dtype()),
           "more than 16 pieces of {} would be rounded more than once", name_of(out.dtype()));
  combine_in_order(context, pieces, out, Sum());
}

void max_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out) {
  combine_in_order(context, pieces, out, Largest());
}

}  // namespace normformer::cuda
