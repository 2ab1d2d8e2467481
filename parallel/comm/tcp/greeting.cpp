#include "greeting.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include <poll.h>
#include <sys/socket.h>

#include "normformer/core/error.h"

namespace normformer::detail {

namespace {

struct GreetingHeader {
  char magic[8];
  uint32_t version;  // of all that is said over a connection
  uint32_t kind;
  uint64_t bytes;
};
constexpr char kMagic[8] = {'n', 'o', 'r', 'm', 't', 'c', 'p', '\n'};
constexpr uint32_t kVersion = 1;

bool await_events(const Socket& socket, short events, Deadline deadline) {
  pollfd waiting{socket.get(), events, 0};
  while (!is_past(deadline)) {
    const int ready = poll(&waiting, 1, milliseconds_until(deadline));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
  }
  return false;
}

}  // namespace

GreetingReader::GreetingReader(size_t most_bytes) : most_bytes_(most_bytes), bytes_(sizeof(GreetingHeader)) {}

GreetingReader::State GreetingReader::read(const Socket& socket) {
  while (filled_ < bytes_.size()) {
    const ssize_t got = recv(socket.get(), bytes_.data() + filled_, bytes_.size() - filled_, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return State::incomplete;
    if (got <= 0) return State::broken;
    filled_ += static_cast<size_t>(got);
    if (filled_ == bytes_.size() && !in_text_ && parse_header() == State::broken) return State::broken;
  }
  greeting_.fields = lines_of({bytes_.data(), bytes_.size()});
  return State::complete;
}

GreetingReader::State GreetingReader::parse_header() {
  GreetingHeader header;
  std::memcpy(&header, bytes_.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.version != kVersion ||
      header.kind > static_cast<uint32_t>(Greeting::Kind::link) || header.bytes > most_bytes_) {
    return State::broken;
  }
  greeting_.kind = static_cast<Greeting::Kind>(header.kind);
  in_text_ = true;
  bytes_.resize(header.bytes);
  filled_ = 0;
  return State::incomplete;
}

bool send_greeting(const Socket& socket, const Greeting& greeting, Deadline deadline) {
  std::string text(sizeof(GreetingHeader), '\0');
  for (const std::string& field : greeting.fields) {
    NF_CHECK(field.find('\n') == std::string::npos, "a line break in the greeting \"{}\"", field);
    text += field + '\n';
  }
  GreetingHeader header{{}, kVersion, static_cast<uint32_t>(greeting.kind), text.size() - sizeof header};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::memcpy(text.data(), &header, sizeof header);
  for (size_t sent = 0; sent < text.size();) {
    const ssize_t n = send(socket.get(), text.data() + sent, text.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      sent += static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!await_events(socket, POLLOUT, deadline)) return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

std::optional<Greeting> await_greeting(const Socket& socket, size_t most_bytes, Deadline deadline) {
  GreetingReader reader(most_bytes);
  while (await_events(socket, POLLIN, deadline)) {
    const auto state = reader.read(socket);
    if (state == GreetingReader::State::complete) return reader.greeting();
    if (state == GreetingReader::State::broken) return std::nullopt;
  }
  return std::nullopt;
}

std::optional<uint64_t> parse_number(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    lines.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

}  // namespace normformer::detail
