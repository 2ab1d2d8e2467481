#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "normformer/evaluation/generation.h"
#include "normformer/training/agreement.h"

#include "commands.h"
#include "prompts.h"
#include "trained_model.h"

namespace normformer {

namespace {

struct GenerateOptions {
  TrainedModelOptions model;
  std::vector<std::string> prompts;
  std::filesystem::path prompt_file;
  std::filesystem::path output;
  GenerationOptions generation;
};

// What is continued, as text and as tokens.
struct Prompts {
  std::vector<std::string> texts;
  std::vector<std::vector<int32_t>> tokens;
};

// A model may have more tokens than its tokenizer.
std::string bytes_of(const BpeTokenizer& tokenizer, int32_t token) {
  return token < tokenizer.vocab_size() ? tokenizer.token(token) : std::string();
}

Prompts collect_prompts(const GenerateOptions& options, const BpeTokenizer& tokenizer) {
  Prompts prompts{options.prompts, {}};
  if (!options.prompt_file.empty()) {
    for (std::string& text : read_prompts(options.prompt_file)) prompts.texts.push_back(std::move(text));
  }
  if (prompts.texts.empty()) prompts.texts.emplace_back();
  for (const std::string& text : prompts.texts) {
    std::vector<int32_t> tokens = tokenizer.encode(text);
    // Without a text the model continues the beginning of a document.
    if (tokens.empty() && tokenizer.end_of_text()) tokens.push_back(*tokenizer.end_of_text());
    if (tokens.empty())
      throw ConfigError("a prompt is empty and the vocabulary has no <|endoftext|> to begin with");
    prompts.tokens.push_back(std::move(tokens));
  }
  return prompts;
}

// Writes texts as lines of JSON, to a file that must not exist or to stdout.
class TextLines {
 public:
  TextLines(const std::filesystem::path& path, bool logits) : path_(path), logits_(logits) {
    if (path.empty()) return;
    if (std::filesystem::exists(path)) {
      throw ConfigError(
          fmt::format("--output {} exists already: name a new file, or remove it", path.string()));
    }
    file_.open(path);
    require_written();
  }

  void write(const BpeTokenizer& tokenizer, const std::string& prompt, const GeneratedText& made) {
    std::string text;
    for (const int32_t token : made.tokens) text += bytes_of(tokenizer, token);
    nlohmann::ordered_json line;
    line["prompt"] = prompt;
    line["sample"] = made.sample;
    line["text"] = text;
    line["tokens"] = made.tokens;
    if (logits_) line["logits"] = made.logits;
    // Tokens need not be whole characters.
    stream() << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
    require_written();
  }

 private:
  std::ostream& stream() { return path_.empty() ? std::cout : file_; }

  void require_written() {
    if (stream()) return;
    throw IoError(
        fmt::format("cannot write {}: {}", path_.empty() ? "to stdout" : path_.string(), system_reason()));
  }

  std::filesystem::path path_;
  bool logits_;
  std::ofstream file_;
};

void print_one_text(const TrainedModel& loaded, const Prompts& prompts, const GenerationOptions& generation,
                    bool prints) {
  const auto print = [&](const std::string& bytes) {
    if (!prints) return;
    std::fwrite(bytes.data(), 1, bytes.size(), stdout);
    std::fflush(stdout);
  };
  print(prompts.texts.front());
  generate(
      *loaded.model, prompts.tokens, generation,
      {.grown = [&](const GeneratedText& text) { print(bytes_of(*loaded.tokenizer, text.tokens.back())); },
       .finished = {}});
  print("\n");
}

void write_lines(const TrainedModel& loaded, const Prompts& prompts, const GenerationOptions& generation,
                 TextLines* lines) {
  const auto write = [&](const GeneratedText& text) {
    if (lines == nullptr) return;
    lines->write(*loaded.tokenizer, prompts.texts[static_cast<size_t>(text.prompt)], text);
  };
  generate(*loaded.model, prompts.tokens, generation, {.grown = {}, .finished = write});
}

int generate_texts(const GenerateOptions& options, const RankProcess& process, const TrainedModel& loaded) {
  Prompts prompts;
  GenerationOptions generation = options.generation;
  bool is_one = false;
  std::unique_ptr<TextLines> lines;
  const bool prints = process.world.rank() == 0;
  run_agreed(process.world, [&] {
    if (predicts_some_tokens(loaded.config.model)) {
      throw ConfigError(
          "this model does not continue texts: generate needs a run with model.head = \"language\"");
    }
    const BpeTokenizer& tokenizer = loaded.require_tokenizer();
    prompts = collect_prompts(options, tokenizer);
    generation.stop = tokenizer.end_of_text();
    is_one = prompts.texts.size() == 1 && generation.samples == 1 && options.output.empty() &&
             !generation.keep_logits;
    if (prints && !is_one) lines = std::make_unique<TextLines>(options.output, generation.keep_logits);
  });
  if (is_one)
    print_one_text(loaded, prompts, generation, prints);
  else
    write_lines(loaded, prompts, generation, lines.get());
  return 0;
}

int load_and_generate(GenerateOptions options, const RankProcess& process) {
  // Every pass makes products of new shapes: to time a GPU's algorithms for each would take far longer.
  options.model.overrides.insert(options.model.overrides.begin(), "device.tune_products=false");
  options.model.whole_sequences = true;
  const TrainedModel loaded = load_trained_model(options.model, process);
  return run_on_device(process, [&] { return generate_texts(options, process, loaded); });
}

// CLI::Range and its like let NaN pass.
CLI::Validator at_least_zero() {
  return {[](const std::string& text) {
            double value = 0.0;
            const bool fits = CLI::detail::lexical_cast(text, value) && value >= 0.0;
            return fits ? std::string() : fmt::format("'{}' is not a number of at least 0", text);
          },
          "NUMBER >= 0"};
}

void add_texts(CLI::App& command, GenerateOptions& options) {
  command
      .add_option("--prompt", options.prompts,
                  "A text to continue; may be repeated. None: a document's begin")
      ->take_all()
      ->allow_extra_args(false);
  command.add_option("--prompts", options.prompt_file,
                     "A file of texts, one a line; in .jsonl the \"prompt\" of each line's object");
  command.add_option("--samples", options.generation.samples, "Continuations of each text")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command.add_option("--batch", options.generation.batch, "Texts that each replica continues at a time")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command.add_option("--output", options.output,
                     "A new file for lines of JSON; several texts without it: to stdout");
  command.add_flag("--logits", options.generation.keep_logits,
                   "In the lines of JSON, what each token was drawn from: the whole vocabulary's logits");
}

void add_sampling(CLI::App& command, GenerationOptions& generation) {
  command.add_option("--max-tokens", generation.max_tokens, "New tokens of each text at most")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_option("--temperature", generation.temperature, "0 takes the likeliest token")
      ->capture_default_str()
      ->check(at_least_zero());
  command.add_option("--top-k", generation.top_k, "Draw from the k likeliest tokens; 0: from all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      .add_option("--top-p", generation.top_p, "Draw from the likeliest tokens that reach this probability")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0))
      ->check(at_least_zero());
  command.add_option("--seed", generation.seed, "Of the draws")->capture_default_str();
}

}  // namespace

void add_generate_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* command = app.add_subcommand("generate", "Continue texts with a trained model");
  options->model.add_to(*command);
  add_texts(*command, *options);
  add_sampling(*command, options->generation);
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv,
                          [&](const RankProcess& process) { return load_and_generate(*options, process); });
    };
  });
}

}  // namespace normformer
