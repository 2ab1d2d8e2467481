#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "normformer/data/blend.h"
#include "normformer/data/indexed_dataset.h"
#include "normformer/data/masking.h"
#include "normformer/data/sample_order.h"

namespace normformer {

/// One corpus to train or validate on, and how much it counts in the mix.
struct TokenSource {
  std::filesystem::path prefix;  ///< as IndexedDataset takes it
  double weight = 1;
};

/// In which order samples are taken.
enum class SampleSequence {
  shuffled,   ///< training: sources mixed by weight, each shuffled anew every epoch of its own
  sequential  ///< validation: every sample of the first source in order, then of the second; weights unused
};

/// What a TokenDataset is made from.
struct TokenDatasetOptions {
  std::vector<TokenSource> sources = {};
  int64_t seq_len = 0;
  int64_t vocab_size = kAnyVocabulary;
  SampleSequence sequence = SampleSequence::shuffled;
  uint64_t seed = 0;  ///< of the shuffling
  /// The token that ends a document. Where given, batches carry document starts and a loss mask, so that no
  /// token sees, or is predicted from, another document.
  std::optional<int32_t> document_mask_token = std::nullopt;
  /// For masked language models: a sample is the rule's start token and then seq_len - 1 tokens, of which the
  /// predicted ones are the targets. Not beside a document mask.
  std::optional<MaskingRule> masking = std::nullopt;
};

/// A piece of a global batch: sequences as rows.
struct Batch {
  int64_t sequences = 0;
  int64_t seq_len = 0;
  std::vector<int32_t> inputs;   ///< [sequences, seq_len]
  std::vector<int32_t> targets;  ///< [sequences, seq_len]: the token after each input; of masked samples, the
                                 ///< token in its place
  /// [sequences, seq_len]: the place in its row where each token's document starts (0 for one that began
  /// before the row); a token at t may attend to places document_start..t. Empty without a document mask.
  std::vector<int32_t> document_start;
  /// [sequences, seq_len]: 1 where the target counts, 0 where the input ends a document, so that its target
  /// belongs to the next one; of masked samples, 1 where a token is predicted. Empty without either.
  std::vector<uint8_t> loss_mask;
};

/// The samples of a run: one or several corpora cut into samples of seq_len tokens and the one that follows,
/// in an order that is a pure function of the seed and the global sample index. So a run's position in its
/// data is one integer, whatever the layout, and any rank can read any part of any batch.
///
/// Each source is one stream of tokens, its documents one after another; sample i holds tokens
/// [i·seq_len, (i + 1)·seq_len] of it, so that every token but the first is predicted once an epoch. What is
/// left at the end, if shorter, is dropped. Masked samples take seq_len - 1 tokens in place of seq_len.
/// Reading is safe from several threads.
class TokenDataset {
 public:
  /// Opens and validates every source. Throws ConfigError, IoError and DataError; a source that is too short
  /// for one sample is refused.
  explicit TokenDataset(const TokenDatasetOptions& options);

  int64_t seq_len() const { return options_.seq_len; }
  int64_t vocab_size() const { return options_.vocab_size; }
  int64_t num_sources() const { return static_cast<int64_t>(sources_.size()); }
  const IndexedDataset& source(int64_t index) const { return sources_.at(index).tokens; }
  /// The samples of all sources together: one epoch where they are not blended.
  int64_t num_samples() const { return num_samples_; }
  /// The tokens of all sources together.
  int64_t num_tokens() const;

  /// Which source, and which sample of it, global sample `index` >= 0 is. The sequence has no end: a source
  /// that is used up starts its next epoch.
  struct Place {
    int64_t source = 0;
    int64_t sample = 0;
    bool operator==(const Place&) const = default;
  };
  Place place(int64_t index) const;

  /// How often each source has been gone through before global sample `index`, in epochs.
  std::vector<double> epochs(int64_t index) const;

  /// Copies global sample `index` >= 0: seq_len + 1 tokens, or the seq_len of a masked one as they are.
  /// Throws DataError for a token outside of the vocabulary.
  void read_sample(int64_t index, std::span<int32_t> tokens) const;

  /// Global samples [first, first + count) as rows of a batch.
  Batch read_batch(int64_t first, int64_t count) const;

  /// A hash of everything that decides what read_batch returns: the corpora's fingerprints, weights,
  /// seq_len, order, seed and mask. A checkpoint keeps it; a run that resumes with another would see other
  /// data.
  uint64_t fingerprint() const;

 private:
  struct Source {
    IndexedDataset tokens;
    SampleOrder order;
    int64_t first_sample;  ///< samples of the sources before
  };

  // Tokens from the beginning of a sample to that of the next one.
  int64_t stride() const { return options_.masking ? options_.seq_len - 1 : options_.seq_len; }
  void fill_row(int64_t index, int64_t row, Batch& batch) const;
  void fill_masked_row(int64_t index, int64_t row, Batch& batch) const;
  void mask_documents(Batch& batch, int64_t row) const;

  TokenDatasetOptions options_;
  std::vector<Source> sources_;
  std::optional<Blend> blend_;  ///< set where shuffled
  int64_t num_samples_ = 0;
};

}  // namespace normformer
