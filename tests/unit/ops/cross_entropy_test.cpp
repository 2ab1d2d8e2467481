#include "normformer/ops/cross_entropy.h"

#include <algorithm>
#include <limits>

#include "support.h"

namespace normformer::ops {
namespace {

std::vector<int32_t> targets_of(int64_t rows, int64_t vocabulary) {
  std::vector<int32_t> ids;
  for (int64_t n = 0; n < rows; ++n) ids.push_back(static_cast<int32_t>((n * n + 3) % vocabulary));
  return ids;
}

Tensor ids_tensor(Context& context, const std::vector<int32_t>& ids) {
  return from_host<int32_t>(context, ids, {static_cast<int64_t>(ids.size())});
}

/// -log softmax(logits)[target], by rows.
Reals reference(const Reals& logits, const std::vector<int32_t>& targets) {
  Reals nll;
  const size_t columns = targets.empty() ? 1 : logits.size() / targets.size();
  for (size_t n = 0; n < targets.size(); ++n) {
    const Real* row = logits.data() + n * columns;
    const Real maximum = *std::max_element(row, row + columns);
    Real sum = 0;
    for (size_t c = 0; c < columns; ++c) sum += std::exp(row[c] - maximum);
    nll.push_back(std::log(sum) + maximum - row[static_cast<size_t>(targets[n])]);
  }
  return nll;
}

struct Outputs {
  std::vector<Tensor> gradients;  // by shard
  Tensor nll;
};

/// The three local steps with the reductions between them done by hand, over columns cut into shards.
Outputs run(Context& context, const Tensor& logits, const std::vector<int32_t>& targets,
            const std::vector<Range>& shards, const Tensor& weights, double factor) {
  const DType dtype = logits.dtype();
  const DType sum_type = accumulator_of(dtype);
  const int64_t rows = logits.dim(0);
  const int64_t columns = logits.dim(1);
  const std::vector<double> values = to_host(logits);
  const Tensor ids = ids_tensor(context, targets);
  Outputs out;
  std::vector<double> maxima(static_cast<size_t>(rows), -1e300);
  for (const Range shard : shards) {
    std::vector<double> part;
    for (int64_t r = 0; r < rows; ++r)
      part.insert(part.end(), values.begin() + r * columns + shard.begin,
                  values.begin() + r * columns + shard.end);
    out.gradients.push_back(tensor_of(context, dtype, {rows, shard.size()}, part));
    const Tensor local = unwritten(context, sum_type, {rows});
    logits_max(context, out.gradients.back(), local);
    const std::vector<double> found = to_host(local);
    for (size_t r = 0; r < maxima.size(); ++r) maxima[r] = std::max(maxima[r], found[r]);
  }
  const Tensor maximum = tensor_of(context, sum_type, {rows}, maxima);
  const Tensor sums = context.zeros({rows, 2}, sum_type);
  for (size_t s = 0; s < shards.size(); ++s) {
    const Tensor local = unwritten(context, sum_type, {rows, 2});
    logits_sums(context, out.gradients[s], maximum, ids, shards[s].begin, local);
    add(context, local, sums);
  }
  out.nll = unwritten(context, sum_type, {rows});
  cross_entropy(context, sums, out.nll);
  for (size_t s = 0; s < shards.size(); ++s)
    cross_entropy_backward(context, out.gradients[s], maximum, sums, ids, shards[s].begin, weights, factor);
  return out;
}

TEST(CrossEntropy, MatchesTheReferenceForAnySplitOfTheVocabulary) {
  for (const DType dtype : kFloatingTypes) {
    for (const auto [rows, columns] : {Extent{1, 1}, Extent{3, 5}, Extent{7, 33}, Extent{65, 770}}) {
      std::vector<std::vector<Range>> splits{{{0, columns}}};
      if (columns > 4) splits.push_back({{0, 2}, {2, 3}, {3, columns}});
      for (const auto& shards : splits) {
        Context context(test_device(), 2);
        const Tensor logits = random_tensor(context, dtype, {rows, columns}, 1, 3.0);
        const std::vector<int32_t> targets = targets_of(rows, columns);
        std::vector<uint8_t> counts;
        for (int64_t r = 0; r < rows; ++r) counts.push_back(r % 3 == 1 ? 0 : 1);
        const Tensor weights = from_host<uint8_t>(context, counts, {rows});
        const double factor = 0.75;
        const Outputs out = run(context, logits, targets, shards, weights, factor);
        const Reals x = reals(logits);
        const Reals nll = reference(x, targets);
        const std::string what = name_of_case(dtype, rows, columns);
        // Logits below 16, so differences have errors of 32 u, which exp makes relative; exp's own are 4 u.
        // Of the sum's additions at most columns / 4 are one after the other. nll adds three numbers
        // below 32.
        const Real roundings = static_cast<Real>(columns) / 4 + 48;
        expect_rounded(out.nll, nll, {32}, roundings, what + " nll");
        for (size_t s = 0; s < shards.size(); ++s) {
          Reals want;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = shards[s].begin; c < shards[s].end; ++c) {
              const auto n = static_cast<size_t>(r);
              // log p(c) = log p(target) + logit(c) - logit(target)
              const Real* row = x.data() + r * columns;
              const Real p = std::exp(-nll[n] + row[c] - row[targets[n]]);
              want.push_back(counts[n] * Real(factor) * (p - (c == targets[n] ? 1 : 0)));
            }
          }
          expect_rounded(out.gradients[s], want, {1}, roundings + 8, what + " gradient");
        }
      }
    }
  }
}

