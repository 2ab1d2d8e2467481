#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "normformer/core/mapped_file.h"
#include "normformer/data/unicode.h"
#include "normformer/evaluation/classification.h"
#include "normformer/evaluation/perplexity.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run.h"
#include "normformer/training/run_data.h"

#include "commands.h"
#include "trained_model.h"

namespace normformer {

namespace {

struct EvalOptions {
  TrainedModelOptions model;
  std::filesystem::path text;
  std::filesystem::path nll;
  std::filesystem::path predictions;
  bool unlabelled = false;
};

std::string read_text(const std::filesystem::path& path) {
  std::string text(MappedFile(path).text());
  if (text.empty()) throw DataError(fmt::format("{} is empty: there is nothing to evaluate", path.string()));
  return text;
}

// At once, before anything is written that a full disk may refuse.
void print_scores(const TrainedModel& loaded, const EvalOptions& options, const std::string& scores) {
  fmt::print("{} on {}: {}\n", loaded.checkpoint, options.text.string(), scores);
  std::fflush(stdout);
}

// One object a token: its id, which bytes of the text it is (a token need not be whole characters), and its
// negative log-likelihood.
void write_nll(const std::filesystem::path& path, const BpeTokenizer& tokenizer,
               const std::vector<int32_t>& tokens, const std::vector<double>& nll) {
  std::ofstream file(path, std::ios::trunc);
  size_t begin = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    nlohmann::ordered_json line;
    line["token"] = tokens[i];
    line["begin"] = begin;
    line["end"] = begin += tokenizer.token(tokens[i]).size();
    line["nll"] = nll[i];
    file << line.dump() << '\n';
  }
  if (!file.flush()) throw IoError(fmt::format("cannot write {}: {}", path.string(), system_reason()));
}

// One object a text: its line in the file, the likeliest class, and the probability of each.
void write_predictions(const std::filesystem::path& path, const std::vector<LabelledText>& texts,
                       const std::vector<std::string>& classes, const ClassifiedTexts& made) {
  std::ofstream file(path, std::ios::trunc);
  for (size_t i = 0; i < texts.size(); ++i) {
    nlohmann::ordered_json line;
    line["line"] = texts[i].line;
    line["prediction"] = classes[static_cast<size_t>(made.predictions[i])];
    if (!texts[i].label.empty()) line["label"] = texts[i].label;
    for (size_t c = 0; c < classes.size(); ++c)
      line["probabilities"][classes[c]] = std::exp(made.log_likelihoods[i * classes.size() + c]);
    file << line.dump() << '\n';
  }
  if (!file.flush()) throw IoError(fmt::format("cannot write {}: {}", path.string(), system_reason()));
}

// What reads a classifier's data: as the run had it, but for labels that are not there.
std::vector<LabelledText> read_texts(const EvalOptions& options, const TrainedModel& loaded) {
  const DataConfig& data = loaded.config.data;
  return read_labelled_texts(options.text,
                             {data.text_fields, options.unlabelled ? std::string() : data.label_field});
}

void refuse_options_of_languages(const EvalOptions& options) {
  if (!options.nll.empty()) {
    throw ConfigError(
        "--nll tells the likelihood of every token, but a classifier scores texts: write --predictions");
  }
  if (options.unlabelled && options.predictions.empty())
    throw ConfigError("--unlabelled leaves nothing but predictions: say with --predictions where to");
}

// As the run that trained the model has written them.
std::vector<std::string> classes_of(const TrainedModel& loaded) {
  const std::filesystem::path path = loaded.folder.classes();
  if (!std::filesystem::exists(path)) {
    throw DataError(fmt::format(
        "{} is not there to name the classes: copy it, and the tokenizer, from the folder of the run that "
        "trained the model",
        path.string()));
  }
  std::vector<std::string> classes = read_class_names(path);
  if (static_cast<int64_t>(classes.size()) != loaded.config.model.classes) {
    throw DataError(fmt::format("{} names {} classes, but the model has {}", path.string(), classes.size(),
                                loaded.config.model.classes));
  }
  return classes;
}

std::string describe_scores(const ClassifiedTexts& made, const LabelledDataset& data) {
  const auto classes = static_cast<int64_t>(data.classes().size());
  const ClassScores scores = score_classes(data.targets(), made.predictions, classes);
  const std::string f1 =
      scores.f1 ? fmt::format(", F1 of '{}' {:.4f}", data.classes().back(), *scores.f1) : std::string();
  return fmt::format(", loss {:.6f}, accuracy {:.4f} ({} right), Matthews correlation {:.4f}{}",
                     made.result.mean(), made.result.accuracy(), made.result.correct.value_or(0),
                     scores.matthews, f1);
}

int eval_classifier(const EvalOptions& options, const RankProcess& process, const TrainedModel& loaded) {
  std::vector<std::string> classes;
  std::vector<LabelledText> texts;
  std::optional<LabelledDataset> data;
  run_agreed(process.world, [&] {
    refuse_options_of_languages(options);
    classes = classes_of(loaded);
    texts = read_texts(options, loaded);
    data.emplace(open_labelled(loaded.config, options.text, texts,
                               options.unlabelled ? std::vector<std::string>{} : classes,
                               loaded.require_tokenizer()));
  });
  const ClassifiedTexts made = classify(*loaded.model, loaded.config, *data);
  run_agreed(process.world, [&] {
    if (process.world.rank() != 0) return;
    const std::string how_well = options.unlabelled ? std::string() : describe_scores(made, *data);
    print_scores(loaded, options, fmt::format("{} texts{}", texts.size(), how_well));
    if (!options.predictions.empty()) write_predictions(options.predictions, texts, classes, made);
  });
  return 0;
}

int eval_masked(const EvalOptions& options, const RankProcess& process, const TrainedModel& loaded) {
  std::vector<int32_t> tokens;
  MaskingRule rule;
  run_agreed(process.world, [&] {
    if (!options.nll.empty()) {
      throw ConfigError(
          "--nll tells the likelihood of every token, but a masked language model scores masked ones only: "
          "leave it "
          "out");
    }
    rule = masking_rule(loaded.config, SampleSequence::sequential, loaded.tokenizer);
    tokens = loaded.tokenizer->encode(read_text(options.text));
  });
  const TextScore score = score_masked_tokens(*loaded.model, loaded.config, tokens, rule);
  if (process.world.rank() != 0) return 0;
  const double mean = score.nll_sum / static_cast<double>(std::max<int64_t>(1, score.tokens));
  print_scores(loaded, options,
               fmt::format("{} tokens, {} of them masked, loss {:.6f}, perplexity {:.4f}", tokens.size(),
                           score.tokens, mean, std::exp(mean)));
  return 0;
}

int eval_text(const EvalOptions& options, const RankProcess& process, const TrainedModel& loaded) {
  std::string text;
  std::vector<int32_t> tokens;
  int32_t before = 0;
  run_agreed(process.world, [&] {
    const BpeTokenizer& tokenizer = loaded.require_tokenizer();
    text = read_text(options.text);
    tokens = tokenizer.encode(text);
    before = tokenizer.end_of_text().value_or(tokens.front());
  });
  const TextScore score = score_tokens(*loaded.model, loaded.config, tokens, before, !options.nll.empty());
  run_agreed(process.world, [&] {
    if (process.world.rank() != 0) return;
    const double mean = score.nll_sum / static_cast<double>(score.tokens);
    const double bits = score.nll_sum / std::log(2.0) / static_cast<double>(text.size());
    print_scores(loaded, options,
                 fmt::format("{} tokens, loss {:.6f}, perplexity {:.4f}, {:.4f} bits a byte", score.tokens,
                             mean, std::exp(mean), bits));
    if (!options.nll.empty()) write_nll(options.nll, *loaded.tokenizer, tokens, score.nll);
  });
  return 0;
}

void refuse_options_of_classifiers(const EvalOptions& options) {
  if (options.predictions.empty() && !options.unlabelled) return;
  throw ConfigError(fmt::format("{} is for runs with model.head = \"classification\"",
                                options.unlabelled ? "--unlabelled" : "--predictions"));
}

int load_and_eval(const EvalOptions& options, const RankProcess& process) {
  const TrainedModel loaded = load_trained_model(options.model, process);
  const OutputHead head = loaded.config.model.head;
  return run_on_device(process, [&] {
    if (head == OutputHead::classification) return eval_classifier(options, process, loaded);
    run_agreed(process.world, [&] { refuse_options_of_classifiers(options); });
    return head == OutputHead::masked_language ? eval_masked(options, process, loaded)
                                               : eval_text(options, process, loaded);
  });
}

}  // namespace

void add_eval_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = app.add_subcommand(
      "eval", "Perplexity of a trained model over a text, or accuracy of a classifier over labelled texts");
  options->model.add_to(*command);
  command
      ->add_option("text", options->text,
                   "A text file; for a classifier a .tsv or .jsonl file as the run was trained on")
      ->required();
  command->add_option("--nll", options->nll,
                      "Also write every token's negative log-likelihood here, as JSON lines");
  command->add_option("--predictions", options->predictions,
                      "Of a classifier: also write each text's class and probabilities here, as JSON lines");
  command->add_flag("--unlabelled", options->unlabelled,
                    "Of a classifier: the texts have no labels, and predictions are all that is wanted");
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv,
                          [&](const RankProcess& process) { return load_and_eval(*options, process); });
    };
  });
}

}  // namespace normformer
