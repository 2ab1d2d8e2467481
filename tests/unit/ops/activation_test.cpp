#include "normformer/ops/activation.h"

#include "support.h"

namespace normformer::ops {
namespace {

const std::vector<ActivationKind> kKinds{ActivationKind::gelu, ActivationKind::gelu_tanh,
                                         ActivationKind::relu_squared, ActivationKind::tanh};

std::string name_of_kind(ActivationKind kind) {
  return kind == ActivationKind::gelu        ? "gelu"
         : kind == ActivationKind::gelu_tanh ? "gelu_tanh"
         : kind == ActivationKind::tanh      ? "tanh"
                                             : "relu_squared";
}

Real activated(ActivationKind kind, Real x) {
  switch (kind) {
    case ActivationKind::gelu:
      return x * std::erfc(-x / std::sqrt(Real(2))) / 2;
    case ActivationKind::gelu_tanh:
      return x * (1 + std::tanh(std::sqrt(2 / std::acos(Real(-1))) * (x + Real(0.044715L) * x * x * x))) / 2;
    case ActivationKind::tanh:
      return std::tanh(x);
    default:
      return x > 0 ? x * x : 0;
  }
}

struct Switches {
  ActivationKind kind = ActivationKind::gelu;
  double dropout = 0.0;
  bool norm = false;
};

std::vector<Switches> all_switches() {
  std::vector<Switches> all;
  for (const ActivationKind kind : kKinds) {
    for (const double dropout : {0.0, 0.3}) {
      for (const bool norm : {false, true}) all.push_back({kind, dropout, norm});
    }
  }
  return all;
}

std::string name_of_switches(const Switches& s, DType dtype, int64_t rows, int64_t columns) {
  return name_of_kind(s.kind) + (s.dropout > 0 ? " dropout " : " ") + (s.norm ? "norm " : "") +
         name_of_case(dtype, rows, columns);
}

/// z values that stay away from relu's kink, so that differences are smooth there.
std::vector<double> away_from_zero(unsigned seed, int64_t n) {
  std::vector<double> values = normals(seed, n, 1.5);
  for (double& value : values) value += value < 0 ? -0.25 : 0.25;
  return values;
}

struct Inputs {
  Tensor z, bias, gamma, d, mean, rstd, mean_g, mean_gx;

  Inputs(Context& context, DType dtype, int64_t rows, int64_t columns)
      : z(tensor_of(context, dtype, {rows, columns}, away_from_zero(1, rows * columns))),
        bias(random_tensor(context, dtype, {columns}, 2, 0.03)),
        gamma(random_tensor(context, dtype, {columns}, 3, 0.3, 1.0)),
        d(random_tensor(context, dtype, {rows, columns}, 4)),
        mean(random_tensor(context, accumulator_of(dtype), {rows}, 5, 0.1, 0.4)),
        rstd(random_tensor(context, accumulator_of(dtype), {rows}, 6, 0.05, 1.2)),
        mean_g(random_tensor(context, accumulator_of(dtype), {rows}, 7, 0.3)),
        mean_gx(random_tensor(context, accumulator_of(dtype), {rows}, 8, 0.3)) {}

