#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/labelled_texts.h"
#include "normformer/data/sample_order.h"
#include "normformer/data/token_dataset.h"

namespace normformer {

/// One text, or two of a pair, as a model that classifies reads it: RoBERTa's `<s> a </s>` or
/// `<s> a </s></s> b </s>` (Liu et al. 2019), with `mark` as both, at most `length` tokens. What is too much
/// is cut off the ends of the texts, token by token of the longer one (of two as long, of the second).
/// LogicError for a length that leaves a text no token.
std::vector<int32_t> join_texts(std::vector<std::vector<int32_t>> texts, int32_t mark, int64_t length);

/// What a LabelledDataset is made from, beside its texts.
struct LabelledDatasetOptions {
  std::filesystem::path path;        ///< of the texts, for messages
  std::vector<std::string> classes;  ///< their names; empty: texts without labels
  int64_t length = 0;                ///< tokens of a sample at most
  /// Where the model looks for the class: at a sample's last token (causal attention), else at its first.
  bool reads_last_token = false;
  SampleSequence sequence = SampleSequence::shuffled;
  uint64_t seed = 0;  ///< of the shuffling
  /// Samples of a global batch, all of which are padded to one length; 0: those that are read together.
  int64_t batch = 0;
};

/// Texts with labels as samples of a run, in an order that is a pure function of the seed and the global
/// sample index: shuffled anew each epoch, or as in the file.
///
/// A sample's tokens stand at the end of its row, so that attention which stops at document_start hides the
/// padding before them from them: nothing that is computed of a sample depends on it. Rows are as long as the
/// longest of their global batch, rounded up to a multiple of 8, and at most `length`. Reading is safe from
/// several threads.
class LabelledDataset {
 public:
  /// Encodes all texts. Throws DataError, with file and line, for a label that is no class; ConfigError where
  /// the tokenizer has no <|endoftext|>, which begins and ends texts, or the length no room for a text.
  LabelledDataset(const LabelledDatasetOptions& options, const std::vector<LabelledText>& texts,
                  const BpeTokenizer& tokenizer);

  const std::vector<std::string>& classes() const { return options_.classes; }
  int64_t num_samples() const { return order_.num_samples(); }
  /// Of all samples, without padding.
  int64_t num_tokens() const { return static_cast<int64_t>(tokens_.size()); }

  /// The tokens of a row of the batch that global sample `index` >= 0 is in.
  int64_t row_length(int64_t index) const;

  /// Global samples [first, first + count) as rows of a batch: document_start is where a sample's tokens
  /// begin (0 for the padding before), loss_mask 1 at the one token that the model reads, whose target is the
  /// class (0 without labels).
  Batch read_batch(int64_t first, int64_t count) const;

  /// The classes of the texts, in the order of the file; empty without labels.
  const std::vector<int32_t>& targets() const { return targets_; }

  /// As TokenDataset::fingerprint.
  uint64_t fingerprint() const;

 private:
  std::span<const int32_t> tokens_of(int64_t sample) const;
  int64_t longest(int64_t first, int64_t count) const;
  void fill_row(int64_t sample, int64_t row, Batch& batch) const;

  LabelledDatasetOptions options_;
  SampleOrder order_;
  int32_t mark_ = 0;
  std::vector<int32_t> tokens_;   // of all samples, one behind the other
  std::vector<int64_t> starts_;   // of each sample, and the end
  std::vector<int32_t> targets_;  // of each sample; empty without labels
};

}  // namespace normformer
