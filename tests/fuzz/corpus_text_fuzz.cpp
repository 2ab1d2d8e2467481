// Text and JSON of a corpus: flags, and the file.
#include "normformer/data/pretokenizer.h"

#include "corpus_reader.h"
#include "corpus_text.h"
#include "fuzz.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

/// Pieces cover the text, and are the same where it is cut first.
void check_pieces(std::string_view text) {
  const std::vector<std::string_view> pieces = split_pieces(text);
  std::string together;
  for (const std::string_view piece : pieces) together += piece;
  require(together == text, "pieces cover the text");
  if (text.empty()) return;
  const size_t cut = safe_cut(text, text.size() / 2);
  require(cut <= text.size(), "a cut is within the text");
  std::vector<std::string_view> parts = split_pieces(text.substr(0, cut));
  const std::vector<std::string_view> second = split_pieces(text.substr(cut));
  parts.insert(parts.end(), second.begin(), second.end());
  require(parts == pieces, "a cut text has the same pieces");
}

void read_all(const std::filesystem::path& path, DocumentRule rule, InvalidUtf8 policy) {
  CorpusReader reader({path}, rule, "--");
  int64_t document = -1;
  while (const auto batch = reader.read()) {
    for (const CorpusChunk& chunk : batch->chunks) {
      require(chunk.document == document || chunk.document == document + 1, "documents are counted");
      document = chunk.document;
      takes([&] {
        const ChunkText text(chunk, "text", policy);
        require(policy == InvalidUtf8::bytes || !find_invalid_utf8(text.text()), "text is UTF-8");
        check_pieces(text.text());
      });
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  FuzzInput input(data, size);
  const uint8_t flags = input.byte();
  const std::filesystem::path path = folder / ((flags & 1) != 0 ? "x.jsonl" : "x.txt");
  write_bytes(path, input.rest());
  takes([&] {
    read_all(path, static_cast<DocumentRule>(flags / 2 % 3), static_cast<InvalidUtf8>(flags / 8 % 3));
  });
  return 0;
}