  Inputs in_fp64(Context& context) const {
    Inputs wide = *this;
    for (Tensor* t :
         {&wide.z, &wide.bias, &wide.gamma, &wide.d, &wide.mean, &wide.rstd, &wide.mean_g, &wide.mean_gx})
      *t = converted(context, *t, DType::f64);
    return wide;
  }
};

struct Outputs {
  Tensor out, sums, dz, dbias, dgamma, dbeta;
};

Outputs run(Context& context, const Inputs& in, const Switches& switches) {
  const DType dtype = in.z.dtype();
  const DType sum_type = accumulator_of(dtype);
  const int64_t columns = in.z.dim(1);
  const Dropout dropout = odd_dropout(switches.dropout, columns);
  Outputs out{unwritten(context, dtype, in.z.shape()), unwritten(context, sum_type, {in.z.dim(0), 2}),
              unwritten(context, dtype, in.z.shape()), context.zeros({columns}, sum_type),
              context.zeros({columns}, sum_type),      context.zeros({columns}, sum_type)};
  activation_forward(context, switches.kind, in.z, in.bias, dropout, switches.norm ? in.gamma : Tensor(),
                     out.out, switches.norm ? out.sums : Tensor());
  const NormOfActivation norm{in.gamma, in.mean, in.rstd, in.mean_g, in.mean_gx, out.dgamma, out.dbeta};
  activation_backward(context, switches.kind, in.d, in.z, in.bias, dropout, switches.norm ? &norm : nullptr,
                      out.dz, out.dbias);
  return out;
}

/// h = drop(act(z + bias)).
Reals hidden(const Reals& z, const Reals& bias, const Switches& switches) {
  Reals h;
  const auto columns = static_cast<int64_t>(bias.size());
  const Dropout dropout = odd_dropout(switches.dropout, columns);
  for (size_t i = 0; i < z.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / columns;
    const int64_t column = static_cast<int64_t>(i) % columns;
    h.push_back(dropout_multiplier(dropout, row, column) *
                activated(switches.kind, z[i] + bias[static_cast<size_t>(column)]));
  }
  return h;
}

TEST(Activation, ForwardAndItsSumsMatchTheReference) {
  for (const Switches& switches : all_switches()) {
    for (const DType dtype : kFloatingTypes) {
      for (const auto [rows, columns] : kExtents) {
        Context context(test_device(), 2);
        const Inputs in(context, dtype, rows, columns);
        const Outputs out = run(context, in, switches);
        const Reals h = hidden(reals(in.z), reals(in.bias), switches);
        const Reals gamma = reals(in.gamma);
        const Reals z = reals(in.z);
        Reals want = h;
        Reals magnitudes;
        Reals sums;
        for (size_t i = 0; i < h.size(); ++i) {
          if (switches.norm) want[i] *= gamma[i % gamma.size()];
          // 1 + |h|: Phi(x) errs by 1e-7, below 2 u of fp32, and multiplies x; x = z + bias is rounded once
          // and the slope is below 1.2 (2 |x| for relu_squared, whose value is x^2).
          magnitudes.push_back(2 * (1 + std::abs(want[i]) + std::abs(z[i])));
        }
        const std::string what = name_of_switches(switches, dtype, rows, columns);
        expect_rounded(out.out, want, magnitudes, 8, what);
        if (!switches.norm) continue;
        Reals sum_magnitudes;
        for (int64_t n = 0; n < rows; ++n) {
          Real sum = 0;
          Real squares = 0;
          Real sizes = 0;
          for (int64_t c = 0; c < columns; ++c) {
            const Real value = h[static_cast<size_t>(n * columns + c)];
            const Real size = 1 + std::abs(value);
            sum += value;
            squares += value * value;
            sizes += 2 * size * size;
          }
          sums.insert(sums.end(), {sum, squares});
          sum_magnitudes.insert(sum_magnitudes.end(), {sizes, sizes});
        }
        // At most columns / 4 additions one after the other (four lanes are the fewest), 8 roundings in each
        // term.
        expect_rounded(out.sums, sums, sum_magnitudes, static_cast<Real>(columns) / 4 + 16, what + " sums");
      }
    }
  }
}

TEST(Activation, GeluAndTanhAreAccurateEverywhereInFp32) {
  Context context(test_device());
  std::vector<double> xs;
  for (int i = -160000; i <= 160000; ++i) xs.push_back(i * 1e-4);
  const auto n = static_cast<int64_t>(xs.size());
  const Tensor x = tensor_of(context, DType::f32, {1, n}, xs);
  const Tensor bias = context.zeros({n}, DType::f32);
  for (const ActivationKind kind : {ActivationKind::gelu, ActivationKind::gelu_tanh, ActivationKind::tanh}) {
    const Tensor y = context.empty({1, n}, DType::f32);
    activation_forward(context, kind, x, bias, Dropout(), Tensor(), y, Tensor());
    const Reals inputs = reals(x);
    const Reals values = reals(y);
    Real worst = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Real error = std::abs(values[i] - activated(kind, inputs[i]));
      worst = std::max(worst, error / std::max(Real(1), std::abs(inputs[i])));
    }
    EXPECT_LT(static_cast<double>(worst), 1.5e-7) << name_of_kind(kind);
  }
}

TEST(Activation, NotANumberAndInfinityAreNotHidden) {
  Context context(test_device());
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kFloatingTypes) {
    for (const ActivationKind kind : kKinds) {
      const Tensor z = tensor_of(context, dtype, {1, 2}, {std::nan(""), inf});
      activation_forward(context, kind, z, context.zeros({2}, dtype), Dropout(), Tensor(), z, Tensor());
      EXPECT_TRUE(std::isnan(reals(z)[0])) << name_of_kind(kind);
      EXPECT_EQ(reals(z)[1], kind == ActivationKind::tanh ? 1 : Real(inf)) << name_of_kind(kind);
    }
  }
}

