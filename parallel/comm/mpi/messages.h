#pragma once

#include <algorithm>
#include <cstdint>

namespace normformer::detail {

/// The most bytes of one MPI message, whose count is an int.
inline constexpr int64_t kMaxMessageBytes = int64_t{1} << 30;

/// Calls send_or_receive(offset, count) for the messages that `bytes` bytes travel as, in order; one empty
/// message for no bytes. The one place where 64-bit counts become MPI's.
template <class Call>
void for_each_message(int64_t bytes, Call&& send_or_receive, int64_t limit = kMaxMessageBytes) {
  int64_t offset = 0;
  do {
    const int64_t count = std::min(limit, bytes - offset);
    send_or_receive(offset, static_cast<int>(count));
    offset += count;
  } while (offset < bytes);
}

}  // namespace normformer::detail
