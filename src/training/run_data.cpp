#include "normformer/training/run_data.h"

#include <algorithm>

#include "normformer/core/error.h"
#include "normformer/data/indexed_dataset.h"
#include "normformer/data/manifest.h"
#include "normformer/training/run.h"
#include "normformer/training/run_checkpoint.h"

namespace normformer {

namespace {

bool classifies(const RunConfig& config) { return config.model.head == OutputHead::classification; }

// That of the run whose weights a classifier starts from, of which its own folder has a copy.
BpeTokenizer tokenizer_of_origin(const RunConfig& config) {
  const std::filesystem::path from = config.train.init_from;
  const std::filesystem::path origin = names_checkpoint(from) ? from.parent_path().parent_path() : from;
  for (const std::filesystem::path& run : {origin, std::filesystem::path(config.checkpoint.folder)}) {
    const std::filesystem::path folder = RunFolder{run}.tokenizer();
    if (!from.empty() && std::filesystem::exists(folder)) return BpeTokenizer::load(folder);
  }
  throw ConfigError(
      "nothing tells the tokenizer of model.head = \"classification\": name its folder in data.tokenizer, or "
      "in train.init_from a run that keeps one");
}

}  // namespace

std::optional<BpeTokenizer> find_tokenizer(const RunConfig& config) {
  if (!config.data.tokenizer.empty()) return BpeTokenizer::load(config.data.tokenizer);
  if (classifies(config)) return tokenizer_of_origin(config);
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

LabelledFields fields_of(const RunConfig& config) {
  return {.texts = config.data.text_fields, .label = config.data.label_field};
}

std::vector<LabelledText> read_training_texts(const RunConfig& config) {
  if (config.data.train_labelled.empty()) {
    throw ConfigError(
        "data.train_labelled names no texts to train on: write a .tsv or .jsonl file of texts with labels");
  }
  return read_labelled_texts(config.data.train_labelled, fields_of(config));
}

}  // namespace

RunConfig with_vocabulary(RunConfig config) {
  const auto tokenizer = find_tokenizer(config);
  if (classifies(config)) {
    const auto names =
        class_names_of(read_training_texts(config), config.model.classes, config.data.train_labelled);
    config.model.classes = static_cast<int64_t>(names.size());
  }
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

namespace {

TokenDataset open_tokens(const RunConfig& config, const std::vector<DataSource>& sources,
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

LabelledDatasetOptions labelled_options(const RunConfig& config, const std::filesystem::path& path,
                                        std::vector<std::string> classes, SampleSequence sequence) {
  return {.path = path,
          .classes = std::move(classes),
          .length = config.model.length,
          .reads_last_token = config.model.attention == AttentionMask::causal,
          .sequence = sequence,
          .seed = config.train.seed,
          .batch = sequence == SampleSequence::shuffled ? config.train.global_batch : 0};
}

}  // namespace

Batch RunDataset::read_batch(int64_t first, int64_t count) const {
  return std::visit([&](const auto& data) { return data.read_batch(first, count); }, data_);
}

int64_t RunDataset::num_samples() const {
  return std::visit([](const auto& data) { return data.num_samples(); }, data_);
}

int64_t RunDataset::num_tokens() const {
  return std::visit([](const auto& data) { return data.num_tokens(); }, data_);
}

uint64_t RunDataset::fingerprint() const {
  return std::visit([](const auto& data) { return data.fingerprint(); }, data_);
}

int64_t RunDataset::row_length(int64_t index) const {
  if (const auto* texts = std::get_if<LabelledDataset>(&data_)) return texts->row_length(index);
  return std::get<TokenDataset>(data_).seq_len();
}

std::vector<std::string> RunDataset::classes() const {
  const auto* texts = std::get_if<LabelledDataset>(&data_);
  return texts != nullptr ? texts->classes() : std::vector<std::string>{};
}

RunDataset open_training_data(const RunConfig& config, const std::optional<BpeTokenizer>& tokenizer) {
  const DataConfig& data = config.data;
  if (!classifies(config))
    return RunDataset(open_tokens(config, data.train, SampleSequence::shuffled, tokenizer));
  const std::vector<LabelledText> texts = read_training_texts(config);
  auto names = class_names_of(texts, config.model.classes, data.train_labelled);
  return RunDataset(LabelledDataset(
      labelled_options(config, data.train_labelled, std::move(names), SampleSequence::shuffled), texts,
      *tokenizer));
}

std::optional<RunDataset> open_validation_data(const RunConfig& config,
                                               const std::optional<BpeTokenizer>& tokenizer,
                                               const std::vector<std::string>& classes) {
  const DataConfig& data = config.data;
  if (classifies(config)) {
    if (data.valid_labelled.empty()) return std::nullopt;
    const std::vector<LabelledText> texts = read_labelled_texts(data.valid_labelled, fields_of(config));
    return RunDataset(open_labelled(config, data.valid_labelled, texts, classes, *tokenizer));
  }
  if (data.valid.empty()) return std::nullopt;
  return RunDataset(open_tokens(config, data.valid, SampleSequence::sequential, tokenizer));
}

LabelledDataset open_labelled(const RunConfig& config, const std::filesystem::path& path,
                              const std::vector<LabelledText>& texts, const std::vector<std::string>& classes,
                              const BpeTokenizer& tokenizer) {
  return {labelled_options(config, path, classes, SampleSequence::sequential), texts, tokenizer};
}

}  // namespace normformer
