#include "tcp_mesh.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "normformer/core/error.h"

namespace normformer::detail {

namespace {

constexpr int tag_of_exchange(int number) { return -1 - number; }
constexpr double kGoodbyeSeconds = 2.0;
constexpr double kLastSeconds = 0.2;
constexpr int64_t kSliceBytes = 256 << 10;  // moved for one peer before others have their turn
constexpr int64_t kMostMessageBytes = int64_t{1} << 46;
constexpr size_t kMostReasonBytes = 1000;

enum Kind : uint32_t {
  kMessage = 0x4e460001,
  kGoodbye,  // the sender has ended in good order
  kFailure,  // the sender has failed, for the reason that follows
};

std::shared_ptr<TcpMesh::Departure> make_departure(uint64_t group, int tag, const std::byte* data,
                                                   int64_t bytes, std::shared_ptr<TcpMesh::Tally> tally) {
  auto made = std::make_shared<TcpMesh::Departure>();
  made->header = {group, bytes, tag, kMessage};
  made->data = data;
  made->tally = std::move(tally);
  return made;
}

// What is left of a message, at most a slice; two parts, the second perhaps empty.
std::pair<iovec, iovec> rest_of(TcpMesh::Departure& departure) {
  constexpr auto kHeader = static_cast<int64_t>(sizeof(TcpMesh::Header));
  const int64_t header_sent = std::min(departure.sent, kHeader);
  const int64_t data_sent = departure.sent - header_sent;
  auto* const header = reinterpret_cast<std::byte*>(&departure.header);
  // sendmsg reads only, but its structure knows no const.
  auto* const data = const_cast<std::byte*>(departure.data);
  return {{header + header_sent, static_cast<size_t>(kHeader - header_sent)},
          {data_sent > 0 ? data + data_sent : data,
           static_cast<size_t>(std::min(departure.header.bytes - data_sent, kSliceBytes))}};
}

ssize_t send_parts(int socket, iovec* parts, size_t count) {
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = count;
  return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

// Spreads the bits of a number over all of it (the finaliser of SplitMix64).
uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

}  // namespace

TcpMesh::TcpMesh(int rank, std::vector<Member> members)
    : rank_(rank), peers_(members.size()), alarm_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (!alarm_) throw CommError("no eventfd: " + system_reason());
  for (size_t r = 0; r < members.size(); ++r) {
    peers_[r].socket = std::move(members[r].socket);
    peers_[r].name = name_of_rank(static_cast<int>(r), members[r].host);
  }
  thread_ = std::thread([this] { run(); });
}

TcpMesh::~TcpMesh() {
  {
    const auto lock = enter();
    ending_ = true;
    orderly_ = !failed_ && std::uncaught_exceptions() == 0;
    end_by_ = after_seconds(kGoodbyeSeconds);
    if (orderly_) say_goodbye();
    wake_thread();
  }
  thread_.join();
  std::this_thread::sleep_until(stay_until_);
}

uint64_t TcpMesh::group_number(uint64_t parent, int split, int first_member) {
  const uint64_t steps = (uint64_t{static_cast<uint32_t>(split)} << 32) | static_cast<uint32_t>(first_member);
  const uint64_t number = mix(mix(parent + 0x9e3779b97f4a7c15u) ^ steps);
  const auto lock = enter();
  NF_CHECK(groups_.insert(number).second, "two groups have the number {}", number);
  return number;
}

// --- The callers' side ---

std::unique_lock<std::mutex> TcpMesh::enter() {
  ++callers_;
  std::unique_lock lock(mutex_);
  --callers_;
  return lock;
}

void TcpMesh::await(std::unique_lock<std::mutex>& lock, Tally& tally) {
  if (tally.open == 0) return;
  tally.awaited = true;
  wake_.wait(lock, [&] { return tally.open == 0 || failed_; });
  if (tally.open > 0) throw_failure();
  --callers_;
}

void TcpMesh::count_down(Tally& tally) {
  if (--tally.open > 0 || !tally.awaited) return;
  ++callers_;
  wake_.notify_all();
}

void TcpMesh::throw_failure() const {
  if (failed_) throw CommError(why_);
}

void TcpMesh::fail(const std::string& why) {
  if (failed_) return;
  failed_ = true;
  why_ = why;
  for (Peer& peer : peers_) {
    if (peer.socket) tell_failure(peer);
  }
  wake_.notify_all();
  wake_thread();
}

// So that all name who failed first. Where a message is half sent, nothing else can be said: there the
// connection stays a little longer, so that the other hears from elsewhere before it ends.
void TcpMesh::tell_failure(Peer& peer) {
  if (!peer.leaving.empty() && peer.leaving.front()->sent > 0) {
    stay_until_ = after_seconds(kLastSeconds);
    return;
  }
  Header header{0, static_cast<int64_t>(std::min(why_.size(), kMostReasonBytes)), 0, kFailure};
  iovec parts[] = {{&header, sizeof header}, {why_.data(), static_cast<size_t>(header.bytes)}};
  send_parts(peer.socket.get(), parts, 2);
  shutdown(peer.socket.get(), SHUT_WR);
}

void TcpMesh::wake_thread() const {
  const uint64_t one = 1;
  // Only a counter that is full refuses, which wakes as well.
  static_cast<void>(!write(alarm_.get(), &one, sizeof one));
}

void TcpMesh::check_size(int from, int64_t sent, int64_t expected) {
  if (sent == expected) return;
  fail(fmt::format("{} sent {} bytes where {} expected {}", peer(from).name, sent, peer(rank_).name,
                   expected));
}

void TcpMesh::post_send(int to, const std::shared_ptr<Departure>& departure) {
  ++departure->tally->open;
  if (to == rank_) return deliver_to_self(*departure);
  Peer& there = peer(to);
  if (there.has_left) {
    fail(fmt::format("{} has ended, but {} sends to it", there.name, peer(rank_).name));
    throw_failure();
  }
  there.leaving.push_back(departure);
  if (there.leaving.size() == 1) write_to(there);
  if (!there.leaving.empty()) wake_thread();
}

void TcpMesh::deliver_to_self(Departure& departure) {
  Arrival message;
  message.bytes = message.received = departure.header.bytes;
  const auto size = static_cast<size_t>(message.bytes);
  message.own = std::make_unique_for_overwrite<std::byte[]>(size);
  message.target = message.own.get();
  if (size > 0) std::memcpy(message.target, departure.data, size);
  count_down(*departure.tally);
  const Address address{departure.header.group, rank_, departure.header.tag};
  Box& box = mail_[address];
  if (box.awaited.empty()) {
    box.arrived.push_back(std::make_shared<Arrival>(std::move(message)));
    return;
  }
  const std::shared_ptr<Arrival> receiver = box.awaited.front();
  box.awaited.pop_front();
  if (box.awaited.empty()) mail_.erase(address);
  check_size(rank_, message.bytes, receiver->bytes);
  throw_failure();
  hand_over(message, *receiver);
}

void TcpMesh::post_receive(const Address& address, const std::shared_ptr<Arrival>& receiver) {
  ++receiver->tally->open;
  const auto found = mail_.find(address);
  if (found == mail_.end() || found->second.arrived.empty()) {
    if (peer(address.from).has_left) {
      fail(fmt::format("{} has ended, but {} waits for it", peer(address.from).name, peer(rank_).name));
      throw_failure();
    }
    mail_[address].awaited.push_back(receiver);
    return;
  }
  const std::shared_ptr<Arrival> message = found->second.arrived.front();
  found->second.arrived.pop_front();
  if (found->second.arrived.empty()) mail_.erase(found);
  check_size(address.from, message->bytes, receiver->bytes);
  throw_failure();
  hand_over(*message, *receiver);
}

// Gives a message that came unasked to its receiver; what has not come yet goes to the receiver's memory.
void TcpMesh::hand_over(Arrival& message, Arrival& receiver) {
  if (message.received > 0) {
    std::memcpy(receiver.target, message.target, static_cast<size_t>(message.received));
  }
  message.target = receiver.target;
  message.tally = receiver.tally;
  message.own.reset();
  if (message.complete()) count_down(*message.tally);
}

std::shared_ptr<TcpMesh::Tally> TcpMesh::post_exchange(uint64_t group, std::span<const Outgoing> sends,
                                                       std::span<const Incoming> receives, int number) {
  const int tag = tag_of_exchange(number);
  auto tally = std::make_shared<Tally>();
  throw_failure();
  for (const Incoming& in : receives) {
    post_receive({group, in.from, tag}, make_receiver(in.data, in.bytes, tally));
  }
  for (const Outgoing& out : sends) {
    post_send(out.to, make_departure(group, tag, out.data, out.bytes, tally));
  }
  return tally;
}

std::shared_ptr<TcpMesh::Arrival> TcpMesh::make_receiver(std::byte* data, int64_t bytes,
                                                         std::shared_ptr<Tally> tally) {
  auto receiver = std::make_shared<Arrival>();
  receiver->target = data;
  receiver->bytes = bytes;
  receiver->tally = std::move(tally);
  return receiver;
}

std::shared_ptr<TcpMesh::Tally> TcpMesh::post_receiver(uint64_t group, std::byte* data, int64_t bytes,
                                                       int from, int tag) {
  throw_failure();
  if (from == rank_ && !mail_.contains({group, from, tag})) {
    throw CommError(peer(rank_).name + " waits for a message to itself that it has not sent");
  }
  auto tally = std::make_shared<Tally>();
  post_receive({group, from, tag}, make_receiver(data, bytes, tally));
  return tally;
}

void TcpMesh::exchange(uint64_t group, std::span<const Outgoing> sends, std::span<const Incoming> receives,
                       int number) {
  auto lock = enter();
  await(lock, *post_exchange(group, sends, receives, number));
}

std::shared_ptr<TcpMesh::Tally> TcpMesh::start_exchange(uint64_t group, std::span<const Outgoing> sends,
                                                        std::span<const Incoming> receives, int number) {
  const auto lock = enter();
  return post_exchange(group, sends, receives, number);
}

void TcpMesh::receive(uint64_t group, std::byte* data, int64_t bytes, int from, int tag) {
  auto lock = enter();
  await(lock, *post_receiver(group, data, bytes, from, tag));
}

std::shared_ptr<TcpMesh::Tally> TcpMesh::start_receive(uint64_t group, std::byte* data, int64_t bytes,
                                                       int from, int tag) {
  const auto lock = enter();
  return post_receiver(group, data, bytes, from, tag);
}

bool TcpMesh::is_done(const Tally& tally) {
  const auto lock = enter();
  if (tally.open > 0) throw_failure();
  return tally.open == 0;
}

std::shared_ptr<TcpMesh::Departure> TcpMesh::send(uint64_t group, const Tensor& tensor, int to, int tag) {
  auto departure = make_departure(group, tag, static_cast<const std::byte*>(tensor.raw()), tensor.nbytes(),
                                  std::make_shared<Tally>());
  departure->keep_alive = tensor;
  const auto lock = enter();
  throw_failure();
  post_send(to, departure);
  return departure;
}

void TcpMesh::await_sent(Departure& departure) {
  Tensor tensor;  // goes after the lock, here: what memory a rank holds does not depend on timing
  auto lock = enter();
  await(lock, *departure.tally);
  tensor = std::move(departure.keep_alive);
}

void TcpMesh::abandon(Departure& departure) {
  Tensor tensor;
  const auto lock = enter();
  tensor = std::move(departure.keep_alive);
  if (departure.tally->open == 0 || failed_) return;
  const auto size = static_cast<size_t>(departure.header.bytes);
  departure.copy = std::make_unique_for_overwrite<std::byte[]>(size);
  if (size > 0) std::memcpy(departure.copy.get(), departure.data, size);
  departure.data = departure.copy.get();
}

// --- The thread's side ---

void TcpMesh::run() {
  std::unique_lock lock(mutex_);
  try {
    while (!is_over()) move_bytes(lock);
  } catch (const std::exception& e) {
    if (!lock.owns_lock()) lock.lock();
    fail(fmt::format("{}: {}", peer(rank_).name, e.what()));
  }
}

bool TcpMesh::is_over() const {
  if (failed_) return true;
  if (!ending_) return false;
  if (!orderly_ || is_past(end_by_)) return true;
  return std::none_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return bool(peer.socket); });
}