/// The likeliest id of each row over columns cut into shards, the maxima and the last step done by hand.
std::vector<double> likeliest(Context& context, const Tensor& logits, const std::vector<Range>& shards) {
  const DType sum_type = accumulator_of(logits.dtype());
  const int64_t rows = logits.dim(0);
  const std::vector<double> values = to_host(logits);
  std::vector<double> maxima;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = values.begin() + r * logits.dim(1);
    maxima.push_back(*std::max_element(row, row + logits.dim(1)));
  }
  const Tensor maximum = tensor_of(context, sum_type, {rows}, maxima);
  std::vector<double> best(static_cast<size_t>(rows), -std::numeric_limits<double>::infinity());
  for (const Range shard : shards) {
    std::vector<double> part;
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = values.begin() + r * logits.dim(1);
      part.insert(part.end(), row + shard.begin, row + shard.end);
    }
    const Tensor ids = unwritten(context, sum_type, {rows});
    logits_first_max(context, tensor_of(context, logits.dtype(), {rows, shard.size()}, part), maximum,
                     shard.begin, ids);
    const std::vector<double> found = to_host(ids);
    for (size_t r = 0; r < best.size(); ++r) best[r] = std::max(best[r], found[r]);
  }
  for (double& id : best) id = -id;
  return best;
}

TEST(CrossEntropy, TheLikeliestTokenIsTheFirstOfEqualsForAnySplitOfTheVocabulary) {
  for (const DType dtype : kFloatingTypes) {
    Context context(test_device(), 2);
    const Tensor ties =
        tensor_of(context, dtype, {4, 5}, {0, 2, 1, 2, 2, -1, -1, -1, -1, -1, 3, 2, 1, 0, 3, 0, 0, 0, 0, 1});
    for (const auto& shards : std::vector<std::vector<Range>>{{{0, 5}}, {{0, 1}, {1, 2}, {2, 5}}}) {
      EXPECT_EQ(likeliest(context, ties, shards), (std::vector<double>{1, 0, 0, 4}));
    }
    // Wide rows, whose columns a GPU's threads share; of few values, so that there are equals.
    std::vector<double> values;
    for (int64_t i = 0; i < 3 * 5003; ++i) values.push_back(static_cast<double>(i * i % 61 % 23));
    std::vector<double> expected;
    for (auto row = values.begin(); row != values.end(); row += 5003) {
      expected.push_back(static_cast<double>(std::max_element(row, row + 5003) - row));
    }
    const Tensor wide = tensor_of(context, dtype, {3, 5003}, values);
    EXPECT_EQ(likeliest(context, wide, {{0, 5003}}), expected);
    EXPECT_EQ(likeliest(context, wide, {{0, 7}, {7, 2503}, {2503, 5003}}), expected);
  }
}

TEST(CrossEntropy, GradientMatchesDifferences) {
  Context context(test_device(), 2);
  for (const auto [rows, columns] : {Extent{3, 5}, Extent{7, 33}}) {
    const Tensor logits = random_tensor(context, DType::f64, {rows, columns}, 1, 2.0);
    const std::vector<int32_t> targets = targets_of(rows, columns);
    Reals x = reals(logits);
    const Outputs out = run(context, logits, targets, {{0, columns}}, Tensor(), 0.5);
    const auto loss = [&] {
      Real sum = 0;
      for (const Real value : reference(x, targets)) sum += value / 2;
      return sum;
    };
    expect_close(out.gradients[0], numeric_gradient(x, loss), 1e-9L, "gradient");
  }
}