TEST(Activation, BackwardMatchesDifferencesOfTheReference) {
  for (const Switches& switches : all_switches()) {
    if (switches.norm) continue;
    for (const auto [rows, columns] : {Extent{1, 1}, Extent{3, 5}, Extent{7, 33}}) {
      Context context(test_device(), 2);
      const Inputs in(context, DType::f64, rows, columns);
      const Outputs out = run(context, in, switches);
      Reals z = reals(in.z);
      Reals bias = reals(in.bias);
      const Reals d = reals(in.d);
      const auto loss = [&] { return dot(d, hidden(z, bias, switches)); };
      const std::string what = name_of_switches(switches, DType::f64, rows, columns);
      expect_close(out.dz, numeric_gradient(z, loss), 1e-8L, what + " dz");
      expect_close(out.dbias, numeric_gradient(bias, loss), 1e-8L, what + " dbias");
    }
  }
}

/// With statistics of the very h the backward is that of the whole LayerNorm.
TEST(Activation, BackwardThroughItsNormMatchesDifferencesOfTheReference) {
  constexpr Real kEps = 1e-5L;
  for (Switches switches : all_switches()) {
    if (!switches.norm) continue;
    for (const auto [rows, columns] : {Extent{3, 5}, Extent{7, 33}}) {
      Context context(test_device(), 2);
      Inputs in(context, DType::f64, rows, columns);
      Reals z = reals(in.z);
      Reals bias = reals(in.bias);
      Reals gamma = reals(in.gamma);
      const Reals d = reals(in.d);
      Reals beta(static_cast<size_t>(columns), 0.25L);
      const auto features = static_cast<Real>(columns);
      std::vector<double> mean, rstd, mean_g, mean_gx;
      const auto normed = [&] {
        Reals out = hidden(z, bias, switches);
        mean.clear();
        rstd.clear();
        for (int64_t n = 0; n < rows; ++n) {
          Real* row = out.data() + n * columns;
          Real m = 0;
          Real v = 0;
          for (int64_t c = 0; c < columns; ++c) m += row[c] / features;
          for (int64_t c = 0; c < columns; ++c) v += (row[c] - m) * (row[c] - m) / features;
          const Real r = 1 / std::sqrt(v + kEps);
          mean.push_back(static_cast<double>(m));
          rstd.push_back(static_cast<double>(r));
          for (int64_t c = 0; c < columns; ++c) row[c] = (row[c] - m) * r;
        }
        return out;
      };
      const Reals xhat = normed();
      for (int64_t n = 0; n < rows; ++n) {
        Real g = 0;
        Real gx = 0;
        for (int64_t c = 0; c < columns; ++c) {
          const auto i = static_cast<size_t>(n * columns + c);
          g += gamma[static_cast<size_t>(c)] * d[i] / features;
          gx += gamma[static_cast<size_t>(c)] * d[i] * xhat[i] / features;
        }
        mean_g.push_back(static_cast<double>(g));
        mean_gx.push_back(static_cast<double>(gx));
      }
      in.mean = from_host<double>(context, mean, {rows});
      in.rstd = from_host<double>(context, rstd, {rows});
      in.mean_g = from_host<double>(context, mean_g, {rows});
      in.mean_gx = from_host<double>(context, mean_gx, {rows});
      const Outputs out = run(context, in, switches);
      const auto loss = [&] {
        Reals y = normed();
        for (size_t i = 0; i < y.size(); ++i) y[i] = gamma[i % gamma.size()] * y[i] + beta[i % beta.size()];
        return dot(d, y);
      };
      const std::string what = name_of_switches(switches, DType::f64, rows, columns);
      expect_close(out.dz, numeric_gradient(z, loss), 1e-7L, what + " dz");
      expect_close(out.dbias, numeric_gradient(bias, loss), 1e-7L, what + " dbias");
      expect_close(out.dgamma, numeric_gradient(gamma, loss), 1e-8L, what + " dgamma");
      expect_close(out.dbeta, numeric_gradient(beta, loss), 1e-8L, what + " dbeta");
    }
  }
}

TEST(Activation, BackwardOfNarrowTypesMatchesFp64) {
  for (const Switches& switches : all_switches()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const auto [rows, columns] : kExtents) {
        Context context(test_device(), 2);
        const Inputs in(context, dtype, rows, columns);
        const Outputs out = run(context, in, switches);
        const Outputs want = run(context, in.in_fp64(context), switches);
        const std::string what = name_of_switches(switches, dtype, rows, columns);
        // |x| < 8, so h < 64 / 0.7 and slopes < 16; xhat < 140 and a gradient is of a few such factors below
        // 64, each with fewer than 8 roundings.
        const Real term = (switches.kind == ActivationKind::relu_squared ? 64 : 8) * (switches.norm ? 8 : 1);
        expect_rounded(out.dz, reals(want.dz), {term * 8}, 16, what + " dz");
        const Reals sums{term * static_cast<Real>(rows + 1)};
        const Real roundings = static_cast<Real>(rows) + 16;
        expect_rounded(out.dbias, reals(want.dbias), sums, roundings, what + " dbias");
        expect_rounded(out.dgamma, reals(want.dgamma), sums, roundings, what + " dgamma");
        expect_rounded(out.dbeta, reals(want.dbeta), sums, roundings, what + " dbeta");
      }
    }
  }
}

