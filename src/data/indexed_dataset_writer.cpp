#include <algorithm>
#include <vector>

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/data/indexed_dataset.h"

#include "output_file.h"

namespace normformer {

struct IndexedDatasetWriter::State {
  State(const std::filesystem::path& prefix, int64_t vocab, int64_t longest)
      : vocab_size(vocab),
        max_sequence(longest),
        type(token_type_for(vocab)),
        tokens(prefix.string() + ".bin"),
        index(prefix.string() + ".idx") {}

  int64_t vocab_size;
  int64_t max_sequence;
  TokenType type;
  OutputFile tokens;
  OutputFile index;
  std::vector<int32_t> lengths;
  std::vector<int64_t> documents = {0};
  std::vector<uint16_t> narrow;
  int64_t num_tokens = 0;
  int64_t sequence_tokens = 0;
  bool document_open = false;
};

namespace {

template <class T>
void put(OutputFile& file, const std::vector<T>& values) {
  file.write(std::as_bytes(std::span(values)));
}

template <class T>
void put_value(OutputFile& file, T value) {
  file.write(std::as_bytes(std::span(&value, 1)));
}

}  // namespace

IndexedDatasetWriter::IndexedDatasetWriter(const std::filesystem::path& prefix, int64_t vocab_size,
                                           int64_t max_sequence)
    : state_(std::make_unique<State>(prefix, vocab_size, max_sequence)) {
  NF_CHECK(max_sequence > 0 && max_sequence <= std::numeric_limits<int32_t>::max(), "sequences of {} tokens",
           max_sequence);
}

IndexedDatasetWriter::~IndexedDatasetWriter() = default;

int64_t IndexedDatasetWriter::num_documents() const {
  return static_cast<int64_t>(state_->documents.size()) - 1;
}

int64_t IndexedDatasetWriter::num_tokens() const { return state_->num_tokens; }

void IndexedDatasetWriter::append(std::span<const int32_t> tokens) {
  State& s = *state_;
  for (const int32_t token : tokens) {
    NF_CHECK(token >= 0 && token < s.vocab_size, "token {} of a vocabulary of {}", token, s.vocab_size);
  }
  if (s.type == TokenType::u16) {
    s.narrow.assign(tokens.begin(), tokens.end());
    put(s.tokens, s.narrow);
  } else {
    s.tokens.write(std::as_bytes(tokens));
  }
  s.document_open = true;
  s.num_tokens += static_cast<int64_t>(tokens.size());
  s.sequence_tokens += static_cast<int64_t>(tokens.size());
  while (s.sequence_tokens > s.max_sequence) {
    s.lengths.push_back(static_cast<int32_t>(s.max_sequence));
    s.sequence_tokens -= s.max_sequence;
  }
}

void IndexedDatasetWriter::end_document() {
  State& s = *state_;
  s.lengths.push_back(static_cast<int32_t>(s.sequence_tokens));
  s.documents.push_back(static_cast<int64_t>(s.lengths.size()));
  s.sequence_tokens = 0;
  s.document_open = false;
}

void IndexedDatasetWriter::add_document(std::span<const int32_t> tokens) {
  append(tokens);
  end_document();
}

WrittenDataset IndexedDatasetWriter::finish() {
  State& s = *state_;
  NF_CHECK(!s.document_open, "the last document is not ended");
  constexpr char kHeader[] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
  s.index.write(std::as_bytes(std::span(kHeader)));
  put_value(s.index, uint64_t{1});
  put_value(s.index, static_cast<uint8_t>(s.type));
  put_value(s.index, static_cast<uint64_t>(s.lengths.size()));
  put_value(s.index, static_cast<uint64_t>(s.documents.size()));
  put(s.index, s.lengths);
  int64_t offset = 0;
  for (const int32_t length : s.lengths) {
    put_value(s.index, offset);
    offset += length * size_of(s.type);
  }
  put(s.index, s.documents);
  s.tokens.complete();
  s.index.complete();
  // An older dataset of this name must not be seen with its index and these tokens.
  std::filesystem::remove(s.index.path());
  s.tokens.publish();
  s.index.publish();
  return {num_documents(), s.num_tokens, s.type, s.tokens.hash(), s.index.hash()};
}

}  // namespace normformer
