#include "normformer/data/labelled_dataset.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xxhash.h>

#include "normformer/core/checked.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr int64_t kRowMultiple = 8;

int64_t marks_of(std::size_t texts) { return texts == 1 ? 2 : 4; }

SampleOrder order_of(const LabelledDatasetOptions& options, std::size_t texts) {
  const auto samples = static_cast<int64_t>(texts);
  if (options.sequence == SampleSequence::sequential) return SampleOrder::sequential(samples);
  return SampleOrder::shuffled(RandomStream{options.seed}.with("sample order").with(uint64_t{0}), samples);
}

int32_t require_mark(const BpeTokenizer& tokenizer) {
  if (const auto mark = tokenizer.end_of_text()) return *mark;
  throw ConfigError(
      "model.head = \"classification\" needs a tokenizer with <|endoftext|>, which begins and ends texts: "
      "name its folder in data.tokenizer");
}

using ClassNumbers = std::unordered_map<std::string, int32_t>;

int32_t class_of(const ClassNumbers& numbers, const LabelledText& text,
                 const LabelledDatasetOptions& options) {
  const auto found = numbers.find(text.label);
  if (found != numbers.end()) return found->second;
  constexpr std::size_t kShown = 20;
  const std::size_t shown = std::min(options.classes.size(), kShown);
  throw DataError(fmt::format(
      "{} line {}: the label \"{}\" is none of the classes trained on: {}{}", options.path.string(),
      text.line, text.label,
      fmt::join(options.classes.begin(), options.classes.begin() + static_cast<std::ptrdiff_t>(shown), ", "),
      shown < options.classes.size() ? ", ..." : ""));
}

}  // namespace

std::vector<int32_t> join_texts(std::vector<std::vector<int32_t>> texts, int32_t mark, int64_t length) {
  const int64_t marks = marks_of(texts.size());
  NF_CHECK((texts.size() == 1 || texts.size() == 2) && length >= marks + static_cast<int64_t>(texts.size()),
           "{} texts in {} tokens", texts.size(), length);
  std::vector<int32_t>& first = texts.front();
  std::vector<int32_t>& second = texts.back();
  const auto room = static_cast<std::size_t>(length - marks);
  if (texts.size() == 1) {
    first.resize(std::min(first.size(), room));
  } else {
    while (first.size() + second.size() > room) (first.size() > second.size() ? first : second).pop_back();
  }
  std::vector<int32_t> joined{mark};
  for (std::size_t i = 0; i < texts.size(); ++i) {
    if (i > 0) joined.push_back(mark);
    joined.insert(joined.end(), texts[i].begin(), texts[i].end());
    joined.push_back(mark);
  }
  return joined;
}

LabelledDataset::LabelledDataset(const LabelledDatasetOptions& options,
                                 const std::vector<LabelledText>& texts, const BpeTokenizer& tokenizer)
    : options_(options), order_(order_of(options, texts.size())), mark_(require_mark(tokenizer)) {
  const auto per_sample = static_cast<int64_t>(texts.front().texts.size());
  const int64_t least = marks_of(texts.front().texts.size()) + per_sample;
  if (options.length < least) {
    throw ConfigError(fmt::format("model.length = {} leaves no room for {}; at least {} tokens do",
                                  options.length, per_sample == 1 ? "a text" : "a pair of texts", least));
  }
  ClassNumbers numbers;
  for (const std::string& name : options.classes) numbers.emplace(name, static_cast<int32_t>(numbers.size()));
  BpeEncoder encoder(tokenizer);
  starts_.push_back(0);
  for (const LabelledText& text : texts) {
    std::vector<std::vector<int32_t>> encoded(text.texts.size());
    for (std::size_t i = 0; i < encoded.size(); ++i) encoder.encode(text.texts[i], encoded[i]);
    const std::vector<int32_t> sample = join_texts(std::move(encoded), mark_, options.length);
    tokens_.insert(tokens_.end(), sample.begin(), sample.end());
    starts_.push_back(static_cast<int64_t>(tokens_.size()));
    if (!numbers.empty()) targets_.push_back(class_of(numbers, text, options));
  }
}

std::span<const int32_t> LabelledDataset::tokens_of(int64_t sample) const {
  const auto at = static_cast<std::size_t>(sample);
  return std::span(tokens_).subspan(static_cast<std::size_t>(starts_[at]),
                                    static_cast<std::size_t>(starts_[at + 1] - starts_[at]));
}

// The length of rows that hold these global samples.
int64_t LabelledDataset::longest(int64_t first, int64_t count) const {
  int64_t tokens = 1;
  for (int64_t i = first; i < first + count; ++i)
    tokens = std::max(tokens, static_cast<int64_t>(tokens_of(order_.at(i)).size()));
  return std::min((tokens + kRowMultiple - 1) / kRowMultiple * kRowMultiple, options_.length);
}

int64_t LabelledDataset::row_length(int64_t index) const {
  const int64_t batch = std::max<int64_t>(1, options_.batch);
  return longest(index / batch * batch, batch);
}

Batch LabelledDataset::read_batch(int64_t first, int64_t count) const {
  NF_CHECK(first >= 0 && count >= 0, "samples [{}, {} + {})", first, first, count);
  Batch batch;
  batch.sequences = count;
  batch.seq_len = options_.batch > 0 ? row_length(first) : longest(first, count);
  const auto elements = static_cast<std::size_t>(checked_mul(count, batch.seq_len));
  batch.inputs.assign(elements, mark_);
  batch.targets.resize(elements);
  batch.document_start.resize(elements);
  batch.loss_mask.resize(elements);
  for (int64_t row = 0; row < count; ++row) fill_row(order_.at(first + row), row, batch);
  return batch;
}

void LabelledDataset::fill_row(int64_t sample, int64_t row, Batch& batch) const {
  const std::span<const int32_t> tokens = tokens_of(sample);
  const auto size = static_cast<int64_t>(tokens.size());
  NF_CHECK(size <= batch.seq_len, "{} tokens for a row of {}", size, batch.seq_len);
  const int64_t end = (row + 1) * batch.seq_len;
  const int64_t begin = end - size;
  std::copy(tokens.begin(), tokens.end(), batch.inputs.begin() + begin);
  std::fill(batch.document_start.begin() + begin, batch.document_start.begin() + end,
            static_cast<int32_t>(batch.seq_len - size));
  const auto read = static_cast<std::size_t>(options_.reads_last_token ? end - 1 : begin);
  batch.loss_mask[read] = 1;
  if (!targets_.empty()) batch.targets[read] = targets_[static_cast<std::size_t>(sample)];
}

uint64_t LabelledDataset::fingerprint() const {
  const auto hash = [](const auto& values) {
    return XXH3_64bits(values.data(), values.size() * sizeof(values[0]));
  };
  std::vector<uint64_t> facts = {static_cast<uint64_t>(options_.length),
                                 static_cast<uint64_t>(options_.reads_last_token),
                                 static_cast<uint64_t>(options_.sequence),
                                 options_.seed,
                                 static_cast<uint64_t>(mark_),
                                 hash(tokens_),
                                 hash(starts_),
                                 hash(targets_)};
  for (const std::string& name : options_.classes) facts.push_back(hash(name));
  return hash(facts);
}

}  // namespace normformer
