#include <vector>

#include "normformer/ops/activation.h"

#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

template <class A>
struct Point {
  A value;
  A slope;
};

/// 1 / x for 1 <= x <= 2, to within a rounding.
__device__ inline double inverse_of(double x) { return 1.0 / x; }
__device__ inline float inverse_of(float x) {
  const float approximate = __fdividef(1.0f, x);
  return fmaf(approximate, fmaf(-x, approximate, 1.0f), approximate);
}

/// The normal distribution at x: its cumulative function, and exp(-x^2 / 2).
template <class A>
struct Normal {
  A cumulative;
  A density;
};

__device__ inline Normal<double> normal(double x) {
  return {0.5 * erfc(-x * 0.70710678118654752440), exp(-0.5 * x * x)};
}

/// Absolute error of `cumulative` below 1e-7: the polynomial of the same function on CPU. One exponential
/// gives both, and there is no branch.
__device__ inline Normal<float> normal(float x) {
  const float density = expf(x * x * -0.5f);
  const float a = fminf(fabsf(x), 9.0f);  // the density is zero long before
  float p = -3.15336036143e-7f;
  p = fmaf(p, a, 7.70457917749e-6f);
  p = fmaf(p, a, -8.47347251987e-5f);
  p = fmaf(p, a, 0.000563478171584f);
  p = fmaf(p, a, -0.00258957536626f);
  p = fmaf(p, a, 0.00900288250299f);
  p = fmaf(p, a, -0.025470666314f);
  p = fmaf(p, a, 0.0619230798599f);
  p = fmaf(p, a, -0.132805417562f);
  p = fmaf(p, a, 0.249972490361f);
  p = fmaf(p, a, -0.398940595308f);
  p = fmaf(p, a, 0.49999998307f);
  const float tail = p * density;
  return {x < 0.0f ? tail : 1.0f - tail, density};
}

/// The activation and its derivative at x.
template <ActivationKind kKind, class A>
__device__ Point<A> evaluate(A x) {
  if constexpr (kKind == ActivationKind::gelu) {
    const auto n = normal(x);
    return {x * n.cumulative, x * (n.density * A(0.39894228040143267794)) + n.cumulative};  // / sqrt(2 pi)
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), with the exponential of -2 |u| so that it cannot overflow.
    constexpr A kTwoScale = A(1.5957691216057307118);  // 2 sqrt(2 / pi)
    constexpr A kCubic = A(0.044715);
    const A square = x * x;
    const A two_u = kTwoScale * x * (kCubic * square + A(1));
    const A e = std::exp(-std::fabs(two_u));
    const A inverse = inverse_of(A(1) + e);
    const A gate = (two_u < A(0) ? e : A(1)) * inverse;
    const A gate_slope = e * (inverse * inverse);
    const A two_u_slope = kTwoScale * (A(3) * kCubic * square + A(1));
    return {x * gate, x * gate_slope * two_u_slope + gate};
  } else if constexpr (kKind == ActivationKind::tanh) {
    const A value = std::tanh(x);
    return {value, (A(1) - value) * (A(1) + value)};
  } else {
    const A positive = x < A(0) ? A(0) : x;  // a NaN stays one
    return {positive * positive, positive + positive};
  }
}

template <ActivationKind kKind, class T, int N>
struct Activation {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  struct Columns {
    Pack<T, N> bias, gamma;
  };
  struct Row {};
  using Elements = Pack<T, N>;

  const T* z;
  const T* bias;
  DropoutMask<A> mask;
  const T* gamma;
  T* out;
  A* row_sums;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_at<N>(bias, column), pack_or<N>(gamma, column, 1.0)};
  }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(z, row * width + column); }

  /// Writes the elements; `h` receives what they are before gamma.
  __device__ void write(const Columns& of_columns, const Elements& elements, int64_t row, int64_t column,
                        A (&h)[N]) const {
    const uint32_t kept = kept_bits<N>(mask, row, column);
    A scaled[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A x = widen(elements.values[i]) + widen(of_columns.bias.values[i]);
      h[i] = evaluate<kKind>(x).value * multiplier(mask, kept, i);
      scaled[i] = h[i] * widen(of_columns.gamma.values[i]);
    }
    store_pack<N>(scaled, out + row * width + column);
  }

  __device__ void terms(const Columns& of_columns, const Elements& elements, Row, int64_t row, int64_t column,
                        A (&sums)[2]) const {
    A h[N];
    write(of_columns, elements, row, column, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0] += h[i];
      sums[1] += h[i] * h[i];
    }
  }

  __device__ void put(int64_t row, const A (&sums)[2]) const {
    row_sums[2 * row] = sums[0];
    row_sums[2 * row + 1] = sums[1];
  }

  __device__ void finish(const Columns& of_columns, const Elements& elements, Row, int64_t row,
                         int64_t column, Sums<A, 0, N>&) const {
    A h[N];
    write(of_columns, elements, row, column, h);
  }
};

template <ActivationKind kKind, class T, int N>
struct ActivationBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 1;  // of the bias
  using Columns = Pack<T, N>;            // bias
  struct Row {};
  struct Elements {
    Pack<T, N> d, z;
  };

  const T* d;
  const T* z;
  const T* bias;
  DropoutMask<A> mask;
  T* dz;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return pack_at<N>(bias, column); }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return {pack_at<N>(d, row * width + column), pack_at<N>(z, row * width + column)};
  }

  __device__ void finish(const Columns& biases, const Elements& elements, Row, int64_t row, int64_t column,
                         Sums<A, kColumnSums, N>& sums) const {
    const uint32_t kept = kept_bits<N>(mask, row, column);
    A gradient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A x = widen(elements.z.values[i]) + widen(biases.values[i]);
      gradient[i] = widen(elements.d.values[i]) * evaluate<kKind>(x).slope * multiplier(mask, kept, i);
      sums[0][i] += gradient[i];
    }
    store_pack<N>(gradient, dz + row * width + column);
  }
};

