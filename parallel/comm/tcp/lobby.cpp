#include "lobby.h"

#include <algorithm>
#include <cerrno>

#include <poll.h>

#include "normformer/core/error.h"

namespace normformer::detail {

namespace {

constexpr double kPatienceSeconds = 10.0;
constexpr size_t kMostVisitors = 512;  // more are strangers: the longest here go

}  // namespace

std::optional<Lobby::Event> Lobby::next(std::span<const int> watched, Deadline deadline) {
  while (!is_past(deadline)) {
    // Watched first, so that their places are their indices.
    std::vector<pollfd> polled;
    for (const int socket : watched) polled.push_back({socket, POLLRDHUP, 0});
    polled.push_back({listener_.get(), POLLIN, 0});
    Deadline until = deadline;
    for (const Visitor& visitor : visitors_) {
      polled.push_back({visitor.socket.get(), POLLIN, 0});
      until = std::min(until, visitor.patience);
    }
    if (poll(polled.data(), polled.size(), milliseconds_until(until)) < 0 && errno != EINTR) {
      throw CommError("cannot wait for connections: " + system_reason());
    }
    // Before visitors: one that comes again has left before.
    for (size_t i = 0; i < watched.size(); ++i) {
      if (polled[i].revents != 0) return Event{Socket(), {}, i};
    }
    take_visitors();
    if (auto event = hear_visitors()) return event;
  }
  return std::nullopt;
}

void Lobby::take_visitors() {
  while (Socket made = accept_from(listener_)) {
    visitors_.push_back(
        {std::move(made), GreetingReader(kMostGreetingBytes), after_seconds(kPatienceSeconds)});
    if (visitors_.size() > kMostVisitors) visitors_.erase(visitors_.begin());
  }
}

std::optional<Lobby::Event> Lobby::hear_visitors() {
  for (auto visitor = visitors_.begin(); visitor != visitors_.end();) {
    const auto state = visitor->reader.read(visitor->socket);
    if (state == GreetingReader::State::complete) {
      Event event{std::move(visitor->socket), visitor->reader.greeting(), 0};
      visitors_.erase(visitor);
      return event;
    }
    const bool goes = state == GreetingReader::State::broken || is_past(visitor->patience);
    visitor = goes ? visitors_.erase(visitor) : visitor + 1;
  }
  return std::nullopt;
}

}  // namespace normformer::detail
