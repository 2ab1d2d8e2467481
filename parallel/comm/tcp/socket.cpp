#include "socket.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include "normformer/core/error.h"

namespace normformer::detail {

Deadline after_seconds(double seconds) {
  return std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                std::chrono::duration<double>(seconds));
}

int milliseconds_until(Deadline deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 1 << 30));
}

bool is_past(Deadline deadline) { return std::chrono::steady_clock::now() >= deadline; }

std::string Endpoint::describe() const {
  return fmt::format("{}:{}", host.find(':') == std::string::npos ? host : "[" + host + "]", port);
}

Endpoint parse_endpoint(const std::string& text, const std::string& address) {
  const size_t colon = text.rfind(':');
  Endpoint endpoint;
  const char* const end = text.data() + text.size();
  const bool read = colon != std::string::npos &&
                    std::from_chars(text.data() + colon + 1, end, endpoint.port).ptr == end &&
                    endpoint.port > 0 && endpoint.port < 65536;
  endpoint.host = text.substr(0, read ? colon : 0);
  if (endpoint.host.size() > 2 && endpoint.host.front() == '[' && endpoint.host.back() == ']') {
    endpoint.host = endpoint.host.substr(1, endpoint.host.size() - 2);
  } else if (endpoint.host.find(':') != std::string::npos) {
    endpoint.host.clear();
  }
  if (endpoint.host.empty()) {
    throw ConfigError(fmt::format(
        "{} is no address where ranks can meet: write tcp://host:port, and an IPv6 address in brackets",
        address));
  }
  return endpoint;
}

namespace {

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

// Null, and a reason in `why`, where the name has no address.
Addresses resolve(const Endpoint& endpoint, int flags, std::string& why) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int code = getaddrinfo(endpoint.host.c_str(), std::to_string(endpoint.port).c_str(), &hints, &list);
  if (code != 0) why = fmt::format("{} cannot be resolved: {}", endpoint.host, gai_strerror(code));
  return Addresses(code == 0 ? list : nullptr);
}

void set(const Socket& socket, int level, int option, int value) {
  setsockopt(socket.get(), level, option, &value, sizeof value);
}

Socket open_socket(int family) {
  return Socket(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

// Messages leave at once, and a host that has vanished is noticed within a minute.
void prepare_for_messages(const Socket& socket) {
  set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket, IPPROTO_TCP, TCP_KEEPIDLE, 15);
  set(socket, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(socket, IPPROTO_TCP, TCP_KEEPCNT, 9);
  set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 60'000);
}

bool listens(const Socket& socket, const sockaddr* at, socklen_t length) {
  set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  return bind(socket.get(), at, length) == 0 && listen(socket.get(), SOMAXCONN) == 0;
}

Socket listen_everywhere(int port) {
  Socket both = open_socket(AF_INET6);
  if (both) {
    set(both, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    sockaddr_in6 any{};
    any.sin6_family = AF_INET6;
    any.sin6_addr = in6addr_any;
    any.sin6_port = htons(static_cast<uint16_t>(port));
    if (listens(both, reinterpret_cast<const sockaddr*>(&any), sizeof any)) return both;
    if (errno == EADDRINUSE) return Socket();
  }
  Socket old = open_socket(AF_INET);
  sockaddr_in any{};
  any.sin_family = AF_INET;
  any.sin_addr.s_addr = htonl(INADDR_ANY);
  any.sin_port = htons(static_cast<uint16_t>(port));
  return old && listens(old, reinterpret_cast<const sockaddr*>(&any), sizeof any) ? std::move(old) : Socket();
}

Socket listen_at_number(const std::string& host, int port) {
  std::string why;
  const Addresses found = resolve({host, port}, AI_NUMERICHOST | AI_PASSIVE, why);
  if (found == nullptr) throw CommError(why);
  Socket socket = open_socket(found->ai_family);
  return socket && listens(socket, found->ai_addr, found->ai_addrlen) ? std::move(socket) : Socket();
}

// 0, or what the system says against it.
int connect_before(const Socket& socket, const addrinfo& to, Deadline deadline) {
  if (connect(socket.get(), to.ai_addr, to.ai_addrlen) == 0) return 0;
  if (errno != EINPROGRESS) return errno;
  pollfd waiting{socket.get(), POLLOUT, 0};
  int ready = 0;
  do {
    ready = poll(&waiting, 1, milliseconds_until(deadline));
  } while (ready < 0 && errno == EINTR);
  if (ready <= 0) return ETIMEDOUT;
  int error = 0;
  socklen_t length = sizeof error;
  return getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

}  // namespace

Socket listen_at(const std::string& host, int port) {
  Socket listener = host.empty() ? listen_everywhere(port) : listen_at_number(host, port);
  if (!listener) {
    throw CommError(fmt::format("cannot listen on port {}: {}{}", port, system_reason(),
                                errno == EADDRINUSE ? "; choose another, since a launcher such as torchrun "
                                                      "may hold it itself"
                                                    : ""));
  }
  return listener;
}

int port_of(const Socket& listener) {
  sockaddr_storage at{};
  socklen_t length = sizeof at;
  if (getsockname(listener.get(), reinterpret_cast<sockaddr*>(&at), &length) != 0) {
    throw CommError("a listener has no port: " + system_reason());
  }
  // The port lies at the same place for both families.
  return ntohs(reinterpret_cast<const sockaddr_in*>(&at)->sin_port);
}

Socket accept_from(const Socket& listener) {
  Socket made(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (made) {
    prepare_for_messages(made);
  } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS || errno == EBADF) {
    throw CommError("cannot take a connection: " + system_reason());
  }
  return made;
}

Socket connect_to(const Endpoint& to, Deadline deadline, std::string& why) {
  const Addresses found = resolve(to, 0, why);
  for (const addrinfo* address = found.get(); address != nullptr; address = address->ai_next) {
    Socket socket = open_socket(address->ai_family);
    const int error = socket ? connect_before(socket, *address, deadline) : errno;
    if (error == 0) {
      prepare_for_messages(socket);
      return socket;
    }
    errno = error;
    why = fmt::format("{}: {}", to.describe(), system_reason());
  }
  return Socket();
}

std::string number_of_peer(const Socket& socket) {
  sockaddr_storage at{};
  socklen_t length = sizeof at;
  char text[NI_MAXHOST] = {};
  if (getpeername(socket.get(), reinterpret_cast<sockaddr*>(&at), &length) != 0 ||
      getnameinfo(reinterpret_cast<const sockaddr*>(&at), length, text, sizeof text, nullptr, 0,
                  NI_NUMERICHOST) != 0) {
    return "";
  }
  // How a listener for both families shows an IPv4 address.
  const std::string number = text;
  return number.starts_with("::ffff:") ? number.substr(7) : number;
}

bool is_loopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

}  // namespace normformer::detail
