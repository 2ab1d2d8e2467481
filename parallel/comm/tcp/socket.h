#pragma once

#include <chrono>
#include <string>

#include <unistd.h>

#include "normformer/core/unique_handle.h"

namespace normformer::detail {

using Deadline = std::chrono::steady_clock::time_point;

/// From now; the number of milliseconds that poll() may wait until then, at least 0.
Deadline after_seconds(double seconds);
int milliseconds_until(Deadline deadline);
bool is_past(Deadline deadline);

struct SocketTraits {
  using Handle = int;
  static Handle none() noexcept { return -1; }
  static void close(Handle socket) noexcept { ::close(socket); }
};
/// A socket, or another descriptor of the system.
using Socket = UniqueHandle<SocketTraits>;

/// A host, by name or by number, and a port.
struct Endpoint {
  std::string host;
  int port = 0;

  std::string describe() const;
};

/// Of "host:port" or "[IPv6]:port". ConfigError where it is neither; `address` is what the user wrote.
Endpoint parse_endpoint(const std::string& text, const std::string& address);

/// A socket that listens and does not block: at a number of this host, or everywhere, over IPv4 and IPv6,
/// where `host` is empty. Port 0 is any free one. Throws CommError.
Socket listen_at(const std::string& host, int port);

/// The port on which a socket listens.
int port_of(const Socket& listener);

/// The next connection that waits at a listener, ready for messages; none where none waits. Throws CommError.
Socket accept_from(const Socket& listener);

/// A connection to the first of the host's addresses that takes one before the deadline, ready for messages;
/// none, and a reason in `why`, where none does.
Socket connect_to(const Endpoint& to, Deadline deadline, std::string& why);

/// The other end's host as a number: "10.0.0.7" or "fe80::1".
std::string number_of_peer(const Socket& socket);

/// Whether a host's number, or "localhost", means the host itself.
bool is_loopback(const std::string& host);

}  // namespace normformer::detail
