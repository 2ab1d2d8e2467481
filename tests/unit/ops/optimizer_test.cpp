#include "normformer/ops/optimizer.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "instruction_sets.h"
#include "support.h"

namespace normformer::ops {
namespace {

/// One parameter under AdamW in long double: torch.optim.AdamW's formula, or fairseq's FusedAdam's.
struct Reference {
  Real p = 0, m = 0, v = 0;

  void update(const AdamW& s, Real g) {
    g *= s.grad_factor;
    m = s.beta1 * m + (1 - Real(s.beta1)) * g;
    v = s.beta2 * v + (1 - Real(s.beta2)) * g * g;
    const Real correction1 = 1 - std::pow(Real(s.beta1), static_cast<Real>(s.update));
    const Real correction2 = 1 - std::pow(Real(s.beta2), static_cast<Real>(s.update));
    p -= s.lr * Real(s.weight_decay) * p;
    if (s.fairseq_eps) {
      const Real step_size = s.lr * std::sqrt(correction2) / correction1;
      p -= step_size * m / (std::sqrt(v) + s.eps);
    } else {
      p -= s.lr * (m / correction1) / (std::sqrt(v / correction2) + s.eps);
    }
  }
};

TEST(AdamW, FollowsTheFormulaForManySteps) {
  for (const bool fairseq : {false, true}) {
    for (const DType dtype : kFloatingTypes) {
      for (const int64_t n : {1, 5, 33, 770}) {
        Context context(test_device(), 2);
        const DType sums = accumulator_of(dtype);
        const Tensor master = random_tensor(context, sums, {n}, 1);
        const Tensor moment1 = context.zeros({n}, sums);
        const Tensor moment2 = context.zeros({n}, sums);
        const Tensor params = unwritten(context, dtype, {n});
        std::vector<Reference> references;
        for (const Real p : reals(master)) references.push_back({p, 0, 0});
        AdamW step{
            .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-6, .weight_decay = 0.1, .grad_factor = 0.125};
        step.fairseq_eps = fairseq;
        for (step.update = 1; step.update <= 5; ++step.update) {
          const Tensor gradient = random_tensor(context, sums, {n}, static_cast<unsigned>(10 + step.update));
          const Reals g = reals(gradient);
          for (size_t i = 0; i < g.size(); ++i) references[i].update(step, g[i]);
          adamw(context, step, gradient, master, moment1, moment2, params);
        }
        Reals p, m, v;
        for (const Reference& r : references) {
          p.push_back(r.p);
          m.push_back(r.m);
          v.push_back(r.v);
        }
        const std::string what = name_of_case(dtype, 1, n) + (fairseq ? " fairseq" : " torch");
        // |g| < 5/8: a moment gains three roundings a step. A step moves p (below 5) by less than lr * 10,
        // with some ten roundings and the moments' own, and rounds p twice.
        expect_rounded(moment1, m, {1}, 5 * 4, what + " moment1");
        expect_rounded(moment2, v, {1}, 5 * 4, what + " moment2");
        expect_rounded(master, p, {5}, 5 * 4, what + " master");
        expect_rounded(params, p, {5}, 5 * 4, what + " params");
      }
    }
  }
}

// Masters of 16 bits: as with a master of fp32 that is rounded after every step.
TEST(AdamW, AMasterOfSixteenBitsIsUpdatedInFp32AndRoundedOnce) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int64_t n : {1, 33, 40001}) {
      Context context(test_device(), 2);
      const Tensor master = random_tensor(context, dtype, {n}, 1);
      const Tensor wide = converted(context, master, DType::f32);
      const Tensor rounded = context.empty({n}, dtype);
      std::vector<Tensor> moments;
      for (int i = 0; i < 4; ++i) moments.push_back(context.zeros({n}, DType::f32));
      AdamW step{.lr = 1e-2, .weight_decay = 0.1, .grad_factor = 0.125};
      for (step.update = 1; step.update <= 4; ++step.update) {
        const Tensor gradient = random_tensor(context, DType::f32, {n}, static_cast<unsigned>(step.update));
        adamw(context, step, gradient, master, moments[0], moments[1], master);
        adamw(context, step, gradient, wide, moments[2], moments[3], rounded);
        copy(context, rounded, wide);
        expect_same_bits(master, rounded, std::string(name_of(dtype)) + " master");
        expect_same_bits(moments[0], moments[2], "moment1");
        expect_same_bits(moments[1], moments[3], "moment2");
      }
      EXPECT_THROW(adamw(context, step, moments[0], master, moments[1], moments[2], rounded), LogicError);
    }
  }
}

