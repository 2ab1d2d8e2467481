#include "task_results.h"

#include <algorithm>
#include <fstream>

#include <nlohmann/json.hpp>

#include "normformer/core/error.h"

namespace normformer {

namespace {

using Json = nlohmann::ordered_json;

// The harness' name of results that nothing was filtered of.
std::string key(const std::string& metric) { return metric + ",none"; }

// Digits that mean something: perplexities of models that know nothing are huge.
std::string shown(double number) {
  return number < 1e6 ? fmt::format("{:.4f}", number) : fmt::format("{:.6g}", number);
}

Json number_or_none(const std::optional<double>& number) { return number ? Json(*number) : Json("N/A"); }

Json numbers_json(const TaskResult& result) {
  Json numbers;
  numbers["alias"] = result.task.rule.name;
  for (const TaskMetric& metric : result.metrics) {
    numbers[key(metric.name)] = metric.value;
    numbers[key(metric.name + "_stderr")] = number_or_none(metric.standard_error);
  }
  return numbers;
}

Json results_json(const EvaluatedModel& model, std::span<const TaskResult> results) {
  Json all;
  for (const TaskResult& result : results) {
    const std::string name(result.task.rule.name);
    all["results"][name] = numbers_json(result);
    all["versions"][name] = result.task.rule.version;
    all["n-shot"][name] = 0;
    all["n-samples"][name]["effective"] = result.task.items.size();
    for (const TaskMetric& metric : result.metrics) {
      all["higher_is_better"][name][metric.name] = metric.higher_is_better;
    }
  }
  all["config"] = {{"model", "normformer"},
                   {"model_args", model.run},
                   {"checkpoint", model.checkpoint},
                   {"limit", model.limit ? Json(*model.limit) : Json()}};
  return all;
}

Json sample_json(const TaskRule& rule, const TaskItem& item, std::span<const ContinuationScore> scores,
                 std::size_t number) {
  Json line;
  line["doc_id"] = number;
  line["place"] = item.place;
  if (rule.kind == TaskKind::choice) line["target"] = item.gold;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const Json answer = {scores[i].log_likelihood, scores[i].is_greedy};
    line["arguments"].push_back({item.requests[i].context, item.requests[i].continuation});
    line["resps"].push_back(Json::array({answer}));
    line["filtered_resps"].push_back(answer);
    line["tokens"].push_back(scores[i].tokens);
  }
  const ItemResult result = judge_item(rule, item, scores);
  line["acc"] = result.is_right ? 1.0 : 0.0;
  if (result.is_right_normalised) line["acc_norm"] = *result.is_right_normalised ? 1.0 : 0.0;
  return line;
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::trunc);
  file << text;
  if (!file.flush()) throw IoError(fmt::format("cannot write {}: {}", path.string(), system_reason()));
}

// In ASCII alone: to some readers a line ends at U+2028 too.
void write_samples(const std::filesystem::path& folder, const TaskResult& result) {
  std::string lines;
  std::span<const ContinuationScore> scores = result.scores;
  for (std::size_t i = 0; i < result.task.items.size(); ++i) {
    const TaskItem& item = result.task.items[i];
    const Json line = sample_json(result.task.rule, item, scores.subspan(0, item.requests.size()), i);
    lines += line.dump(-1, ' ', true) + "\n";
    scores = scores.subspan(item.requests.size());
  }
  write_text(folder / fmt::format("samples_{}.jsonl", result.task.rule.name), lines);
}

}  // namespace

std::string results_table(std::span<const TaskResult> results) {
  std::string table = fmt::format(
      "|{:^17}|Version|Filter|n-shot|{:^10}|{:^10}|   |Stderr|\n|{:-<17}|------:|------|-----:|{:-<10}|"
      "{:->9}:|---|-----:|\n",
      "Tasks", "Metric", "Value", "", "", "");
  for (const TaskResult& result : results) {
    std::string_view name = result.task.rule.name;
    for (const TaskMetric& metric : result.metrics) {
      const std::string error = metric.standard_error ? shown(*metric.standard_error) : "N/A";
      table += fmt::format("|{:<17}|{:>7}|none  |     0|{:<10}|{:>10}|±  |{:>6}|\n", name,
                           name.empty() ? "" : fmt::format("{:g}", result.task.rule.version), metric.name,
                           shown(metric.value), error);
      name = "";
    }
  }
  return table;
}

void write_results(const std::filesystem::path& folder, const EvaluatedModel& model,
                   std::span<const TaskResult> results, bool samples) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw IoError(fmt::format("cannot make the folder {}: {}", folder.string(), error.message()));
  for (std::size_t i = 0; samples && i < results.size(); ++i) write_samples(folder, results[i]);
  write_text(folder / "results.json", results_json(model, results).dump(2) + "\n");
}

}  // namespace normformer
