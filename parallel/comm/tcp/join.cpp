// How ranks find each other. Rank 0 gathers all at the meeting point, each with the port of a listener of its
// own, and sends everybody the list; then of every two other ranks the higher connects to the lower.
#include "join.h"

#include <algorithm>
#include <random>
#include <thread>

#include "normformer/core/error.h"

#include "greeting.h"
#include "lobby.h"
#include "meeting_point.h"

namespace normformer::detail {

std::string name_of_rank(int rank, const std::string& host) {
  return fmt::format("rank {} (host {})", rank, host);
}

namespace {

using Kind = Greeting::Kind;

constexpr double kConnectSeconds = 3.0;

// Another random number in every call, never 0.
uint64_t draw_secret() {
  std::random_device device;
  return ((uint64_t{device()} << 32) | device()) | 1;
}

// What a rank says of itself to rank 0.
struct Application {
  int size = 0;
  int rank = 0;
  int port = 0;  // of its own listener
  uint64_t invitation = 0;
  std::string job;
  std::string host;

  Greeting greeting() const {
    return {Kind::join,
            {std::to_string(size), std::to_string(rank), std::to_string(port), std::to_string(invitation),
             job, host}};
  }
};

std::optional<Application> read_application(const Greeting& greeting) {
  if (greeting.kind != Kind::join || greeting.fields.size() != 6) return std::nullopt;
  const auto& fields = greeting.fields;
  const auto size = parse_number(fields[0]);
  const auto rank = parse_number(fields[1]);
  const auto port = parse_number(fields[2]);
  const auto invitation = parse_number(fields[3]);
  constexpr uint64_t kMostRanks = 1 << 20;
  if (!size || !rank || !port || !invitation || *size > kMostRanks || *rank >= *size || *port > 65535) {
    return std::nullopt;
  }
  return Application{static_cast<int>(*size),
                     static_cast<int>(*rank),
                     static_cast<int>(*port),
                     *invitation,
                     fields[4],
                     fields[5]};
}

// Where a rank listens, as the list of members says it.
struct Listed {
  std::string host;
  Endpoint endpoint;
};

// The list: a secret that only members know, then three fields for each.
Greeting list_greeting(uint64_t secret, const std::vector<Listed>& members) {
  Greeting greeting{Kind::members, {std::to_string(secret)}};
  for (const Listed& member : members) {
    greeting.fields.push_back(member.host);
    greeting.fields.push_back(member.endpoint.host);
    greeting.fields.push_back(std::to_string(member.endpoint.port));
  }
  return greeting;
}

std::optional<std::vector<Listed>> read_list(const Greeting& greeting, int size) {
  const auto& fields = greeting.fields;
  if (greeting.kind != Kind::members || fields.size() != 3 * static_cast<size_t>(size) + 1) {
    return std::nullopt;
  }
  std::vector<Listed> members;
  for (size_t i = 1; i < fields.size(); i += 3) {
    members.push_back(
        {fields[i], {fields[i + 1], static_cast<int>(parse_number(fields[i + 2]).value_or(0))}});
  }
  return members;
}

std::vector<int> sockets_of(const std::vector<Member>& members) {
  std::vector<int> sockets;
  for (const Member& member : members) sockets.push_back(member.socket.get());
  return sockets;
}

// Takes the file away however the meeting ends.
class Withdrawal {
 public:
  Withdrawal(const MeetingPoint& point, uint64_t invitation) : point_(point), invitation_(invitation) {}
  Withdrawal(const Withdrawal&) = delete;
  Withdrawal& operator=(const Withdrawal&) = delete;
  ~Withdrawal() {
    try {
      point_.withdraw(invitation_);
    } catch (const std::exception&) {
      // Whoever finds the file learns from its invitation that it is an old one.
    }
  }

 private:
  const MeetingPoint& point_;
  uint64_t invitation_;
};

// Rank 0, who waits for the others.
class Host {
 public:
  Host(const Rendezvous& job, const MeetingPoint& point, double seconds)
      : job_(job),
        point_(point),
        seconds_(seconds),
        deadline_(after_seconds(seconds)),
        members_(static_cast<size_t>(job.size)),
        listed_(static_cast<size_t>(job.size)) {
    members_[0].host = host_name();
    listed_[0].host = host_name();
  }

  std::vector<Member> gather() {
    point_.clear();
    Socket listener = point_.listen();
    if (point_.is_file()) invitation_ = draw_secret();
    const Withdrawal withdrawal(point_, invitation_);
    point_.announce(listener, invitation_);
    Lobby lobby(std::move(listener));
    while (!missing().empty()) {
      auto event = lobby.next(sockets_of(members_), deadline_);
      if (!event) give_up();
      if (event->visitor) {
        receive(std::move(event->visitor), event->greeting);
      } else {
        members_[event->ended].socket = Socket();
      }
    }
    tell_all(list_greeting(draw_secret(), listed_));
    return std::move(members_);
  }

