#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "normformer/core/error.h"

namespace normformer {

/// Ends the process where a property does not hold, so that libFuzzer keeps the input.
inline void require(bool holds, std::string_view property) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %.*s\n", static_cast<int>(property.size()), property.data());
  std::abort();
}

/// Runs a reader of outside bytes. Returns whether it took them: an Error that blames them is an answer, and
/// anything else, LogicError among it, ends the process.
template <class Body>
bool takes(Body&& body) {
  try {
    body();
    return true;
  } catch (const Error& e) {
    const ExitCode code = e.exit_code();
    const bool blames_input =
        code == ExitCode::bad_usage || code == ExitCode::bad_data || code == ExitCode::io_failure;
    require(blames_input, e.what());
    return false;
  }
}

/// An input of libFuzzer, taken apart from its front; what is not there counts as zeros or as empty.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  std::string_view rest() const { return rest_; }

  uint8_t byte() {
    if (rest_.empty()) return 0;
    const auto first = static_cast<uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return first;
  }

  uint16_t two_bytes() {
    const uint8_t low = byte();
    return static_cast<uint16_t>(low | byte() << 8);
  }

  std::string_view bytes(size_t count) {
    const std::string_view part = rest_.substr(0, count);
    rest_.remove_prefix(part.size());
    return part;
  }

  /// Bytes behind their number in two bytes.
  std::string_view part() { return bytes(two_bytes()); }

  /// The bytes before the next `end`, which is left out.
  std::string_view until(char end) {
    const std::string_view part = bytes(std::min(rest_.find(end), rest_.size()));
    byte();
    return part;
  }

 private:
  std::string_view rest_;
};

}  // namespace normformer
