#include <cstdio>
#include <memory>
#include <string>

#include "normformer/evaluation/generation.h"
#include "normformer/training/agreement.h"

#include "commands.h"
#include "trained_model.h"

namespace normformer {

namespace {

struct GenerateOptions {
  TrainedModelOptions model;
  std::string prompt;
  GenerationOptions generation;
};

int generate_text(const GenerateOptions& options, const RankProcess& process, const TrainedModel& loaded) {
  std::vector<int32_t> prompt;
  GenerationOptions generation = options.generation;
  run_agreed(process.world, [&] {
    if (predicts_some_tokens(loaded.config.model)) {
      throw ConfigError(
          "this model does not continue texts: generate needs a run with model.head = \"language\"");
    }
    const BpeTokenizer& tokenizer = loaded.require_tokenizer();
    prompt = tokenizer.encode(options.prompt);
    generation.stop = tokenizer.end_of_text();
    // Without a text the model continues the beginning of a document.
    if (prompt.empty() && generation.stop) prompt.push_back(*generation.stop);
    if (prompt.empty())
      throw ConfigError("--prompt is empty and the vocabulary has no <|endoftext|> to begin with");
  });
  const bool prints = process.world.rank() == 0;
  if (prints) std::fputs(options.prompt.c_str(), stdout);
  generate(*loaded.model, prompt, generation, [&](int32_t token) {
    if (!prints) return;
    const std::string bytes =
        token < loaded.tokenizer->vocab_size() ? loaded.tokenizer->token(token) : std::string();
    std::fwrite(bytes.data(), 1, bytes.size(), stdout);
    std::fflush(stdout);
  });
  if (prints) std::puts("");
  return 0;
}

int load_and_generate(GenerateOptions options, const RankProcess& process) {
  // Every token makes products of new shapes: to time a GPU's algorithms for each would take far longer.
  options.model.overrides.insert(options.model.overrides.begin(), "device.tune_products=false");
  options.model.whole_sequences = true;
  const TrainedModel loaded = load_trained_model(options.model, process);
  return run_on_device(process, [&] { return generate_text(options, process, loaded); });
}

}  // namespace

void add_generate_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text with a trained model");
  options->model.add_to(*command);
  command->add_option("--prompt", options->prompt, "The text to continue");
  command->add_option("--max-tokens", options->generation.max_tokens, "New tokens at most")
      ->capture_default_str();
  command->add_option("--temperature", options->generation.temperature, "0 takes the likeliest token")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--top-k", options->generation.top_k, "Draw from the k likeliest tokens; 0: from all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--top-p", options->generation.top_p,
                   "Draw from the likeliest tokens that reach this probability")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  command->add_option("--seed", options->generation.seed, "Of the draws")->capture_default_str();
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv,
                          [&](const RankProcess& process) { return load_and_generate(*options, process); });
    };
  });
}

}  // namespace normformer
