#include <cstdio>
#include <map>
#include <memory>

#include "normformer/data/prepare.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

void print_summary(const CorpusManifest& manifest) {
  for (const CorpusSplit& split : manifest.splits) {
    fmt::print("{}: {} documents, {} tokens from {} bytes in {}\n", split.name, split.documents, split.tokens,
               split.bytes, (manifest.folder / split.dataset).string());
  }
  fmt::print("vocabulary: {} tokens in {}\n", manifest.vocab_size,
             (manifest.folder / manifest.tokenizer).string());
}

}  // namespace

void add_prepare_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<PrepareOptions>();
  CLI::App* command = app.add_subcommand("prepare", "Turn text into tokens to train on");
  command->add_option("inputs", options->inputs, "Text files, folders (every file below), or .jsonl files")
      ->required();
  command
      ->add_option("-o,--output", options->output,
                   "OUTPUT.bin and .idx (with validation OUTPUT_train and OUTPUT_valid), OUTPUT.json, "
                   "OUTPUT_tokenizer/")
      ->required();
  auto* tokenizer =
      command->add_option("--tokenizer", options->tokenizer,
                          "Folder with vocab.json + merges.txt, encoder.json + vocab.bpe or tokenizer.json");
  command
      ->add_option("--train-vocab", options->train_vocab_size,
                   "Train a byte-level BPE vocabulary of this size")
      ->excludes(tokenizer);
  command->add_option("--json-key", options->json_key, "The field of JSON objects that holds the text")
      ->capture_default_str();
  command->add_option("--documents", options->documents, "What is one document of a text file")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, DocumentRule>{{"file", DocumentRule::file},
                                              {"blank-lines", DocumentRule::blank_lines},
                                              {"separator", DocumentRule::separator}}));
  command->add_option("--separator", options->separator, "The line that separates documents")
      ->each([options](const std::string&) { options->documents = DocumentRule::separator; });
  command->add_flag("!--no-end-of-document", options->append_end_of_document,
                    "Do not put <|endoftext|> after documents");
  command->add_option("--invalid-utf8", options->invalid_utf8, "What to do with bytes that are not UTF-8")
      ->transform(
          CLI::CheckedTransformer(std::map<std::string, InvalidUtf8>{{"refuse", InvalidUtf8::refuse},
                                                                     {"replace", InvalidUtf8::replace},
                                                                     {"bytes", InvalidUtf8::bytes}}));
  command->add_option("--valid", options->valid_inputs, "Texts to validate on");
  command->add_option("--valid-fraction", options->valid_fraction,
                      "Share of the documents kept for validation");
  command->add_option("--seed", options->seed, "Draws the documents kept for validation")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: as many as the machine has")->capture_default_str();
  command->callback([options, &chosen] {
    chosen = [options](int*, char***) {
      require_single_process("prepare");
      print_summary(prepare_corpus(*options));
      return 0;
    };
  });
}

}  // namespace normformer
