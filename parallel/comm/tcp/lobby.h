#pragma once

#include <optional>
#include <span>
#include <vector>

#include "greeting.h"
#include "socket.h"

namespace normformer::detail {

/// Takes connections at a listener and holds them until they have said who they are. One that talks nonsense,
/// or says nothing for some seconds, is closed; it holds up nobody else.
class Lobby {
 public:
  explicit Lobby(Socket listener) : listener_(std::move(listener)) {}

  struct Event {
    Socket visitor;     ///< none where a watched connection has ended
    Greeting greeting;  ///< the visitor's
    size_t ended = 0;   ///< the index of the watched connection that has
  };

  /// Waits until a visitor has greeted or one of the connections `watched` has ended; nothing where neither
  /// happens before the deadline. Sockets without a connection are passed over. Throws CommError.
  std::optional<Event> next(std::span<const int> watched, Deadline deadline);

 private:
  struct Visitor {
    Socket socket;
    GreetingReader reader;
    Deadline patience;
  };

  void take_visitors();
  std::optional<Event> hear_visitors();

  Socket listener_;
  std::vector<Visitor> visitors_;
};

}  // namespace normformer::detail
