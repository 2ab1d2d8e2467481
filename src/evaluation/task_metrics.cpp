#include <algorithm>
#include <cmath>
#include <numeric>

#include "normformer/core/checked.h"
#include "normformer/evaluation/task_scores.h"

#include "python_random.h"

namespace normformer {

namespace {

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double sample_deviation(std::span<const double> values) {
  const double middle = mean(values);
  double squares = 0.0;
  for (const double value : values) squares += (value - middle) * (value - middle);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

double perplexity(std::span<const double> log_likelihoods) { return std::exp(-mean(log_likelihoods)); }

// As the harness' bootstrap_stderr: a hundred times a thousand samples of as many items, each hundredth with
// the random numbers of its own seed.
double bootstrapped_deviation_of_perplexity(Context& context, std::span<const double> log_likelihoods) {
  constexpr int64_t kSeeds = 100;
  constexpr int64_t kSamples = 1000;
  std::vector<double> found(kSeeds * kSamples);
  context.threads().parallel_for(kSeeds, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sample(log_likelihoods.size());
    const auto items = static_cast<double>(log_likelihoods.size());
    for (int64_t seed = begin; seed < end; ++seed) {
      PythonRandom random(static_cast<uint32_t>(seed));
      for (int64_t i = 0; i < kSamples; ++i) {
        for (double& value : sample) value = log_likelihoods[static_cast<std::size_t>(random.next() * items)];
        found[static_cast<std::size_t>(seed * kSamples + i)] = perplexity(sample);
      }
    }
  });
  return sample_deviation(found);
}

TaskMetric accuracy(const char* name, const std::vector<double>& right) {
  TaskMetric metric{.name = name, .value = mean(right), .standard_error = {}};
  if (right.size() > 1) {
    metric.standard_error = sample_deviation(right) / std::sqrt(static_cast<double>(right.size()));
  }
  return metric;
}

std::size_t index_of_largest(const std::vector<double>& values) {
  return static_cast<std::size_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

}  // namespace

ItemResult judge_item(const TaskRule& rule, const TaskItem& item, std::span<const ContinuationScore> scores) {
  if (rule.kind == TaskKind::last_word) return {scores.front().is_greedy, {}};
  std::vector<double> likelihoods;
  for (const ContinuationScore& score : scores) likelihoods.push_back(score.log_likelihood);
  const auto gold = static_cast<std::size_t>(item.gold);
  ItemResult result{index_of_largest(likelihoods) == gold, {}};
  if (!rule.is_normalised) return result;
  for (std::size_t i = 0; i < likelihoods.size(); ++i) likelihoods[i] /= static_cast<double>(item.lengths[i]);
  result.is_right_normalised = index_of_largest(likelihoods) == gold;
  return result;
}

std::vector<TaskMetric> task_metrics(Context& context, const Task& task,
                                     std::span<const ContinuationScore> scores) {
  std::vector<double> right;
  std::vector<double> right_normalised;
  std::vector<double> likelihoods;
  for (const TaskItem& item : task.items) {
    const auto mine = scores.subspan(0, item.requests.size());
    scores = scores.subspan(item.requests.size());
    const ItemResult result = judge_item(task.rule, item, mine);
    right.push_back(result.is_right ? 1.0 : 0.0);
    right_normalised.push_back(result.is_right_normalised.value_or(false) ? 1.0 : 0.0);
    likelihoods.push_back(mine.front().log_likelihood);
  }
  std::vector<TaskMetric> metrics;
  if (task.rule.kind == TaskKind::last_word) {
    metrics.push_back({"perplexity", perplexity(likelihoods), {}, false});
    if (likelihoods.size() > 1) {
      metrics.back().standard_error = bootstrapped_deviation_of_perplexity(context, likelihoods);
    }
  }
  metrics.push_back(accuracy("acc", right));
  if (task.rule.is_normalised) metrics.push_back(accuracy("acc_norm", right_normalised));
  return metrics;
}

}  // namespace normformer
