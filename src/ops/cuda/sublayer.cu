#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "normformer/ops/sublayer.h"

#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

/// SublayerOutput's parameters; null where a part is absent. An absent bias counts as 0, an absent scale
/// as 1.
template <class T>
struct Vectors {
  const T* bias;
  Heads<T> heads;
  const T* gamma;
  const T* beta;
  const T* residual_scale;

  Vectors(const SublayerOutput& parts, int64_t columns)
      : bias(data_or_null<T>(parts.bias)),
        heads(parts.head_scale, columns),
        gamma(data_or_null<T>(parts.norm_gamma)),
        beta(data_or_null<T>(parts.norm_beta)),
        residual_scale(data_or_null<T>(parts.residual_scale)) {}

  bool can_be_packs(int64_t columns) const {
    return can_pack<kPack<T>>(columns, bias, gamma, beta, residual_scale) && heads.hold_packs_of(kPack<T>);
  }
};

template <class T, int N>
struct Output {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  struct Columns {
    Pack<T, N> bias, residual_scale;
    A head_scale;
  };
  struct Row {};
  struct Elements {
    Pack<T, N> branch, residual;
  };

  const T* branch;
  const T* residual;
  Vectors<T> vectors;
  DropoutMask<A> mask;
  T* out;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_or<N>(vectors.bias, column, 0.0), pack_or<N>(vectors.residual_scale, column, 1.0),
            vectors.heads.scale_of(column)};
  }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return {pack_at<N>(branch, row * width + column), pack_at<N>(residual, row * width + column)};
  }

  __device__ void finish(const Columns& of_columns, const Elements& elements, Row, int64_t row,
                         int64_t column, Sums<A, 0, N>&) const {
    A values[N];
    added(of_columns, elements, values);
    write(of_columns.residual_scale, elements, row, column, values);
  }

  /// What is added to the residual where there is no norm; with one, what is normalised.
  __device__ void added(const Columns& of_columns, const Elements& elements, A (&values)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] =
          of_columns.head_scale * (widen(elements.branch.values[i]) + widen(of_columns.bias.values[i]));
    }
  }

  /// Takes what is added and leaves what has been written.
  __device__ void write(const Pack<T, N>& residual_scale, const Elements& elements, int64_t row,
                        int64_t column, A (&values)[N]) const {
    const uint32_t kept = kept_bits<N>(mask, row, column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A sum = widen(residual_scale.values[i]) * widen(elements.residual.values[i]) +
                    values[i] * multiplier(mask, kept, i);
      values[i] = widen(narrow<T>(sum));
    }
    store_pack<N>(values, out + row * width + column);
  }
};

template <class T, int N>
struct NormedOutput {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  using Elements = typename Output<T, N>::Elements;

  Output<T, N> output;

  __device__ Elements load(int64_t row, int64_t column) const { return output.load(row, column); }

  __device__ void values(const Elements& elements, int64_t column, A (&to)[N]) const {
    output.added(output.columns(column), elements, to);
  }

  __device__ void finish(const Elements& elements, A (&values)[N], int64_t row, int64_t column, A mean,
                         A rstd) const {
    normalise_values(output.vectors.gamma, output.vectors.beta, column, mean, rstd, values);
    output.write(output.columns(column).residual_scale, elements, row, column, values);
  }
};

/// NextNorm's tensors.
template <class T>
struct Next {
  using A = Accumulator<T>;
  const T* gamma;
  const T* beta;
  A eps;
  T* y;
  A* means;
  A* rstds;

  explicit Next(const NextNorm& next)
      : gamma(data_or_null<T>(next.gamma)),
        beta(data_or_null<T>(next.beta)),
        eps(static_cast<A>(next.eps)),
        y(data_or_null<T>(next.y)),
        means(data_or_null<A>(next.mean)),
        rstds(data_or_null<A>(next.rstd)) {}
};

