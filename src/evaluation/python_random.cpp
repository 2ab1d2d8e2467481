#include "python_random.h"

namespace normformer {

PythonRandom::PythonRandom(uint32_t seed) {
  const auto mixed = [this](std::size_t i) { return state_[i - 1] ^ (state_[i - 1] >> 30); };
  state_[0] = 19650218;
  for (uint32_t i = 1; i < kWords; ++i) state_[i] = 1812433253u * mixed(i) + i;
  // Of a key of one word: it goes in, and its place, which is 0, does not.
  std::size_t i = 1;
  const auto go_on = [&] {
    if (++i < kWords) return;
    state_[0] = state_[kWords - 1];
    i = 1;
  };
  for (std::size_t n = 0; n < kWords; ++n, go_on()) state_[i] = (state_[i] ^ (mixed(i) * 1664525u)) + seed;
  for (std::size_t n = 1; n < kWords; ++n, go_on()) {
    state_[i] = (state_[i] ^ (mixed(i) * 1566083941u)) - static_cast<uint32_t>(i);
  }
  state_[0] = 0x80000000u;
}

void PythonRandom::renew() {
  constexpr std::size_t kMiddle = 397;
  for (std::size_t i = 0; i < kWords; ++i) {
    const uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % kWords] & 0x7FFFFFFFu);
    state_[i] = state_[(i + kMiddle) % kWords] ^ (y >> 1) ^ ((y & 1u) * 0x9908B0DFu);
  }
  used_ = 0;
}

uint32_t PythonRandom::word() {
  if (used_ == kWords) renew();
  uint32_t y = state_[used_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9D2C5680u;
  y ^= (y << 15) & 0xEFC60000u;
  return y ^ (y >> 18);
}

double PythonRandom::next() {
  const uint32_t high = word() >> 5;
  const uint32_t low = word() >> 6;
  return (high * 67108864.0 + low) / 9007199254740992.0;
}

}  // namespace normformer
