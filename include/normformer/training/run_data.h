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

/// The configuration with model.vocab filled in from the tokenizer where it is 0. Throws ConfigError where
/// there is no tokenizer to tell it, or where model.vocab is smaller than the tokenizer's; IoError and
/// DataError.
RunConfig with_vocabulary(RunConfig config);

/// Opens corpora as a run reads them. Throws ConfigError, IoError and DataError.
TokenDataset open_dataset(const RunConfig& config, const std::vector<DataSource>& sources,
                          SampleSequence sequence, const std::optional<BpeTokenizer>& tokenizer);

}  // namespace normformer