/// The output and its next norm: rows stay in registers as in norm_rows_kernel, from what is read to y.
/// kNorm: whether there is a norm before the residual, of `eps`, `means` and `rstds`.
template <bool kNorm, int K, class T, int N, class A = Accumulator<T>>
__global__ void __launch_bounds__(kNormThreads)
    output_and_next_kernel(NormedOutput<T, N> op, Next<T> next, int64_t rows, int64_t columns,
                           int team_threads, A of_each, A eps, A* means, A* rstds) {
  Team team(team_threads);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index;
  const auto column = [&](int k) { return (int64_t{k} * team_threads + team.member) * N; };
  const auto used = [&](int k) { return row < rows && column(k) < columns; };
  const bool first = row < rows && team.member == 0;

  typename Output<T, N>::Elements elements[K] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (used(k)) elements[k] = op.load(row, column(k));
  }
  A values[K][N] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (used(k)) op.values(elements[k], column(k), values[k]);
  }
  Statistics<A> before = {};
  if constexpr (kNorm) {
    before = held_statistics(team, values, used, of_each, eps);
    if (first) {
      means[row] = before.mean;
      rstds[row] = before.rstd;
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!used(k)) continue;
    if constexpr (kNorm) {
      op.finish(elements[k], values[k], row, column(k), before.mean, before.rstd);
    } else {
      op.output.write(op.output.columns(column(k)).residual_scale, elements[k], row, column(k), values[k]);
    }
  }
  const auto [mean, rstd] = held_statistics(team, values, used, of_each, next.eps);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!used(k)) continue;
    normalise_values(next.gamma, next.beta, column(k), mean, rstd, values[k]);
    store_pack<N>(values[k], next.y + row * columns + column(k));
  }
  if (first) {
    next.means[row] = mean;
    next.rstds[row] = rstd;
  }
}

/// What backward passes read and write; null where there is none or it is not needed.
template <class T>
struct BackwardMatrices {
  const T* dout;
  const T* branch;
  const T* residual;
  T* dbranch;
  T* dresidual;
  int64_t width;
};

/// Where a quantity's sums of columns stand among a backward pass's.
enum class Sum { bias, norm_gamma, norm_beta, head_scale, residual_scale };
constexpr int place_of(Sum sum, bool norm) {
  return norm || sum == Sum::bias ? static_cast<int>(sum) : static_cast<int>(sum) - 2;
}

/// Where there is neither a norm nor a scale.
template <class T, int N>
struct PlainBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 1;
  struct Columns {};
  struct Row {};
  using Elements = Pack<T, N>;  // dout

  BackwardMatrices<T> matrices;
  DropoutMask<A> mask;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return pack_at<N>(matrices.dout, row * matrices.width + column);
  }

  __device__ void finish(Columns, const Elements& dout, Row, int64_t row, int64_t column,
                         Sums<A, kColumnSums, N>& sums) const {
    const uint32_t kept = kept_bits<N>(mask, row, column);
    A dbranch[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dbranch[i] = widen(dout.values[i]) * multiplier(mask, kept, i);
      sums[place_of(Sum::bias, false)][i] += dbranch[i];
    }
    const int64_t at = row * matrices.width + column;
    if (matrices.dresidual != nullptr) *reinterpret_cast<Elements*>(matrices.dresidual + at) = dout;
    store_pack<N>(dbranch, matrices.dbranch + at);
  }
};

struct Nothing {};

