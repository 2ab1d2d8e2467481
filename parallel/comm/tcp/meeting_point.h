#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "normformer/comm/tcp.h"

#include "socket.h"

namespace normformer::detail {

/// Where to look for rank 0.
struct Directions {
  std::vector<Endpoint> endpoints;  ///< all the same listener; to be tried in this order
  uint64_t invitation = 0;          ///< what rank 0 wants to hear; 0 where it tells nobody beforehand
};

/// The place where the ranks of a job meet, as its address says.
class MeetingPoint {
 public:
  /// ConfigError where the address is none.
  explicit MeetingPoint(const Rendezvous& rendezvous);

  /// Rank 0's listener.
  Socket listen() const;

  /// The host that every rank listens at: empty for all of its own.
  std::string listening_host() const;

  /// Removes a file that an earlier job has left. ConfigError where it is another kind of file.
  void clear() const;

  /// Tells the others of rank 0's listener, by the file if that is how they meet. Throws IoError.
  void announce(const Socket& listener, uint64_t invitation) const;

  /// Removes what was announced.
  void withdraw(uint64_t invitation) const;

  /// What is known of rank 0 now; nothing, and a reason in `why`, where the file is not there or is another
  /// job's.
  std::optional<Directions> find(std::string& why) const;

  bool is_file() const { return !file_.empty(); }
  const std::string& address() const { return address_; }

 private:
  // What the file says.
  struct Announcement {
    std::string job;
    std::string size;
    uint64_t invitation = 0;
    int port = 0;
    std::vector<std::string> hosts;  // rank 0's name, then its numbers
  };
  std::optional<Announcement> read_file() const;

  std::string address_;
  std::string job_;
  int size_;
  std::filesystem::path file_;  // empty where they meet at an endpoint
  Endpoint endpoint_;
};

}  // namespace normformer::detail
