#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace normformer {

/// Four 32-bit random words from a 128-bit counter and a 64-bit key: Philox4x32-10.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3.
/// A pure function: every random number of a run is addressed by what it is for, never by who draws it.
constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

/// A stream of random numbers: the key that philox4x32 takes. Two streams made from different facts are
/// unrelated.
struct RandomStream {
  uint64_t key = 0;

  /// The stream for one more fact (a batch index, a layer, a site): order of facts matters.
  constexpr RandomStream with(uint64_t fact) const { return {mix(key ^ mix(fact + 0x9E3779B97F4A7C15ull))}; }

  /// The stream for one more named fact, such as a parameter's name.
  constexpr RandomStream with(std::string_view name) const {
    uint64_t hash = 0xCBF29CE484222325ull;  // FNV-1a, mixed once more by the overload above
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
    return with(hash ^ (uint64_t{name.size()} << 56));
  }

  /// The four words at `block` of sub-stream `lane`. Element i of a tensor uses word i % 4 of block i / 4.
  constexpr std::array<uint32_t, 4> words(uint64_t block, uint64_t lane = 0) const {
    return philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                       static_cast<uint32_t>(lane), static_cast<uint32_t>(lane >> 32)},
                      {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
  }

  /// A 64-bit random integer at `index`.
  constexpr uint64_t u64(uint64_t index) const {
    const auto w = words(index / 2, 1);
    const auto i = (index % 2) * 2;
    return (uint64_t{w[i + 1]} << 32) | w[i];
  }

 private:
  // The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that spreads every bit.
  static constexpr uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  }
};

/// A double in (0, 1) from one 32-bit word; never 0 or 1.
constexpr double to_unit_open(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

}  // namespace normformer
