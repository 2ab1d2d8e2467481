#pragma once

#include <string>
#include <vector>

#include "normformer/comm/tcp.h"

#include "socket.h"

namespace normformer::detail {

/// Another rank of the job, and the connection to it.
struct Member {
  Socket socket;  ///< none for this rank itself
  std::string host;
};

/// How a rank is called in messages: "rank 3 (host b)".
std::string name_of_rank(int rank, const std::string& host);

/// Finds all ranks of the job and connects to each; by rank. CommError where not all have come within
/// `timeout_seconds`.
std::vector<Member> join_ranks(const Rendezvous& rendezvous, double timeout_seconds);

}  // namespace normformer::detail