// Every half there is through loads, and what lies between two of them through stores.
TEST(AdamW, HalvesAreWidenedAndRoundedAsInSoftware) {
  const auto check = [] {
    Context context(test_device(), 1);
    std::vector<float> values;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      f16 half;
      half.bits = static_cast<uint16_t>(bits);
      const auto value = static_cast<float>(half);
      values.insert(values.end(), {value, std::nextafter(value * 1.0004882812f, 0.0f), value * 1.0004882812f,
                                   value * 1.00048829f, value + 0x1p-25f, value - 0x1p-26f});
    }
    values.insert(values.end(), {65519.996f, 65520.0f, -65520.0f, 1e30f});
    const auto n = static_cast<int64_t>(values.size());
    const Tensor master = from_host<float>(context, values, {n});
    const Tensor zeros = context.zeros({n}, DType::f32);
    const Tensor params = context.empty({n}, DType::f16);
    adamw(context, AdamW{.lr = 0.0}, zeros, master, context.zeros({n}, DType::f32),
          context.zeros({n}, DType::f32), params);
    const Tensor halves = context.empty({n}, DType::f16);
    copy(context, params, halves);
    adamw(context, AdamW{.lr = 0.0}, zeros, halves, context.zeros({n}, DType::f32),
          context.zeros({n}, DType::f32), halves);
    std::vector<f16> narrow(values.size());
    std::vector<f16> again(values.size());
    params.copy_out(narrow.data());
    halves.copy_out(again.data());
    int64_t wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t expected = f16(values[i]).bits;
      if (std::isnan(values[i])) {
        wrong += !std::isnan(static_cast<float>(narrow[i])) || !std::isnan(static_cast<float>(again[i]));
      } else {
        wrong += narrow[i].bits != expected || again[i].bits != expected;
      }
    }
    EXPECT_EQ(wrong, 0);
  };
  check();
  if (test_device() == DeviceKind::cpu) for_instruction_sets(check);
}

/// By hand: one step from zero moments moves a parameter by lr, whatever the size of its gradient.
TEST(AdamW, TheFirstStepIsLr) {
  Context context(test_device());
  const Tensor master = tensor_of(context, DType::f64, {3}, {1, 1, 1});
  const Tensor moment1 = context.zeros({3}, DType::f64);
  const Tensor moment2 = context.zeros({3}, DType::f64);
  const Tensor gradient = tensor_of(context, DType::f64, {3}, {1e-3, -7.0, 0.0});
  adamw(context, AdamW{.lr = 0.5, .eps = 0.0 + 1e-300, .weight_decay = 0.1}, gradient, master, moment1,
        moment2, Tensor());
  const std::vector<double> p = to_host(master);
  EXPECT_NEAR(p[0], 0.95 - 0.5, 1e-14);
  EXPECT_NEAR(p[1], 0.95 + 0.5, 1e-14);
  EXPECT_EQ(p[2], 0.95);
}

TEST(AdamW, TheMasterMayBeTheParametersAndThreadsDoNotMatter) {
  std::vector<Tensor> masters;
  for (const int threads : {1, 2, 3}) {
    for (const bool separate : {true, false}) {
      Context context(test_device(), threads);
      const int64_t n = 40001;
      const Tensor master = random_tensor(context, DType::f32, {n}, 1);
      const Tensor moment1 = random_tensor(context, DType::f32, {n}, 2);
      const Tensor moment2 = random_tensor(context, DType::f32, {n}, 3, 0.01, 1.0);
      const Tensor params = separate ? context.empty({n}, DType::f32) : master;
      adamw(context, AdamW{.lr = 0.1, .weight_decay = 0.1, .update = 3},
            random_tensor(context, DType::f32, {n}, 4), master, moment1, moment2, params);
      masters.push_back(master);
      expect_same_bits(masters.back(), masters.front(), "master");
      expect_same_bits(params, master, "params");
    }
  }
}

TEST(AbsoluteMax, FindsTheLargestAndShowsWhatIsNotFinite) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kFloatingTypes) {
    Context context(test_device(), 2);
    for (const int64_t n : {1, 5, 33, 40001}) {
      std::vector<double> values = normals(1, n);
      values[static_cast<size_t>(n / 2)] = -64;
      EXPECT_EQ(absolute_max(context, tensor_of(context, dtype, {n}, values)), 64);
      for (const double bad : {inf, -inf, std::nan(""), -std::nan("")}) {
        values.back() = bad;
        EXPECT_EQ(absolute_max(context, tensor_of(context, dtype, {n}, values)), inf);
        std::swap(values.back(), values.front());
        EXPECT_EQ(absolute_max(context, tensor_of(context, dtype, {n}, values)), inf);
        values = normals(1, n);
        values[static_cast<size_t>(n / 2)] = -64;
      }
    }
    EXPECT_EQ(absolute_max(context, context.empty({0}, dtype)), 0);
    const double least = dtype == DType::f16 ? 1e-7 : 1e-40;  // a subnormal
    EXPECT_GT(absolute_max(context, tensor_of(context, dtype, {2}, {-least, 0})), 0);
  }
}