TEST(Activation, TheBitsDoNotDependOnThreadsOrPlace) {
  for (const DType dtype : kFloatingTypes) {
    const Switches switches{ActivationKind::gelu, 0.2, true};
    Context one(test_device(), 1);
    const Inputs in(one, dtype, 65, 770);
    const Outputs want = run(one, in, switches);
    for (const int threads : {2, 3}) {
      Context context(test_device(), threads);
      const Outputs got = run(context, Inputs(context, dtype, 65, 770), switches);
      expect_same_bits(got.out, want.out, "out");
      expect_same_bits(got.sums, want.sums, "sums");
      expect_same_bits(got.dz, want.dz, "dz");
      expect_same_bits(got.dbias, want.dbias, "dbias");
      expect_same_bits(got.dgamma, want.dgamma, "dgamma");
      expect_same_bits(got.dbeta, want.dbeta, "dbeta");
    }
    const Dropout dropout = odd_dropout(0.2, 770);
    const NormOfActivation norm{in.gamma, in.mean, in.rstd, in.mean_g, in.mean_gx, want.dgamma, want.dbeta};
    activation_backward(one, switches.kind, in.d, in.z, in.bias, dropout, &norm, in.d, want.dbias);
    expect_same_bits(in.d, want.dz, "dz in place of d");
    activation_forward(one, switches.kind, in.z, in.bias, dropout, in.gamma, in.z, want.sums);
    expect_same_bits(in.z, want.out, "out in place of z");
  }
}

/// Features split over ranks at columns that are no multiple of a vector or of the generator's blocks.
TEST(Activation, SplitFeaturesGiveTheBitsOfTheWhole) {
  for (const DType dtype : kFloatingTypes) {
    Context context(test_device());
    const int64_t rows = 9;
    const int64_t columns = 77;
    const Switches switches{ActivationKind::gelu_tanh, 0.4, true};
    const Inputs in(context, dtype, rows, columns);
    const Reals whole = reals(run(context, in, switches).out);
    const std::vector<double> z = to_host(in.z);
    const std::vector<double> bias = to_host(in.bias);
    const std::vector<double> gamma = to_host(in.gamma);
    for (const Range part : {Range{0, 1}, Range{1, 30}, Range{30, 77}}) {
      std::vector<double> z_part;
      for (int64_t r = 0; r < rows; ++r)
        z_part.insert(z_part.end(), z.begin() + r * columns + part.begin, z.begin() + r * columns + part.end);
      const std::vector<double> bias_part(bias.begin() + part.begin, bias.begin() + part.end);
      const std::vector<double> gamma_part(gamma.begin() + part.begin, gamma.begin() + part.end);
      Dropout dropout = odd_dropout(0.4, columns);
      dropout.first_column += part.begin;
      const Tensor out = tensor_of(context, dtype, {rows, part.size()}, z_part);
      activation_forward(context, switches.kind, out, tensor_of(context, dtype, {part.size()}, bias_part),
                         dropout, tensor_of(context, dtype, {part.size()}, gamma_part), out, Tensor());
      const Reals got = reals(out);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < part.size(); ++c) {
          EXPECT_EQ(got[static_cast<size_t>(r * part.size() + c)],
                    whole[static_cast<size_t>(r * columns + part.begin + c)]);
        }
      }
    }
  }
}

TEST(Activation, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor z = context.empty({65, 770}, DType::bf16);
    const Tensor row = context.empty({770}, DType::bf16);
    const Tensor sum = context.empty({770}, DType::f32);
    const Tensor column = context.empty({65}, DType::f32);
    const Tensor sums = context.empty({65, 2}, DType::f32);
    activation_forward(context, ActivationKind::gelu, z, row, odd_dropout(0.1, 770), row, z, sums);
    const NormOfActivation norm{row, column, column, column, column, sum, sum};
    activation_backward(context, ActivationKind::gelu, z, z, row, odd_dropout(0.1, 770), &norm, z, sum);
  });
}

}  // namespace
}  // namespace normformer::ops
