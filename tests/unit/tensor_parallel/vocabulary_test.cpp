#include "normformer/tensor_parallel/vocabulary.h"

#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

#include "normformer/ops/random_fill.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {
namespace {

constexpr int64_t kTokens = 7;
constexpr int64_t kWidth = 4;
constexpr int64_t kVocab = 13;

VocabularyRows rows_of(Context& context, const Group& group) {
  const Range mine = even_part(kVocab, group.size(), group.rank());
  VocabularyRows rows{context.empty({mine.size(), kWidth}, DType::f64),
                      context.zeros({mine.size(), kWidth}, DType::f64), mine.begin};
  ops::fill_normal(context, rows.weight, {mine, {0, kWidth}, kVocab, kWidth}, RandomStream{1}, 1.0);
  return rows;
}

Tensor hidden_states(Context& context) {
  Tensor hidden = context.empty({kTokens, kWidth}, DType::f64);
  ops::fill_normal(context, hidden, {{0, kTokens}, {0, kWidth}, kTokens, kWidth}, RandomStream{2}, 1.0);
  return hidden;
}

// -log softmax(hidden E^T)[target], and its derivatives, by hand.
struct Reference {
  std::vector<double> nll;
  std::vector<double> dhidden;
  std::vector<double> likeliest;
};
Reference reference(const std::vector<double>& hidden, const std::vector<double>& weight,
                    const std::vector<int32_t>& targets, const std::vector<uint8_t>& weights) {
  Reference r{std::vector<double>(kTokens), std::vector<double>(kTokens * kWidth, 0.0), {}};
  for (int64_t n = 0; n < kTokens; ++n) {
    std::vector<double> logits(kVocab, 0.0);
    double total = 0.0;
    for (int64_t v = 0; v < kVocab; ++v) {
      for (int64_t d = 0; d < kWidth; ++d) logits[v] += hidden[n * kWidth + d] * weight[v * kWidth + d];
      total += std::exp(logits[v]);
    }
    r.nll[n] = std::log(total) - logits[targets[n]];
    r.likeliest.push_back(
        static_cast<double>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    for (int64_t v = 0; v < kVocab; ++v) {
      const double dlogit = (std::exp(logits[v]) / total - (v == targets[n] ? 1.0 : 0.0)) * weights[n];
      for (int64_t d = 0; d < kWidth; ++d) r.dhidden[n * kWidth + d] += dlogit * weight[v * kWidth + d];
    }
  }
  return r;
}

TEST(VocabularyLoss, AnySplitEqualsTheDefinition) {
  const std::vector<int32_t> targets{0, 12, 5, 6, 4, 9, 0};
  const std::vector<uint8_t> weights{1, 1, 0, 1, 1, 0, 1};
  for (const int ranks : {1, 2, 3, 4}) {
    run_local_world(ranks, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const VocabularyRows rows = rows_of(context, world);
      const VocabularyRows all = rows_of(context, make_self_world());
      const Placed<Replicated> hidden(hidden_states(context));
      LossOptions options;
      options.targets = from_host<int32_t>(context, targets, {kTokens});
      options.weights = from_host<uint8_t>(context, weights, {kTokens});
      const LossResult loss = vocabulary_loss(context, world, rows, hidden, options);
      const Placed<Replicated> dhidden = reduce_partial(context, world, loss.dhidden);
      const Reference expected = reference(to_host(hidden.tensor()), to_host(all.weight), targets, weights);
      for (int64_t n = 0; n < kTokens; ++n) EXPECT_NEAR(to_host(loss.nll)[n], expected.nll[n], 1e-13);
      EXPECT_FALSE(loss.minus_likeliest);
      options.training = false;
      options.likeliest = true;
      const auto likeliest = to_host(vocabulary_loss(context, world, rows, hidden, options).minus_likeliest);
      for (int64_t n = 0; n < kTokens; ++n) EXPECT_EQ(-likeliest[n], expected.likeliest[n]);
      for (int64_t i = 0; i < kTokens * kWidth; ++i) {
        EXPECT_NEAR(to_host(dhidden.tensor())[i], expected.dhidden[i], 1e-13);
      }
    });
  }
}

TEST(VocabularyEmbedding, EveryRowComesFromTheRankThatHoldsIt) {
  const std::vector<int32_t> ids{12, 0, 4, 5, 4};
  run_local_world(3, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const VocabularyRows rows = rows_of(context, world);
    const std::vector<double> all = to_host(rows_of(context, make_self_world()).weight);
    const Tensor tokens = from_host<int32_t>(context, ids, {5});
    const auto embedded =
        to_host(reduce_partial(context, world, embed_tokens(context, rows, tokens)).tensor());
    for (size_t n = 0; n < ids.size(); ++n) {
      for (int64_t d = 0; d < kWidth; ++d) EXPECT_EQ(embedded[n * kWidth + d], all[ids[n] * kWidth + d]);
    }
  });
}

}  // namespace
}  // namespace normformer
