#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fuzz.h"
#include "ledger_layout.h"

namespace normformer {

/// A ledger's file is mostly zeros. Here it is the number of ranks, a byte, and runs of words: where the run
/// begins, counted in words from the file's begin, in two bytes, how many they are, a byte, and the words.
inline std::vector<uint64_t> unpack_ledger(FuzzInput& input) {
  const int world_size = 1 + input.byte() % 16;
  std::vector<uint64_t> words(ledger_layout::file_size(world_size) / sizeof(uint64_t));
  words[0] = ledger_layout::kMagic;
  words[1] = ledger_layout::kVersion;
  words[2] = static_cast<uint64_t>(world_size);
  while (!input.rest().empty()) {
    const size_t begin = input.two_bytes() % words.size();
    const std::string_view run = input.bytes(size_t{8} * input.byte());
    std::memcpy(&words[begin], run.data(), std::min(run.size(), (words.size() - begin) * sizeof(uint64_t)));
  }
  return words;
}

/// What unpack_ledger makes a ledger's words of.
inline std::string pack_ledger(const std::vector<uint64_t>& words, int world_size) {
  std::string packed(1, static_cast<char>(world_size - 1));
  for (size_t begin = 0; begin < words.size();) {
    size_t end = begin;
    while (end < words.size() && words[end] != 0 && end - begin < 255) ++end;
    if (end > begin) {
      packed +=
          {static_cast<char>(begin & 0xff), static_cast<char>(begin >> 8), static_cast<char>(end - begin)};
      packed.append(reinterpret_cast<const char*>(&words[begin]), (end - begin) * sizeof(uint64_t));
    }
    begin = std::max(end, begin + 1);
  }
  return packed;
}

}  // namespace normformer