 private:
  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int r = 1; r < job_.size; ++r) {
      if (!members_[static_cast<size_t>(r)].socket) ranks.push_back(r);
    }
    return ranks;
  }

  [[noreturn]] void give_up() {
    const std::vector<int> absent = missing();
    const std::string why =
        fmt::format("rank{} {} of {} did not come to {} within {} seconds{}", absent.size() == 1 ? "" : "s",
                    fmt::join(absent, ", "), job_.size, point_.address(), seconds_,
                    last_refused_.empty() ? "" : "; refused: " + last_refused_);
    tell_all({Kind::refused, {why}});
    throw CommError(why);
  }

  void tell_all(const Greeting& greeting) const {
    // Whoever cannot be told has gone, which the mesh finds out.
    for (const Member& member : members_) {
      if (member.socket) send_greeting(member.socket, greeting, after_seconds(kConnectSeconds));
    }
  }

  void receive(Socket visitor, const Greeting& greeting) {
    const auto application = read_application(greeting);
    if (!application) return;
    const std::string reason = reason_against(*application);
    if (!reason.empty()) {
      last_refused_ = name_of_rank(application->rank, application->host) + ", since " + reason;
      send_greeting(visitor, {Kind::refused, {reason}}, after_seconds(kConnectSeconds));
      return;
    }
    const auto rank = static_cast<size_t>(application->rank);
    if (!send_greeting(visitor, {Kind::accepted, {host_name()}}, after_seconds(kConnectSeconds))) return;
    listed_[rank] = {application->host, {number_of_peer(visitor), application->port}};
    members_[rank] = {std::move(visitor), application->host};
  }

  // Why a visitor may not take part; empty where it may.
  std::string reason_against(const Application& who) const {
    const std::string self = name_of_rank(0, host_name());
    if (who.job != job_.job) return fmt::format("{} is of job \"{}\", not \"{}\"", self, job_.job, who.job);
    if (who.size != job_.size) {
      return fmt::format("{} is of a job of {} ranks, not {}", self, job_.size, who.size);
    }
    if (who.invitation != invitation_) return self + " has not invited it: its file is an old one";
    if (who.rank == 0) return self + " is there already";
    const Member& same = members_[static_cast<size_t>(who.rank)];
    if (same.socket) return name_of_rank(who.rank, same.host) + " is there already";
    return "";
  }

  const Rendezvous& job_;
  const MeetingPoint& point_;
  double seconds_;
  Deadline deadline_;
  uint64_t invitation_ = 0;
  std::vector<Member> members_;
  std::vector<Listed> listed_;
  std::string last_refused_;
};

// Any other rank.
class Guest {
 public:
  Guest(const Rendezvous& job, const MeetingPoint& point, double seconds)
      : job_(job),
        point_(point),
        seconds_(seconds),
        deadline_(after_seconds(seconds)),
        listener_(listen_at(point.listening_host(), 0)) {}

  std::vector<Member> join() {
    Socket host = find_host();
    receive_list(host);
    std::vector<Member> members;
    for (const Listed& listed : listed_) members.push_back({Socket(), listed.host});
    const std::string hosts_number = number_of_peer(host);
    members[0].socket = std::move(host);
    for (int r = 1; r < job_.rank; ++r) members[static_cast<size_t>(r)].socket = link_to(r, hosts_number);
    await_links(members);
    return members;
  }

 private:
  // A connection to rank 0 that has been accepted.
  Socket find_host() {
    std::string why = "nobody has answered";
    double patience = 1.0;  // a host under load may be slow to answer, and a stranger never does
    double pause = 0.01;
    while (!is_past(deadline_)) {
      if (const auto directions = point_.find(why)) {
        for (const Endpoint& endpoint : directions->endpoints) {
          Socket host = knock(endpoint, directions->invitation, patience, why);
          if (host) return host;
        }
      }
      std::this_thread::sleep_until(std::min(deadline_, after_seconds(pause)));
      pause = std::min(0.25, 1.5 * pause);
    }
    throw CommError(fmt::format("rank {} did not find rank 0 of {} at {} within {} seconds: {}", job_.rank,
                                job_.size, point_.address(), seconds_, refusal_.empty() ? why : refusal_));
  }