/// With a norm or scales: kNorm, kScales. In a pass without scales no residual is read, and no sums are kept
/// of what nobody asks for.
template <bool kNorm, bool kScales, class T, int N>
struct OutputBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 1 + (kNorm ? 2 : 0) + (kScales ? 2 : 0);
  template <bool kHas>
  using PackIf = std::conditional_t<kHas, Pack<T, N>, Nothing>;
  struct Columns {
    Pack<T, N> bias;
    PackIf<kNorm> gamma;
    PackIf<kScales> residual_scale;
    A head_scale;
  };
  struct Row {
    A mean, rstd, mean_g, mean_gx;
  };
  struct Elements {
    Pack<T, N> dout, branch;
    PackIf<kScales> residual;
    uint32_t kept;
  };

  BackwardMatrices<T> matrices;
  Vectors<T> vectors;
  DropoutMask<A> mask;
  const A* means;
  const A* rstds;
  A of_each;              ///< 1 / width
  A* row_sums = nullptr;  ///< mean_g, mean_gx where another kernel sums them up

  __device__ Columns columns(int64_t column) const {
    Columns made;
    made.bias = pack_or<N>(vectors.bias, column, 0.0);
    made.head_scale = kScales ? vectors.heads.scale_of(column) : A(1);
    if constexpr (kNorm) made.gamma = pack_at<N>(vectors.gamma, column);
    if constexpr (kScales) made.residual_scale = pack_or<N>(vectors.residual_scale, column, 1.0);
    return made;
  }

  __device__ Row row(int64_t row) const {
    if (!kNorm) return {A(0), A(1), A(0), A(0)};
    if (row_sums == nullptr) return {means[row], rstds[row], A(0), A(0)};
    return {means[row], rstds[row], row_sums[2 * row], row_sums[2 * row + 1]};
  }

  __device__ Elements load(int64_t row, int64_t column) const {
    const int64_t at = row * matrices.width + column;
    Elements made;
    made.dout = pack_at<N>(matrices.dout, at);
    made.branch = pack_or<N>(matrices.branch, at, 0.0);
    if constexpr (kScales) made.residual = pack_or<N>(matrices.residual, at, 0.0);
    made.kept = kept_bits<N>(mask, row, column);
    return made;
  }

  __device__ A biased(const Columns& of_columns, const Elements& elements, int i) const {
    return widen(elements.branch.values[i]) + widen(of_columns.bias.values[i]);
  }

  /// The gradient of what was dropped.
  __device__ A undropped(const Elements& elements, int i) const {
    return widen(elements.dout.values[i]) * multiplier(mask, elements.kept, i);
  }

  /// What gamma multiplies.
  __device__ A normed(const Columns& of_columns, const Elements& elements, const Row& of_row, int i) const {
    return (of_columns.head_scale * biased(of_columns, elements, i) - of_row.mean) * of_row.rstd;
  }

  __device__ void terms(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t,
                        int64_t, A (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A g = widen(of_columns.gamma.values[i]) * undropped(elements, i);
      sums[0] += g;
      sums[1] += g * normed(of_columns, elements, of_row, i);
    }
  }

  __device__ void put(int64_t row, const A (&sums)[2]) const {
    if (row_sums == nullptr) return;
    row_sums[2 * row] = sums[0] * of_each;
    row_sums[2 * row + 1] = sums[1] * of_each;
  }

  __device__ void take(Row& of_row, const A (&sums)[2]) const {
    of_row.mean_g = sums[0] * of_each;
    of_row.mean_gx = sums[1] * of_each;
  }

  __device__ void finish(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, kColumnSums, N>& sums) const {
    const int64_t at = row * matrices.width + column;
    if constexpr (kScales) {
      A dresidual[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A dout = widen(elements.dout.values[i]);
        sums[place_of(Sum::residual_scale, kNorm)][i] += dout * widen(elements.residual.values[i]);
        dresidual[i] = dout * widen(of_columns.residual_scale.values[i]);
      }
      if (matrices.dresidual != nullptr) store_pack<N>(dresidual, matrices.dresidual + at);
    } else if (matrices.dresidual != nullptr) {
      *reinterpret_cast<Pack<T, N>*>(matrices.dresidual + at) = elements.dout;
    }
    A dbranch[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A d = undropped(elements, i);
      if constexpr (kNorm) {
        const A x = normed(of_columns, elements, of_row, i);
        sums[place_of(Sum::norm_gamma, kNorm)][i] += d * x;
        sums[place_of(Sum::norm_beta, kNorm)][i] += d;
        d = of_row.rstd * (widen(of_columns.gamma.values[i]) * d - of_row.mean_g - x * of_row.mean_gx);
      }
      if constexpr (kScales) {
        sums[place_of(Sum::head_scale, kNorm)][i] += d * biased(of_columns, elements, i);
        d *= of_columns.head_scale;
      }
      sums[place_of(Sum::bias, kNorm)][i] += d;
      dbranch[i] = d;
    }
    store_pack<N>(dbranch, matrices.dbranch + at);
  }
};

/// The gradients that are there, and where their sums stand in a row of partials: one after the other.
class Gradients {
 public:
  Gradients(const SublayerOutputGradients& wanted, int64_t columns) : columns_(columns) {
    place(Sum::bias, wanted.bias);
    place(Sum::head_scale, wanted.head_scale);
    place(Sum::norm_gamma, wanted.norm_gamma);
    place(Sum::norm_beta, wanted.norm_beta);
    place(Sum::residual_scale, wanted.residual_scale);
  }

  /// For a kernel that keeps S sums.
  template <class A, int S>
  Partials<A, S> in(const Tensor& partials, bool norm) const {
    Partials<A, S> made;
    std::fill_n(made.first, S, -1);
    if (!partials) return made;
    made.data = partials.data<A>();
    made.stride = partials.dim(1);
    for (const auto& [sum, target] : placed_) made.first[place_of(sum, norm)] = target.first;
    return made;
  }

  template <class A>
  void add_blocks_of(Context& context, const Tensor& partials) const {
    std::vector<ColumnSum> by_column;
    for (const auto& [sum, target] : placed_) {
      if (sum == Sum::head_scale) {
        add_blocks_by_group<A>(context, partials, target.first, columns_, target.out);
      } else {
        by_column.push_back(target);
      }
    }
    if (!by_column.empty()) add_blocks<A>(context, partials, by_column);
  }

 private:
  void place(Sum sum, const Tensor& gradient) {
    if (gradient) placed_.push_back({sum, {static_cast<int64_t>(placed_.size()) * columns_, gradient}});
  }

  int64_t columns_;
  std::vector<std::pair<Sum, ColumnSum>> placed_;
};

