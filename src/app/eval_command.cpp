#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "normformer/data/unicode.h"
#include "normformer/evaluation/perplexity.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run_data.h"

#include "commands.h"
#include "trained_model.h"

namespace normformer {

namespace {

struct EvalOptions {
  TrainedModelOptions model;
  std::filesystem::path text;
  std::filesystem::path nll;
};

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) throw IoError(fmt::format("cannot read {}: {}", path.string(), system_reason()));
  if (text.empty()) throw DataError(fmt::format("{} is empty: there is nothing to evaluate", path.string()));
  return text;
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
  fmt::print("{} on {}: {} tokens, {} of them masked, loss {:.6f}, perplexity {:.4f}\n", loaded.checkpoint,
             options.text.string(), tokens.size(), score.tokens, mean, std::exp(mean));
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
    if (process.world.rank() == 0 && !options.nll.empty()) {
      write_nll(options.nll, *loaded.tokenizer, tokens, score.nll);
    }
  });
  if (process.world.rank() != 0) return 0;
  const double mean = score.nll_sum / static_cast<double>(score.tokens);
  fmt::print("{} on {}: {} tokens, loss {:.6f}, perplexity {:.4f}, {:.4f} bits a byte\n", loaded.checkpoint,
             options.text.string(), score.tokens, mean, std::exp(mean),
             score.nll_sum / std::log(2.0) / static_cast<double>(text.size()));
  return 0;
}

int load_and_eval(const EvalOptions& options, const RankProcess& process) {
  const TrainedModel loaded = load_trained_model(options.model, process);
  const bool is_masked = loaded.config.model.head == OutputHead::masked_language;
  return run_on_device(process, [&] {
    return is_masked ? eval_masked(options, process, loaded) : eval_text(options, process, loaded);
  });
}

}  // namespace

void add_eval_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = app.add_subcommand("eval", "Perplexity of a trained model over a text");
  options->model.add_to(*command);
  command->add_option("text", options->text, "A text file")->required();
  command->add_option("--nll", options->nll,
                      "Also write every token's negative log-likelihood here, as JSON lines");
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv,
                          [&](const RankProcess& process) { return load_and_eval(*options, process); });
    };
  });
}

}  // namespace normformer
