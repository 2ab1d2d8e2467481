// The manifest of a prepared corpus, beside a real one's tokens and tokenizer.
#include "normformer/data/manifest.h"

#include "fuzz.h"
#include "small_corpus.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  static const bool prepared = (prepare_small_corpus(folder / "corpus"), true);
  require(prepared, "there is a corpus");
  FuzzInput input(data, size);
  write_bytes(folder / "corpus.json", input.rest());
  const bool read = takes([&] {
    const CorpusManifest manifest = read_corpus_manifest(folder / "corpus.json");
    require(is_plain_name(manifest.tokenizer), "a tokenizer is in the corpus' folder");
    for (const CorpusSplit& split : manifest.splits) {
      require(is_plain_name(split.dataset), "a dataset is in the corpus' folder");
      require(split.tokens >= 0 && split.documents >= 0 && split.bytes >= 0, "sizes are not negative");
    }
  });
  for (const char* name : {"corpus", "corpus_train", "corpus_valid.bin"}) {
    require(takes([&] { static_cast<void>(find_corpus_manifest(folder / name)); }) == read,
            "a manifest is found where one can be read");
    takes([&] { static_cast<void>(load_corpus_tokenizer(folder / name)); });
    takes([&] { verify_corpus(folder / name); });
  }
  return 0;
}
