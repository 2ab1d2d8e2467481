// Token files: flags, the .idx file behind its length, and the .bin file. An empty .idx stands for none.
#include "normformer/data/indexed_dataset.h"
#include "normformer/data/token_dataset.h"

#include "fuzz.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

/// Documents cover the stream one after another, and tokens are read alike in one go and one by one.
void walk(const IndexedDataset& dataset) {
  int64_t end = 0;
  for (int64_t i = 0; i < dataset.num_documents(); ++i) {
    const Range document = dataset.document(i);
    require(document.begin == end && document.end >= end, "documents stand one after another");
    end = document.end;
  }
  require(end == dataset.num_tokens(), "documents cover the stream");
  std::vector<int32_t> tokens(static_cast<size_t>(dataset.num_tokens()));
  if (!takes([&] { dataset.read(0, tokens); })) return;
  for (int64_t at = 0; at < dataset.num_tokens(); at += 1 + at / 8) {
    int32_t token = 0;
    dataset.read(at, {&token, 1});
    require(token == tokens[static_cast<size_t>(at)], "a token is the same alone");
    require(dataset.document(dataset.document_at(at)).contains(at), "a token is in its document");
  }
  static_cast<void>(dataset.fingerprint());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  FuzzInput input(data, size);
  const uint8_t flags = input.byte();
  const std::string_view index = input.part();
  std::filesystem::remove(folder / "x.idx");
  if (!index.empty()) write_bytes(folder / "x.idx", index);
  write_bytes(folder / "x.bin", input.rest());

  const int64_t vocab_size = (flags & 1) != 0 ? kAnyVocabulary : 300;
  takes([&] { walk(IndexedDataset(folder / "x", vocab_size)); });
  takes([&] {
    const TokenDataset samples({.sources = {{folder / "x"}},
                                .seq_len = 1 + flags / 16,
                                .vocab_size = vocab_size,
                                .document_mask_token = (flags & 2) != 0 ? std::optional(0) : std::nullopt});
    const Batch batch = samples.read_batch(flags, 3);
    require(batch.inputs.size() == static_cast<size_t>(3 * samples.seq_len()), "a batch is complete");
  });
  return 0;
}