/// The same through a LayerNorm.
template <ActivationKind kKind, class T, int N>
struct ActivationNormBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 3;  // of the bias, gamma, beta
  struct Columns {
    Pack<T, N> bias, gamma;
  };
  struct Row {
    A mean, rstd, mean_g, mean_gx;
  };
  struct Elements {
    Pack<T, N> d, z;
  };

  const T* d;
  const T* z;
  const T* bias;
  DropoutMask<A> mask;
  const T* gamma;
  const A* means;
  const A* rstds;
  const A* means_g;
  const A* means_gx;
  T* dz;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_at<N>(bias, column), pack_at<N>(gamma, column)};
  }
  __device__ Row row(int64_t row) const { return {means[row], rstds[row], means_g[row], means_gx[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return {pack_at<N>(d, row * width + column), pack_at<N>(z, row * width + column)};
  }

  __device__ void finish(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, kColumnSums, N>& sums) const {
    const uint32_t kept = kept_bits<N>(mask, row, column);
    A gradient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A x = widen(elements.z.values[i]) + widen(of_columns.bias.values[i]);
      const auto point = evaluate<kKind>(x);
      const A normed = of_row.rstd * (point.value * multiplier(mask, kept, i) - of_row.mean);
      const A from = widen(elements.d.values[i]);
      const A g = widen(of_columns.gamma.values[i]) * from;
      const A dh = of_row.rstd * (g - of_row.mean_g - normed * of_row.mean_gx);
      gradient[i] = dh * multiplier(mask, kept, i) * point.slope;
      sums[0][i] += gradient[i];
      sums[1][i] += from * normed;
      sums[2][i] += from;
    }
    store_pack<N>(gradient, dz + row * width + column);
  }
};

/// Calls body.operator()<kind>().
template <class Body>
void with_kind(ActivationKind kind, Body&& body) {
  switch (kind) {
    case ActivationKind::gelu:
      return body.template operator()<ActivationKind::gelu>();
    case ActivationKind::gelu_tanh:
      return body.template operator()<ActivationKind::gelu_tanh>();
    case ActivationKind::relu_squared:
      return body.template operator()<ActivationKind::relu_squared>();
    case ActivationKind::tanh:
      return body.template operator()<ActivationKind::tanh>();
  }
}

}  // namespace

void activation_forward(Context& context, ActivationKind kind, const Tensor& z, const Tensor& bias,
                        const Dropout& dropout, const Tensor& gamma, const Tensor& out, const Tensor& sums) {
  const int64_t columns = z.dim(1);
  dispatch_floating(z.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = z.data<T>();
    const T* biases = bias.data<T>();
    const T* gammas = data_or_null<T>(gamma);
    T* to = out.data<T>();
    with_kind(kind, [&]<ActivationKind kKind>() {
      with_packs<T>(can_pack<kPack<T>>(columns, in, biases, gammas, to), [&]<int N>() {
        const Activation<kKind, T, N> op{
            in, biases, DropoutMask<A>(dropout), gammas, to, data_or_null<A>(sums), columns};
        if (sums) {
          launch_row_sums(context, op, z.dim(0), columns);
        } else {
          launch_tiles(context, op, z.dim(0), columns);
        }
      });
    });
  });
}

void activation_backward(Context& context, ActivationKind kind, const Tensor& d, const Tensor& z,
                         const Tensor& bias, const Dropout& dropout, const NormOfActivation* norm,
                         const Tensor& dz, const Tensor& dbias, const Tensor& partials) {
  const int64_t columns = z.dim(1);
  dispatch_floating(z.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* from = d.data<T>();
    const T* in = z.data<T>();
    const T* biases = bias.data<T>();
    const T* gammas = norm == nullptr ? nullptr : norm->gamma.data<T>();
    T* to = dz.data<T>();
    const DropoutMask<A> mask(dropout);
    const bool packs = can_pack<kPack<T>>(columns, from, in, biases, gammas, to, partials.data<A>());
    with_kind(kind, [&]<ActivationKind kKind>() {
      with_packs<T>(packs, [&]<int N>() {
        if (norm == nullptr) {
          const ActivationBackward<kKind, T, N> op{from, in, biases, mask, to, columns};
          launch_tiles(context, op, z.dim(0), columns, partials_in<A, 1>(partials, columns));
        } else {
          const ActivationNormBackward<kKind, T, N> op{from,
                                                       in,
                                                       biases,
                                                       mask,
                                                       gammas,
                                                       norm->mean.data<A>(),
                                                       norm->rstd.data<A>(),
                                                       norm->mean_g.data<A>(),
                                                       norm->mean_gx.data<A>(),
                                                       to,
                                                       columns};
          launch_tiles(context, op, z.dim(0), columns, partials_in<A, 3>(partials, columns));
        }
      });
    });
    std::vector<ColumnSum> sums{{0, dbias}};
    if (norm != nullptr) {
      sums.push_back({columns, norm->dgamma});
      sums.push_back({2 * columns, norm->dbeta});
    }
    add_blocks<A>(context, partials, sums);
  });
}

}  // namespace normformer::ops::cuda