  // None, and a reason in `why`, where it is not rank 0 who answers there, or he refuses.
  Socket knock(const Endpoint& endpoint, uint64_t invitation, double& patience, std::string& why) {
    Socket host = connect_to(endpoint, std::min(deadline_, after_seconds(kConnectSeconds)), why);
    if (!host) return host;
    const Application self{job_.size, job_.rank, port_of(listener_), invitation, job_.job, host_name()};
    const Deadline answer_by = std::min(deadline_, after_seconds(patience));
    const bool asked = send_greeting(host, self.greeting(), answer_by);
    const auto answer = asked ? await_greeting(host, kMostGreetingBytes, answer_by) : std::nullopt;
    if (answer && answer->kind == Kind::accepted && !answer->fields.empty()) {
      name_of_host_ = name_of_rank(0, answer->fields[0]);
      return host;
    }
    if (answer && answer->kind == Kind::refused && !answer->fields.empty()) {
      refusal_ = answer->fields[0];
    } else {
      why = endpoint.describe() + " does not answer as a rank 0 does";
      patience = std::min(8.0, 2.0 * patience);
    }
    return Socket();
  }

  void receive_list(const Socket& host) {
    // Rank 0 began to wait at another time, and says itself why it gives up: a little longer than it.
    const Deadline list_by = after_seconds(seconds_ + 5.0);
    const size_t most_bytes = kMostGreetingBytes + 512 * static_cast<size_t>(job_.size);
    const auto answer = await_greeting(host, most_bytes, list_by);
    if (answer && answer->kind == Kind::refused && !answer->fields.empty())
      throw CommError(answer->fields[0]);
    const auto list = answer ? read_list(*answer, job_.size) : std::nullopt;
    if (!list) {
      throw CommError(fmt::format("{} {} before all {} ranks had come", name_of_host_,
                                  is_past(list_by) ? "fell silent" : "closed its connection", job_.size));
    }
    // All are there now: connecting has its own time.
    deadline_ = after_seconds(seconds_);
    secret_ = answer->fields[0];
    listed_ = *list;
  }

  // A connection to a lower rank. Of one on rank 0's own host, rank 0 knows no number that holds elsewhere.
  Socket link_to(int rank, const std::string& hosts_number) const {
    const Listed& listed = listed_[static_cast<size_t>(rank)];
    Endpoint endpoint = listed.endpoint;
    if (is_loopback(endpoint.host)) endpoint.host = hosts_number;
    std::string why;
    Socket made = connect_to(endpoint, deadline_, why);
    if (!made || !send_greeting(made, {Kind::link, {secret_, std::to_string(job_.rank)}}, deadline_)) {
      throw CommError(fmt::format("{} cannot reach {}: {}", name_of_rank(job_.rank, host_name()),
                                  name_of_rank(rank, listed.host), why));
    }
    return made;
  }

  // Waits for the connections of higher ranks.
  void await_links(std::vector<Member>& members) {
    Lobby lobby(std::move(listener_));
    for (int open = job_.size - 1 - job_.rank; open > 0;) {
      auto event = lobby.next(sockets_of(members), deadline_);
      if (!event) {
        throw CommError(fmt::format("{} waited {} seconds for connections of {} higher ranks",
                                    name_of_rank(job_.rank, host_name()), seconds_, open));
      }
      if (!event->visitor) {
        throw CommError(name_of_rank(static_cast<int>(event->ended), members[event->ended].host) +
                        " closed its connection");
      }
      const auto rank = linking_rank(event->greeting);
      if (!rank || members[*rank].socket) continue;
      members[*rank].socket = std::move(event->visitor);
      --open;
    }
  }

  // The higher rank that a greeting is of; nothing where it is a stranger's.
  std::optional<size_t> linking_rank(const Greeting& greeting) const {
    if (greeting.kind != Kind::link || greeting.fields.size() != 2 || greeting.fields[0] != secret_) {
      return std::nullopt;
    }
    const auto rank = parse_number(greeting.fields[1]);
    if (!rank || *rank <= static_cast<uint64_t>(job_.rank) || *rank >= static_cast<uint64_t>(job_.size)) {
      return std::nullopt;
    }
    return static_cast<size_t>(*rank);
  }

  const Rendezvous& job_;
  const MeetingPoint& point_;
  double seconds_;
  Deadline deadline_;
  Socket listener_;
  std::string refusal_;  // the last that a rank 0 has said: worth more than what others failed to say
  std::string name_of_host_;
  std::string secret_;
  std::vector<Listed> listed_;
};

}  // namespace

std::vector<Member> join_ranks(const Rendezvous& rendezvous, double timeout_seconds) {
  const MeetingPoint point(rendezvous);
  return rendezvous.rank == 0 ? Host(rendezvous, point, timeout_seconds).gather()
                              : Guest(rendezvous, point, timeout_seconds).join();
}

}  // namespace normformer::detail