/// Launches the kernel that has what `parts` need.
template <class T, int N>
void launch_backward(Context& context, const SublayerOutput& parts, const BackwardMatrices<T>& m,
                     const Tensor& mean, const Tensor& rstd, int64_t rows, const Gradients& gradients,
                     const Tensor& partials) {
  using A = Accumulator<T>;
  const DropoutMask<A> mask(parts.dropout);
  const bool scales = parts.head_scale || parts.residual_scale;
  const auto with = [&]<bool kNorm, bool kScales>() {
    using Op = OutputBackward<kNorm, kScales, T, N>;
    const Op op{m,
                Vectors<T>(parts, m.width),
                mask,
                data_or_null<A>(mean),
                data_or_null<A>(rstd),
                of_each<A>(m.width)};
    const auto to = gradients.in<A, Op::kColumnSums>(partials, kNorm);
    if constexpr (kNorm) {
      launch_by_rows<N == 8 ? 1 : 2>(context, op, rows, m.width, to);
    } else {
      launch_tiles(context, op, rows, m.width, to);
    }
  };
  if (parts.norm_gamma) {
    scales ? with.template operator()<true, true>() : with.template operator()<true, false>();
  } else if (scales) {
    with.template operator()<false, true>();
  } else {
    launch_tiles(context, PlainBackward<T, N>{m, mask}, rows, m.width, gradients.in<A, 1>(partials, false));
  }
}

/// For rows that registers hold.
template <class T, int N>
void launch_with_next(Context& context, const SublayerOutput& parts, const NormedOutput<T, N>& op,
                      const Next<T>& next, int64_t rows, int64_t columns, const Tensor& mean,
                      const Tensor& rstd) {
  using A = Accumulator<T>;
  const HeldRows held(columns / N);
  held.with_groups_of_thread([&]<int K>() {
    const auto kernel =
        parts.norm_gamma ? output_and_next_kernel<true, K, T, N> : output_and_next_kernel<false, K, T, N>;
    launch(context, held.launch_shape(rows), kernel, op, next, rows, columns,
           static_cast<int>(held.team_threads), of_each<A>(columns), static_cast<A>(parts.norm_eps),
           data_or_null<A>(mean), data_or_null<A>(rstd));
  });
}

}  // namespace

void sublayer_output_forward(Context& context, const SublayerOutput& parts, const Tensor& branch,
                             const Tensor& residual, const Tensor& out, const Tensor& mean,
                             const Tensor& rstd, const NextNorm& next) {
  const int64_t rows = branch.dim(0);
  const int64_t columns = branch.dim(1);
  dispatch_floating(branch.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = branch.data<T>();
    const T* around = residual.data<T>();
    T* to = out.data<T>();
    const Vectors<T> vectors(parts, columns);
    const Next<T> after(next);
    const bool packs = vectors.can_be_packs(columns) &&
                       can_pack<kPack<T>>(columns, in, around, to, after.gamma, after.beta, after.y);
    with_packs<T>(packs, [&]<int N>() {
      const Output<T, N> op{in, around, vectors, DropoutMask<A>(parts.dropout), to, columns};
      if constexpr (N > 1) {
        if (next.gamma && HeldRows(columns / N).fit())
          return launch_with_next(context, parts, NormedOutput<T, N>{op}, after, rows, columns, mean, rstd);
      }
      if (parts.norm_gamma) {
        launch_norm_rows(context, NormedOutput<T, N>{op}, rows, columns, parts.norm_eps, mean.data<A>(),
                         rstd.data<A>());
      } else {
        launch_tiles(context, op, rows, columns);
      }
      if (next.gamma)
        layer_norm_forward(context, out, next.gamma, next.beta, next.eps, next.y, next.mean, next.rstd);
    });
  });
}

void sublayer_output_backward(Context& context, const SublayerOutput& parts, const Tensor& dout,
                              const Tensor& branch, const Tensor& residual, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dbranch, const Tensor& dresidual,
                              const SublayerOutputGradients& gradients, const Tensor& partials) {
  const int64_t rows = dout.dim(0);
  const int64_t columns = dout.dim(1);
  const bool reads_branch = parts.norm_gamma || parts.head_scale;
  const Gradients wanted(gradients, columns);
  dispatch_floating(dout.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const BackwardMatrices<T> m{dout.data<T>(),
                                reads_branch ? branch.data<T>() : nullptr,
                                parts.residual_scale ? residual.data<T>() : nullptr,
                                dbranch.data<T>(),
                                data_or_null<T>(dresidual),
                                columns};
    const bool packs = Vectors<T>(parts, columns).can_be_packs(columns) &&
                       can_pack<kPack<T>>(columns, m.dout, m.branch, m.residual, m.dbranch, m.dresidual,
                                          data_or_null<A>(partials));
    with_packs<T>(packs, [&]<int N>() {
      launch_backward<T, N>(context, parts, m, mean, rstd, rows, wanted, partials);
    });
    wanted.add_blocks_of<A>(context, partials);
  });
}

}  // namespace normformer::ops::cuda
