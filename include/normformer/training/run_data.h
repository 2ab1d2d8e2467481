#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/labelled_dataset.h"
#include "normformer/data/token_dataset.h"

namespace normformer {

/// The tokenizer of a run's data: data.tokenizer; or the one that the first training set was prepared with,
/// none for token files from elsewhere; or, of a classifier, that of the run that it starts from. Throws
/// ConfigError where nothing tells it, IoError and DataError.
std::optional<BpeTokenizer> find_tokenizer(const RunConfig& config);

/// The configuration with data.mask_token (of masked language models) and model.vocab filled in from the
/// tokenizer where they are 0, and model.classes from the training texts' labels; bidirectional models have
/// an id for a mask beside the tokenizer's. Throws ConfigError where there is no tokenizer to tell it, or
/// where model.vocab is smaller than what the tokenizer needs; IoError and DataError.
RunConfig with_vocabulary(RunConfig config);

/// How a masked language model's samples are masked, for training (shuffled) or validation. Throws
/// ConfigError where there is no tokenizer with <|endoftext|>.
MaskingRule masking_rule(const RunConfig& config, SampleSequence sequence,
                         const std::optional<BpeTokenizer>& tokenizer);

/// What a run trains on or is validated on: a stream of tokens, or texts with labels.
class RunDataset {
 public:
  explicit RunDataset(TokenDataset data) : data_(std::move(data)) {}
  explicit RunDataset(LabelledDataset data) : data_(std::move(data)) {}

  Batch read_batch(int64_t first, int64_t count) const;
  int64_t num_samples() const;
  int64_t num_tokens() const;
  uint64_t fingerprint() const;

  /// The tokens of a row of the batch that global sample `index` is in.
  int64_t row_length(int64_t index) const;

  /// The names of the classes; none without labels.
  std::vector<std::string> classes() const;

 private:
  std::variant<TokenDataset, LabelledDataset> data_;
};

/// Opens what a run trains on. Throws ConfigError, IoError and DataError.
RunDataset open_training_data(const RunConfig& config, const std::optional<BpeTokenizer>& tokenizer);

/// Opens what it is validated on, where the configuration names something. `classes` are those of the
/// training data. Throws as open_training_data.
std::optional<RunDataset> open_validation_data(const RunConfig& config,
                                               const std::optional<BpeTokenizer>& tokenizer,
                                               const std::vector<std::string>& classes);

/// Texts read from `path`, one after another, for a classifier with these classes; none: without labels.
/// Throws as LabelledDataset.
LabelledDataset open_labelled(const RunConfig& config, const std::filesystem::path& path,
                              const std::vector<LabelledText>& texts, const std::vector<std::string>& classes,
                              const BpeTokenizer& tokenizer);

}  // namespace normformer
