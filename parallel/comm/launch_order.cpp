#include "normformer/comm/launch_order.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <source_location>
#include <tuple>

#include <fmt/ranges.h>

#include "normformer/comm/ledger_file.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// A group, its members here as indices of the ranks that were given.
struct KnownGroup {
  const GroupMembers* members;
  std::vector<size_t> present;
  std::vector<bool> is_present;  // by index
};

bool is_wait(std::string_view kind) { return kind == "wait"; }

using Channel = std::tuple<size_t, int, int, int>;  // group, sender, receiver (both in the group), tag

[[noreturn]] void fail(const std::string& what) { throw LogicError(what, std::source_location::current()); }

std::string describe(const TrafficEvent& event) {
  std::string what = fmt::format("{} of {} bytes", event.kind, event.bytes);
  if (event.kind == "broadcast") what += fmt::format(" from its rank {}", event.peer);
  if (is_message(event.kind))
    what +=
        fmt::format(" {} its rank {}, tag {},", event.kind == "send" ? "to" : "from", event.peer, event.tag);
  return fmt::format("{} in group {} of ranks {}", what, event.group->name,
                     fmt::join(event.group->world_ranks, ", "));
}

class Launches {
 public:
  explicit Launches(std::span<const RankEvents> ranks) : ranks_(ranks) {
    for (const RankEvents& rank : ranks) {
      index_of_[rank.rank] = groups_of_.size();
      groups_of_.emplace_back();
    }
    NF_CHECK(index_of_.size() == ranks.size(), "a rank's calls are given twice");
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (const TrafficEvent& event : ranks[r].events) groups_of_[r].push_back(number_of(event));
    }
    number_calls();
  }

  void check() {
    for (size_t a = 0; a < ranks_.size(); ++a) {
      for (size_t b = a + 1; b < ranks_.size(); ++b) check_pair(a, b);
    }
    check_messages();
    check_progress();
  }

 private:
  size_t number_of(const TrafficEvent& event) {
    const auto known = known_.find(event.group.get());
    if (known != known_.end()) return known->second;
    const auto [same, is_new] =
        by_members_.try_emplace({event.group->name, event.group->world_ranks}, groups_.size());
    if (is_new) {
      KnownGroup group{event.group.get(), {}, std::vector<bool>(ranks_.size(), false)};
      for (const int member : event.group->world_ranks) {
        const auto found = index_of_.find(member);
        if (found == index_of_.end()) continue;
        group.present.push_back(found->second);
        group.is_present[found->second] = true;
      }
      groups_.push_back(std::move(group));
    }
    known_.emplace(event.group.get(), same->second);
    return same->second;
  }

  const TrafficEvent& event(size_t rank, size_t position) const { return ranks_[rank].events[position]; }
  size_t size(size_t rank) const { return ranks_[rank].events.size(); }

  // A rank's next collective from `position` on that it shares with `other`; its size where there is none.
  size_t next_shared(size_t rank, size_t other, size_t position) const {
    while (position < size(rank) &&
           (is_message(event(rank, position).kind) || is_wait(event(rank, position).kind) ||
            !groups_[groups_of_[rank][position]].is_present[other]))
      ++position;
    return position;
  }

  bool are_alike(size_t a, size_t i, size_t b, size_t j) const {
    const TrafficEvent& x = event(a, i);
    const TrafficEvent& y = event(b, j);
    return groups_of_[a][i] == groups_of_[b][j] && x.kind == y.kind && x.peer == y.peer &&
           (x.bytes == y.bytes || x.kind == "control");
  }

  std::string does(size_t rank, size_t position) const {
    if (position >= size(rank)) return fmt::format("rank {} makes no more such calls", ranks_[rank].rank);
    const bool waits = is_wait(event(rank, position).kind);
    const size_t call = waits ? started_at(rank, event(rank, position).start).value_or(position) : position;
    return fmt::format("rank {} with its call {} {} {}", ranks_[rank].rank, position,
                       waits ? "waits for the started" : "does", describe(event(rank, call)));
  }

  void check_pair(size_t a, size_t b) const {
    size_t i = next_shared(a, b, 0);
    size_t j = next_shared(b, a, 0);
    for (int64_t shared = 0; i < size(a) || j < size(b); ++shared) {
      if (i == size(a) || j == size(b) || !are_alike(a, i, b, j))
        fail(fmt::format("ranks {} and {} do not agree on collective {} of those that they share: {}, {}",
                         ranks_[a].rank, ranks_[b].rank, shared, does(a, i), does(b, j)));
      i = next_shared(a, b, i + 1);
      j = next_shared(b, a, j + 1);
    }
  }

  // The channel of a message and the index of the rank at its other end; none where that was not given.
  std::optional<std::pair<Channel, size_t>> channel_of(size_t rank, size_t position) const {
    const TrafficEvent& e = event(rank, position);
    const std::vector<int>& members = e.group->world_ranks;
    const auto other = index_of_.find(members.at(static_cast<size_t>(e.peer)));
    if (other == index_of_.end()) return std::nullopt;
    const auto me =
        static_cast<int>(std::find(members.begin(), members.end(), ranks_[rank].rank) - members.begin());
    const size_t group = groups_of_[rank][position];
    if (e.kind == "send") return {{{group, me, e.peer, e.tag}, other->second}};
    return {{{group, e.peer, me, e.tag}, other->second}};
  }

  void check_messages() const {
    struct End {
      size_t rank = 0;
      std::vector<size_t> positions = {};
    };
    std::map<Channel, std::pair<End, End>> channels;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      for (size_t i = 0; i < size(r); ++i) {
        if (!is_message(event(r, i).kind)) continue;
        const auto channel = channel_of(r, i);
        if (!channel) continue;
        auto& [sender, receiver] = channels[channel->first];
        End& mine = event(r, i).kind == "send" ? sender : receiver;
        End& others = event(r, i).kind == "send" ? receiver : sender;
        mine.rank = r;
        others.rank = channel->second;
        mine.positions.push_back(i);
      }
    }
    for (const auto& [channel, ends] : channels) {
      const auto& [sender, receiver] = ends;
      const size_t messages = std::max(sender.positions.size(), receiver.positions.size());
      for (size_t m = 0; m < messages; ++m) {
        const auto position = [&](const End& end) {
          return m < end.positions.size() ? end.positions[m] : size(end.rank);
        };
        const size_t from = position(sender);
        const size_t to = position(receiver);
        if (from < size(sender.rank) && to < size(receiver.rank) &&
            event(sender.rank, from).bytes == event(receiver.rank, to).bytes)
          continue;
        fail(fmt::format("message {} from rank {} to rank {} with tag {} does not arrive: {}, {}", m,
                         ranks_[sender.rank].rank, ranks_[receiver.rank].rank, std::get<3>(channel),
                         does(sender.rank, from), does(receiver.rank, to)));
      }
    }
  }

  // The place of each collective in its group, and of each message in its channel, on each rank; and where
  // each call that is only started is.
  void number_calls() {
    for (size_t r = 0; r < ranks_.size(); ++r) {
      std::map<size_t, int64_t> collectives;
      std::map<Channel, int64_t> messages;
      places_.emplace_back();
      starts_.emplace_back();
      for (size_t i = 0; i < size(r); ++i) {
        const TrafficEvent& e = event(r, i);
        if (e.start > 0 && !is_wait(e.kind)) starts_[r].emplace(e.start, i);
        const auto channel = is_message(e.kind) ? channel_of(r, i) : std::nullopt;
        int64_t place = 0;
        if (channel)
          place = messages[channel->first]++;
        else if (!is_message(e.kind) && !is_wait(e.kind))
          place = collectives[groups_of_[r][i]]++;
        places_[r].push_back(place);
      }
    }
  }

  // Where a started call is; nowhere where it was started before these calls.
  std::optional<size_t> started_at(size_t r, int64_t start) const {
    const auto found = starts_[r].find(start);
    return found == starts_[r].end() ? std::nullopt : std::optional(found->second);
  }

  // How far ranks have come.
  struct Progress {
    std::vector<size_t> next;  // [rank]: the call that is not yet done
    std::vector<bool> issued;  // [rank]: whether it has been issued
    std::map<Channel, int64_t> sent;
    std::map<std::pair<size_t, size_t>, int64_t> collectives;  // by group and rank: how many were issued
    std::deque<size_t> can_try;
  };

  // Lets all ranks make their calls as far as they get.
  void check_progress() const {
    Progress p{std::vector<size_t>(ranks_.size(), 0), std::vector<bool>(ranks_.size(), false), {}, {}, {}};
    for (size_t r = 0; r < ranks_.size(); ++r) p.can_try.push_back(r);
    while (!p.can_try.empty()) {
      const size_t r = p.can_try.front();
      p.can_try.pop_front();
      while (p.next[r] < size(r) && goes_on(r, p)) {
      }
    }
    std::vector<std::string> stuck;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if (p.next[r] < size(r)) stuck.push_back(does(r, p.next[r]));
    }
    constexpr size_t kMostTold = 4;
    if (stuck.empty()) return;
    const size_t count = stuck.size();
    stuck.resize(std::min(count, kMostTold));
    fail(fmt::format("{} ranks wait for each other for ever: {}", count, fmt::join(stuck, ", ")));
  }

  // Issues a rank's next call, if that was not done, and goes on where it need not be waited for longer.
  bool goes_on(size_t r, Progress& p) const {
    const size_t at = p.next[r];
    if (!p.issued[r]) issue(r, at, p);
    p.issued[r] = true;
    const TrafficEvent& e = event(r, at);
    const bool waits = is_wait(e.kind) || (e.start == 0 && e.kind != "send");
    if (waits && !is_done(r, is_wait(e.kind) ? started_at(r, e.start).value_or(at) : at, p)) return false;
    p.issued[r] = false;
    ++p.next[r];
    return true;
  }

  void issue(size_t r, size_t at, Progress& p) const {
    const TrafficEvent& e = event(r, at);
    if (is_wait(e.kind)) return;
    if (is_message(e.kind)) {
      const auto channel = channel_of(r, at);
      if (!channel || e.kind != "send") return;
      ++p.sent[channel->first];
      p.can_try.push_back(channel->second);
      return;
    }
    const size_t group = groups_of_[r][at];
    ++p.collectives[{group, r}];
    for (const size_t member : groups_[group].present) {
      if (member != r) p.can_try.push_back(member);
    }
  }

  // Whether a collective or a receive that was issued has all that it needs from others.
  bool is_done(size_t r, size_t at, Progress& p) const {
    if (is_wait(event(r, at).kind)) return true;  // for what was started before
    const int64_t place = places_[r][at];
    if (is_message(event(r, at).kind)) {
      const auto channel = channel_of(r, at);
      return !channel || p.sent[channel->first] > place;
    }
    const size_t group = groups_of_[r][at];
    const std::vector<size_t>& present = groups_[group].present;
    return std::all_of(present.begin(), present.end(), [&](size_t member) {
      return p.collectives[{group, member}] > place;
    });
  }

  std::span<const RankEvents> ranks_;
  std::map<int, size_t> index_of_;              // by world rank
  std::vector<std::vector<size_t>> groups_of_;  // [rank][call]
  std::vector<KnownGroup> groups_;
  std::vector<std::vector<int64_t>> places_;       // [rank][call]
  std::vector<std::map<int64_t, size_t>> starts_;  // [rank]: calls by their number as started ones
  std::map<const GroupMembers*, size_t> known_;
  std::map<std::pair<std::string, std::vector<int>>, size_t> by_members_;
};

}  // namespace

void check_launch_order(std::span<const RankEvents> ranks) { Launches(ranks).check(); }

}  // namespace normformer