TEST(CrossEntropy, ExtremesOfLogits) {
  Context context(test_device());
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kFloatingTypes) {
    // A masked logit has no probability; far below the maximum exp is zero; equal logits share evenly.
    const Tensor logits = tensor_of(context, dtype, {3, 4}, {0, -inf, 0, 0, 1e4, 0, -1e4, 0, 5, 5, 5, 5});
    const Outputs out = run(context, logits, {0, 0, 3}, {{0, 4}}, Tensor(), 1.0);
    expect_rounded(out.nll, {std::log(Real(3)), 0, std::log(Real(4))}, {4}, 4, "nll");
    expect_rounded(out.gradients[0],
                   {-2 / Real(3), 0, 1 / Real(3), 1 / Real(3), 0, 0, 0, 0, 0.25L, 0.25L, 0.25L, -0.75L}, {1},
                   8, "gradient");
    const Tensor bad = tensor_of(context, dtype, {1, 4}, {0, std::nan(""), 0, 0});
    EXPECT_TRUE(std::isnan(reals(run(context, bad, {0}, {{0, 4}}, Tensor(), 1.0).nll)[0]));
  }
}

TEST(CrossEntropy, TheTargetsGradientIsRoundedOnce) {
  Context context(test_device());
  // bf16(1/3) - 1 rounds to -0.664; -2/3 itself to -0.668.
  const Tensor logits = context.zeros({1, 3}, DType::bf16);
  const Outputs out = run(context, logits, {1}, {{0, 3}}, Tensor(), 1.0);
  EXPECT_EQ(to_host(out.gradients[0])[1], static_cast<float>(bf16(-2.0f / 3.0f)));
}

TEST(CrossEntropy, TokensThatDoNotCountHaveNoGradientWhateverTheirLogits) {
  Context context(test_device());
  const Tensor logits = tensor_of(context, DType::bf16, {1, 3}, {std::nan(""), 0, 1});
  const std::vector<uint8_t> none{0};
  const Outputs out = run(context, logits, {0}, {{0, 3}}, from_host<uint8_t>(context, none, {1}), 1.0);
  EXPECT_EQ(to_host(out.gradients[0]), (std::vector<double>{0, 0, 0}));
}

TEST(CrossEntropy, TheBitsDoNotDependOnThreads) {
  for (const DType dtype : kFloatingTypes) {
    std::vector<Outputs> all;
    for (const int threads : {1, 2, 3}) {
      Context context(test_device(), threads);
      const Tensor logits = random_tensor(context, dtype, {65, 770}, 1, 3.0);
      all.push_back(run(context, logits, targets_of(65, 770), {{0, 770}}, Tensor(), 1.0));
      expect_same_bits(all.back().nll, all.front().nll, "nll");
      expect_same_bits(all.back().gradients[0], all.front().gradients[0], "gradient");
    }
  }
}

TEST(WeightedSum, AddsInFp64InOrder) {
  Context context(test_device(), 2);
  const Tensor values = tensor_of(context, DType::f32, {4}, {16777216.0, 1.0, 1.0, 5.0});
  const std::vector<uint8_t> counts{1, 1, 1, 0};
  EXPECT_EQ(weighted_sum(context, values, from_host<uint8_t>(context, counts, {4})), 16777218.0);
  EXPECT_EQ(weighted_sum(context, values, Tensor()), 16777223.0);
  EXPECT_EQ(weighted_sum(context, context.empty({0}, DType::f64), Tensor()), 0.0);
}

TEST(CrossEntropy, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor logits = context.zeros({5, 9}, DType::bf16);
    const Tensor maxima = context.zeros({5}, DType::f32);
    const Tensor nll = context.zeros({5}, DType::f32);
    const Tensor sums = context.zeros({5, 2}, DType::f32);
    const Tensor targets = context.zeros({5}, DType::i32);
    logits_max(context, logits, maxima);
    logits_first_max(context, logits, maxima, 0, nll);
    logits_sums(context, logits, maxima, targets, 0, sums);
    cross_entropy(context, sums, nll);
    cross_entropy_backward(context, logits, maxima, sums, targets, 0, Tensor(), 1.0);
    weighted_sum(context, nll, Tensor());
  });
}

}  // namespace
}  // namespace normformer::ops
