// Tokenizer files and a text to encode, zero bytes between them, behind a letter that says which: 't'
// tokenizer.json; 'm' merges.txt, to which a fitting vocabulary is made; else vocab.json and merges.txt.
#include <set>

#include <nlohmann/json.hpp>

#include "normformer/data/bpe_tokenizer.h"

#include "byte_alphabet.h"
#include "fuzz.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

/// The 256 bytes and what each line of the merges would make.
std::string vocabulary_for(std::string_view merges) {
  nlohmann::json ids = {{"<|endoftext|>", 0}};
  for (const uint8_t byte : byte_order()) {
    ids.emplace(to_alphabet(std::string(1, static_cast<char>(byte))), ids.size());
  }
  while (!merges.empty()) {
    std::string line(merges.substr(0, merges.find('\n')));
    merges.remove_prefix(std::min(line.size() + 1, merges.size()));
    std::erase(line, ' ');
    ids.emplace(line, ids.size());
  }
  return ids.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

BpeTokenizer load(const TemporaryFolder& folder, char kind, FuzzInput& input) {
  if (kind == 't') {
    write_bytes(folder / "tokenizer.json", input.until('\0'));
    return BpeTokenizer::load(folder / "tokenizer.json");
  }
  const std::string vocabulary(kind == 'm' ? "" : input.until('\0'));
  const std::string merges(input.until('\0'));
  write_bytes(folder / "vocab.json", kind == 'm' ? vocabulary_for(merges) : vocabulary);
  write_bytes(folder / "merges.txt", merges);
  return BpeTokenizer::load(folder / "vocab.json", folder / "merges.txt");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  FuzzInput input(data, size);
  const char kind = static_cast<char>(input.byte());
  takes([&] {
    const BpeTokenizer tokenizer = load(folder, kind, input);
    const std::string_view text = input.rest();
    for (const SpecialText special : {SpecialText::as_text, SpecialText::as_token}) {
      require(tokenizer.decode(tokenizer.encode(text, special)) == text, "text comes back as it was");
    }
    tokenizer.save(folder / "saved");
    require(BpeTokenizer::load(folder / "saved").hash() == tokenizer.hash(),
            "a tokenizer comes back as it was");
  });
  return 0;
}
