#pragma once

#include <optional>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/token_dataset.h"

namespace normformer {

/// The tokenizer of a run's corpora: data.tokenizer, or the one that the first training set was prepared
/// with; none for token files from elsewhere. Throws IoError and DataError.
std::optional<BpeTokenizer> find_tokenizer(const RunConfig& config);

/// The configuration with data.mask_token (of masked language models) and model.vocab filled in from the
/// tokenizer where they are 0; bidirectional models have an id for a mask beside the tokenizer's. Throws
/// ConfigError where there is no tokenizer to tell it, or where model.vocab is smaller than what the
/// tokenizer needs; IoError and DataError.
RunConfig with_vocabulary(RunConfig config);

/// How a masked language model's samples are masked, for training (shuffled) or validation. Throws
/// ConfigError where there is no tokenizer with <|endoftext|>.
MaskingRule masking_rule(const RunConfig& config, SampleSequence sequence,
                         const std::optional<BpeTokenizer>& tokenizer);

/// Opens corpora as a run reads them. Throws ConfigError, IoError and DataError.
TokenDataset open_dataset(const RunConfig& config, const std::vector<DataSource>& sources,
                          SampleSequence sequence, const std::optional<BpeTokenizer>& tokenizer);

}  // namespace normformer