void TcpMesh::list_sockets() {
  polled_.assign(1, {alarm_.get(), POLLIN, 0});
  for (const Peer& peer : peers_) {
    const bool writes = !peer.leaving.empty() && !peer.refuses;
    polled_.push_back({peer.socket.get(), static_cast<short>(writes ? POLLIN | POLLOUT : POLLIN), 0});
  }
}

void TcpMesh::move_bytes(std::unique_lock<std::mutex>& lock) {
  list_sockets();
  const int wait = ending_ ? milliseconds_until(end_by_) : -1;
  lock.unlock();
  if (poll(polled_.data(), polled_.size(), wait) < 0 && errno != EINTR) {
    throw CommError("cannot wait for messages: " + system_reason());
  }
  while (callers_ > 0) std::this_thread::yield();
  lock.lock();
  uint64_t alarms = 0;
  static_cast<void>(!read(alarm_.get(), &alarms, sizeof alarms));
  for (size_t r = 0; r < peers_.size() && !failed_; ++r) {
    Peer& peer = peers_[r];
    const int events = polled_[r + 1].revents;
    if ((events & POLLOUT) != 0) write_to(peer);
    if ((events & ~POLLOUT) != 0 && !failed_) read_from(peer);
  }
}

void TcpMesh::write_to(Peer& peer) {
  if (peer.refuses) return;
  for (int64_t budget = kSliceBytes; budget > 0 && !peer.leaving.empty();) {
    const std::shared_ptr<Departure> departure = peer.leaving.front();
    const auto [header, data] = rest_of(*departure);
    iovec parts[] = {header, data};
    const ssize_t sent = send_parts(peer.socket.get(), parts, 2);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) {
      peer.refuses = !would_block();
      return;
    }
    budget -= sent;
    departure->sent += sent;
    if (departure->sent < static_cast<int64_t>(sizeof(Header)) + departure->header.bytes) continue;
    peer.leaving.pop_front();
    if (departure->tally != nullptr) count_down(*departure->tally);
  }
  if (ending_ && peer.leaving.empty() && !peer.finished) {
    peer.finished = true;
    shutdown(peer.socket.get(), SHUT_WR);
  }
}