TEST(NormSums, AddWhatLongDoubleAddsAndThreadsDoNotMatter) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const int64_t n : {1, 5, 33, 770, 40001}) {
      std::vector<Tensor> all;
      for (const int threads : {1, 3}) {
        Context context(test_device(), threads);
        const Tensor x = random_tensor(context, dtype, {n}, 7);
        Real absolute = 2;
        Real squares = 3;
        for (const Real value : reals(x)) {
          absolute += std::abs(value);
          squares += value * value;
        }
        const Tensor sums = tensor_of(context, DType::f64, {2}, {2.0, 3.0});
        add_norm_sums(context, x, sums);
        const Reals got = reals(sums);
        EXPECT_NEAR(static_cast<double>(got[0] / absolute), 1.0, 1e-14) << n;
        EXPECT_NEAR(static_cast<double>(got[1] / squares), 1.0, 1e-14) << n;
        all.push_back(sums);
        expect_same_bits(all.back(), all.front(), "sums");
      }
    }
  }
  Context context(test_device(), 1);
  const Tensor sums = tensor_of(context, DType::f64, {2}, {2.0, 3.0});
  add_norm_sums(context, context.empty({0}, DType::f32), sums);
  EXPECT_EQ(reals(sums), (Reals{2.0, 3.0}));
  add_norm_sums(context, tensor_of(context, DType::f32, {2}, {1.0, std::nan("")}), sums);
  EXPECT_TRUE(std::isnan(reals(sums)[0]));
  EXPECT_TRUE(std::isnan(reals(sums)[1]));
}

/// The sum of squares of `values` cut into shards, each added by itself below its own largest, then the
/// shards' bins.
OrderFreeSumOfSquares sum_of(DType dtype, const std::vector<double>& values, const std::vector<size_t>& cuts,
                             int threads) {
  Context context(test_device(), threads);
  const double largest =
      absolute_max(context, tensor_of(context, dtype, {static_cast<int64_t>(values.size())}, values));
  OrderFreeSumOfSquares all(largest);
  size_t begin = 0;
  for (const size_t end : cuts) {
    const std::vector<double> part(values.begin() + static_cast<std::ptrdiff_t>(begin),
                                   values.begin() + static_cast<std::ptrdiff_t>(end));
    const Tensor x = tensor_of(context, dtype, {static_cast<int64_t>(part.size())}, part);
    const double largest_here = absolute_max(context, x);
    OrderFreeSumOfSquares sum(largest_here);
    sum.add(context, x);
    all.add_bins(largest_here, sum.bins());
    begin = end;
  }
  return all;
}

TEST(OrderFreeSumOfSquares, HasTheSameBitsForEveryOrderAndGrouping) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const double scale : {1.0, 1e-20, 1e15, 1e-42}) {
      std::vector<double> values = normals(7, 50000, scale);
      for (size_t i = 0; i < values.size(); i += 3) values[i] *= 1e-5;  // terms of many sizes
      const size_t n = values.size();
      const OrderFreeSumOfSquares whole = sum_of(dtype, values, {n}, 1);
      const OrderFreeSumOfSquares::Bins want = whole.bins();
      EXPECT_GT(whole.value(), 0.0);
      std::mt19937_64 engine(3);
      for (const std::vector<size_t>& cuts :
           {std::vector<size_t>{n}, {1, n}, {17, 17, 40000, n}, {n / 3, n / 2, n / 2 + 5, n}}) {
        for (const int threads : {1, 2, 3}) EXPECT_EQ(sum_of(dtype, values, cuts, threads).bins(), want);
        std::shuffle(values.begin(), values.end(), engine);
        EXPECT_EQ(sum_of(dtype, values, cuts, 2).bins(), want);
      }
    }
  }
}

