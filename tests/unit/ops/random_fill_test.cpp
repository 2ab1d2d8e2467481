#include "normformer/ops/random_fill.h"

#include <algorithm>
#include <numbers>

#include "support.h"

namespace normformer::ops {
namespace {

const RandomStream kStream = RandomStream{}.with(1).with("weight");

TEST(RandomFill, EveryPartHasTheValuesOfTheWhole) {
  for (const DType dtype : kFloatingTypes) {
    for (const bool normal : {false, true}) {
      Context context(test_device(), 2);
      const auto fill = [&](const Tensor& tensor, const Rectangle& part) {
        if (normal)
          fill_normal(context, tensor, part, kStream, 0.02);
        else
          fill_uniform(context, tensor, part, kStream, 0.25);
      };
      const int64_t rows = 13;
      const int64_t columns = 37;
      const Tensor whole = unwritten(context, dtype, {rows, columns});
      fill(whole, {{0, rows}, {0, columns}, rows, columns});
      const Reals want = reals(whole);
      for (const Range row_part : {Range{0, 13}, Range{3, 4}, Range{5, 13}, Range{4, 4}}) {
        for (const Range column_part : {Range{0, 37}, Range{1, 2}, Range{7, 37}}) {
          const Tensor part = unwritten(context, dtype, {row_part.size(), column_part.size()});
          fill(part, {row_part, column_part, rows, columns});
          const Reals got = reals(part);
          for (size_t i = 0; i < got.size(); ++i) {
            const auto r = row_part.begin + static_cast<int64_t>(i) / column_part.size();
            const auto c = column_part.begin + static_cast<int64_t>(i) % column_part.size();
            ASSERT_EQ(got[i], want[static_cast<size_t>(r * columns + c)]);
          }
        }
      }
    }
  }
}

TEST(RandomFill, IsTheDocumentedFunctionOfWords) {
  Context context(test_device());
  const Tensor normal = context.empty({50}, DType::f64);
  const Tensor uniform = context.empty({50}, DType::f64);
  const Rectangle part{{100, 150}, {0, 1}, 1000, 1};
  fill_normal(context, normal, part, kStream, 2.0);
  fill_uniform(context, uniform, part, kStream, 3.0);
  for (uint64_t i = 0; i < 50; ++i) {
    const uint64_t index = 100 + i;
    const auto pair = kStream.words(index / 2);
    const double u1 = (pair[2 * (index % 2)] + 0.5) / 4294967296.0;
    const double u2 = (pair[2 * (index % 2) + 1] + 0.5) / 4294967296.0;
    EXPECT_NEAR(to_host(normal)[i], 2 * std::sqrt(-2 * std::log(u1)) * std::cos(2 * std::numbers::pi * u2),
                1e-14);
    const double u = (kStream.words(index / 4)[index % 4] + 0.5) / 4294967296.0;
    EXPECT_NEAR(to_host(uniform)[i], 3 * (2 * u - 1), 1e-15);
  }
}

/// The largest distance between the empirical distribution of `values` and `cumulative`.
template <class Cumulative>
double kolmogorov_smirnov(std::vector<double> values, Cumulative&& cumulative) {
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  double distance = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double expected = cumulative(values[i]);
    distance = std::max({distance, std::abs(expected - static_cast<double>(i) / n),
                         std::abs(expected - static_cast<double>(i + 1) / n)});
  }
  return distance;
}

TEST(RandomFill, HasTheDistributionsThatItNames) {
  Context context(test_device(), 2);
  constexpr int64_t kRows = 500;
  constexpr int64_t kColumns = 400;
  constexpr double n = kRows * kColumns;
  const Rectangle whole{{0, kRows}, {0, kColumns}, kRows, kColumns};
  const Tensor tensor = context.empty({kRows, kColumns}, DType::f64);
  // The 0.1 % point of the Kolmogorov-Smirnov statistic is 1.95 / sqrt(n). The stream is fixed: no flakiness.
  const double critical = 1.95 / std::sqrt(n);
  fill_normal(context, tensor, whole, kStream, 0.5);
  std::vector<double> values = to_host(tensor);
  EXPECT_LT(kolmogorov_smirnov(values, [](double x) { return 0.5 * std::erfc(-x / 0.5 / std::sqrt(2.0)); }),
            critical);
  double sum = 0;
  double squares = 0;
  double lagged = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    sum += values[i];
    squares += values[i] * values[i];
    if (i > 0) lagged += values[i] * values[i - 1];
  }
  EXPECT_LT(std::abs(sum / n), 4 * 0.5 / std::sqrt(n));
  EXPECT_LT(std::abs(squares / n - 0.25), 4 * 0.25 * std::sqrt(2 / n));
  EXPECT_LT(std::abs(lagged / n), 4 * 0.25 / std::sqrt(n)) << "neighbours are correlated";
  fill_uniform(context, tensor, whole, kStream, 2.0);
  values = to_host(tensor);
  EXPECT_LT(kolmogorov_smirnov(values, [](double x) { return (x + 2.0) / 4.0; }), critical);
  EXPECT_LT(*std::max_element(values.begin(), values.end()), 2.0);
  EXPECT_GT(*std::min_element(values.begin(), values.end()), -2.0);
}

TEST(RandomFill, ConstantsMetaAndWrongParts) {
  Context context(test_device());
  const Tensor tensor = context.empty({3, 5}, DType::bf16);
  fill_constant(context, tensor, 1.5);
  EXPECT_EQ(to_host(tensor), std::vector<double>(15, 1.5));
  EXPECT_THROW(fill_normal(context, tensor, {{0, 3}, {0, 4}, 3, 4}, kStream, 1.0), LogicError);
  EXPECT_THROW(fill_normal(context, tensor, {{1, 4}, {0, 5}, 3, 5}, kStream, 1.0), LogicError);
  expect_same_costs_on_meta([](Context& either) {
    const Tensor t = either.empty({3, 5}, DType::bf16);
    const Rectangle whole{{0, 3}, {0, 5}, 3, 5};
    fill_normal(either, t, whole, kStream, 1.0);
    fill_uniform(either, t, whole, kStream, 1.0);
    fill_constant(either, t, 1.0);
  });
}

}  // namespace
}  // namespace normformer::ops
