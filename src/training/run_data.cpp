#include "normformer/training/run_data.h"

#include "normformer/core/error.h"
#include "normformer/data/manifest.h"

namespace normformer {

std::optional<BpeTokenizer> find_tokenizer(const RunConfig& config) {
  if (!config.data.tokenizer.empty()) return BpeTokenizer::load(config.data.tokenizer);
  if (config.data.train.empty()) {
    throw ConfigError("data.train names no corpus: make one with `normformer prepare`");
  }
  const std::string& prefix = config.data.train.front().prefix;
  if (!find_corpus_manifest(prefix)) return std::nullopt;
  return load_corpus_tokenizer(prefix);
}

RunConfig with_vocabulary(RunConfig config) {
  const auto tokenizer = find_tokenizer(config);
  if (config.model.vocab == 0) {
    if (!tokenizer) {
      throw ConfigError(fmt::format("{} has no manifest that tells its vocabulary: set model.vocab",
                                    config.data.train.front().prefix));
    }
    config.model.vocab = tokenizer->vocab_size();
  }
  if (tokenizer && config.model.vocab < tokenizer->vocab_size()) {
    throw ConfigError(
        fmt::format("model.vocab is {}, but the corpus' tokenizer has {} tokens: set it to 0 or to that",
                    config.model.vocab, tokenizer->vocab_size()));
  }
  return config;
}

TokenDataset open_dataset(const RunConfig& config, const std::vector<DataSource>& sources,
                          SampleSequence sequence, const std::optional<BpeTokenizer>& tokenizer) {
  TokenDatasetOptions options;
  for (const DataSource& source : sources) options.sources.push_back({source.prefix, source.weight});
  options.seq_len = config.model.length;
  options.vocab_size = config.model.vocab;
  options.sequence = sequence;
  options.seed = config.train.seed;
  if (config.data.document_mask) {
    options.document_mask_token = tokenizer ? tokenizer->end_of_text() : std::nullopt;
    if (!options.document_mask_token) {
      throw ConfigError(
          "data.document_mask needs a tokenizer with <|endoftext|>: name its folder in data.tokenizer");
    }
  }
  return TokenDataset(options);
}

}  // namespace normformer
