// A rank's ledger: the input as a file, and as words written over that of an idle rank (ledger_words.h).
#include <cstring>

#include "normformer/comm/ledger_file.h"

#include "fuzz.h"
#include "ledger_words.h"

using namespace normformer;

namespace {

void read_ledger_in(std::span<const uint64_t> words, size_t bytes) {
  takes([&] {
    const RankLedger ledger = parse_ledger(std::as_bytes(words).first(bytes), "it");
    RankLedger other = ledger;
    other.rank = (ledger.rank + 1) % ledger.world_size;
    static_cast<void>(diagnose(std::vector{ledger, other}));
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint64_t> raw(size / sizeof(uint64_t) + 1);
  if (size > 0) std::memcpy(raw.data(), data, size);
  read_ledger_in(raw, size);

  FuzzInput input(data, size);
  const std::vector<uint64_t> words = unpack_ledger(input);
  read_ledger_in(words, words.size() * sizeof(uint64_t));
  return 0;
}