void TcpMesh::read_from(Peer& peer) {
  for (int64_t budget = kSliceBytes; budget > 0 && peer.socket && !failed_;) {
    std::byte* into = reinterpret_cast<std::byte*>(&peer.header) + peer.header_bytes;
    auto wanted = static_cast<int64_t>(sizeof(Header) - peer.header_bytes);
    if (peer.arriving != nullptr) {
      into = peer.arriving->target + peer.arriving->received;
      wanted = std::min(peer.arriving->bytes - peer.arriving->received, kSliceBytes);
    }
    const ssize_t got = recv(peer.socket.get(), into, static_cast<size_t>(wanted), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && would_block()) return;
    if (got <= 0) return notice_end(peer);
    budget -= got;
    took(peer, got);
  }
}

void TcpMesh::took(Peer& peer, int64_t bytes) {
  if (peer.arriving != nullptr) {
    peer.arriving->received += bytes;
  } else {
    peer.header_bytes += static_cast<size_t>(bytes);
    if (peer.header_bytes < sizeof(Header)) return;
    begin_arrival(peer);
  }
  if (!failed_ && peer.arriving != nullptr && peer.arriving->complete()) end_arrival(peer);
}

// Where a message goes whose header has been read: to its receiver, or to memory of its own.
void TcpMesh::begin_arrival(Peer& peer) {
  const Header& header = peer.header;
  const bool known = header.kind >= kMessage && header.kind <= kFailure;
  const int64_t most = header.kind == kMessage ? kMostMessageBytes : static_cast<int64_t>(kMostReasonBytes);
  if (!known || header.bytes < 0 || header.bytes > most) return fail(peer.name + " sent what is no message");
  const int from = static_cast<int>(&peer - peers_.data());
  if (header.kind == kMessage) {
    const Address address{header.group, from, header.tag};
    const auto found = mail_.find(address);
    if (found != mail_.end() && !found->second.awaited.empty()) {
      peer.arriving = found->second.awaited.front();
      found->second.awaited.pop_front();
      if (found->second.awaited.empty()) mail_.erase(found);
      return check_size(from, header.bytes, peer.arriving->bytes);
    }
  }
  peer.arriving = std::make_shared<Arrival>();
  peer.arriving->bytes = header.bytes;
  peer.arriving->own = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(header.bytes));
  peer.arriving->target = peer.arriving->own.get();
  if (header.kind == kMessage) mail_[{header.group, from, header.tag}].arrived.push_back(peer.arriving);
}

