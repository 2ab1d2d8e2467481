#include "normformer/evaluation/classification.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace normformer {

namespace {

// Logits become logarithms of probabilities; the number of the likeliest class.
int32_t normalise(std::span<double> logits) {
  const auto likeliest = std::max_element(logits.begin(), logits.end());
  const auto number = static_cast<int32_t>(likeliest - logits.begin());
  const double largest = *likeliest;
  double sum = 0.0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  for (double& logit : logits) logit -= largest + std::log(sum);
  return number;
}

}  // namespace

ClassScores score_classes(std::span<const int32_t> targets, std::span<const int32_t> predictions,
                          int64_t classes) {
  NF_CHECK(targets.size() == predictions.size(), "{} texts, {} predictions", targets.size(),
           predictions.size());
  std::vector<double> of_target(static_cast<size_t>(classes));
  std::vector<double> of_prediction(static_cast<size_t>(classes));
  std::vector<double> right(static_cast<size_t>(classes));
  for (size_t i = 0; i < targets.size(); ++i) {
    of_target[static_cast<size_t>(targets[i])] += 1.0;
    of_prediction[static_cast<size_t>(predictions[i])] += 1.0;
    if (targets[i] == predictions[i]) right[static_cast<size_t>(targets[i])] += 1.0;
  }
  const auto product = [&](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  // Covariances of one-hot rows, times the number of texts squared.
  const auto texts = static_cast<double>(targets.size());
  const double both = std::accumulate(right.begin(), right.end(), 0.0) * texts;
  const double spread = (texts * texts - product(of_target, of_target)) *
                        (texts * texts - product(of_prediction, of_prediction));
  ClassScores scores;
  if (spread > 0.0) scores.matthews = (both - product(of_target, of_prediction)) / std::sqrt(spread);
  if (classes == 2) {
    const double named = of_target[1] + of_prediction[1];
    scores.f1 = named > 0.0 ? 2.0 * right[1] / named : 0.0;
  }
  return scores;
}

ClassifiedTexts classify(ModelInstance& model, const RunConfig& config, const LabelledDataset& texts) {
  const Group& world = model.mesh().world();
  const int64_t classes = config.model.classes;
  std::vector<double> logits(static_cast<size_t>(texts.num_samples() * classes));
  const LogitsVisitor keep = [&](int64_t first, const std::vector<double>& values) {
    for (size_t i = 0; i < values.size(); ++i) logits[static_cast<size_t>(first * classes) + i] += values[i];
  };
  const auto source = [&](int64_t first, int64_t count) { return texts.read_batch(first, count); };
  ClassifiedTexts made{evaluate(model, config, source, texts.num_samples(), {}, keep), {}, {}};
  // Each text was read by one rank; the others hold zeros.
  Context& context = model.context();
  const Tensor all = from_host<double>(context, logits, {static_cast<int64_t>(logits.size())});
  world.all_reduce(context, all, ReduceOp::sum);
  if (world.rank() != 0) return made;
  made.log_likelihoods = to_host(all);
  for (int64_t i = 0; i < texts.num_samples(); ++i) {
    made.predictions.push_back(
        normalise(std::span(made.log_likelihoods)
                      .subspan(static_cast<size_t>(i * classes), static_cast<size_t>(classes))));
  }
  return made;
}

}  // namespace normformer
