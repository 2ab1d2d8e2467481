#include "meeting_point.h"

#include <memory>

#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "normformer/core/error.h"
#include "normformer/core/file_system.h"

#include "greeting.h"

namespace normformer::detail {

namespace {

constexpr const char* kFirstLine = "normformer rendezvous 1";
constexpr int64_t kMostFileBytes = 64 << 10;

// Numbers of this host by which others may reach it: not itself, and none that means another host elsewhere.
std::vector<std::string> own_numbers() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return {};
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(list, freeifaddrs);
  std::vector<std::string> numbers;
  for (const ifaddrs* at = list; at != nullptr; at = at->ifa_next) {
    if (at->ifa_addr == nullptr || (at->ifa_flags & IFF_UP) == 0 || (at->ifa_flags & IFF_LOOPBACK) != 0) {
      continue;
    }
    const int family = at->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const socklen_t length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    char text[NI_MAXHOST] = {};
    if (getnameinfo(at->ifa_addr, length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) != 0) continue;
    const std::string number = text;
    const bool only_on_its_link = number.find('%') != std::string::npos;
    if (!only_on_its_link) numbers.push_back(number);
  }
  return numbers;
}

}  // namespace

MeetingPoint::MeetingPoint(const Rendezvous& rendezvous)
    : address_(rendezvous.address), job_(rendezvous.job), size_(rendezvous.size) {
  constexpr std::string_view kFile = "file://";
  constexpr std::string_view kTcp = "tcp://";
  if (address_.starts_with(kFile)) {
    file_ = address_.substr(kFile.size());
    if (!file_.is_absolute() || file_.filename().empty()) {
      throw ConfigError(fmt::format("{} names no file: write file:///shared/folder/name", address_));
    }
  } else {
    const bool tcp = address_.starts_with(kTcp);
    endpoint_ = parse_endpoint(tcp ? address_.substr(kTcp.size()) : "", address_);
  }
  if (job_.find('\n') != std::string::npos) throw ConfigError("the job's name has a line break");
}

Socket MeetingPoint::listen() const { return listen_at(listening_host(), endpoint_.port); }

std::string MeetingPoint::listening_host() const {
  return is_loopback(endpoint_.host) && endpoint_.host != "localhost" ? endpoint_.host : "";
}

void MeetingPoint::announce(const Socket& listener, uint64_t invitation) const {
  if (!is_file()) return;
  std::string text = fmt::format("{}\n{}\n{}\n{}\n{}\n{}\n", kFirstLine, job_, size_, invitation,
                                 port_of(listener), host_name());
  for (const std::string& number : own_numbers()) text += number + '\n';
  write_durably(*make_system_files(), file_, text);
}

void MeetingPoint::clear() const {
  if (!is_file()) return;
  const auto files = make_system_files();
  if (!files->exists(file_)) return;
  if (!read_file()) {
    throw ConfigError(fmt::format("{} is there already, and no file of a rendezvous", file_.string()));
  }
  files->remove_file(file_);
}

void MeetingPoint::withdraw(uint64_t invitation) const {
  if (!is_file()) return;
  const auto files = make_system_files();
  if (!files->exists(file_)) return;
  const auto left = read_file();
  if (left && left->invitation == invitation) files->remove_file(file_);
}

std::optional<MeetingPoint::Announcement> MeetingPoint::read_file() const {
  const auto lines = lines_of(read_whole_file(*make_system_files(), file_, kMostFileBytes));
  if (lines.size() < 6 || lines[0] != kFirstLine) return std::nullopt;
  const auto invitation = parse_number(lines[3]);
  const auto port = parse_number(lines[4]);
  if (!invitation || !port) return std::nullopt;
  return Announcement{
      lines[1], lines[2], *invitation, static_cast<int>(*port), {lines.begin() + 5, lines.end()}};
}

std::optional<Directions> MeetingPoint::find(std::string& why) const {
  if (!is_file()) return Directions{{endpoint_}, 0};
  std::optional<Announcement> read;
  try {
    read = read_file();
  } catch (const Error& e) {
    why = e.what();
    return std::nullopt;
  }
  if (!read) {
    why = fmt::format("{} is no file of a rendezvous", file_.string());
    return std::nullopt;
  }
  if (read->job != job_ || read->size != std::to_string(size_)) {
    why = fmt::format("{} is of job \"{}\" of {} ranks", file_.string(), read->job, read->size);
    return std::nullopt;
  }
  Directions found;
  found.invitation = read->invitation;
  if (read->hosts.front() == host_name()) found.endpoints.push_back({"127.0.0.1", read->port});
  for (const std::string& host : read->hosts) found.endpoints.push_back({host, read->port});
  return found;
}

}  // namespace normformer::detail