void TcpMesh::end_arrival(Peer& peer) {
  const std::shared_ptr<Arrival> message = std::move(peer.arriving);
  peer.arriving = nullptr;
  peer.header_bytes = 0;
  if (peer.header.kind == kFailure) {
    return fail({reinterpret_cast<const char*>(message->target), static_cast<size_t>(message->bytes)});
  }
  if (peer.header.kind == kGoodbye) {
    peer.has_left = true;
    if (is_awaited(static_cast<int>(&peer - peers_.data())) || (!peer.leaving.empty() && !ending_)) {
      fail(fmt::format("{} has ended, but {} still waits for it", peer.name, this->peer(rank_).name));
    }
    return;
  }
  if (message->tally != nullptr) count_down(*message->tally);
}

bool TcpMesh::is_awaited(int rank) const {
  return std::any_of(mail_.begin(), mail_.end(), [&](const auto& entry) {
    return entry.first.from == rank && !entry.second.awaited.empty();
  });
}

void TcpMesh::notice_end(Peer& peer) {
  peer.socket = Socket();
  peer.leaving.clear();
  // Whoever has heard a goodbye hangs up.
  if (!peer.has_left && !ending_) fail(peer.name + " closed its connection");
}

void TcpMesh::say_goodbye() {
  for (Peer& peer : peers_) {
    if (!peer.socket) continue;
    auto goodbye = std::make_shared<Departure>();
    goodbye->header = {0, 0, 0, kGoodbye};
    peer.leaving.push_back(std::move(goodbye));
    write_to(peer);
  }
}

}  // namespace normformer::detail