// Parts of very different sizes: what one rank adds begins many places below what another does.
TEST(OrderFreeSumOfSquares, PartsOfAnySizeHaveTheBitsOfTheWhole) {
  std::mt19937_64 engine(5);
  std::uniform_real_distribution<double> exponents(-530.0, 489.0);
  for (int round = 0; round < 200; ++round) {
    const double center = exponents(engine);
    std::uniform_real_distribution<double> spread(-1.0, 1.0);
    std::vector<double> values;
    std::vector<size_t> cuts;
    for (size_t part = 0; part < 4; ++part) {
      const double size = std::exp2(std::min(489.0, center + 60.0 * spread(engine)));
      for (size_t i = 0; i <= 3 * part; ++i) values.push_back(size * spread(engine));
      cuts.push_back(values.size());
    }
    EXPECT_EQ(sum_of(DType::f64, values, cuts, 1).bins(),
              sum_of(DType::f64, values, {values.size()}, 1).bins());
  }
}

TEST(OrderFreeSumOfSquares, IsAsExactAsItSays) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const double scale : {1.0, 1e-20, 1e15}) {
      const std::vector<double> drawn = normals(9, 30000, scale);
      Context context(test_device());
      const std::vector<double> values =
          to_host(tensor_of(context, dtype, {static_cast<int64_t>(drawn.size())}, drawn));
      // Long double holds 64 bits: sorted sums of 30000 terms lose less than 2^-48 of the result's last
      // double bit.
      std::vector<Real> squares;
      Real largest = 0;
      for (const double value : values) {
        squares.push_back(Real(value) * Real(value));
        largest = std::max(largest, std::abs(Real(value)));
      }
      std::sort(squares.begin(), squares.end());
      const Real want = std::accumulate(squares.begin(), squares.end(), Real(0));
      const Real got = sum_of(dtype, values, {values.size()}, 1).value();
      const auto n = static_cast<Real>(values.size());
      // Cuts: 2^-60 largest^2 a term. fp64 squares are themselves rounded (2^-53). The value's sum is rounded
      // twice.
      const Real bound = n * 0x1p-60L * largest * largest + (dtype == DType::f64 ? 0x1p-53L * want : 0) +
                         2 * 0x1p-53L * want + n * 0x1p-63L * want;
      EXPECT_LE(std::abs(got - want), bound);
    }
  }
}

TEST(OrderFreeSumOfSquares, ZerosSubnormalsAndBounds) {
  Context context(test_device());
  OrderFreeSumOfSquares zero(0.0);
  zero.add(context, tensor_of(context, DType::f32, {3}, {0.0, -0.0, 0.0}));
  EXPECT_EQ(zero.value(), 0.0);
  OrderFreeSumOfSquares none(1.0);
  none.add(context, context.empty({0}, DType::f32));
  EXPECT_EQ(none.value(), 0.0);
  // The smallest subnormal float has an exact square in double.
  OrderFreeSumOfSquares tiny(0x1p-149);
  tiny.add(context, tensor_of(context, DType::f32, {4}, {0x1p-149, -0x1p-149, 0x1p-149, 0x1p-149}));
  EXPECT_EQ(tiny.value(), 0x1p-296);
  // Squares of the smallest doubles vanish or are subnormal; sums of those are exact.
  OrderFreeSumOfSquares smallest(0x1p-536);
  smallest.add(context, tensor_of(context, DType::f64, {3}, {0x1p-536, 0x1p-537, 0x1p-1074}));
  EXPECT_EQ(smallest.value(), 0x1p-1072 + 0x1p-1074);
  // The largest float's square fits.
  OrderFreeSumOfSquares large(0x1.fffffep127);
  large.add(context, tensor_of(context, DType::f32, {2}, {0x1.fffffep127, 1.0}));
  EXPECT_EQ(large.value(), 0x1.fffffep127 * 0x1.fffffep127);
  EXPECT_THROW(tiny.add_bins(1.0, none.bins()), LogicError);
  EXPECT_THROW(OrderFreeSumOfSquares{-1.0}, LogicError);
  EXPECT_THROW(OrderFreeSumOfSquares{std::nan("")}, LogicError);
  EXPECT_THROW(OrderFreeSumOfSquares{std::numeric_limits<double>::infinity()}, LogicError);
}

TEST(Optimizer, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor x = context.zeros({77}, DType::f32);
    const Tensor params = context.empty({77}, DType::bf16);
    adamw(context, AdamW{.lr = 0.1}, x, x, x, x, params);
    EXPECT_EQ(absolute_max(context, x), 0.0);
    OrderFreeSumOfSquares sum(1.0);
    sum.add(context, x);
    EXPECT_EQ(sum.value(), 0.0);
  });
}

}  // namespace
}  // namespace normformer::ops
