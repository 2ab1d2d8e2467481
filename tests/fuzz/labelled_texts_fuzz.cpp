// Texts with labels: flags, and the file.
#include "normformer/data/labelled_dataset.h"

#include "fuzz.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

/// Bytes are their own ids.
BpeTokenizer make_tokenizer() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.emplace_back("<|endoftext|>");
  return {tokens, {}};
}

/// Every text is a row of its own, which reads one token.
void check_rows(const std::filesystem::path& path, const std::vector<LabelledText>& texts,
                const std::vector<std::string>& classes) {
  static const BpeTokenizer tokenizer = make_tokenizer();
  const LabelledDataset data({.path = path, .classes = classes, .length = 24}, texts, tokenizer);
  const Batch batch = data.read_batch(0, data.num_samples());
  require(data.num_samples() == static_cast<int64_t>(texts.size()), "every text is a sample");
  const auto read = std::count(batch.loss_mask.begin(), batch.loss_mask.end(), uint8_t{1});
  require(read == data.num_samples(), "of every text one token is read");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  FuzzInput input(data, size);
  const uint8_t flags = input.byte();
  const std::filesystem::path path = folder / ((flags & 1) != 0 ? "x.jsonl" : "x.tsv");
  write_bytes(path, input.rest());
  LabelledFields fields{{"a"}, (flags & 2) != 0 ? "" : "label"};
  if ((flags & 4) != 0) fields.texts.emplace_back("b");
  takes([&] {
    const std::vector<LabelledText> texts = read_labelled_texts(path, fields);
    for (const LabelledText& text : texts)
      require(text.texts.size() == fields.texts.size() && text.label.empty() == fields.label.empty(),
              "texts and labels are there");
    check_rows(
        path, texts,
        fields.label.empty() ? std::vector<std::string>{} : class_names_of(texts, flags / 8 % 4, path));
  });
  return 0;
}
