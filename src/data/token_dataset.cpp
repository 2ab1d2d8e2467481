#include "normformer/data/token_dataset.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <fmt/format.h>
#include <xxhash.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

void require_valid(const TokenDatasetOptions& options) {
  if (options.sources.empty()) throw ConfigError("no dataset is given; name at least one .bin/.idx prefix");
  if (options.seq_len <= 0) {
    throw ConfigError(fmt::format("a sequence length of {} tokens cannot be trained on; give one above 0",
                                  options.seq_len));
  }
  if (options.masking && options.seq_len < 2) {
    throw ConfigError(
        fmt::format("masked samples begin with a token of their own: a sequence length of {} leaves "
                    "no room for others; give one above 1",
                    options.seq_len));
  }
  const auto mask_token = options.document_mask_token;
  if (mask_token && (*mask_token < 0 || *mask_token >= options.vocab_size)) {
    throw ConfigError(fmt::format("the end-of-document token {} is outside of the vocabulary of {}",
                                  *mask_token, options.vocab_size));
  }
}

/// Samples that begin `stride` tokens apart and end `behind` tokens behind the beginning of the next.
int64_t samples_in(const IndexedDataset& dataset, int64_t stride, int64_t behind) {
  const int64_t samples = (dataset.num_tokens() - behind) / stride;
  if (samples < 1) {
    throw DataError(fmt::format(
        "{} holds {} tokens, too few for one sample of {}{}; use more text or a smaller sequence length",
        dataset.prefix().string(), dataset.num_tokens(), stride, behind > 0 ? " and the token after" : ""));
  }
  return samples;
}

}  // namespace

TokenDataset::TokenDataset(const TokenDatasetOptions& options) : options_(options) {
  require_valid(options);
  const RandomStream stream = RandomStream{options.seed}.with("sample order");
  std::vector<double> weights;
  for (std::size_t i = 0; i < options.sources.size(); ++i) {
    IndexedDataset tokens(options.sources[i].prefix, options.vocab_size);
    const int64_t samples = samples_in(tokens, stride(), options.masking ? 0 : 1);
    const auto order = options.sequence == SampleSequence::shuffled
                           ? SampleOrder::shuffled(stream.with(uint64_t{i}), samples)
                           : SampleOrder::sequential(samples);
    sources_.push_back({std::move(tokens), order, num_samples_});
    num_samples_ = checked_add(num_samples_, samples);
    weights.push_back(options.sources[i].weight);
  }
  if (options.sequence == SampleSequence::shuffled) blend_.emplace(weights);
}

int64_t TokenDataset::num_tokens() const {
  int64_t total = 0;
  for (const Source& source : sources_) total = checked_add(total, source.tokens.num_tokens());
  return total;
}

TokenDataset::Place TokenDataset::place(int64_t index) const {
  NF_CHECK(index >= 0, "global sample {}", index);
  if (blend_) {
    const BlendTurn turn = blend_->turn(index);
    return {turn.dataset, sources_[turn.dataset].order.at(turn.index)};
  }
  const int64_t within = index % num_samples_;
  const auto after = std::upper_bound(sources_.begin(), sources_.end(), within,
                                      [](int64_t i, const Source& s) { return i < s.first_sample; });
  const int64_t source = (after - sources_.begin()) - 1;
  return {source, sources_[source].order.at(within - sources_[source].first_sample)};
}

std::vector<double> TokenDataset::epochs(int64_t index) const {
  std::vector<double> result;
  for (int64_t i = 0; i < num_sources(); ++i) {
    result.push_back(blend_ ? static_cast<double>(blend_->count(i, index)) /
                                  static_cast<double>(sources_[i].order.num_samples())
                            : static_cast<double>(index) / static_cast<double>(num_samples_));
  }
  return result;
}

void TokenDataset::read_sample(int64_t index, std::span<int32_t> tokens) const {
  const int64_t wanted = options_.masking ? seq_len() : seq_len() + 1;
  NF_CHECK(static_cast<int64_t>(tokens.size()) == wanted, "room for {} tokens, not {}", tokens.size(),
           wanted);
  if (options_.masking) {
    tokens.front() = options_.masking->start_token;
    tokens = tokens.subspan(1);
  }
  const Place at = place(index);
  sources_[at.source].tokens.read(at.sample * stride(), tokens);
}

Batch TokenDataset::read_batch(int64_t first, int64_t count) const {
  NF_CHECK(first >= 0 && count >= 0, "samples [{}, {} + {})", first, first, count);
  const int64_t elements = checked_mul(count, seq_len());
  Batch batch;
  batch.sequences = count;
  batch.seq_len = seq_len();
  batch.inputs.resize(elements);
  batch.targets.resize(elements);
  if (options_.document_mask_token) batch.document_start.resize(elements);
  if (options_.document_mask_token || options_.masking) batch.loss_mask.resize(elements);
  for (int64_t row = 0; row < count; ++row) {
    if (options_.masking)
      fill_masked_row(first + row, row, batch);
    else
      fill_row(first + row, row, batch);
  }
  return batch;
}

void TokenDataset::fill_row(int64_t index, int64_t row, Batch& batch) const {
  std::vector<int32_t> tokens(seq_len() + 1);
  read_sample(index, tokens);
  std::copy(tokens.begin(), tokens.end() - 1, batch.inputs.begin() + row * seq_len());
  std::copy(tokens.begin() + 1, tokens.end(), batch.targets.begin() + row * seq_len());
  if (options_.document_mask_token) mask_documents(batch, row);
}

void TokenDataset::fill_masked_row(int64_t index, int64_t row, Batch& batch) const {
  const auto of_row = [&](auto& values) { return std::span(values).subspan(row * seq_len(), seq_len()); };
  read_sample(index, of_row(batch.targets));
  std::copy_n(batch.targets.begin() + row * seq_len(), seq_len(), batch.inputs.begin() + row * seq_len());
  mask_sample(*options_.masking, index, of_row(batch.inputs), of_row(batch.loss_mask));
}

void TokenDataset::mask_documents(Batch& batch, int64_t row) const {
  int32_t start = 0;
  for (int64_t t = 0; t < batch.seq_len; ++t) {
    const int64_t element = row * batch.seq_len + t;
    const bool ends = batch.inputs[element] == *options_.document_mask_token;
    batch.document_start[element] = start;
    batch.loss_mask[element] = ends ? 0 : 1;
    if (ends) start = static_cast<int32_t>(t + 1);
  }
}

uint64_t TokenDataset::fingerprint() const {
  std::vector<uint64_t> facts = {
      static_cast<uint64_t>(options_.seq_len), static_cast<uint64_t>(options_.sequence), options_.seed,
      options_.document_mask_token ? static_cast<uint64_t>(*options_.document_mask_token) : ~uint64_t{0}};
  if (options_.masking) {
    const MaskingRule& rule = *options_.masking;
    for (const double share : {rule.probability, rule.kept, rule.random})
      facts.push_back(std::bit_cast<uint64_t>(share));
    for (const int64_t token : {int64_t{rule.mask_token}, int64_t{rule.start_token}, rule.ordinary_tokens})
      facts.push_back(static_cast<uint64_t>(token));
    facts.push_back(rule.stream.key);
  }
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    facts.push_back(sources_[i].tokens.fingerprint());
    facts.push_back(std::bit_cast<uint64_t>(options_.sources[i].weight));
  }
  return XXH3_64bits(facts.data(), facts.size() * sizeof(uint64_t));
}

}  // namespace normformer
