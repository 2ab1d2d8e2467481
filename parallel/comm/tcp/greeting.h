#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "socket.h"

namespace normformer::detail {

/// What is said over a connection before it carries messages: texts without line breaks, after a header that
/// no stranger sends by chance.
struct Greeting {
  enum class Kind : uint32_t {
    join,      ///< to rank 0: who would like to take part
    accepted,  ///< rank 0's answer: wait for the others
    refused,   ///< rank 0's answer: the reason
    members,   ///< from rank 0: all have come, and where they are
    link,      ///< to another rank: whose connection this is
  };
  Kind kind = Kind::join;
  std::vector<std::string> fields;
};

/// Reads one greeting off a socket that does not block, and not a byte more.
class GreetingReader {
 public:
  enum class State { incomplete, complete, broken };

  /// A greeting longer than `most_bytes` is broken, as is any other nonsense and a connection that ends.
  explicit GreetingReader(size_t most_bytes);

  State read(const Socket& socket);

  /// What was read, once complete.
  const Greeting& greeting() const { return greeting_; }

 private:
  State parse_header();

  size_t most_bytes_;
  std::vector<char> bytes_;
  size_t filled_ = 0;
  bool in_text_ = false;
  Greeting greeting_;
};

/// The longest greeting that is not a list of members.
inline constexpr size_t kMostGreetingBytes = 4096;

/// Whether all of it was sent before the deadline.
bool send_greeting(const Socket& socket, const Greeting& greeting, Deadline deadline);

/// The next greeting; nothing where the connection ends, brings nonsense or nothing before the deadline.
std::optional<Greeting> await_greeting(const Socket& socket, size_t most_bytes, Deadline deadline);

/// The lines of a text, without their ends.
std::vector<std::string> lines_of(std::string_view text);

/// A whole number that is all of a text.
std::optional<uint64_t> parse_number(std::string_view text);

}  // namespace normformer::detail
