#include "normformer/training/run_data.h"

#include <algorithm>

#include "normformer/core/error.h"
#include "normformer/data/indexed_dataset.h"
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

namespace {

int32_t end_of_text_of(const std::optional<BpeTokenizer>& tokenizer, const char* what) {
  const auto token = tokenizer ? tokenizer->end_of_text() : std::nullopt;
  if (!token) {
    throw ConfigError(
        fmt::format("{} needs a tokenizer with <|endoftext|>: name its folder in data.tokenizer", what));
  }
  return *token;
}

// The one that stands for predicted tokens, behind all that texts have unless the user names one.
int64_t mask_token_of(const RunConfig& config, const std::optional<BpeTokenizer>& tokenizer) {
  const int32_t start = end_of_text_of(tokenizer, "model.head = \"masked_language\"");
  if (config.data.mask_token == 0) return tokenizer->vocab_size();
  if (config.data.mask_token == start) {
    throw ConfigError(fmt::format(
        "data.mask_token = {} is <|endoftext|>, which begins every sample: name another id, or write 0",
        config.data.mask_token));
  }
  return config.data.mask_token;
}

// The ids that a model of this tokenizer needs: a bidirectional one, a mask beside its tokens.
int64_t least_vocabulary(const RunConfig& config, const BpeTokenizer& tokenizer) {
  if (config.model.attention == AttentionMask::causal) return tokenizer.vocab_size();
  const int64_t mask = config.data.mask_token == 0 ? tokenizer.vocab_size() : config.data.mask_token;
  return std::max(tokenizer.vocab_size(), mask + 1);
}

}  // namespace

RunConfig with_vocabulary(RunConfig config) {
  const auto tokenizer = find_tokenizer(config);
  if (config.model.head == OutputHead::masked_language)
    config.data.mask_token = mask_token_of(config, tokenizer);
  if (config.model.vocab == 0) {
    if (!tokenizer) {
      const std::string& prefix = config.data.train.front().prefix;
      const IndexedDataset existing(prefix);  // else its own sentence
      throw ConfigError(fmt::format("{} has no manifest that tells its vocabulary: set model.vocab", prefix));
    }
    config.model.vocab = least_vocabulary(config, *tokenizer);
  }
  if (tokenizer && config.model.vocab < tokenizer->vocab_size()) {
    throw ConfigError(
        fmt::format("model.vocab is {}, but the corpus' tokenizer has {} tokens: set it to 0 or to that",
                    config.model.vocab, tokenizer->vocab_size()));
  }
  if (tokenizer && config.model.vocab < least_vocabulary(config, *tokenizer)) {
    throw ConfigError(
        fmt::format("model.vocab is {}, but data.mask_token is {}: set model.vocab to 0 or above that",
                    config.model.vocab, least_vocabulary(config, *tokenizer) - 1));
  }
  return config;
}

MaskingRule masking_rule(const RunConfig& config, SampleSequence sequence,
                         const std::optional<BpeTokenizer>& tokenizer) {
  const DataConfig& data = config.data;
  const bool trains = sequence == SampleSequence::shuffled;
  return {.probability = data.mask_probability,
          .kept = data.mask_kept,
          .random = data.mask_random,
          .mask_token = static_cast<int32_t>(data.mask_token),
          .start_token = end_of_text_of(tokenizer, "model.head = \"masked_language\""),
          .ordinary_tokens = tokenizer->vocab_size(),
          .stream = RandomStream{config.train.seed}.with(trains ? "masking" : "validation masking")};
}

TokenDataset open_dataset(const RunConfig& config, const std::vector<DataSource>& sources,
                          SampleSequence sequence, const std::optional<BpeTokenizer>& tokenizer) {
  TokenDatasetOptions options;
  for (const DataSource& source : sources) options.sources.push_back({source.prefix, source.weight});
  options.seq_len = config.model.length;
  options.vocab_size = config.model.vocab;
  options.sequence = sequence;
  options.seed = config.train.seed;
  if (config.data.document_mask)
    options.document_mask_token = end_of_text_of(tokenizer, "data.document_mask");
  if (config.model.head == OutputHead::masked_language)
    options.masking = masking_rule(config, sequence, tokenizer);
  return TokenDataset(options);
}

}  // namespace normformer
