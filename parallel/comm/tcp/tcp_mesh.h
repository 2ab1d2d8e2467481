#pragma once

#include <atomic>
#include <compare>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <poll.h>

#include "normformer/comm/group.h"

#include "join.h"

namespace normformer::detail {

/// The connections of this process to all other ranks, and the thread that moves bytes over them. Ranks are
/// world ranks here. Every function throws CommError once the mesh has failed, and the mesh fails for all
/// ranks. Safe from several threads.
class TcpMesh {
 public:
  /// How many messages somebody still waits for.
  struct Tally {
    int open = 0;
    bool awaited = false;
  };

  /// What stands before a message's bytes.
  struct Header {
    uint64_t group;
    int64_t bytes;
    int32_t tag;
    uint32_t kind;
  };

  /// A message on its way out. `data` is read until the tally says that it has been sent.
  struct Departure {
    Header header;
    const std::byte* data;
    std::shared_ptr<Tally> tally;
    Tensor keep_alive;
    std::unique_ptr<std::byte[]> copy;  // where data lies if the tensor had to go
    int64_t sent = 0;                   // of header and data together
  };

  /// `members` by rank; none for `rank` itself has a socket.
  TcpMesh(int rank, std::vector<Member> members);
  /// Says goodbye to the others, unless an exception is in flight: then they fail.
  ~TcpMesh();
  TcpMesh(const TcpMesh&) = delete;
  TcpMesh& operator=(const TcpMesh&) = delete;

  /// The number of the group that came from the `split`-th split of group `parent` and whose first member is
  /// `first_member`; the same on all its ranks.
  uint64_t group_number(uint64_t parent, int split, int first_member);

  /// As GroupImpl::exchange.
  void exchange(uint64_t group, std::span<const Outgoing> sends, std::span<const Incoming> receives,
                int number);

  /// As GroupImpl::receive.
  void receive(uint64_t group, std::byte* data, int64_t bytes, int from, int tag);

  /// Begin the same, and return what tells when it is done.
  std::shared_ptr<Tally> start_exchange(uint64_t group, std::span<const Outgoing> sends,
                                        std::span<const Incoming> receives, int number);
  std::shared_ptr<Tally> start_receive(uint64_t group, std::byte* data, int64_t bytes, int from, int tag);
  bool is_done(const Tally& tally);

  /// Begins to send a tensor; never waits.
  std::shared_ptr<Departure> send(uint64_t group, const Tensor& tensor, int to, int tag);

  /// Returns once the tensor has been handed to the system, and lets go of it.
  void await_sent(Departure& departure);

  /// Lets go of the tensor at once; the message goes on as a copy.
  void abandon(Departure& departure);

 private:
  // A message on its way in, or to be: into `target`, which is the receiver's memory or `own`.
  struct Arrival {
    std::byte* target = nullptr;
    int64_t bytes = 0;
    int64_t received = 0;
    std::shared_ptr<Tally> tally;  // of a receiver, if there is one already
    std::unique_ptr<std::byte[]> own;

    bool complete() const { return received == bytes; }
  };

  struct Address {
    uint64_t group;
    int from;
    int tag;
    auto operator<=>(const Address&) const = default;
  };

  // Messages that nobody has asked for yet, or receivers that wait: never both.
  struct Box {
    std::deque<std::shared_ptr<Arrival>> arrived;
    std::deque<std::shared_ptr<Arrival>> awaited;
  };

  struct Peer {
    Socket socket;  // none for this rank itself, and where the peer has gone in good order
    std::string name;
    std::deque<std::shared_ptr<Departure>> leaving;
    Header header{};
    size_t header_bytes = 0;
    std::shared_ptr<Arrival> arriving;  // where the header has been read
    bool has_left = false;              // it said goodbye
    bool refuses = false;               // it takes no more; reading will tell why
    bool finished = false;              // nothing more will be sent to it
  };

  Peer& peer(int rank) { return peers_[static_cast<size_t>(rank)]; }

  std::unique_lock<std::mutex> enter();
  std::shared_ptr<Tally> post_exchange(uint64_t group, std::span<const Outgoing> sends,
                                       std::span<const Incoming> receives, int number);
  std::shared_ptr<Tally> post_receiver(uint64_t group, std::byte* data, int64_t bytes, int from, int tag);
  void await(std::unique_lock<std::mutex>& lock, Tally& tally);
  void count_down(Tally& tally);
  static std::shared_ptr<Arrival> make_receiver(std::byte* data, int64_t bytes, std::shared_ptr<Tally> tally);
  void throw_failure() const;
  void fail(const std::string& why);
  void tell_failure(Peer& peer);
  void wake_thread() const;

  void post_send(int to, const std::shared_ptr<Departure>& departure);
  void post_receive(const Address& address, const std::shared_ptr<Arrival>& receiver);
  void hand_over(Arrival& message, Arrival& receiver);
  void deliver_to_self(Departure& departure);
  void check_size(int from, int64_t sent, int64_t expected);
  bool is_awaited(int rank) const;

  void run();
  void move_bytes(std::unique_lock<std::mutex>& lock);
  void list_sockets();
  bool is_over() const;
  void write_to(Peer& peer);
  void read_from(Peer& peer);
  void took(Peer& peer, int64_t bytes);
  void begin_arrival(Peer& peer);
  void end_arrival(Peer& peer);
  void notice_end(Peer& peer);
  void say_goodbye();

  int rank_;
  std::vector<Peer> peers_;
  Socket alarm_;  // what wakes the thread

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> callers_{0};  // who want the mutex; the thread lets them in first
  std::map<Address, Box> mail_;
  std::set<uint64_t> groups_;
  bool failed_ = false;
  std::string why_;
  bool ending_ = false;
  bool orderly_ = true;
  Deadline end_by_{};
  Deadline stay_until_{};

  std::vector<pollfd> polled_;  // the thread's alone: the alarm, then a peer each
  std::thread thread_;
};

}  // namespace normformer::detail
