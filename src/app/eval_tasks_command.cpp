#include <cstdio>
#include <memory>
#include <set>
#include <string>

#include "normformer/evaluation/task_scores.h"
#include "normformer/training/agreement.h"

#include "commands.h"
#include "task_results.h"
#include "trained_model.h"

namespace normformer {

namespace {

struct EvalTasksOptions {
  TrainedModelOptions model;
  std::vector<std::string> tasks;
  std::optional<int64_t> limit;
  std::filesystem::path output;
  bool log_samples = false;
};

// What the files say, which costs far less than a model.
std::vector<TaskResult> read_tasks(const EvalTasksOptions& options) {
  if (options.log_samples && options.output.empty()) {
    throw ConfigError("--log-samples writes files: name their folder with --output");
  }
  if (!options.output.empty() && std::filesystem::exists(options.output / "results.json")) {
    throw ConfigError(fmt::format("--output {}: a results.json is there already; name another folder",
                                  options.output.string()));
  }
  std::vector<TaskResult> results;
  std::set<std::string> names;
  for (const std::string& text : options.tasks) {
    const TaskSource source = parse_task_source(text);
    if (!names.insert(source.name).second)
      throw ConfigError(fmt::format("--task {} stands twice", source.name));
    results.push_back({read_task(source, options.limit), {}, {}});
  }
  return results;
}

std::vector<EncodedRequest> encode_requests(const Task& task, const TrainedModel& loaded) {
  const BpeTokenizer& tokenizer = loaded.require_tokenizer();
  const auto end_of_text = tokenizer.end_of_text();
  if (!end_of_text) {
    throw DataError("the run's vocabulary has no <|endoftext|>, which stands for an empty context");
  }
  BpeEncoder encoder(tokenizer);
  std::vector<EncodedRequest> encoded;
  for (const TaskItem& item : task.items) {
    for (const ContinuationRequest& request : item.requests) {
      encoded.push_back(
          encode_request(encoder, request, *end_of_text, loaded.config.model.length, item.place));
    }
  }
  return encoded;
}

int eval_tasks(const EvalTasksOptions& options, const RankProcess& process, const TrainedModel& loaded,
               std::vector<TaskResult> results) {
  std::vector<std::vector<EncodedRequest>> requests;
  run_agreed(process.world, [&] {
    if (predicts_some_tokens(loaded.config.model)) {
      throw ConfigError(
          "this model does not continue texts: eval-tasks needs a run with model.head = \"language\"");
    }
    for (const TaskResult& result : results) requests.push_back(encode_requests(result.task, loaded));
  });
  for (std::size_t i = 0; i < results.size(); ++i) {
    results[i].scores = score_requests(*loaded.model, loaded.config, requests[i]);
  }
  run_agreed(process.world, [&] {
    if (process.world.rank() != 0) return;
    for (TaskResult& result : results) {
      result.metrics = task_metrics(*loaded.context, result.task, result.scores);
    }
    // First what no full disk can lose.
    fmt::print("{} of {}\n{}", loaded.checkpoint, options.model.run.string(), results_table(results));
    std::fflush(stdout);
    const EvaluatedModel model{options.model.run.string(), loaded.checkpoint, options.limit};
    if (!options.output.empty()) write_results(options.output, model, results, options.log_samples);
  });
  return 0;
}

int load_and_eval_tasks(EvalTasksOptions options, const RankProcess& process) {
  std::vector<TaskResult> results;
  run_agreed(process.world, [&] { results = read_tasks(options); });
  // Micro-batches of many lengths make products of many shapes: to time a GPU's algorithms for each would
  // take far longer.
  options.model.overrides.insert(options.model.overrides.begin(), "device.tune_products=false");
  const TrainedModel loaded = load_trained_model(options.model, process);
  return run_on_device(process, [&] { return eval_tasks(options, process, loaded, std::move(results)); });
}

}  // namespace

void add_eval_tasks_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<EvalTasksOptions>();
  CLI::App* command =
      app.add_subcommand("eval-tasks", "Zero-shot tasks, as lm-evaluation-harness scores them");
  options->model.add_to(*command);
  std::string names;
  for (const TaskRule& rule : known_tasks())
    names += fmt::format("{}{}", names.empty() ? "" : ", ", rule.name);
  command
      ->add_option("--task", options->tasks,
                   fmt::format("NAME=FILE, or piqa=FILE,LABELS; once for each task. Names: {}", names))
      ->required()
      ->take_all()
      ->allow_extra_args(false);
  command->add_option("--limit", options->limit, "Only the first items of each task")
      ->check(CLI::PositiveNumber);
  command->add_option("--output", options->output, "A folder for results.json");
  command->add_flag("--log-samples", options->log_samples,
                    "Also write every request with its score there, as samples_TASK.jsonl");
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv,
                          [&](const RankProcess& process) { return load_and_eval_tasks(*options, process); });
    };
  });
}

}  // namespace normformer
